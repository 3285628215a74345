"""The advantages and the loss, by hand."""

import math

import pytest
import torch

from grpo import group_advantages, is_clipped, policy_loss, token_weights


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
    mask = torch.tensor([[True] + [False] * 5] * 2)
    new = rows([0.1, *garbage], [-0.1, *garbage]).requires_grad_()
    old = rows([0.0, *reversed(garbage)], [0.0, *garbage])
    loss = policy_loss(new, old, rows(1, -1).flatten(), mask)
    loss.sum().backward()
    assert (loss[:, 1:] == 0).all() and (new.grad[:, 1:] == 0).all()
    assert torch.isfinite(loss[:, 0]).all() and (new.grad[:, 0] != 0).all()
    assert not is_clipped(new, old, rows(1, -1).flatten(), mask)[:, 1:].any()


# ---------------------------------------------------------------------------- the mean


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_token_weights_of_a_batch_sum_to_one_however_it_is_cut(average):
    lengths = [1, 9, 4, 0, 4, 2]  # of one response all tokens are forced
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    for cut in ([6], [2, 4], [1] * 6):
        parts = [token_weights(m, average, tokens=20, responses=5) for m in mask.split(cut)]
        weights = torch.cat(parts)
        assert weights.sum().item() == pytest.approx(1)
        assert (weights[~mask] == 0).all()
        each = weights.sum(-1)
        by_hand = torch.tensor(lengths) / 20 if average == "token" else mask.any(-1) / 5
        torch.testing.assert_close(each, by_hand)
