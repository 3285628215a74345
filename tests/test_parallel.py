"""Several processes (gloo): the gradient of one, no hang, resuming with other numbers of ranks, a rank that is lost.

Ranks are forked from this process, so whatever a test has replaced here is replaced in them too.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from conftest import QUESTIONS, random_response
from safetensors.torch import load_file, save_file
from test_data import write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import lora
import parallel
import train
from checkpoint import list_checkpoints
from config import parse
from model import Sample, encode

pytestmark = pytest.mark.usefixtures("reward_by_luck")
EPISODES = {"steps": 4, "heldout": 3, "rethink_fraction": 0.5, "save_every": 2, "keep_last": 9}


def trained(base: Path, out: Path, **changes) -> list[dict]:
    """The steps of a run by two ranks, which must go well on both."""
    assert tiny.on_ranks(2, lambda: train.main(tiny.flags(base, out, **changes))) == [0, 0]
    return tiny.steps_of(out)


# ---------------------------------------------------------------------------- the gradient


def hand_made_batch(policy) -> list[train.Branch]:
    """Responses to questions with 0, 1 and 2 pictures; some drawn twice, forced, imitated."""
    draw, branches = torch.Generator().manual_seed(0), []
    for question in QUESTIONS:
        prompt = encode(policy, question, "bare")
        for i in range(5):
            length = int(torch.randint(2, 20, (), generator=draw))
            mask = torch.rand(length, generator=draw) > 0.2
            mask[0] = True
            old = -6 + torch.randn(length, generator=draw)
            advantage = float(torch.randn((), generator=draw))
            tokens = random_response(length, i, policy)
            sample = Sample(prompt, tokens, old, mask, "", "stop", 1.0, advantage)
            sample.rethought = "self_correction" if i == 2 else None
            branches.append(train.Branch(sample, draws=1 + i % 2, fresh=i < 4, imitate=i == 2))
    return branches


def gradients(base: Path, out: Path, **changes) -> list:
    """Those of the hand-made batch by `train.update`, as the optimiser meets them, into `out`.
    Returns (which part of a weight this rank holds, of how many, in which copy)."""
    run = train.prepare(parse(tiny.flags(base, out, max_grad_norm=0, **changes)))
    found = {}

    def note(optimizer, args, kwargs):
        for name, parameter in checkpoint.trained(run.policy):
            found[name] = parallel.whole(parameter.grad).clone()

    for module in lora.adapted(run.policy).values():  # at its start of 0, A has no gradient
        parallel.local(module.lora_B.detach()).fill_(0.02)
    run.optimizer.register_step_pre_hook(note)
    train.update(run, hand_made_batch(run.policy))
    if parallel.rank() == 0:
        save_file(found, out / "gradient.safetensors")
    part, parts = parallel.shard_place(next(run.policy.parameters()))
    return [part, parts, parallel.rank() // parts]


def assert_gradient_of_one(base: Path, out: Path, **changes) -> None:
    """That OUT/ranks holds the gradient that one rank takes in one micro-batch."""
    gradients(base, out / "one", micro_batch_tokens=8192, **changes)
    one, several = (load_file(out / name / "gradient.safetensors") for name in ("one", "ranks"))
    assert several.keys() == one.keys()
    flat, want = (torch.cat([found[n].flatten() for n in sorted(one)]) for found in (several, one))
    assert (flat - want).abs().max() < 1e-5 and (flat - want).norm() < 1e-5 * want.norm()
    assert all(bool(g.any()) for name, g in one.items() if "visual.blocks" in name or "lora" in name)


# One response at a time, some trees, everything.
KINDS = {f"budget {n}": {"micro_batch_tokens": n} for n in (1, 100, 8192)} | {
    "offload": {"offload": "true"}, "lora": {"lora_rank": 3}, "frozen": {"train_vision": "false"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_gradient_of_one(base, tmp_path, kind):
    """Whatever micro-batches each has, and with text on one and pictures on the other."""
    tiny.on_ranks(2, lambda: gradients(base, tmp_path / "ranks", **KINDS[kind]))
    weights = KINDS[kind] if kind in ("lora", "frozen") else {}
    assert_gradient_of_one(base, tmp_path, **weights)


def test_hybrid_sharding_splits_within_a_node_and_takes_the_gradient_of_one(base, tmp_path):
    """Two nodes of two ranks."""
    places = tiny.on_ranks(4, lambda: gradients(base, tmp_path / "ranks", shard="node"), per_node=2)
    assert sorted(places) == [[0, 2, 0], [0, 2, 1], [1, 2, 0], [1, 2, 1]]
    assert_gradient_of_one(base, tmp_path)


# ---------------------------------------------------------------------------- whole runs


def test_a_run_of_two_nodes_is_saved_once_and_one_rank_goes_on(base, tmp_path):
    settings = {"shard": "node", "tensor": 2, "rethink_fraction": 0.5}
    assert tiny.on_ranks(4, lambda: train.main(tiny.flags(base, tmp_path, **settings, steps=2)), 2) == [0] * 4
    saved = sorted(path.name for path in (tmp_path / "checkpoint-2").glob("state-*"))
    assert saved == ["state-0-of-2.safetensors", "state-1-of-2.safetensors"]
    tiny.run_training(base, tmp_path, steps=3, rethink_fraction=0.5, resume="true")
    rows = tiny.steps_of(tmp_path)
    assert [(row["step"], row["batch_responses"]) for row in rows] == [(1, 16), (2, 16), (3, 16)]
    assert all(0 < row["reward"] < 1 and row["logp_mismatch"] < 1e-4 for row in rows)
    assert all(0 <= row["heldout_accuracy"] <= 1 for row in tiny.heldout_of(tmp_path))


def test_ranks_that_offload_train_on_each_response_once(base, tmp_path):
    rows = trained(base, tmp_path, offload="true", steps=2, rethink_fraction=0.5)
    assert all(row["batch_responses"] == 16 and row["logp_mismatch"] < 1e-4 for row in rows)
    assert not tiny.same_tensors(tiny.weights_of(tmp_path / "checkpoint-2"), tiny.weights_of(base))


class Collectives(TorchDispatchMode):
    """Counts what is sent between ranks while it is on."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace in ("c10d", "_c10d_functional")
        return function(*args, **(kwargs or {}))


