"""What the scripts beside this file launch: each is run with stand-ins for python and torchrun."""

import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from config import Config, parse

# Notes its arguments, a line per call, and leaves a checkpoint where a run would.
STAND_IN = r"""#!/bin/sh
(IFS=$(printf '\t'); printf '%s\n' "$*" | tr '\n' ' '; echo) >>"$CALLS"
while [ $# -gt 1 ]; do
  [ "$1" = --out ] && mkdir -p "$2/checkpoint-1"
  shift
done
exit 0
"""


def calls(name: str, **variables: str) -> list[list[str]]:
    """The arguments of every call of python and torchrun that NAME.sh makes, as the shell puts them together."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shutil.copytree(FOLDER, folder / "recipes")
        (folder / "bin").mkdir()
        for program in ("python", "torchrun"):
            (folder / "bin" / program).write_text(STAND_IN)
            (folder / "bin" / program).chmod(0o755)
        # One job at a time: lines of two would mix.
        env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(folder / "calls"),
            "HEAD": "node0", "JOBS": "1",
        } | variables  # fmt: skip
        command = ["bash", str(folder / "recipes" / f"{name}.sh")]
        command += [] if "toy" in name or name == "own_data" else ["data.parquet", "runs/x"]
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
        lines = (folder / "calls").read_text(encoding="utf-8").splitlines()
    return [line.rstrip().split("\t") for line in lines]


def training(name: str) -> list[tuple[str, int, int, Config]]:
    """(size of the model, GPUs, GB of a card, settings) of each training line of a script for a real model."""
    script = (FOLDER / f"{name}.sh").read_text(encoding="utf-8")
    card = re.search(r"(\d+) GB", script)  # the first that it names
    model = re.search(r"MODEL=(\S+)", script)  # the one that it proposes
    lines, size = [], None
    for words in calls(name, **({"MODEL": model[1]} if model else {})):
        if "train.py" not in words:
            continue
        at = words.index("train.py")
        counts = {flag: int(n) for flag, n in pairwise(words) if flag.startswith("--n")}
        c = parse(words[at + 1 :])
        named = re.search(r"-(\d+)B-", c.model)
        size = f"{named[1]}b" if named else size  # else a checkpoint of the line before
        lines.append((size, math.prod(counts.values()), int(card[1]), c))
    return lines
