"""What a hostile day does to a run, from a seed: damaged files and kills.

    python tests/mutate.py files 1000        damage a file that a command reads, and run the command
    python tests/mutate.py kills 200         SIGKILL at a random moment, then the same line again
    python tests/mutate.py soak 2000         one long run with a kill every 100 steps

Every trial runs in a process of its own (forked, so that torch is there already). What may become of it:

    same       the result is the undamaged one's, to the bit
    refused    exit 2, and one line that says what is wrong
    accepted   a damaged input that is as good as any other: a flipped letter in a question

What may not: a traceback, a hang, or "wrong": exit 0 with another result where the damaged file is one
that we wrote ourselves. tests/test_errors.py runs a minute of it.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from PIL import Image
from tiny import SECONDS, flags, lucky, make_base, start, start_ranks, wait

import eval as evaluation
import report
import train

LIMIT = 90  # seconds that a trial may take; each needs one or two on an idle machine
FAILURES = ("traceback", "hang", "wrong")

# ---------------------------------------------------------------------------- processes


def by_luck(action: Callable[[], int]) -> Callable[[], int]:
    """The action, in a process where half of the guesses are right."""

    def lucky_action() -> int:
        train.is_right = lambda sample, text=None: lucky(sample)
        return action()

    return lucky_action


def run(action, log: Path) -> tuple[str, str]:
    """("done", "refused", "traceback" or "hang", what was said)."""
    code = wait(start(by_luck(action), log), LIMIT)
    said = log.read_text(errors="replace")
    if code is None:
        return "hang", said
    lines = [line for line in said.splitlines() if line.startswith(("error: ", "eval.py: "))]
    if code == 0 and "Traceback" not in said:
        return "done", said
    good = code == 2 and "Traceback" not in said and len(lines) == 1 and lines[0].isprintable()
    return ("refused" if good else "traceback"), said


# ---------------------------------------------------------------------------- damage


STRANGE = (None, [], {}, "", "x", "\x1b[2J\n", True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"),
           float("-inf"), [[]], [None], {"a": None}, "9" * 400)  # fmt: skip


def places(value) -> list[tuple]:
    """(container, key) of all values within a JSON value; of a long list, of the first few."""
    keys = value if isinstance(value, dict) else range(min(4, len(value))) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def in_json(lines: list[bytes], rng: random.Random, how: str) -> bytes:
    """Replace or drop a value in one of these lines of JSON."""
    i = rng.randrange(len(lines))
    value = json.loads(lines[i])
    container, key = rng.choice(places(value))
    if how == "drop":
        del container[key]
    else:
        container[key] = rng.choice(STRANGE)
    lines[i] = json.dumps(value).encode()
    return b"\n".join([*lines, b""])


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one of these ways; returns which."""
    data, n = path.read_bytes(), path.stat().st_size
    kinds = ["truncate", "flip", "empty", "zeros", "gone"]
    if path.suffix in (".json", ".jsonl"):
        kinds += ["retype", "drop"] * 3
    how = rng.choice(kinds)
    if how == "gone":
        path.unlink()
        return how
    if how == "truncate":
        data = data[: rng.randrange(n)]
    elif how == "flip":
        i = rng.randrange(min(n, 4096) if rng.random() < 0.5 else n)  # headers more often
        data = data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]
    elif how == "empty":
        data = b""
    elif how == "zeros":
        i = rng.randrange(n)
        data = data[:i] + bytes(min(64, n - i)) + data[i + 64 :]
    else:
        data = in_json(data.splitlines() if path.suffix == ".jsonl" else [data], rng, how)
    path.write_bytes(data)
    return how


# ---------------------------------------------------------------------------- scenes


@dataclass
class Scene:
    """A folder, a command that reads it, and what the command leaves when nothing is damaged."""

    name: str
    folder: Path
    command: Callable[[Path], int]  # in a copy of the folder
    result: Callable[[Path], object]
    wanted: Callable[[Path], bool]  # which files the command reads
    ours: bool  # written by us: another result with exit 0 is wrong
    expected: object = None


def tensors(directory: Path):
    return sorted((p.name, p.read_bytes()) for p in directory.glob("*.safetensors"))


def steps(out: Path, after: int = 0):
    lines = (out / "metrics.jsonl").read_bytes().splitlines()
    rows = [json.loads(line) for line in lines if line[:1] == b"{"]
    return [{k: v for k, v in r.items() if k not in SECONDS} for r in rows if r["step"] > after]