def test_decoding_whole_weights_uses_no_collective_so_that_lengths_may_differ(base, tmp_path, monkeypatch):
    """Rank 0's responses are one token long, rank 1's run into the limit."""
    tiny.let_be_right(monkeypatch, tiny.odd_sum)
    sampling, training = Collectives(), Collectives()
    real_generate, real_update = train.generate, train.update

    def generate(policy, *args, **kwargs):
        policy.eos_ids = list(range(len(policy.tokenizer))) if parallel.rank() == 0 else []
        with sampling:
            return real_generate(policy, *args, **kwargs)

    def update(*args):
        with training:
            return real_update(*args)

    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "update", update)
    command = tiny.flags(base, tmp_path, steps=2, batch_size=32, heldout=1, max_new_tokens=12, rollout_rows=8)
    seen = tiny.on_ranks(2, lambda: (train.main(command), sampling.count, training.count > 0))
    assert seen == [[0, 0, True]] * 2
    rows = tiny.steps_of(tmp_path)
    assert [(row["response_length"], row["truncated"]) for row in rows] == [((1 + 12) / 2, 0.5)] * 2


def test_pictures_do_not_travel_between_ranks(base, tmp_path, monkeypatch):
    gather, sent = parallel.gather, []
    monkeypatch.setattr(
        parallel, "gather", lambda items, *by: sent.append(pickle.dumps(items)) or gather(items, *by)
    )

    def sampled():
        groups, _ = train.sample_episode(train.prepare(parse(tiny.flags(base, tmp_path, **EPISODES))))
        assert all(sample.prompt.question.images for group in groups for sample in group)
        return sum(b"PIL" in items for items in sent)

    assert tiny.on_ranks(2, sampled) == [0, 0]


def test_nothing_effective_on_any_rank_skips_the_step(base, tmp_path, monkeypatch):
    tiny.let_be_right(monkeypatch, lambda sample: False)
    rows = trained(base, tmp_path, ssr="filter", steps=2, heldout=0)
    assert [row["skipped"] for row in rows] == [True, True]
    assert tiny.same_tensors(tiny.weights_of(tmp_path / "checkpoint-2"), tiny.weights_of(base))


