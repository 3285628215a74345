"""LoRA: the equation, its gradients, and that nothing else notices it."""

import copy
import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import QUESTIONS, hf_logprobs, random_response
from safetensors import safe_open
from tiny import flags, run_training, same_tensors, steps_of, weights_of
from transformers import AutoModelForImageTextToText

import lora
import train
from checkpoint import trained
from config import parse
from model import encode, load_policy, response_logprobs
from rollout import generate

RANK, ALPHA = 4, 16.0
pytestmark = pytest.mark.usefixtures("reward_by_luck")


@pytest.fixture(scope="module")
def pair(policy):
    """(a policy with adapters that have learnt something, one that holds W + (alpha / r) B A), in float64."""
    adapted, merged = copy.deepcopy(policy), copy.deepcopy(policy).double()
    lora.adapt(adapted, RANK, ALPHA)
    adapted.double()
    lora.initialise(adapted, seed=0)
    modules, draw = dict(merged.model.named_modules()), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in lora.adapted(adapted).items():
            module.lora_B.copy_(0.05 * torch.randn(module.lora_B.shape, generator=draw))
            modules[name].weight += ALPHA / RANK * module.lora_B @ module.lora_A
    return adapted, merged


def groups_of(prompts, policy):
    return [(p, [random_response(n, n, policy) for n in (5, 2, 9)]) for p in prompts]


def test_it_starts_as_the_base_exactly(policy, prompts):
    fresh = copy.deepcopy(policy)
    lora.adapt(fresh, RANK, ALPHA)
    lora.initialise(fresh, seed=0)
    assert all(bool(m.lora_A.any()) for m in lora.adapted(fresh).values())
    groups = groups_of(prompts, policy)
    with torch.no_grad():
        found, expected = (response_logprobs(p, groups)[0] for p in (fresh, policy))
    assert torch.equal(found, expected)


def test_trees_take_the_merged_weights_and_their_gradient(pair, prompts):
    """dL/dB = (alpha / r) dL/dW A^T and dL/dA = (alpha / r) B^T dL/dW, with dL/dW of full training."""
    adapted, full = pair
    groups = groups_of(prompts, full)
    found, expected = (response_logprobs(p, groups)[0] for p in (adapted, full))
    assert (found - expected).abs().max() < 1e-10
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).double()
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    dense = dict(full.model.named_modules())
    for name, module in lora.adapted(adapted).items():
        dW = ALPHA / RANK * dense[name].weight.grad
        torch.testing.assert_close(module.lora_B.grad, dW @ module.lora_A.T)
        torch.testing.assert_close(module.lora_A.grad, module.lora_B.T @ dW)
    full.zero_grad(), adapted.zero_grad()


def test_rollouts_are_those_of_the_merged_weights(pair, prompts):
    for temperature in (0.0, 1.0):
        found, expected = (generate(p, prompts, 3, 12, temperature) for p in pair)
        for mine, theirs in zip(chain(*found), chain(*expected)):
            assert torch.equal(mine.tokens, theirs.tokens)
            assert (mine.logprobs - theirs.logprobs).abs().max() < 1e-5  # kept in fp32


SETTINGS = {"lora_rank": RANK, "lora_alpha": 8, "lr": 1e-2, "rethink_fraction": 0.5}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory, by_luck) -> Path:
    """Two episodes of two steps with adapters, a checkpoint at steps 1 to 4."""
    out = tmp_path_factory.mktemp("lora")
    with by_luck():
        return run_training(base, out, **SETTINGS, save_every=1, keep_last=9)


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    with safe_open(checkpoint / "state-0-of-1.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}


def test_only_adapters_have_state_and_only_projections_move(run, base):
    kinds = {"param", "step", "exp_avg", "exp_avg_sq"}
    names = state_of(run / "checkpoint-4")
    assert {name.split("/")[0] for name in names} == kinds
    assert all(name.endswith(("lora_A", "lora_B")) for name in names)
    before, after = weights_of(base), weights_of(run / "checkpoint-4")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved == {n for n in before if n.endswith("_proj.weight") and "visual" not in n}
    assert max(row["logp_mismatch"] for row in steps_of(run)) < 1e-4


def test_a_resumed_run_is_the_run(run, base, tmp_path):
    out = shutil.copytree(run, tmp_path / "copy")
    for step in (4, 3):
        shutil.rmtree(out / f"checkpoint-{step}")
    run_training(base, out, **SETTINGS, resume="true")
    assert steps_of(out) == steps_of(run)
    for tensors in (weights_of, state_of):
        assert same_tensors(tensors(out / "checkpoint-4"), tensors(run / "checkpoint-4"))


def test_the_checkpoint_is_the_adapted_policy_for_transformers(run, base, prompts):
    """The merged model, loaded from the hub's layout, against the base with A and B of the state."""
    saved = run / "checkpoint-4"
    adapted, merged, state = load_policy(str(base)), load_policy(str(saved)), state_of(saved)
    lora.adapt(adapted, RANK, SETTINGS["lora_alpha"])
    response = random_response(6, 0, merged)
    with torch.no_grad():
        for name, parameter in trained(adapted):
            parameter.copy_(state[f"param/{name}"])
        found = hf_logprobs(merged, prompts[1], response)
        expected = response_logprobs(adapted, [(prompts[1], [response])])[0][0]
    assert (found - expected).abs().max() < 1e-4


def test_the_adapter_loads_in_peft(run, base, prompts):
    peft = pytest.importorskip("peft")
    saved = run / "checkpoint-4"
    assert json.loads((saved / "adapter/adapter_config.json").read_text())["r"] == RANK
    model = peft.PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(base), str(saved / "adapter")
    )
    loaded = load_policy(str(base))
    loaded.model = model.base_model.model
    response = random_response(6, 0, loaded)
    with torch.no_grad():
        found, expected = (hf_logprobs(p, prompts[1], response) for p in (loaded, load_policy(str(saved))))
    assert (found - expected).abs().max() < 1e-4
    assert not torch.equal(found, hf_logprobs(load_policy(str(base)), prompts[1], response))


def test_a_frozen_tower_stays_has_no_moments_and_no_backward(base, tmp_path, capsys):
    settings = {"train_vision": "false", "batch_size": 32, "heldout": 0}
    out = run_training(base, tmp_path / "run", **settings, steps=1)
    before, after = weights_of(base), weights_of(out / "checkpoint-1")
    for name in before:
        assert torch.equal(before[name], after[name]) == ("visual" in name), name
    assert not any("visual" in name for name in state_of(out / "checkpoint-1"))
    # So another --model would be another tower, without a word.
    other = shutil.copytree(base, tmp_path / "other")
    assert train.main(flags(other, out, **settings, steps=2, resume="true")) == 2
    assert "--model" in capsys.readouterr().err.splitlines()[-1]
    policy, seen = train.prepare(parse(flags(base, tmp_path / "new", **settings))).policy, []
    policy.model.model.visual.register_forward_hook(lambda *args: seen.append(args[2].pooler_output))
    response_logprobs(policy, groups_of([encode(policy, QUESTIONS[1], "bare")], policy))[0].sum().backward()
    assert len(seen) == 1 and not seen[0].requires_grad
    assert all(p.grad is None for p in policy.model.model.visual.parameters())
    assert policy.text_model.embed_tokens.weight.grad is not None
