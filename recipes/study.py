"""The study of results/: which runs it is made of, and how to run them.

    python recipes/study.py plan                                    the runs, and the core-hours they take
    python recipes/study.py run main [--jobs 2] [--seeds 0-19] [--out runs/study]       those still missing
    python recipes/study.py report results --runs runs/study        tables and figures of the finished ones

A run is a folder OUT/ARM-SEED, and done when its metrics.jsonl has reached the last step. Each is one
process of one thread. Runs start seed by seed, so that all arms have the same seeds whenever the command is
stopped; the same command goes on where it was. `run map` runs map_60_4, map_60_16 and so on.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def episodes(n: int, updates: int) -> str:
    """Flags of n episodes of 64 questions x 8 responses, with so many optimiser steps each; the paper has 16."""
    steps = n * updates
    return (
        f"--episode_queries 64 --batch_size {512 // updates} --steps {steps} --max_new_tokens 72 "
        f"--heldout 512 --eval_every {steps // 4} --save_every {steps} --keep_last 1"
    )


def guess(n: int) -> str:
    """Flags of n episodes in a world to look again in; room for five looks."""
    return f"--toy_level inverse {episodes(n, 16)} --max_new_tokens 112"


HARD = f"--toy_level hard {episodes(16, 16)}"
PLAIN = {"plain": "--ssr off", "filter": "--ssr filter", "ssr": "--ssr replay"}
FORCED = {
    "plain": "--ssr off --rethink_fraction 0",
    "ssr": "--ssr replay --rethink_fraction 0",
    "rethink": "--ssr off --rethink_fraction 0.3",
    "ssr_rethink": "--ssr replay --rethink_fraction 0.3",
    "rethink_oracle": "--ssr off --rethink_fraction 0.3 --rethink_trigger oracle",
    "rethink_wrong": "--ssr off --rethink_fraction 0.3 --rethink_trigger wrong",
}
# Worlds by the share of questions, in per cent, that are effective in the later half of plain GRPO: (level, episodes).
# Chosen by that share alone, with seed 100 and 16 updates per episode. What was tried, with 12 or 16 episodes:
# 7 steps 65, 5 and 7 steps 69, 5 steps 59, 4 steps 38, 2 or 5 steps 39, 3 steps 28, 1 to 3 steps 22, 1 step 20;
# 1, 5 and 7 steps as 1:2:2 33, 3:1:1 20, 8:1:1 (hard, four seeds) 16 to 28, 30:1:1 15. Within 16 episodes none
# falls lower (of 8 responses, each right in 98 %, one is wrong in 15 %), so the fourth world has 32 episodes: 11.
WORLDS = {
    60: ("0,0,0,0,1", 16), 30: ("1,0,0,0,2,0,2", 16), 15: ("hard", 16), 10: ("30,0,0,0,1,0,1", 32),
}  # fmt: skip
UPDATES = (4, 16)  # per episode


@dataclass
class Experiment:
    asks: str
    arms: dict[str, str]  # name -> what follows `python`, without --seed and --out
    seeds: int  # 0, 1, ..., seeds - 1
    against: str = "plain"  # the arm that the others are compared with: of this experiment, or of another
    minutes: float = 1.7  # per run, on one core
    equal_tokens: bool = True  # arms are compared at equal sampled tokens; else where their runs end


EXPERIMENTS = {
    "main": Experiment(
        "Do replay and Forced Rethinking help?",
        {arm: f"train.py {HARD} {flags} --rethink_fraction 0" for arm, flags in PLAIN.items()}
        | {
            "ssr_rethink": f"train.py {HARD} --ssr replay --rethink_fraction 0.3",
            "rethink": f"train.py {HARD} --ssr off --rethink_fraction 0.3",
        },
        seeds=20,
    ),
    "replay": Experiment(
        "Which samples should be replayed, and how often?",
        {
            "ssr_alpha0": f"train.py {HARD} --ssr_alpha 0 --rethink_fraction 0",
            "ssr_alpha2": f"train.py {HARD} --ssr_alpha 2 --rethink_fraction 0",
            "ssr_whole": f"recipes/buffers.py whole {HARD} --rethink_fraction 0",
            "ssr_most4": f"recipes/buffers.py most4 {HARD} --rethink_fraction 0",
            "ssr_two": f"recipes/buffers.py two {HARD} --rethink_fraction 0",
        },
        seeds=10,
        against="ssr",
    ),
    # The base has been taught one prompt, so that asking it for the answer alone would mean nothing to it. Six
    # tokens are what "Looks like \boxed{pink}." takes; the shortest way to look before answering takes nine.
    "direct": Experiment(
        "Does thinking pay, against answering at once?",
        {"direct": f"train.py {HARD} --ssr off --rethink_fraction 0 --max_new_tokens 6"},
        seeds=10,
        equal_tokens=False,  # the tokens are half of the answer
    ),
    "imitation": Experiment(
        "Does imitating one's own right responses first help reinforcement learning?",
        {
            arm: f"recipes/imitate_first.py {phases} {HARD} --ssr off --rethink_fraction 0"
            for arm, phases in {
                "imitate_rl": "imitate:64,rl:192",
                "imitate_rl_twice": "imitate:64,rl:64,imitate:64,rl:64",
                "imitate_alone": "imitate:64,imitate:64,imitate:64,imitate:64",
            }.items()
        },
        seeds=10,
    ),
    "guess": Experiment(
        "Does Forced Rethinking help where looking again repairs?",
        {f"guess_{arm}": f"train.py {guess(16)} {flags}" for arm, flags in FORCED.items()},
        seeds=10,
        against="guess_plain",
        minutes=5,
    ),
    # With Forced Rethinking responses are long: its runs sample 2.7 times the tokens of plain ones.
    "guess_long": Experiment(
        "And against plain GRPO for as many tokens?",
        {"guess_plain_long": f"train.py {guess(44)} {FORCED['plain']}"},
        seeds=10,
        against="guess_rethink",
        minutes=9,
    ),
}
for share, (level, n) in WORLDS.items():
    for updates in UPDATES:
        if (share, updates) != (15, 16):  # that is main
            cell = f"{share}_{updates}"
            flags = f"--toy_level {level} {episodes(n, updates)} --rethink_fraction 0"
            EXPERIMENTS[f"map_{cell}"] = Experiment(
                f"When does replay help? {share} % effective, {updates} updates per episode.",
                {f"{arm}_{cell}": f"train.py {flags} {ssr}" for arm, ssr in PLAIN.items()},
                seeds=5,
                against=f"plain_{cell}",
                minutes=0.1 * n,
            )


def chosen(name: str) -> dict[str, Experiment]:
    """The experiment of this name; where there is none, those whose names begin with it and "_"."""
    if name in EXPERIMENTS:
        return {name: EXPERIMENTS[name]}
    found = {k: e for k, e in EXPERIMENTS.items() if k.startswith(f"{name}_")}
    if not found:
        sys.exit(f"error: no experiment {name}; there are {', '.join(EXPERIMENTS)}")
    return found


def is_done(folder: Path) -> bool:
    """Whether a run has been measured after its last step."""
    try:
        steps = json.loads((folder / "config.json").read_text())["steps"]
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, IndexError, json.JSONDecodeError):  # not begun, or its last line is half written
        return False
    return last["step"] == steps and "heldout_accuracy" in last


def plan() -> None:
    total = 0
    for name, e in EXPERIMENTS.items():
        hours = len(e.arms) * e.seeds * e.minutes / 60
        total += hours
        print(f"{name:12} {e.seeds:2} seeds, {hours:4.1f} core-hours: {', '.join(e.arms)}")
    print(f"{total:.1f} core-hours in all")


def run(name: str, jobs: int, seeds: range | None, out: Path) -> int:
    """Make the runs that are missing, `jobs` at a time. Returns how many failed."""
    import config
    import prepare
    import record

    experiments = chosen(name).values()
    wanted = [
        (out / f"{arm}-{seed}", [*command.split(), "--seed", str(seed)])
        for seed in seeds or range(max(e.seeds for e in experiments))
        for e in experiments
        for arm, command in e.arms.items()
        if seeds or seed < e.seeds
    ]
    todo = [(folder, command) for folder, command in wanted if not is_done(folder)]
    print(f"{len(wanted)} runs, {len(wanted) - len(todo)} done before", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    lock = record.lock_folder(out)  # another call would delete what this one has begun
    for level in {b for _, command in todo for a, b in pairwise(command) if a == "--toy_level"}:
        prepare.model_path(config.parse(["--toy_level", level]))  # made once, and not by all runs at once
    processes, failed = [], []

    def make(item: tuple[Path, list[str]]) -> Path:
        folder, command = item
        shutil.rmtree(folder, ignore_errors=True)  # an earlier call has begun it
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        command = [sys.executable, *command, "--out", str(folder.absolute())]
        with open(f"{folder}.log", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            processes.append(process)
            process.wait()
        return folder

    def stop(*_):
        for process in processes:
            process.kill()
        os._exit(1)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with ThreadPool(jobs) as pool:
        for n, folder in enumerate(pool.imap_unordered(make, todo), 1):
            done = is_done(folder)
            if not done:
                failed.append(folder)
            print(f"{n} of {len(todo)}: {folder}{'' if done else ' failed'}", flush=True)
    for folder in failed:
        print(f"failed: {folder.name}, see {folder}.log", file=sys.stderr)
    lock.close()
    return len(failed)


def read_seeds(text: str) -> range:
    """
    >>> read_seeds("0-19"), read_seeds("7")
    (range(0, 20), range(7, 8))
    """
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("study.py", description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("plan", help="print the runs and what they take")
    runs = verbs.add_parser("run", help="make the runs of an experiment that are missing")
    runs.add_argument("experiment")
    runs.add_argument("--jobs", type=int, default=2, help="runs at a time")
    runs.add_argument("--seeds", type=read_seeds, help="such as 0-4, in place of all")
    runs.add_argument("--out", type=Path, default=Path("runs/study"))
    report = verbs.add_parser("report", help="tables and figures of the runs that are done")
    report.add_argument("results", type=Path)
    report.add_argument("--runs", type=Path, action="append", default=[],
                        help="a folder of runs to add to RESULTS, may be given again; else what is there is read")  # fmt: skip
    args = parser.parse_args(argv)
    if args.verb == "plan":
        plan()
        return 0
    if args.verb == "run":
        return min(1, run(args.experiment, args.jobs, args.seeds, args.out))
    from study_tables import write

    write(args.runs, args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
