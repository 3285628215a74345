"""What test_parallel.py runs on two processes, and on two nodes of two:

    torchrun --nproc_per_node 2 tests/two_ranks.py BASE DIR
    torchrun --nnodes 2 --nproc_per_node 2 ... tests/two_ranks.py BASE DIR node

Each check writes what it saw into DIR; the tests judge it. A hang is a time limit in the test.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from safetensors.torch import save_file
from tiny import flags, lucky, odd_sum
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import lora
import parallel
import toy
import train
from config import parse
from data import Question
from model import Sample, encode

BUDGETS = (1, 100, 8192)  # --micro_batch_tokens: one response at a time, some trees, everything
ONE_RANK = {"steps": 4, "heldout": 3, "rethink_fraction": 0.5, "save_every": 2, "keep_last": 9}


def hand_made_batch(policy) -> list[train.Branch]:
    """Responses to questions with 0, 1 and 2 pictures; some drawn twice, forced, imitated."""
    (world,) = toy.toy_questions(toy.LEVELS["easy"], 1, "hand made")
    picture = world.images[0]
    questions = [
        Question("text", "How many legs do 3 spiders have?", [], "24"),
        Question("one", world.text, [picture], "red"),
        Question("two", "<image>Is this <image> turned?", [picture, picture.rotate(90)], "no"),
    ]
    draw = torch.Generator().manual_seed(0)
    branches = []
    for question in questions:
        prompt = encode(policy, question, "bare")
        for i in range(5):
            length = int(torch.randint(2, 20, (), generator=draw))
            tokens = torch.randint(20, 400, (length,), generator=draw)
            mask = torch.rand(length, generator=draw) > 0.2
            mask[0] = True
            old = -6 + torch.randn(length, generator=draw)
            advantage = float(torch.randn((), generator=draw))
            sample = Sample(prompt, tokens, old, mask, "", "stop", 1.0, advantage)
            sample.rethought = "self_correction" if i == 2 else None
            branches.append(train.Branch(sample, draws=1 + i % 2, fresh=i < 4, imitate=i == 2))
    return branches


def gradients_of_hand_made_batch(run) -> dict[str, torch.Tensor]:
    """By `train.update`, as the optimiser meets them."""
    found = {}

    def note(optimizer, args, kwargs):
        for name, parameter in checkpoint.trained(run.policy):
            found[name] = parallel.whole(parameter.grad).clone()

    for module in lora.adapted(run.policy).values():  # at its start of 0, A has no gradient
        parallel.local(module.lora_B.detach()).fill_(0.02)
    handle = run.optimizer.register_step_pre_hook(note)
    train.update(run, hand_made_batch(run.policy))
    handle.remove()
    return found


class Collectives(TorchDispatchMode):
    """Counts what is sent between ranks while it is on."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace in ("c10d", "_c10d_functional")
        return function(*args, **(kwargs or {}))


def reward_by(is_right):
    return mock.patch.object(train, "is_right", lambda sample, text=None: is_right(sample))


def even_lucky(sample) -> bool:
    """Right now and then at the questions 0 and 2, which rank 0 samples; never at rank 1's."""
    return lucky(sample) and int(sample.prompt.question.id[-1]) % 2 == 0


def whole_state(run) -> dict[str, torch.Tensor]:
    """Weights and moments put together from all ranks."""
    tensors = {}
    for name, parameter in run.policy.named_parameters():
        tensors[f"param/{name}"] = parallel.whole(parameter.detach()).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            state = run.optimizer.state[parameter]
            tensors[f"{moment}/{name}"] = parallel.whole(state[moment]).clone()
    return tensors


# ---------------------------------------------------------------------------- the checks


def gradient(base: Path, out: Path, name: str, **changes) -> None:
    run = train.prepare(parse(flags(base, out, max_grad_norm=0, **changes)))
    gradients = gradients_of_hand_made_batch(run)
    if parallel.rank() == 0:
        save_file(gradients, out / f"gradient-{name}.safetensors")


