"""Two processes (gloo): the gradient of one, no hang, resuming with other numbers of ranks."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import (
    flags,
    heldout_of,
    let_be_right,
    lucky,
    make_base,
    run_training,
    same_tensors,
    steps_of,
    weights_of,
)
from two_ranks import BUDGETS, ONE_RANK, even_lucky, gradients_of_hand_made_batch, hand_made_batch

import checkpoint
import parallel
import train
from checkpoint import list_checkpoints
from config import parse

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LIMIT = 150  # seconds: longer is a hang
HERE = Path(__file__).parent


def environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


@pytest.fixture(scope="session")
def base():
    return make_base()


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory):
    """The checks of two_ranks.py, run once: name -> what each rank saw; "" -> their folder."""
    out = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as monkeypatch:
        let_be_right(monkeypatch, lucky)
        run_training(base, out / "from_one", steps=1, heldout=0, keep_last=9)
    command = [*TORCHRUN, HERE / "two_ranks.py", base, out]
    done = subprocess.run(command, timeout=LIMIT, env=environment(), check=False,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-5000:]

    @functools.cache
    def read(name: str):
        return json.loads((out / f"{name}.json").read_text()) if name else out

    return read


@pytest.fixture(scope="module")
def nodes(base, tmp_path_factory):
    """What two_ranks.py saw on two nodes of two ranks, on this machine: one dict per rank; their folder."""
    out = tmp_path_factory.mktemp("nodes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2",
              "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "nodes"]  # fmt: skip
    command = [*launch, HERE / "two_ranks.py", base, out, "node"]
    agents = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE) for _ in range(2)
    ]  # fmt: skip
    try:
        errors = [agent.communicate(timeout=LIMIT)[1].decode() for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(errors)[-5000:]
    return json.loads((out / "node.json").read_text()), out


def distance(a: dict, b: dict) -> tuple[float, float]:
    """Largest difference of any number, and the norm of the difference relative to b's."""
    assert a.keys() == b.keys()
    flat_a, flat_b = (torch.cat([x[n].flatten() for n in sorted(x)]) for x in (a, b))
    return float((flat_a - flat_b).abs().max()), float((flat_a - flat_b).norm() / flat_b.norm())


KINDS = {"lora": {"lora_rank": 3}, "frozen": {"train_vision": "false"}}


@pytest.mark.parametrize("budget", [*BUDGETS, "offload", *KINDS])
def test_two_ranks_take_the_gradient_of_one(ranks, base, tmp_path, budget):
    """Whatever micro-batches each has, and with text on one and pictures on the other."""
    kind = KINDS.get(budget, {})
    run = train.prepare(parse(flags(base, tmp_path, max_grad_norm=0, micro_batch_tokens=8192, **kind)))
    one = gradients_of_hand_made_batch(run)
    two = load_file(ranks("") / f"gradient-{budget}.safetensors")
    largest, relative = distance(two, one)
    print(f"budget {budget}: largest difference {largest:.1e}, relative {relative:.1e}")
    assert largest < 1e-5 and relative < 1e-5
    assert all(bool(g.any()) for name, g in one.items() if "visual.blocks" in name or "lora" in name)
    assert any("visual" in name for name in one) == (not kind)


def test_hybrid_sharding_splits_within_a_node_and_takes_the_gradient_of_one(nodes, base, tmp_path):
    """Two nodes of two ranks, met by torchrun's rendezvous as on a cluster."""
    seen, out = nodes
    places = sorted((rank["part"], rank["copy"]) for rank in seen)
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(rank["parts"] == 2 and 0.45 < rank["share"] < 0.55 for rank in seen)
    run = train.prepare(parse(flags(base, tmp_path, max_grad_norm=0)))
    one = gradients_of_hand_made_batch(run)
    largest, relative = distance(load_file(out / "gradient-node.safetensors"), one)
    assert largest < 1e-5 and relative < 1e-5


