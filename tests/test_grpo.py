"""The advantages and the loss, by hand; and what of a response is trained."""

import math

import pytest
import torch

from grpo import group_advantages, is_clipped, policy_loss, token_weights
from model import response_logprobs
from rollout import Continuation, generate

T, F = True, False


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


# ---------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    rewards = rows([1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0])
    mean = group_advantages(rewards, "mean")
    assert mean.tolist() == [[0.875] + [-0.125] * 7, [0.25] * 6 + [-0.75] * 2]
    # The variance of k successes in 8 is k (8 - k) / 64: 7/64 and 12/64.
    std = group_advantages(rewards, "std")
    a, b = math.sqrt(7) / 8, math.sqrt(12) / 8
    want = rows([0.875 / a] + [-0.125 / a] * 7, [0.25 / b] * 6 + [-0.75 / b] * 2)
    torch.testing.assert_close(std, want)


@pytest.mark.parametrize("scale", ["mean", "std"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 1e8])
def test_a_group_of_equal_rewards_has_exactly_no_advantage(scale, reward):
    for size in (2, 3, 7, 8):
        got = group_advantages(torch.full((2, size), reward), scale)
        assert got.tolist() == [[0.0] * size] * 2


def test_a_group_s_advantages_sum_to_zero_and_std_gives_them_size_one():
    rewards = torch.randint(0, 2, (50, 8), generator=torch.Generator().manual_seed(0))
    for scale in ("mean", "std"):
        got = group_advantages(rewards, scale)
        torch.testing.assert_close(got.sum(-1), torch.zeros(50), atol=1e-5, rtol=0)
    mixed = (rewards != rewards[:, :1]).any(-1)
    torch.testing.assert_close(got[mixed].square().mean(-1), torch.ones(int(mixed.sum())))


# ---------------------------------------------------------------------------- the loss


def test_the_clipped_loss_by_hand_on_both_sides():
    """Ratios 0.5, 0.9, 1, 1.2, 2 between the bounds 0.8 and 1.35, for A = 2 and for A = -2."""
    ratio = rows([0.5, 0.9, 1, 1.2, 2]).expand(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    new = ratio.log().clone().requires_grad_()
    advantages = rows(2, -2).flatten()
    loss = policy_loss(new, torch.zeros(2, 5), advantages, mask, clip_low=0.2, clip_high=0.35)
    want = rows([-1.0, -1.8, -2, -2.4, -2.7], [1.6, 1.8, 2, 2.4, 4.0])
    torch.testing.assert_close(loss.detach(), want)
    # d loss / d logp = -A ratio where the clip does not hold; it holds a rise that has gone too far
    # up, and a fall that has gone too far down, and never what brings the ratio back.
    loss.sum().backward()
    want = rows([-1.0, -1.8, -2, -2.4, 0], [0, 1.8, 2, 2.4, 4.0])
    torch.testing.assert_close(new.grad, want)
    held = is_clipped(new, torch.zeros(2, 5), advantages, mask, 0.2, 0.35)
    assert torch.equal(held, new.grad == 0)


def test_masked_places_give_no_loss_no_gradient_and_no_nan_whatever_they_hold():
    garbage = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30]
    mask = torch.tensor([[T] + [F] * 5, [T] + [F] * 5])
    new = rows([0.1, *garbage], [-0.1, *garbage]).requires_grad_()
    old = rows([0.0, *reversed(garbage)], [0.0, *garbage])
    loss = policy_loss(new, old, rows(1, -1).flatten(), mask)
    loss.sum().backward()
    assert (loss[:, 1:] == 0).all() and (new.grad[:, 1:] == 0).all()
    assert torch.isfinite(loss[:, 0]).all() and (new.grad[:, 0] != 0).all()
    assert not is_clipped(new, old, rows(1, -1).flatten(), mask)[:, 1:].any()


def test_on_policy_the_gradient_is_minus_the_advantage():
    """Where the ratio is 1 the surrogate's gradient is REINFORCE's."""
    new = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([[T, T, T, T], [T, T, F, F], [T, F, F, F]])
    advantages = rows(0.5, -0.25, 2).flatten()
    policy_loss(new, new.detach(), advantages, mask).sum().backward()
    torch.testing.assert_close(new.grad, -advantages[:, None] * mask)


# ---------------------------------------------------------------------------- the mean


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_token_weights_of_a_batch_sum_to_one_however_it_is_cut(average):
    lengths = [1, 9, 4, 4, 2]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    for cut in ([5], [2, 3], [1, 1, 1, 1, 1]):
        parts = [token_weights(m, average, tokens=20, responses=5) for m in mask.split(cut)]
        weights = torch.cat(parts)
        assert weights.sum().item() == pytest.approx(1)
        assert (weights[~mask] == 0).all()
        each = weights.sum(-1)
        by_hand = torch.tensor(lengths) / 20 if average == "token" else torch.full((5,), 0.2)
        torch.testing.assert_close(each, by_hand)


def test_a_response_of_forced_tokens_alone_weighs_nothing():
    mask = torch.tensor([[T, T], [F, F]])
    for average in ("token", "sequence"):
        weights = token_weights(mask, average, tokens=2, responses=1)
        assert weights[1].tolist() == [0, 0] and weights[0].tolist() == [0.5, 0.5]


# ---------------------------------------------------------------------------- with a policy


def test_eos_is_trained_and_pad_prompt_and_forced_tokens_are_not(policy, prompts):
    """The gradient of the loss, at every place of every response."""

    def extend(n, g, sample):
        fits = 2 <= len(sample.tokens) < 30
        return Continuation(len(sample.tokens) - 1, [30, 31], "a kind") if fits else None

    groups = generate(policy, prompts, 4, 40, 1.0, extend=extend)
    samples = [[s.second_look or s for s in group] for group in groups]
    trees = [(group[0].prompt, [s.tokens for s in group]) for group in samples]
    flat = [s for group in samples for s in group]
    assert {s.finish for s in flat} == {"stop", "length"}
    logprobs, _ = response_logprobs(policy, trees)
    logprobs.retain_grad()
    B, R = logprobs.shape
    assert B == len(flat), "a place in the loss for every response, and none for the prompt"
    old, mask = torch.zeros(B, R), torch.zeros(B, R, dtype=torch.bool)
    for b, s in enumerate(flat):
        old[b, : len(s.tokens)], mask[b, : len(s.tokens)] = s.logprobs, s.mask
    advantages = torch.tensor([1.0, -0.5] * (B // 2))
    policy_loss(logprobs, old, advantages, mask).sum().backward()
    policy.zero_grad()
    trained = logprobs.grad != 0
    for b, s in enumerate(flat):
        last = len(s.tokens) - 1
        assert not trained[b, last + 1 :].any()
        assert trained[b, last], "the last token, EOS where the policy said it"
        forced = (~s.mask).nonzero()[:, 0].tolist()
        assert len(forced) == (2 if s.rethought else 0)
        places = set(range(last + 1)) - set(forced)
        assert trained[b].nonzero()[:, 0].tolist() == sorted(places)
    assert any(s.rethought for s in flat)