def test_a_loss_that_is_nan_on_one_rank_skips_the_step_on_all(base, tmp_path, monkeypatch):
    spoilt, unchanged = [], []
    real_loss, real_step = train.policy_loss, train.train_step

    def policy_loss(*args):
        spoilt.append(parallel.rank() == 1 and len(unchanged) == 1)  # in the second step
        return real_loss(*args) * (float("nan") if spoilt[-1] else 1.0)

    def train_step(run, seconds):
        before = [parallel.local(p).clone() for p in run.policy.parameters()]
        row = real_step(run, seconds)
        unchanged.append(all(map(torch.equal, before, map(parallel.local, run.policy.parameters()))))
        return row

    monkeypatch.setattr(train, "policy_loss", policy_loss)
    monkeypatch.setattr(train, "train_step", train_step)
    command = tiny.flags(base, tmp_path, steps=3, heldout=0)
    seen = tiny.on_ranks(2, lambda: (train.main(command), any(spoilt), unchanged))
    assert seen == [[0, False, [False, True, False]], [0, True, [False, True, False]]]
    assert [row["skipped"] for row in tiny.steps_of(tmp_path)] == [False, True, False]


# ---------------------------------------------------------------------------- resuming


def even_lucky(sample) -> bool:
    """Right now and then at the questions 0 and 2, which rank 0 samples; never at rank 1's."""
    return tiny.lucky(sample) and int(sample.prompt.question.id[-1]) % 2 == 0


@pytest.fixture(scope="module")
def of_two(base, tmp_path_factory) -> Path:
    """The folder of a run by two ranks."""
    out = tmp_path_factory.mktemp("two") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.let_be_right(monkeypatch, even_lucky)
        trained(base, out, **EPISODES)
    return out


def test_replay_fills_the_batch_where_one_rank_has_nothing_effective(of_two):
    rows = tiny.steps_of(of_two)
    assert len(rows) == 4 and not any(row["skipped"] for row in rows)
    assert all(row["batch_responses"] == 16 and row["effective_queries"] <= 0.5 for row in rows)
    assert any(row["replayed"] > 0 for row in rows)
    assert max(row["logp_mismatch"] for row in rows) < 1e-4


def test_two_ranks_resume_exactly(of_two, base, tmp_path, monkeypatch):
    tiny.let_be_right(monkeypatch, even_lucky)
    out = shutil.copytree(of_two, tmp_path / "run")
    shutil.rmtree(out / "checkpoint-4")
    assert trained(base, out, **EPISODES, resume="true") == tiny.steps_of(of_two)
    assert tiny.heldout_of(out) == tiny.heldout_of(of_two)
    assert tiny.same_tensors(tiny.weights_of(out / "checkpoint-4"), tiny.weights_of(of_two / "checkpoint-4"))


def resumed(base: Path, out: Path, **changes) -> dict[str, torch.Tensor]:
    """The weights and moments that OUT's newest checkpoint gives back, whole."""
    run, found = train.prepare(parse(tiny.flags(base, out, **changes, resume="true"))), {}
    assert checkpoint.resume_run(run)
    for name, parameter in run.policy.named_parameters():
        for kind, tensor in {"param": parameter.detach(), **run.optimizer.state[parameter]}.items():
            found[f"{kind}/{name}"] = parallel.whole(tensor).clone()
    return {name: tensor for name, tensor in found.items() if not name.startswith("step/")}


def test_two_ranks_go_on_from_one(base, tmp_path):
    tiny.run_training(base, tmp_path, steps=1, heldout=0, keep_last=9)

    def action():
        state = resumed(base, tmp_path, heldout=0)
        if parallel.rank() == 0:
            save_file(state, tmp_path / "resumed.safetensors")

    tiny.on_ranks(2, action)
    state, saved = (
        load_file(tmp_path / f"{x}.safetensors") for x in ("resumed", "checkpoint-1/state-0-of-1")
    )
    assert state.keys() == {name for name in saved if not name.startswith("step/")}
    assert tiny.same_tensors(state, {name: saved[name] for name in state})
    rows = trained(base, tmp_path, steps=3, heldout=0, resume="true")
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_one_rank_goes_on_from_two(of_two, base):
    """What it reads is what two wrote, one after the other."""
    parts = [load_file(of_two / f"checkpoint-4/state-{r}-of-2.safetensors") for r in (0, 1)]
    for name, tensor in resumed(base, of_two, **EPISODES).items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts]))