def training(base: Path, **changes):
    settings = {"steps": 5, "save_every": 2, "rethink_fraction": 0.5, "keep_last": 9} | changes

    def action(out: Path) -> int:
        os.chdir(out)
        return train.main(flags(base, out / "run", **settings))

    return action


def scenes(root: Path) -> list[Scene]:
    base, found = make_base(), []

    def add(name, prepare, command, result, wanted, ours):
        folder = root / name
        folder.mkdir()
        prepare(folder)
        found.append(Scene(name, folder, command, result, wanted, ours))

    def must(action, log=root / "log"):
        how, said = run(action, log)
        assert how == "done", said

    resume = training(base, resume="true", heldout=0)
    add("resume", lambda d: must(partial(training(base, steps=3, heldout=0), d)), resume,
        lambda d: (tensors(d / "run/checkpoint-5"), steps(d / "run", after=3)),
        lambda p: "checkpoint-3" in p.parts or p.name in ("metrics.jsonl", "samples.jsonl"), ours=True)  # fmt: skip
    from_a_run = root / "resume/run/checkpoint-3"
    add("checkpoint", lambda d: shutil.copytree(from_a_run, d / "model"),
        training("model", steps=1, heldout=2), lambda d: tensors(d / "run/checkpoint-1"),
        lambda p: "model" in p.parts and not p.name.startswith(("state-", "samples")), ours=True)  # fmt: skip

    def questions(d: Path) -> None:
        Image.new("RGB", (56, 56), "red").save(d / "a.png")
        Image.effect_noise((60, 40), 90).save(d / "b.jpg")
        rows = [{"qid": f"q{i}", "question": f"{i} + {i}?", "answer": str(2 * i), "category": "sums",
                 "rate": 0.5} for i in range(6)]  # fmt: skip
        rows[0]["image"], rows[1]["image"] = ["a.png"], ["b.jpg", "a.png"]
        (d / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    add("jsonl", questions, training(base, steps=1, data="data.jsonl", heldout=2, pass_rate_column="rate"),
        lambda d: tensors(d / "run/checkpoint-1"), lambda p: True, ours=False)  # fmt: skip

    def asked(d: Path):
        os.chdir(d)  # a result notes where its model was
        return evaluation.main(["--model", "model", "--out", "out", "--limit", "3", "--max_new_tokens", "4"])

    def half_asked(d: Path):
        shutil.copytree(from_a_run, d / "model")
        must(lambda: asked(d))
        path = d / "out/toy.jsonl"
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))

    def summary(d: Path):
        found = json.loads((d / "out/summary.json").read_bytes())
        for entry in found.values():
            entry.pop("settings")
        return found

    add("eval", half_asked, asked, summary,
        lambda p: "out" in p.parts or p.name == "trainer.json", ours=True)  # fmt: skip

    add("report", lambda d: shutil.copytree(root / "resume/run", d / "run"),
        lambda d: report.main([str(d / "run")]),
        lambda d: (d / "run/report.html").stat().st_size > 0,
        lambda p: p.name in ("metrics.jsonl", "samples.jsonl", "config.json") and p.parts[-2] == "run",
        ours=False)  # fmt: skip
    for scene in found:
        trial = shutil.copytree(scene.folder, root / "trial")
        must(partial(scene.command, trial))
        scene.expected = scene.result(trial)
        shutil.rmtree(trial)
    return found


def damaged_files(root: Path, count: int, seed: int) -> Counter:
    """Damage files one after the other, each scene's in turn."""
    known, counts = scenes(root), Counter()
    for number in range(count):
        rng, scene = random.Random(f"{seed} {number}"), known[number % len(known)]
        trial = shutil.copytree(scene.folder, root / "trial")
        files = sorted(p for p in trial.rglob("*") if p.is_file() and scene.wanted(p.relative_to(trial)))
        path = rng.choice(files)
        how = damage(path, rng)
        outcome, said = run(partial(scene.command, trial), root / "log")
        if outcome == "done":
            try:
                same = scene.result(trial) == scene.expected
            except (OSError, ValueError, KeyError) as error:
                same, said = False, said + repr(error)
            outcome = "same" if same else "wrong" if scene.ours else "accepted"
        counts[outcome] += 1
        note(counts, outcome, f"{number} {scene.name}: {how} {path.relative_to(trial)}", said)
        shutil.rmtree(trial)
    return counts


