"""What a hostile day does to a run, from a seed: damaged files and kills.

    python tests/mutate.py files 1000        damage a file that a command reads, and run the command
    python tests/mutate.py kills 200         SIGKILL at a random moment, then the same line again
    python tests/mutate.py soak 2000         one long run with a kill every 100 steps

Every trial runs in a process of its own (forked, so that torch is there already). What may become of it:

    same       the result is the undamaged one's, to the bit
    refused    exit 2, and one line that says what is wrong
    accepted   a damaged input that is as good as any other: a flipped letter in a question

What may not: a traceback, a hang, or "wrong": exit 0 with another result where the damaged file is one
that we wrote ourselves. test_errors.py runs some of it.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "recipes")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import own_data
from tiny import SECONDS, flags, lucky, make_base, start, start_ranks, wait

import eval as evaluation
import report
import train

LIMIT = 90  # seconds that a trial may take; each needs one or two on an idle machine
FAILURES = ("traceback", "hang", "wrong")

# ---------------------------------------------------------------------------- processes


def run(action, log: Path) -> tuple[str, str]:
    """("done", "refused", "traceback" or "hang", what was said)."""
    code = wait(start(action, log), LIMIT)
    said = log.read_text(errors="replace")
    if code is None:
        return "hang", said
    lines = [line for line in said.splitlines() if line.startswith(("error: ", "eval.py: "))]
    if code == 0 and "Traceback" not in said:
        return "done", said
    good = code == 2 and "Traceback" not in said and len(lines) == 1 and lines[0].isprintable()
    return ("refused" if good else "traceback"), said


def must(action, log: Path) -> None:
    how, said = run(action, log)
    assert how == "done", said


# ---------------------------------------------------------------------------- damage


STRANGE = (None, [], {}, "", "x", "\x1b[2J\n", True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"),
           float("-inf"), [[]], [None], {"a": None}, "9" * 400)  # fmt: skip


def places(value) -> list[tuple]:
    """(container, key) of all values within a JSON value; of a long list, of the first few."""
    keys = value if isinstance(value, dict) else range(min(4, len(value))) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one of these ways; returns which."""
    data, is_json = path.read_bytes(), path.suffix in (".json", ".jsonl")
    how = rng.choice(["truncate", "flip", "empty", "zeros", "gone"] + ["retype", "drop"] * 3 * is_json)
    i = rng.randrange(min(len(data), 4096) if rng.random() < 0.5 else len(data))  # headers more often
    if how in ("retype", "drop"):
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        number = rng.randrange(len(lines))
        value = json.loads(lines[number])
        container, key = rng.choice(places(value))
        if how == "drop":
            del container[key]
        else:
            container[key] = rng.choice(STRANGE)
        lines[number] = json.dumps(value).encode()
        data = b"\n".join([*lines, b""])
    elif how == "truncate":
        data = data[:i]
    elif how == "flip":
        data = data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
    elif how == "zeros":
        data = data[:i] + bytes(min(64, len(data) - i)) + data[i + 64 :]
    path.write_bytes(b"" if how == "empty" else data)
    if how == "gone":
        path.unlink()
    return how


class Scene(NamedTuple):
    """A command that reads a folder."""

    prepare: Callable[[Path], object]  # makes the folder
    command: Callable[[Path], int]
    result: Callable[[Path], object]  # what the command leaves there
    wanted: Callable[[Path], bool]  # which files the command reads
    ours: bool  # written by us: another result with exit 0 is wrong


def tensors(directory: Path):
    return sorted((p.name, p.read_bytes()) for p in directory.glob("*.safetensors"))


def steps(out: Path, after: int = 0):
    rows = map(json.loads, (out / "metrics.jsonl").read_bytes().splitlines())
    return [{k: v for k, v in r.items() if k not in SECONDS} for r in rows if r["step"] > after]


def training(base: Path, **changes):
    settings = {"steps": 5, "save_every": 2, "rethink_fraction": 0.5, "keep_last": 9} | changes

    def action(out: Path) -> int:
        os.chdir(out)
        return train.main(flags(base, out / "run", **settings))

    return action


