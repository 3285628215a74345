"""Every bench in turn, as one command.

    python bench/bench_all.py               the CPU's shapes; the published 3B shape on a GPU
    python bench/bench_all.py --quick       shapes that take seconds, to see that all of it runs
    python bench/bench_all.py --out FILE    also write the tables there, as markdown

Each bench is a process of its own, so that none meets what another left in memory. One that fails
is named, and the others run all the same. On a GPU that is the ladder of sampling and its share of
the memory roofline, and the ways of training, their MFU and memory, with activations kept and
recomputed; on any machine whether every fast path is right, the vision tower and the grader; on a CPU
one rank against two, and TRL where it is installed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def benches(quick: bool) -> list[list[str]]:
    """The commands, without the interpreter."""
    if torch.cuda.is_available():
        # A picture's prompt of 1300 tokens alone, and short responses for HF generate: each more takes minutes.
        timed = [["bench_rollout.py", "--response", "128"], ["bench_train.py"]]
        timed += [["bench_train.py", "--gradient_checkpointing"]]
        timed = [[*command, "--lengths", "1"] for command in timed]
    else:
        names = ("rollout", "tails", "train", "ranks", "trl")
        timed = [[f"bench_{name}.py"] for name in names]
    timed = [["bench_paths.py"], ["bench_vision.py"], *timed]
    return [*([*command, "--quick"] if quick else command for command in timed), ["bench_reward.py"]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--out", help="a file for the tables")
    args = parser.parse_args(argv)
    sections, failed = [], []
    for name, *flags in benches(args.quick):
        start = time.perf_counter()
        command = " ".join(["python", f"bench/{name}", *flags])
        done = subprocess.run(
            [sys.executable, HERE / name, *flags], stdout=subprocess.PIPE, text=True, check=False
        )
        said = done.stdout.strip()
        if done.returncode:
            failed.append(command)
            said += f"\nfailed with exit status {done.returncode}"
        seconds = time.perf_counter() - start
        sections.append(f"## `{command}`\n\n{said}\n\n({seconds:.0f} s)\n")
        print(sections[-1], flush=True)
        if args.out:  # after each: a run that is cut short keeps what it has
            Path(args.out).write_text("\n".join(sections), encoding="utf-8")
    if failed:
        print("failed: " + "; ".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