def note(counts: Counter, outcome: str, what: str, said: str) -> None:
    if outcome in FAILURES:
        print(f"{outcome}: {what}\n" + "\n".join(said.splitlines()[-12:]), flush=True)
    if counts.total() % 100 == 0:
        print(dict(counts), flush=True)


# ---------------------------------------------------------------------------- kills


def finish(action, log: Path, world: int) -> float:
    """Run on `world` processes to the end; returns the seconds it took. Raises where one fails."""
    begin = time.monotonic()
    codes = [wait(pid, 3 * LIMIT) for pid in start_ranks(world, by_luck(action), log)]
    said = "".join(log.with_suffix(f".{rank}").read_text(errors="replace") for rank in range(world))
    if codes != [0] * world or "Traceback" in said:
        raise RuntimeError(f"{codes}: {said}")
    return time.monotonic() - begin


def kills(root: Path, count: int, seed: int) -> Counter:
    """Kill a run at a random moment, once or twice, and let it finish: the result is the whole run's."""
    counts, log = Counter(), root / "log"
    shutil.copytree(make_base(), root / "model")

    def asking(out: Path):
        argv = ["--model", root / "model", "--out", out / "run", "--limit", 40, "--rows", 4,
                "--max_new_tokens", 8, "--temperature", 1]  # fmt: skip
        return evaluation.main([*map(str, argv)])

    def trained(out: Path):
        return training(root / "model", steps=6, save_every=2, heldout=2, resume="true")(out)

    def answers(out: Path):
        return (out / "run/toy.jsonl").read_bytes()

    def learnt(out: Path):
        return tensors(out / "run/checkpoint-6"), steps(out / "run")

    jobs = []
    for name, action, result, world in (
        ("train", trained, learnt, 1), ("eval", asking, answers, 1), ("train on 2", trained, learnt, 2)
    ):  # fmt: skip
        whole = root / f"whole {name}"
        whole.mkdir()
        seconds = finish(partial(action, whole), log, world)
        jobs.append((name, action, result, world, seconds, result(whole)))
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        name, action, result, world, seconds, expected = jobs[number % len(jobs)]
        trial = root / "trial"
        trial.mkdir()
        try:
            for _ in range(rng.choice((1, 2))):
                pids = start_ranks(world, by_luck(partial(action, trial)), log)
                time.sleep(rng.uniform(0.05, seconds))
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            finish(partial(action, trial), log, world)
            outcome, said = ("same" if result(trial) == expected else "wrong"), ""
        except (RuntimeError, OSError) as error:
            outcome, said = "traceback", str(error)
        counts[outcome] += 1
        note(counts, outcome, f"{number} {name}", said)
        shutil.rmtree(trial)
    return counts


def soak(root: Path, length: int, seed: int) -> Counter:
    """`length` steps of the tiny policy with a kill every 100: what the process holds on to must stay flat."""
    base, out, counts = make_base(), root / "soak", Counter()
    rng = random.Random(seed)

    def action():
        return training(base, steps=length, save_every=20, eval_every=200, heldout=4, resume="true",
                        keep_last=2)(out)  # fmt: skip

    def done() -> int:
        path = out / "run/metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return max((json.loads(x)["step"] for x in lines[-3:] if x.endswith(b"}")), default=0)

    def held(pid: int) -> tuple[int, int, int]:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return int(status["VmRSS"].split()[0]) // 1024, files, int(status["Threads"])

    while True:
        pid = start(action, root / "log")
        goal = min(length, (done() // 100 + 1) * 100 + rng.randrange(15))
        early = None
        while done() < goal and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.2)
            early = early or (held(pid) if done() > goal - 70 else None)
        late = held(pid)
        if goal >= length:
            code = wait(pid, 60)
            break
        print(f"step {done()}: MiB, files, threads {early} -> {late}", flush=True)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        counts["kills"] += 1
    rows = [row["step"] for row in steps(out / "run") if "heldout_accuracy" not in row]
    counts["steps"] = len(rows)
    counts["wrong"] += rows != list(range(1, length + 1)) or code != 0
    counts["report"] += report.main([str(out / "run")]) == 0
    return counts


TASKS = {"files": damaged_files, "kills": kills, "soak": soak}


def main(argv: list[str]) -> int:
    task, count = argv[0], int(argv[1])
    seed = int(argv[2]) if len(argv) > 2 else 0
    with tempfile.TemporaryDirectory() as root:
        counts = TASKS[task](Path(root), count, seed)
    print(f"{task} {count}, seed {seed}: {dict(counts)}")
    return int(any(counts[name] for name in FAILURES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