def asking(model: Path | str, **changes):
    """The toy's questions; from within the folder, as a result notes where its model was."""
    settings = {"model": model, "out": "out"} | changes

    def action(out: Path) -> int:
        os.chdir(out)
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        return evaluation.main(words)

    return action


def scenes(root: Path) -> dict[str, Scene]:
    base, trained, asked = make_base(), root / "resume/run", asking("model", limit=3, max_new_tokens=4)

    def half_asked(d: Path) -> None:
        shutil.copytree(trained / "checkpoint-3", d / "model")
        must(partial(asked, d), root / "log")
        path = d / "out/toy.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))

    def summary(d: Path):
        return json.loads((d / "out/summary.json").read_bytes())["toy"] | {"settings": None}

    def learnt(d: Path):
        return tensors(d / "run/checkpoint-1")

    return {
        "resume": Scene(
            lambda d: must(partial(training(base, steps=3, heldout=0), d), root / "log"),
            training(base, resume="true", heldout=0),
            lambda d: (tensors(d / "run/checkpoint-5"), steps(d / "run", after=3)),
            lambda p: "checkpoint-3" in p.parts or p.name in ("metrics.jsonl", "samples.jsonl"), ours=True),
        "checkpoint": Scene(
            lambda d: shutil.copytree(trained / "checkpoint-3", d / "model"),
            training("model", steps=1, heldout=2), learnt,
            lambda p: "model" in p.parts and not p.name.startswith(("state-", "samples")), ours=True),
        "jsonl": Scene(
            lambda d: own_data.write(d, "train", 6), training(base, steps=1, data="train.jsonl", heldout=2),
            learnt, lambda p: True, ours=False),
        "eval": Scene(
            half_asked, asked, summary, lambda p: "out" in p.parts or p.name == "trainer.json", ours=True),
        "report": Scene(
            lambda d: shutil.copytree(trained, d / "run"), lambda d: report.main([str(d / "run")]),
            lambda d: (d / "run/report.html").stat().st_size > 0,
            lambda p: p.name in ("metrics.jsonl", "samples.jsonl", "config.json") and p.parts[-2] == "run",
            ours=False),
    }  # fmt: skip


def damaged_files(root: Path, count: int, seed: int) -> Counter:
    """Damage files one after the other, each scene's in turn."""
    known, expected, counts, trial, log = scenes(root), {}, Counter(), root / "trial", root / "log"
    for name, scene in known.items():
        (root / name).mkdir()
        scene.prepare(root / name)
        must(partial(scene.command, shutil.copytree(root / name, trial)), log)
        expected[name] = scene.result(trial)
        shutil.rmtree(trial)
    for number in range(count):
        rng, name = random.Random(f"{seed} {number}"), list(known)[number % len(known)]
        scene = known[name]
        shutil.copytree(root / name, trial)
        files = sorted(p for p in trial.rglob("*") if p.is_file() and scene.wanted(p.relative_to(trial)))
        path = rng.choice(files)
        how = damage(path, rng)
        outcome, said = run(partial(scene.command, trial), log)
        if outcome == "done":
            try:
                same = scene.result(trial) == expected[name]
            except (OSError, ValueError, KeyError) as error:
                same, said = False, said + repr(error)
            outcome = "same" if same else "wrong" if scene.ours else "accepted"
        note(counts, outcome, f"{number} {name}: {how} {path.relative_to(trial)}", said)
        shutil.rmtree(trial)
    return counts


def note(counts: Counter, outcome: str, what: str, said: str) -> None:
    counts[outcome] += 1
    if outcome in FAILURES:
        print(f"{outcome}: {what}\n" + "\n".join(said.splitlines()[-12:]), flush=True)
    if counts.total() % 100 == 0:
        print(dict(counts), flush=True)


# ---------------------------------------------------------------------------- kills


