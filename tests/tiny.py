"""What the end-to-end tests share: a small policy that guesses, runs of seconds with it, and forked processes."""

import faulthandler
import functools
import gc
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import toy
import train
from model import encode, response_logprobs, save_policy
from rethink import TRIGGERS
from reward import extract_answer

SECONDS = ("rollout_seconds", "step_seconds")
LIMIT = 100  # seconds: longer is a hang
TEMPORARY = tempfile.TemporaryDirectory(prefix="tiny-")  # goes when the tests end


@functools.cache
def make_base(family: str = "qwen2_5_vl") -> Path:
    """Two seconds of supervision teach a small policy to guess a colour, half of the time twice:

        Looks like \\boxed{red}.
        Looks like \\boxed{red}.\\n\\nWait, does it seem right?\\nSo \\boxed{pink}.

    So boxes are filled, responses end, and what follows a forced trigger is an answer again.
    """
    policy = toy.new_policy(0, hidden=32, layers=2, heads=2, family=family)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=90)
    rng, colours = random.Random(0), list(toy.COLOURS)[:6]
    questions = toy.toy_questions(toy.LEVELS["easy"], 4, "base")
    prompts = [encode(policy, question, "bare") for question in questions]

    def guess() -> torch.Tensor:
        pieces = [f"Looks like \\boxed{{{rng.choice(colours)}}}."]
        if rng.random() < 0.5:
            trigger = rng.choice(list(TRIGGERS.values()))
            pieces += [trigger, f"\nSo \\boxed{{{rng.choice(colours)}}}."]
        ids = [i for piece in pieces for i in policy.tokenizer(piece).input_ids]
        return torch.tensor([*ids, policy.tokenizer.eos_token_id])

    for _ in range(90):
        groups = [(prompt, [guess() for _ in range(8)]) for prompt in prompts]
        logprobs, _ = response_logprobs(policy, groups)
        loss = -logprobs.sum() / sum(len(y) for _, responses in groups for y in responses)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    directory = Path(TEMPORARY.name) / family
    save_policy(policy, directory)
    return directory


def flags(base: Path, out: Path, **changes) -> list[str]:
    """The command line of a run of seconds: 4 questions x 8 responses, two steps an episode."""
    values = {
        "model": base, "data": "toy", "out": out, "steps": 4, "episode_queries": 4, "group_size": 8,
        "batch_size": 16, "heldout": 4, "max_new_tokens": 32, "save_every": 2, "eval_every": 0,
        "lr": 1e-3, "seed": 2, "rethink_fraction": 0,
    } | changes  # fmt: skip
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def run_training(base: Path, out: Path, **changes) -> Path:
    """Train in this process; the run must go well."""
    assert train.main(flags(base, out, **changes)) == 0
    return out


def strict_json(line: str):
    """JSON as other tools read it: NaN and Infinity are none."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON: {line}")

    return json.loads(line, parse_constant=refuse)


def read_jsonl(path: Path) -> list[dict]:
    return [strict_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def steps_of(out: Path) -> list[dict]:
    """The optimiser steps of metrics.jsonl, without what a clock says."""
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "heldout_accuracy" not in row]
    return [{k: v for k, v in row.items() if k not in SECONDS} for row in rows]


def heldout_of(out: Path) -> list[dict]:
    return [row for row in read_jsonl(out / "metrics.jsonl") if "heldout_accuracy" in row]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_tensors(a: dict, b: dict) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------- processes


def start(action: Callable[[], int], log: Path) -> int:
    """Fork, so that everything is imported already; the child runs `action`, all it says goes to `log`.
    Returns its process id."""
    assert not torch.cuda.is_initialized(), (
        "CUDA does not survive a fork: set CUDA_VISIBLE_DEVICES to nothing"
    )
    if pid := os.fork():
        return pid
    gc.freeze()  # a process group of the parent's that is collected here would wait for threads that are not
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not pytest's
        faulthandler.enable(sys.stderr)  # where it was when a signal, or `wait`, ended it
        code = action()
    except BaseException:  # noqa: BLE001, a child must never return into its parent's work
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit status, negative where a signal ended it; None where the time was up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGABRT)
    os.kill(pid, signal.SIGCONT)
    os.waitpid(pid, 0)
    return None


def start_ranks(world: int, action: Callable[[], int], log: Path, per_node: int = 0) -> list[int]:
    """Fork `world` ranks with the variables that torchrun sets; each logs to LOG.RANK."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def as_rank(rank: int) -> int:
        local = per_node or world
        values = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local,
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        os.environ |= {name: str(value) for name, value in values.items()}
        return action()

    return [start(functools.partial(as_rank, r), log.with_suffix(f".{r}")) for r in range(world)]


def on_ranks(world: int, action: Callable[[], object], per_node: int = 0) -> list:
    """What `action` returns on each of `world` ranks, by way of JSON. Longer than LIMIT is a hang."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"

        def note() -> int:
            found = json.dumps(action())
            log.with_suffix(f".found{os.environ['RANK']}").write_text(found)
            return 0

        end = time.monotonic() + LIMIT
        codes = [wait(pid, end - time.monotonic()) for pid in start_ranks(world, note, log, per_node)]
        said = [log.with_suffix(f".{rank}").read_text()[:3000] for rank in range(world)]
        assert codes == [0] * world, (codes, *said)
        return [json.loads(log.with_suffix(f".found{rank}").read_text()) for rank in range(world)]


# ------------------------------------------------------------------ rewards that tests can rely on


def let_be_right(monkeypatch, is_right) -> None:
    """Let `is_right(sample)` be the rule."""
    monkeypatch.setattr(train, "is_right", lambda sample, text=None: is_right(sample))


def lucky(sample) -> bool:
    """Right for half of the guesses; never at the last of four questions, which teaches nothing."""
    guess = extract_answer(sample.text)
    return guess in ("red", "green", "blue") and not sample.prompt.question.id.endswith("3")


def odd_sum(sample) -> bool:
    """Right for about half of the responses of a policy that varies them at all."""
    return int(sample.tokens.sum()) % 2 == 1
