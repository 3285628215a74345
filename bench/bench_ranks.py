"""The same training on one rank and on two that sample apart, from whole weights, or together, from slices.

    python bench/bench_ranks.py             a 32M-parameter model, gloo ranks of one thread each
    python bench/bench_ranks.py --quick     a tiny model, to see that it runs

`torchrun train.py` as a user runs it, on toy questions with a random model that hardly ever ends
its responses: 8 questions x 8 responses x 64 tokens an episode, two optimiser steps, all groups
trained (`--ssr off`). The first episode warms up and is not counted; the figures are means over
the others, from metrics.jsonl. A rank has one thread, so two ranks have twice the cores of one.

    sampling, updating   seconds an optimiser step
    scaling              tokens per second, as a multiple of one rank's
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import benching  # first: it puts the repository on the path

from model import save_policy

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
WAYS = [("1", "1"), ("2", "1"), ("2", "2")]  # ranks, --tensor


def steps_of(model: Path, out: Path, ranks: str, tensor: str, quick: bool) -> list[dict]:
    """Train, and return the rows of metrics.jsonl after the first episode's."""
    questions, tokens = (4, 8) if quick else (8, 64)
    values = {
        "model": model, "out": out, "tensor": tensor, "steps": 4 if quick else 6,
        "episode_queries": questions, "batch_size": questions * 4, "max_new_tokens": tokens,
        "heldout": 0, "ssr": "off", "rethink_fraction": 0, "save_every": 1000, "keep_last": 1,
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command += [TRAIN, *(str(x) for name, value in values.items() for x in (f"--{name}", value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{ranks} ranks: train.py failed\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows[2:]


def mean(rows: list[dict], figure) -> float:
    return sum(map(figure, rows)) / len(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and one episode")
    args = parser.parse_args(argv)
    table, base = [], None
    with tempfile.TemporaryDirectory() as folder:
        policy = benching.random_policy(benching.SHAPES["quick" if args.quick else "small"])
        save_policy(policy, Path(folder) / "model")
        for ranks, tensor in WAYS:
            out = Path(folder) / f"{ranks}-{tensor}"
            rows = steps_of(Path(folder) / "model", out, ranks, tensor, args.quick)
            sampling = mean(rows, lambda row: row["rollout_seconds"])
            step = mean(rows, lambda row: row["step_seconds"])
            rate = mean(rows, lambda row: row["response_tokens"]) / step
            base = base or rate
            table.append([
                ranks, tensor, sampling, step - sampling, rate, benching.times(rate, base)
            ])  # fmt: skip
    header = ["ranks", "that sample together", "sampling, s", "updating, s",
              "response tokens/s", "scaling"]  # fmt: skip
    print(benching.table(header, table))
    print(
        f"\ntorchrun train.py, gloo, one thread per rank; {benching.parameters(policy) / 1e6:.1f}M "
        f"parameters, fp32.\n{benching.machine()}"
    )


if __name__ == "__main__":
    main()