def gradients(base: Path, out: Path) -> None:
    for budget in BUDGETS:
        gradient(base, out, str(budget), micro_batch_tokens=budget)
    gradient(base, out, "offload", offload="true")
    gradient(base, out, "lora", lora_rank=3)
    gradient(base, out, "frozen", train_vision="false")


def across_nodes(base: Path, out: Path) -> dict:
    """Hybrid sharding: which part and copy this rank holds, how much of the model, and a run with it."""
    gradient(base, out, "node", shard="node")
    run = train.prepare(parse(flags(base, out, shard="node")))
    part, parts, copy = parallel.shard_place_of(run.policy)
    held = sum(parallel.local(p).numel() for p in run.policy.parameters())
    share = held / sum(p.numel() for p in run.policy.parameters())
    with reward_by(lucky):
        settings = {"shard": "node", "tensor": 2, "steps": 2, "rethink_fraction": 0.5}
        code = train.main(flags(base, out / "run", **settings))
    return {"code": code, "part": part, "parts": parts, "copy": copy, "share": share}


def offloaded(base: Path, out: Path) -> dict:
    with reward_by(lucky):
        return {"code": train.main(flags(base, out, offload="true", steps=2, rethink_fraction=0.5))}


def sampled_together(base: Path, out: Path) -> dict:
    """A run whose ranks hold a slice of every layer each while sampling."""
    with reward_by(lucky):
        return {"code": train.main(flags(base, out, tensor=2, steps=2, rethink_fraction=0.5))}


def lengths_differ(base: Path, out: Path) -> dict:
    """Rank 0's responses are one token long, rank 1's run into the limit. Counts collectives."""
    counts = {"sampling": 0, "training": 0, "responses": 0}
    real_generate, real_update = train.generate, train.update

    def generate(policy, prompts, *args, **kwargs):
        everything = list(range(len(policy.tokenizer)))
        policy.eos_ids = everything if parallel.rank() == 0 else []
        with Collectives() as sent:
            groups = real_generate(policy, prompts, *args, **kwargs)
        counts["sampling"] += sent.count
        counts["responses"] += sum(map(len, groups))
        return groups

    def update(*args):
        with Collectives() as sent:
            numbers = real_update(*args)
        counts["training"] += sent.count
        return numbers

    settings = {"steps": 2, "batch_size": 32, "heldout": 1, "max_new_tokens": 12,
                "rollout_rows": 8}  # fmt: skip
    with (
        mock.patch.object(train, "generate", generate),
        mock.patch.object(train, "update", update),
        reward_by(odd_sum),
    ):
        code = train.main(flags(base, out, **settings))
    return {"code": code, **counts}


def one_rank_has_nothing_effective(base: Path, out: Path) -> dict:
    """Also: are pictures left behind when samples travel?"""
    seen = []
    real = train.sample_episode

    def sample_episode(run):
        groups, counts = real(run)
        seen.append([group[0].prompt.pixel_values is None for group in groups])
        return groups, counts

    with reward_by(even_lucky), mock.patch.object(train, "sample_episode", sample_episode):
        return {"code": train.main(flags(base, out, **ONE_RANK)), "left_behind": seen}


def nothing_effective_anywhere(base: Path, out: Path) -> dict:
    with reward_by(lambda sample: False):
        return {"code": train.main(flags(base, out, ssr="filter", steps=2, heldout=0))}


def a_loss_is_nan_on_one_rank(base: Path, out: Path) -> dict:
    """In the second step, on rank 1. Do the weights stay, on every rank?"""
    calls, unchanged = [], []
    real_loss, real_step = train.policy_loss, train.train_step

    def policy_loss(*args):
        spoil = parallel.rank() == 1 and len(unchanged) == 1
        calls.append(spoil)
        return real_loss(*args) * (float("nan") if spoil else 1.0)

    def train_step(run, seconds):
        before = {n: parallel.local(p).clone() for n, p in run.policy.named_parameters()}
        row = real_step(run, seconds)
        pairs = [(before[n], parallel.local(p)) for n, p in run.policy.named_parameters()]
        unchanged.append(all(torch.equal(old, new) for old, new in pairs))
        return row

    with (
        mock.patch.object(train, "policy_loss", policy_loss),
        mock.patch.object(train, "train_step", train_step),
        reward_by(lucky),
    ):
        code = train.main(flags(base, out, steps=3, heldout=0))
    return {"code": code, "spoilt": any(calls), "unchanged": unchanged}