def finish(action, log: Path, world: int) -> float:
    """Run on `world` processes to the end; returns the seconds it took. Raises where one fails."""
    begin = time.monotonic()
    codes = [wait(pid, 3 * LIMIT) for pid in start_ranks(world, action, log)]
    said = "".join(log.with_suffix(f".{rank}").read_text(errors="replace") for rank in range(world))
    if codes != [0] * world or "Traceback" in said:
        raise RuntimeError(f"{codes}: {said}")
    return time.monotonic() - begin


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def kills(root: Path, count: int, seed: int) -> Counter:
    """Kill a run at a random moment, once or twice, and let it finish: the result is the whole run's."""
    base, log, trial, counts = make_base(), root / "log", root / "trial", Counter()
    trained = training(base, steps=6, heldout=2, resume="true")
    asked = asking(base, limit=40, rows=4, max_new_tokens=8, temperature=1)

    def learnt(out: Path):
        return tensors(out / "run/checkpoint-6"), steps(out / "run")

    def answers(out: Path):
        return (out / "out/toy.jsonl").read_bytes()

    jobs = [("train", trained, learnt, 1), ("eval", asked, answers, 1), ("train on 2", trained, learnt, 2)]
    whole = {}
    for name, action, result, world in jobs:
        out = root / f"whole {name}"
        out.mkdir()
        whole[name] = finish(partial(action, out), log, world), result(out)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name, action, result, world = jobs[number % len(jobs)]
        seconds, expected = whole[name]
        trial.mkdir()
        try:
            for _ in range(rng.choice((1, 2))):
                pids = start_ranks(world, partial(action, trial), log)
                time.sleep(rng.uniform(0.05, seconds))
                for pid in pids:
                    kill(pid)
            finish(partial(action, trial), log, world)
            outcome, said = ("same" if result(trial) == expected else "wrong"), ""
        except (RuntimeError, OSError) as error:
            outcome, said = "traceback", str(error)
        note(counts, outcome, f"{number} {name}", said)
        shutil.rmtree(trial)
    return counts


def soak(root: Path, length: int, seed: int) -> Counter:
    """`length` steps of the tiny policy with a kill every 100: what the process holds on to must stay flat."""
    out, log, rng, counts = root / "soak", root / "log", random.Random(seed), Counter()
    out.mkdir()
    settings = {"save_every": 20, "eval_every": 200, "heldout": 4, "keep_last": 2, "resume": "true"}
    action = partial(training(make_base(), steps=length, **settings), out)
    metrics = out / "run/metrics.jsonl"

    def done() -> int:
        return metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0

    def held(pid: int) -> tuple[int, int, int]:
        """MiB, open files, threads."""
        process = Path(f"/proc/{pid}")
        files, threads = (len(list((process / name).iterdir())) for name in ("fd", "task"))
        return int((process / "statm").read_text().split()[1]) // 256, files, threads

    for goal in range(100, length, 100):
        pid, seen = start(action, log), []
        while done() < goal:
            time.sleep(0.2)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), log.read_text()
            seen.append(held(pid))
        time.sleep(rng.random())
        kill(pid)
        print(f"step {done()}: MiB, files, threads {seen[len(seen) // 3]} -> {seen[-1]}", flush=True)
        counts["kills"] += 1
    counts["wrong"] += wait(start(action, log), LIMIT + length) != 0
    rows = [row["step"] for row in steps(out / "run") if "heldout_accuracy" not in row]
    counts["wrong"] += rows != list(range(1, length + 1))
    counts["wrong"] += report.main([str(out / "run")]) != 0
    return counts


TASKS = {"files": damaged_files, "kills": kills, "soak": soak}


def main(argv: list[str]) -> int:
    task, count, seed = argv[0], int(argv[1]), int(argv[2]) if len(argv) > 2 else 0
    train.is_right = lambda sample, text=None: lucky(sample)  # for half of the guesses
    with tempfile.TemporaryDirectory() as root:
        counts = TASKS[task](Path(root), count, seed)
    print(f"{task} {count}, seed {seed}: {dict(counts)}")
    return int(any(counts[name] for name in FAILURES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
