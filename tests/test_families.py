"""Every Qwen-VL by the same code: Qwen2-VL, Qwen2.5-VL and Qwen3-VL, dense and MoE, against transformers.

In float64, so that what differs is a mistake and not a rounding error, and no expert is chosen otherwise.
"""

import copy
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import QUESTIONS, hf_generate, hf_logprobs, random_response, relative_difference, unsettle
from safetensors.torch import load_file, save_file
from tiny import flags, make_base, on_ranks, steps_of
from transformers import AutoModelForImageTextToText

import checkpoint
import eval as evaluation
import lora
import model
import parallel
import toy
import train
from benchmarks import asking
from data import UserError
from model import FAMILIES, Policy, encode, load_policy, response_logprobs, save_policy
from reward import extract_answer
from rollout import generate


def in_float64(policy: Policy) -> Policy:
    policy.model.set_experts_implementation("eager")  # the other kernels know no float64
    return policy.double()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Policy:
    # Of keys, there are as many as two ranks, or fewer.
    heads = 4 if request.param in ("qwen2_5_vl", "qwen3_vl_moe") else 2
    return in_float64(unsettle(toy.new_policy(0, hidden=32, layers=3, heads=heads, family=request.param)))


def prompts_of(policy: Policy) -> list:
    """With no picture, one, one and two."""
    return [encode(policy, question, "bare") for question in QUESTIONS]


