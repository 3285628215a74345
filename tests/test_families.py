"""Every Qwen-VL by the same code: Qwen2-VL, Qwen2.5-VL and Qwen3-VL, dense and MoE, against transformers.

In float64, so that what differs is a mistake and not a rounding error, and no expert is chosen otherwise.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    QUESTIONS,
    hf_generate,
    hf_inputs,
    hf_logprobs,
    noise_image,
    random_response,
    relative_difference,
    unsettle,
)
from family_ranks import evaluate, gradients, load_sharded, one_batch, responses
from safetensors.torch import load_file, save_file
from tiny import flags, make_base, steps_of
from transformers import AutoConfig, AutoModelForImageTextToText

import parallel
import toy
import train
from data import Question, UserError
from model import FAMILIES, Policy, encode, load_policy, response_logprobs, save_policy
from reward import extract_answer
from rollout import generate

LIMIT = 150  # seconds: longer is a hang


def in_float64(policy: Policy) -> Policy:
    policy.model.set_experts_implementation("eager")  # the other kernels know no float64
    return policy.double()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> Policy:
    policy = toy.new_policy(0, hidden=64, layers=3, heads=4, family=request.param)
    return in_float64(unsettle(policy))


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


def test_pictures_are_bounded_in_the_family_s_own_visual_tokens(published):
    """256 x 28 x 28 pixels are 256 tokens of Qwen2.5-VL and 196 of Qwen3-VL."""
    policy = load_policy(str(published), max_image_tokens=12)
    prompt = encode(policy, Question("q", "<image>", [noise_image(640, 640)], ""), "bare")
    assert int((prompt.input_ids == policy.model.config.image_token_id).sum()) == 9  # 3 x 3


def test_what_is_saved_loads_in_transformers_with_nothing_missing(family, published, tmp_path):
    save_policy(load_policy(str(published), torch.float64), tmp_path)
    plain, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float64, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    for prompt in prompts_of(family):
        inputs = hf_inputs(family, prompt, prompt.input_ids)
        with torch.no_grad():
            # transformers rounds to float32 in its norms
            difference = plain(**inputs).logits - family.model(**inputs).logits
        assert difference.abs().max() < 1e-4


def test_experts_are_the_same_by_every_kernel(tmp_path):
    """The kernels that are taken without being asked, in float32 as on a CPU."""
    policy = unsettle(toy.new_policy(0, hidden=64, layers=2, family="qwen3_vl_moe"))
    groups = [(prompt, [random_response(9, 0, policy)]) for prompt in prompts_of(policy)]
    with torch.no_grad():
        got, _ = response_logprobs(policy, groups)
        want, _ = response_logprobs(in_float64(policy), groups)
    assert (got - want).abs().max() < 1e-4


def test_linear_attention_is_refused_in_one_line_that_says_why(tmp_path):
    AutoConfig.for_model("qwen3_5").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="qwen3_5.*linear attention.*tree.*qwen3_vl") as refused:
        load_policy(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_reinforcement_teaches_every_family(name, tmp_path):
    """Of six colours to guess, three are paid for: from a half of the guesses to nearly all."""

    def paid(text, question):
        return float(extract_answer(text) in ("red", "green", "blue"))

    settings = {"steps": 24, "heldout": 0, "batch_size": 32, "save_every": 100, "lr": 3e-3}
    assert train.main(flags(make_base(name), tmp_path, **settings), paid) == 0
    rewards = [row["reward"] for row in steps_of(tmp_path)]
    assert sum(rewards[:2]) / 2 < 0.7 and sum(rewards[-8:]) / 8 > 0.8


# ---------------------------------------------------------------------------- several ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """What family_ranks.py saw on four ranks: a folder with each family's policy and its gradients."""
    out = tmp_path_factory.mktemp("families")
    for name in FAMILIES:  # one with as many key-value heads as ranks, one with fewer
        heads = 4 if name in ("qwen2_5_vl", "qwen3_vl_moe") else 2
        policy = toy.new_policy(0, hidden=32, layers=3, heads=heads, family=name)
        policy = in_float64(unsettle(policy))
        publish(policy, out / name)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    script = Path(__file__).with_name("family_ranks.py")
    done = subprocess.run(
        [sys.executable, "-m", *launch, script, out], timeout=LIMIT, check=False, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-5000:]
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_with_and_without_pictures_take_the_gradient_of_one(ranks, name):
    policy = load_policy(str(ranks / name), torch.float64)
    policy.model.set_experts_implementation("eager")
    for rank in (0, 1):
        response_logprobs(policy, one_batch(policy, rank))[0].sum().backward()
    want, got = gradients(policy), load_file(ranks / f"{name}.safetensors")
    assert got.keys() == want.keys() == dict(policy.named_parameters()).keys()
    for parameter in want:
        assert relative_difference(got[parameter], want[parameter]) < 1e-5, parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_sample_from_slices_what_one_samples_from_whole_layers(ranks, name):
    """Token for token, and by the training forward pass."""
    policy = load_policy(str(ranks / name), torch.float64)
    policy.model.set_experts_implementation("eager")
    want, (first, *others) = responses(policy), json.loads((ranks / f"{name}.json").read_text())
    assert others == [first] * 3
    for temperature in ("0.0", "1.0"):
        assert first[temperature] == want[temperature]
    difference = torch.tensor(first["logprobs"]) - torch.tensor(want["logprobs"])
    assert difference.abs().max() < 1e-5


def test_two_groups_of_two_ranks_evaluate_as_one_rank_does(ranks, tmp_path):
    evaluate(ranks / FAMILIES[1], tmp_path)
    one, two = ((path / "toy.jsonl").read_text() for path in (tmp_path, ranks / "together"))
    assert one == two and one.count("\n") == 12


@pytest.mark.parametrize("parts", [3, 8])
def test_what_cannot_be_cut_is_refused_in_one_line(monkeypatch, parts):
    policy = toy.new_policy(0, hidden=24, layers=1, heads=4)  # 4 heads, 2 of keys and values, 72 columns
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "24")
    with pytest.raises(UserError, match=f"--tensor {parts}: 4 heads on 2 .* 72 MLP columns"):
        parallel.slices(policy, parts)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=f"--tensor {parts} does not divide the 4 ranks"):
        parallel.slices(policy, parts)