def test_a_run_of_two_nodes_is_saved_once_and_one_rank_goes_on(nodes, base, monkeypatch):
    seen, out = nodes
    assert [rank["code"] for rank in seen] == [0] * 4
    saved = sorted(path.name for path in (out / "run/checkpoint-2").glob("state-*"))
    assert saved == ["state-0-of-2.safetensors", "state-1-of-2.safetensors"]
    let_be_right(monkeypatch, lucky)
    run_training(base, out / "run", steps=3, rethink_fraction=0.5, resume="true")
    rows = steps_of(out / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert max(row["logp_mismatch"] for row in rows) < 1e-4


def test_a_run_with_offloaded_weights_trains(ranks, base):
    assert [seen["code"] for seen in ranks("offload")] == [0, 0]
    rows = steps_of(ranks("") / "offload")
    assert len(rows) == 2 and max(row["logp_mismatch"] for row in rows) < 1e-4
    trained = weights_of(ranks("") / "offload/checkpoint-2")
    assert not same_tensors(trained, weights_of(base))


def test_the_hand_made_batch_gives_ranks_unlike_work(base):
    """Text alone on one rank, pictures on the other; unequal numbers of micro-batches."""
    run = train.prepare(parse(flags(base, base.parent / "plan")))
    branches = hand_made_batch(run.policy)
    lengths = [(b.sample.prompt.question.id, len(b.sample.prompt.input_ids), len(b.sample.tokens))
               for b in branches]  # fmt: skip
    counts, alone = set(), set()
    for budget in BUDGETS:
        shares = train.plan_micro_batches(lengths, 2, budget)
        counts.add(len(shares[0]) - len(shares[1]))
        for micros in zip(*shares):
            with_text = [any(lengths[i][0] == "text" for tree in m for i in tree) for m in micros]
            alone.add(with_text[0] != with_text[1])
    assert counts != {0} and True in alone


def test_decoding_whole_weights_uses_no_collective(ranks):
    for seen in ranks("whole"):
        assert seen["sampling"] == 0 < seen["training"]
        assert seen["responses"] > 0


def test_ranks_may_decode_different_lengths(ranks):
    assert [seen["code"] for seen in ranks("whole")] == [0, 0]
    rows = steps_of(ranks("") / "whole")
    assert [row["response_length"] for row in rows] == [(1 + 12) / 2] * 2
    assert [row["truncated"] for row in rows] == [0.5] * 2


def test_ranks_that_sample_together_count_once(ranks):
    assert [seen["code"] for seen in ranks("together")] == [0, 0]
    rows = steps_of(ranks("") / "together")
    assert [row["batch_responses"] for row in rows] == [16, 16]
    assert all(0 < row["reward"] < 1 and row["logp_mismatch"] < 1e-4 for row in rows)
    assert all(0 <= row["heldout_accuracy"] <= 1 for row in heldout_of(ranks("") / "together"))


def test_replay_fills_the_batch_where_one_rank_has_nothing_effective(ranks):
    assert [seen["code"] for seen in ranks("one_rank")] == [0, 0]
    rows = steps_of(ranks("") / "one_rank")
    assert len(rows) == 4 and not any(row["skipped"] for row in rows)
    assert [row["batch_responses"] for row in rows] == [16] * 4
    assert all(row["effective_queries"] <= 0.5 for row in rows)
    assert any(row["replayed"] > 0 for row in rows)
    assert max(row["logp_mismatch"] for row in rows) < 1e-4


def test_pictures_do_not_travel(ranks):
    for seen in ranks("one_rank"):
        assert seen["left_behind"] == [[True] * 4] * 2


def test_nothing_effective_on_any_rank_skips_the_step(ranks, base):
    assert [seen["code"] for seen in ranks("nothing")] == [0, 0]
    assert [row["skipped"] for row in steps_of(ranks("") / "nothing")] == [True, True]
    assert same_tensors(weights_of(ranks("") / "nothing/checkpoint-2"), weights_of(base))


def test_a_loss_that_is_nan_on_one_rank_skips_the_step_on_all(ranks):
    assert [seen["spoilt"] for seen in ranks("nan")] == [False, True]
    for seen in ranks("nan"):
        assert seen["code"] == 0
        assert seen["unchanged"] == [False, True, False]
    assert [row["skipped"] for row in steps_of(ranks("") / "nan")] == [False, True, False]


# ---------------------------------------------------------------------------- resuming


def test_two_ranks_resume_exactly(ranks):
    assert [seen["code"] for seen in ranks("exact")] == [0, 0]
    whole, out = ranks("") / "one_rank", ranks("") / "exact"
    assert steps_of(out) == steps_of(whole) and heldout_of(out) == heldout_of(whole)
    assert same_tensors(weights_of(out / "checkpoint-4"), weights_of(whole / "checkpoint-4"))


def test_two_ranks_go_on_from_one(ranks):
    out = ranks("") / "from_one"
    assert [seen["code"] for seen in ranks("from_one")] == [0, 0]
    assert [row["step"] for row in steps_of(out)] == [1, 2, 3]
    with safe_open(out / "checkpoint-1/state-0-of-1.safetensors", framework="pt") as file:
        saved = {name: file.get_tensor(name) for name in list(file.keys()) if "step/" not in name}
    assert same_tensors(load_file(out / "resumed.safetensors"), saved)


def test_one_rank_goes_on_from_two(ranks, base, tmp_path, monkeypatch):
    let_be_right(monkeypatch, even_lucky)
    out = shutil.copytree(ranks("") / "exact", tmp_path / "run")
    run_training(base, out, **ONE_RANK | {"steps": 6}, resume="true")
    assert [row["step"] for row in steps_of(out)] == [1, 2, 3, 4, 5, 6]
    # What one rank reads is what two wrote, one after the other.
    written = ranks("") / "one_rank" / "checkpoint-4"
    parts = [load_file(written / f"state-{r}-of-2.safetensors") for r in (0, 1)]
    run = train.prepare(parse(flags(base, ranks("") / "one_rank", **ONE_RANK, resume="true")))
    assert checkpoint.resume_run(run) and run.step == 4
    for name, parameter in run.policy.named_parameters():
        found = {"param": parameter.detach()} | run.optimizer.state[parameter]
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(found[kind], torch.cat([part[f"{kind}/{name}"] for part in parts]))


# ---------------------------------------------------------------------------- one rank as on a GPU


def test_one_rank_shards_over_itself_in_half_precision_as_on_a_gpu(base, tmp_path, monkeypatch):
    let_be_right(monkeypatch, lucky)
    settings = {"precision": "bf16", "rethink_fraction": 0.5, "gradient_checkpointing": "true"}
    run_training(base, tmp_path, **settings)
    rows = steps_of(tmp_path)
    assert len(rows) == 4 and not any(row["skipped"] for row in rows)
    assert all(0 < row["logp_mismatch"] < 0.02 for row in rows)  # bf16: not 1e-5
    # The copy for others is what was computed with, and says so; a second stage starts from fp32.
    saved = tmp_path / "checkpoint-4"
    assert {tensor.dtype for tensor in weights_of(saved).values()} == {torch.bfloat16}
    assert "float32" not in (saved / "config.json").read_text()
    run = train.prepare(parse(flags(saved, tmp_path / "stage2", **settings)))
    with safe_open(saved / "state-0-of-1.safetensors", framework="pt") as state:
        for name, parameter in run.policy.named_parameters():
            exact = state.get_tensor(f"param/{name}")
            assert exact.dtype == torch.float32
            assert torch.equal(parallel.local(parameter), exact)
    parallel.stop()


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shared", "--episode_queries 1 cannot be shared by 2 ranks"),
        ("picture", "bad.jsonl:2: picture"),
        ("flag", "--ssr"),
        ("weights", "no weights for"),
    ],
)
def test_a_mistake_ends_all_ranks_and_is_said_once(ranks, name, words):
    (code, lines), (other_code, other_lines) = (seen[name] for seen in ranks("errors"))
    assert code == other_code == 2
    assert len(lines) == 1 and words in lines[0] and not other_lines


# ---------------------------------------------------------------------------- torchrun train.py


def wait_for(condition, process, limit: float) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()[-3000:]
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def test_torchrun_that_is_asked_to_stop_saves_and_one_rank_goes_on(base, tmp_path, monkeypatch):
    """SIGTERM to torchrun, as a cluster sends it, while two ranks are training."""
    settings = {"ssr": "off", "heldout": 0, "save_every": 100_000}
    command = [*TORCHRUN, HERE.parent / "train.py"]
    command += flags(base, tmp_path, **settings, steps=100_000)
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        try:
            metrics = tmp_path / "metrics.jsonl"
            wait_for(lambda: metrics.exists() and len(steps_of(tmp_path)) > 2, process, LIMIT)
            process.send_signal(signal.SIGTERM)
            said, errors = (text.decode() for text in process.communicate(timeout=60))
        finally:
            process.kill()
    done = len(steps_of(tmp_path))
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"checkpoint-{done}"]
    assert errors.count("finishing this step, then saving") == 1
    assert f"stopped after step {done} of 100000" in said and "--resume" in said
    run_training(base, tmp_path, **settings, steps=done + 1, resume="true")
    assert len(steps_of(tmp_path)) == done + 1