@pytest.mark.parametrize("rank", [0, 4])
def test_one_rank_shards_over_itself_in_half_precision_as_on_a_gpu(base, tmp_path, rank):
    """What trains is kept in fp32: all weights, or adapters over a base in bf16."""
    settings = {"precision": "bf16", "gradient_checkpointing": "true", "rethink_fraction": 0.5,
                "lora_rank": rank}  # fmt: skip
    rows = tiny.steps_of(tiny.run_training(base, tmp_path, **settings))
    assert len(rows) == 4 and not any(row["skipped"] for row in rows)
    assert all(0 < row["logp_mismatch"] < 0.02 for row in rows)  # bf16: not 1e-5
    # The copy for others is what was computed with, and says so; a second stage starts from fp32.
    saved = tmp_path / "checkpoint-4"
    assert {tensor.dtype for tensor in tiny.weights_of(saved).values()} == {torch.bfloat16}
    assert "float32" not in (saved / "config.json").read_text()
    state = load_file(saved / "state-0-of-1.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    run = train.prepare(parse(tiny.flags(saved, tmp_path / "stage2", **settings)))
    for name, parameter in run.policy.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        assert rank or torch.equal(parallel.local(parameter), state[f"param/{name}"])
    parallel.stop()


# ---------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"episode_queries": 1, "batch_size": 8}, "--episode_queries 1 cannot be shared by 2 ranks"),
        ({"data": "bad.jsonl", "heldout": 0}, "bad.jsonl:2: picture"),  # rank 1 looks at the second
        ({"ssr": "maybe"}, "--ssr"),
        ({"model": "broken"}, "no weights for"),
    ],
)
def test_a_mistake_ends_all_ranks_and_is_said_once(base, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    fine = {"question": "Is it?", "answer": "no"}
    write_jsonl(Path("bad.jsonl"), [fine, fine | {"image": "gone.png"}, fine, fine])
    shutil.copytree(base, "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    log = tmp_path / "log"
    pids = tiny.start_ranks(2, lambda: train.main(tiny.flags(base, "out", **changes)), log)
    assert [tiny.wait(pid, tiny.LIMIT) for pid in pids] == [2, 2]
    said = [log.with_suffix(f".{rank}").read_text().splitlines() for rank in (0, 1)]
    lines, others = ([line for line in text if line.startswith("error: ")] for text in said)
    assert len(lines) == 1 and words in lines[0] and not others


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_stopped_or_killed_ends_the_other_which_says_how_to_go_on(
    base, tmp_path, monkeypatch, number
):
    """The time is `PULSE` times `SILENT`, 2 s here; without it a collective would wait for hours."""
    monkeypatch.setattr(parallel, "PULSE", 0.1)
    monkeypatch.setattr(parallel, "SILENT", 20)
    real, log = train.update, tmp_path / "log"

    def update(run, branches):
        if run.step == 2 and parallel.rank() == 1:
            os.kill(os.getpid(), number)
        return real(run, branches)

    monkeypatch.setattr(train, "update", update)
    pids = tiny.start_ranks(2, lambda: train.main(tiny.flags(base, tmp_path / "run")), log)
    assert tiny.wait(pids[0], 60) == 1
    os.kill(pids[1], signal.SIGKILL)
    assert tiny.wait(pids[1], 60) == -signal.SIGKILL
    said = log.with_suffix(".0").read_text().splitlines()[-1]
    lost = "rank 1 of 2 did not answer for 2 s" if number == signal.SIGSTOP else "rank 0 lost another rank"
    assert f"error: {lost}; go on with --resume" in said
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_torchrun_that_is_asked_to_stop_saves_and_one_rank_goes_on(base, tmp_path):
    """SIGTERM to torchrun, as a cluster sends it, while two ranks are training."""
    settings = {"ssr": "off", "heldout": 0, "save_every": 100_000}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, Path(train.__file__), *tiny.flags(base, tmp_path, **settings, steps=100_000)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | {"TQDM_DISABLE": "1"}, **pipes) as process:
        try:
            end, metrics = time.monotonic() + tiny.LIMIT, tmp_path / "metrics.jsonl"
            while not (metrics.exists() and len(tiny.steps_of(tmp_path)) > 2):
                assert process.poll() is None, process.communicate()[1].decode()[-3000:]
                assert time.monotonic() < end
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            said, errors = (text.decode() for text in process.communicate(timeout=60))
        finally:
            process.kill()
    done = len(tiny.steps_of(tmp_path))
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"checkpoint-{done}"]
    assert errors.count("finishing this step, then saving") == 1
    assert f"stopped after step {done} of 100000" in said and "--resume" in said
    tiny.run_training(base, tmp_path, **settings, steps=done + 1, resume="true")
    assert len(tiny.steps_of(tmp_path)) == done + 1