def resume_exactly(base: Path, whole: Path, out: Path) -> dict:
    """Two ranks go on from step 2 of the run that `one_rank_has_nothing_effective` finished."""
    if parallel.rank() == 0:
        shutil.copytree(whole, out)
        shutil.rmtree(out / "checkpoint-4")
    parallel.barrier()
    with reward_by(even_lucky):
        return {"code": train.main(flags(base, out, **ONE_RANK, resume="true"))}


def resume_from_one_rank(base: Path, out: Path) -> dict:
    """OUT was written by one rank: what is found there, and can two go on?"""
    real = checkpoint.resume_run

    def resume(run):
        found = real(run)
        state = whole_state(run)
        if parallel.rank() == 0:
            save_file(state, out / "resumed.safetensors")
        return found

    with mock.patch.object(checkpoint, "resume_run", resume), reward_by(lucky):
        command = flags(base, out, steps=3, heldout=0, keep_last=9, resume="true")
        return {"code": train.main(command)}


def errors(base: Path, out: Path) -> dict:
    """Mistakes that one rank alone can see, or all can: all must stop, one must say so."""
    out.mkdir(exist_ok=True)
    data = out / "bad.jsonl"
    row = {"question": "Is it?", "answer": "no"}
    rows = [row, row | {"image": "gone.png"}, row, row]  # rank 1 looks at the second
    broken = out / "broken"
    if parallel.rank() == 0:
        data.write_text("".join(json.dumps(r) + "\n" for r in rows))
        shutil.copytree(base, broken)
        (broken / "model.safetensors").unlink()
    parallel.barrier()
    commands = {
        "shared": flags(base, out / "shared", episode_queries=1, batch_size=8),
        "picture": flags(base, out / "picture", data=data, heldout=0),
        "flag": [*flags(base, out / "flag"), "--ssr", "maybe"],
        "weights": flags(broken, out / "weights"),
    }
    results = {}
    for name, command in commands.items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = train.main(command)
        lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        results[name] = [code, lines]
    return results


def main(base: Path, out: Path, nodes: bool) -> None:
    device = parallel.start()
    checkpoint.FILE_BYTES = 100_000  # so that the hub's copy takes several files, and both ranks write
    stop, parallel.stop = parallel.stop, lambda: None  # one process group for all checks
    parallel.start = lambda precision: device
    checks = {
        "gradient": lambda: gradients(base, out),
        "offload": lambda: offloaded(base, out / "offload"),
        "whole": lambda: lengths_differ(base, out / "whole"),
        "together": lambda: sampled_together(base, out / "together"),
        "one_rank": lambda: one_rank_has_nothing_effective(base, out / "one_rank"),
        "nothing": lambda: nothing_effective_anywhere(base, out / "nothing"),
        "nan": lambda: a_loss_is_nan_on_one_rank(base, out / "nan"),
        "exact": lambda: resume_exactly(base, out / "one_rank", out / "exact"),
        "from_one": lambda: resume_from_one_rank(base, out / "from_one"),
        "errors": lambda: errors(base, out / "errors"),
    }
    if nodes:
        checks = {"node": lambda: across_nodes(base, out)}
    for name, check in checks.items():
        results = parallel.gather([check()])
        if parallel.rank() == 0:
            (out / f"{name}.json").write_text(json.dumps(results))
    parallel.barrier()
    stop()


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(Path(sys.argv[1]), Path(sys.argv[2]), nodes=sys.argv[3:] == ["node"])