def publish(policy: Policy, directory: Path) -> None:
    """In the layout of the hub: the names of transformers 4 for Qwen2, experts as [E, in, out]."""
    save_policy(policy, directory)
    weights = {}
    for name, value in policy.model.named_parameters():  # a head that is tied comes once
        if policy.model.config.model_type.startswith("qwen2"):
            name = name.replace("model.visual.", "visual.").replace(".language_model.", ".")
        turned = ".experts." in name
        weights[name] = (value.transpose(1, 2) if turned else value).detach().contiguous()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def published(family, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp(family.model.config.model_type)
    publish(family, directory)
    return directory


def load_sharded(directory: Path) -> Policy:
    """Each rank reads its own part of the weights, as in training."""
    policy = load_policy(str(directory), torch.float64, empty=True)
    policy.model.set_experts_implementation("eager")
    policy = parallel.shard(policy, torch.device("cpu"))
    checkpoint.load_weights(directory, policy)
    return policy


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, whole; clears them."""
    found = {n: parallel.whole(p.grad).clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def test_trees_equal_separate_rows_of_transformers(family):
    """Log-probabilities and every gradient, on one batch of rows with no picture, one and two."""
    groups = [
        (prompt, [random_response(length, 10 * i + length, family) for length in (7, 1, 12)])
        for i, prompt in enumerate(prompts_of(family))
    ]
    logprobs, _ = response_logprobs(family, groups)
    pull = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    (logprobs * pull).sum().backward()
    trees, b = gradients(family), 0
    for prompt, ys in groups:
        for y in ys:
            want = hf_logprobs(family, prompt, y)
            assert (logprobs[b, : len(y)] - want).abs().max() < 1e-5
            (want * pull[b, : len(y)]).sum().backward()
            b += 1
    rows = gradients(family)
    assert trees.keys() == rows.keys() == dict(family.named_parameters()).keys()
    for name in trees:
        assert relative_difference(trees[name], rows[name]) < 1e-5, name


def test_greedy_decoding_equals_generate_token_for_token(family):
    prompts = prompts_of(family)
    for prompt, [sample] in zip(prompts, generate(family, prompts, 1, 40, temperature=0)):
        assert torch.equal(sample.tokens, hf_generate(family, prompt, 40))


def test_the_published_layout_loads_whole_and_sharded(family, published, alone):
    want = dict(family.model.named_parameters())
    whole = load_policy(str(published), torch.float64)
    sharded = load_sharded(published)
    for loaded in (whole, sharded):
        for name, parameter in loaded.model.named_parameters():
            assert torch.equal(parallel.whole(parameter.detach()), want[name]), name
    # What is no weight, such as rotary frequencies, is there as well.
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), sharded.buffers()))


def test_what_is_saved_loads_in_transformers_with_nothing_missing(family, published, tmp_path):
    again = load_policy(str(published), torch.float64)
    save_policy(again, tmp_path)
    again.model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float64, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    y = random_response(9, 0, family)
    with torch.no_grad():
        for prompt in prompts_of(family):
            difference = hf_logprobs(again, prompt, y) - hf_logprobs(family, prompt, y)
            assert difference.abs().max() < 1e-4  # transformers rounds to float32 in its norms


def test_experts_are_the_same_by_every_kernel():
    """The kernels that are taken without being asked, in float32 as on a CPU."""
    policy = unsettle(toy.new_policy(0, hidden=64, layers=2, family="qwen3_vl_moe"))
    groups = [(prompt, [random_response(9, 0, policy)]) for prompt in prompts_of(policy)]
    with torch.no_grad():
        got, _ = response_logprobs(policy, groups)
        want, _ = response_logprobs(in_float64(policy), groups)
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_reinforcement_teaches_every_family(name, tmp_path):
    """Of six colours to guess, three are paid for: from a half of the guesses to nearly all."""

    def paid(text, question):
        return float(extract_answer(text) in ("red", "green", "blue"))

    settings = {"steps": 12, "heldout": 0, "batch_size": 32, "save_every": 100, "lr": 6e-3}
    assert train.main(flags(make_base(name), tmp_path, **settings), paid) == 0
    rewards = [row["reward"] for row in steps_of(tmp_path)]
    assert sum(rewards[:2]) / 2 < 0.7 and sum(rewards[-4:]) / 4 > 0.8


# ---------------------------------------------------------------------------- several ranks


def one_batch(policy: Policy, rank: int) -> list:
    """Two pictures on one rank, text alone on the next."""
    prompt = encode(policy, QUESTIONS[0 if rank % 2 else 3], "bare")
    return [(prompt, [random_response(5 + i, i, policy) for i in range(3)])]


def responses(policy: Policy) -> list:
    """What is sampled at temperature 0 and 1, from whole weights or slices, and log-probabilities by the training
    forward pass."""
    prompts, said = prompts_of(policy), []
    with torch.no_grad(), parallel.weights_to_sample(policy):
        for temperature in (0.0, 1.0):
            groups = generate(policy, prompts, 2, 12, temperature)
            said.append([[s.tokens.tolist() for s in group] for group in groups])
        pairs = [(prompt, [s.tokens for s in group]) for prompt, group in zip(prompts, groups)]
        return [said, response_logprobs(policy, pairs)[0].tolist()]


def assert_same_responses(found: list, want: list) -> None:
    """Token for token, and by the training forward pass, on every rank."""
    assert found == [found[0]] * len(found)
    (said, logprobs), (said_by_one, logprobs_by_one) = found[0], want
    assert said == said_by_one
    assert (torch.tensor(logprobs) - torch.tensor(logprobs_by_one)).abs().max() < 1e-5


def test_ranks_with_and_without_pictures_take_the_gradient_of_one_and_sample_its_responses(
    family, published, tmp_path
):
    """Four ranks: the whole step is sharded over all, two and two sample from slices of every layer."""

    def action():
        parallel.start()
        policy = load_sharded(published)
        logprobs, _ = response_logprobs(policy, one_batch(policy, parallel.rank()))
        # FSDP takes the mean over ranks, and each batch is on two of four.
        (logprobs.sum() * parallel.world() / 2).backward()
        found = gradients(policy)
        if parallel.rank() == 0:
            save_file(found, tmp_path / "gradients")
        policy.slices = parallel.slices(policy, 2)
        said = responses(policy)
        response_logprobs(policy, one_batch(policy, 0))[0].sum().backward()  # it trains on
        return said

    said = on_ranks(4, action)
    for rank in (0, 1):
        response_logprobs(family, one_batch(family, rank))[0].sum().backward()
    want, got = gradients(family), load_file(tmp_path / "gradients")
    assert got.keys() == want.keys() == dict(family.named_parameters()).keys()
    for parameter in want:
        assert relative_difference(got[parameter], want[parameter]) < 1e-5, parameter
    whole = load_policy(str(published), torch.float64)
    whole.model.set_experts_implementation("eager")
    assert_same_responses(said, responses(whole))


def test_adapters_are_cut_with_the_layers_they_stand_on(policy):
    """LoRA under --tensor: two ranks sample from slices what one samples."""
    adapted = copy.deepcopy(policy)
    lora.adapt(adapted, 4, 16.0)
    adapted.double()
    lora.initialise(adapted, seed=0)
    with torch.no_grad():
        for module in lora.adapted(adapted).values():
            module.lora_B.copy_(module.lora_B + 0.05)
    want = responses(adapted)
    assert want != responses(copy.deepcopy(policy).double())

    def action():
        parallel.start()
        sharded = parallel.shard(adapted, torch.device("cpu"))
        sharded.slices = parallel.slices(sharded, 2)
        return responses(sharded)

    assert_same_responses(on_ranks(2, action), want)


def evaluate(policy: Path, out: Path, *flags) -> int:
    """`eval.py` in float64."""
    real = model.load_policy
    command = ["--model", policy, "--limit", 12, "--max_new_tokens", 9, "--rows", 4, "--out", out, *flags]
    with mock.patch.object(
        model, "load_policy", lambda path, _, **bounds: real(path, torch.float64, **bounds)
    ):
        return evaluation.main([str(x) for x in command])


def test_two_groups_of_two_ranks_evaluate_as_one_rank_does(tmp_path):
    publish(in_float64(unsettle(toy.new_policy(0, hidden=32, layers=2))), tmp_path / "model")
    assert evaluate(tmp_path / "model", tmp_path / "one") == 0

    def action():
        asking.RANK = evaluation.RANK = int(os.environ["RANK"])  # read when they are imported
        asking.WORLD = 4
        return evaluate(tmp_path / "model", tmp_path / "four", "--tensor", 2)

    assert on_ranks(4, action) == [0] * 4
    one, four = ((tmp_path / out / "toy.jsonl").read_text() for out in ("one", "four"))
    assert one == four and one.count("\n") == 12


def test_what_cannot_be_cut_is_refused_in_one_line(monkeypatch):
    policy = toy.new_policy(0, hidden=24, layers=1, heads=4)  # 4 heads, 2 of keys and values, 72 columns
    for ranks, why in (("24", "4 heads on 2 .* 72 MLP columns"), ("4", "does not divide the 4 ranks")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        with pytest.raises(UserError, match=f"--tensor 3.* {why}"):
            parallel.slices(policy, 3)
