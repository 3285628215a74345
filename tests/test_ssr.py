"""Selective Sample Replay: Algorithm 1 worked by hand, and the law of its draws."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import chi_squared

from ssr import ReplayBuffer, effective_sample_size, is_effective, replay_batch


class S(SimpleNamespace):
    """A sample: an advantage and its identity."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def samples(*advantages) -> list:
    return [S(advantage=a) for a in advantages]


def filled(*advantages, **settings) -> tuple[ReplayBuffer, list]:
    buffer, kept = ReplayBuffer(**settings), samples(*advantages)
    buffer.add(kept)
    return buffer, kept


# ---------------------------------------------------------------------------- Algorithm 1


def test_algorithm_1_worked_by_hand():
    """Two batches of four. In each, the effective ones come first, in order, and draws fill up."""
    buffer = ReplayBuffer(seed=3)
    a, b, c, d = samples(0.5, 0.0, -0.5, 0.0)
    batch = replay_batch([a, b, c, d], buffer, size=4)
    # D_eff = {a, c}; B = {a, c} before drawing; n = 4 - 2 draws from B.
    assert batch[:2] == [a, c] and len(batch) == 4 and set(batch[2:]) <= {a, c}
    assert buffer.samples == [a, c]
    e, f, g, h = samples(0.0, 0.875, 0.0, 0.0)
    batch = replay_batch([e, f, g, h], buffer, size=4)
    # D_eff = {f}; B = {a, c, f}; n = 3.
    assert batch[0] is f and len(batch) == 4 and set(batch[1:]) <= {a, c, f}
    assert buffer.samples == [a, c, f]


def test_more_effective_samples_than_the_batch_holds_are_all_trained():
    """max(0, N - |D_eff|): nothing is cut."""
    fresh = samples(0.25, -0.75, 0.5)
    assert replay_batch(fresh, ReplayBuffer(), size=2) == fresh


@pytest.mark.parametrize("alpha", [0, 1, 1000])
@pytest.mark.parametrize("replacement", [True, False])
def test_nothing_effective_and_nothing_stored_is_legal_and_ends(alpha, replacement):
    buffer = ReplayBuffer(alpha, replacement=replacement)
    assert buffer.draw(5) == []
    assert replay_batch(samples(0.0, 0.0), buffer, size=2) == []
    assert replay_batch([], buffer, size=2) == []
    assert len(buffer) == 0


# ---------------------------------------------------------------------------- the law of the draws


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2])
def test_draw_frequencies_follow_the_power_of_the_advantage(alpha):
    advantages = [0.125, -0.25, 0.5, 0.5, -0.75, 0.875]
    buffer, kept = filled(*advantages, alpha=alpha, seed=1)
    counts = Counter(s for _ in range(40) for s in buffer.draw(250))
    weights = [abs(a) ** alpha for a in advantages]
    probabilities = [w / sum(weights) for w in weights]
    statistic, limit = chi_squared([counts[s] for s in kept], probabilities)
    assert statistic < limit
    other = [abs(a) ** (alpha + 0.2) for a in advantages]  # an exponent so close is told apart
    statistic, limit = chi_squared([counts[s] for s in kept], [w / sum(other) for w in other])
    assert statistic > limit


@pytest.mark.parametrize("alpha", [0, 1])
def test_draws_without_replacement_are_weighted_too(alpha):
    """One draw follows the same law; two follow it one after the other, without the first."""
    advantages = [0.125, 0.25, 0.5, 0.875]
    buffer, kept = filled(*advantages, alpha=alpha, seed=2, replacement=False)
    p = [abs(a) ** alpha for a in advantages]
    p = [x / sum(p) for x in p]
    pairs = Counter(tuple(buffer.draw(2)) for _ in range(6000))
    places = [(i, j) for i in range(4) for j in range(4) if i != j]
    want = [p[i] * p[j] / (1 - p[i]) for i, j in places]
    statistic, limit = chi_squared([pairs[kept[i], kept[j]] for i, j in places], want)
    assert statistic < limit


@pytest.mark.parametrize("alpha", [0, 0.01, 1, 2])
@pytest.mark.parametrize("replacement", [True, False])
def test_a_zero_advantage_is_never_stored_nor_drawn(alpha, replacement):
    """With alpha = 0 its weight would be 0^0 = 1."""
    buffer, kept = filled(0.0, 0.5, -0.0, -0.5, 0.0, alpha=alpha, replacement=replacement)
    assert len(buffer) == 2
    drawn = [s for _ in range(200) for s in buffer.draw(3)]
    assert set(drawn) == {kept[1], kept[3]}


@pytest.mark.parametrize("advantage", [math.nan, math.inf, -math.inf, 0.0, -0.0])
def test_what_has_no_finite_gradient_is_not_effective(advantage):
    [sample] = samples(advantage)
    assert not is_effective(sample)
    buffer = ReplayBuffer()
    assert replay_batch([sample], buffer, size=1) == [] and len(buffer) == 0


@pytest.mark.parametrize("alpha", [300, 1e6, math.inf])
def test_a_huge_alpha_draws_the_largest_and_overflows_nowhere(alpha):
    buffer, kept = filled(1e-3, -1.0, 50.0, -50.0, 0.5, alpha=alpha)
    assert set(buffer.draw(500)) == {kept[2], kept[3]}


def test_tiny_advantages_do_not_underflow():
    buffer, kept = filled(1e-200, -3e-200, alpha=2)
    counts = Counter(buffer.draw(4000))
    statistic, limit = chi_squared([counts[s] for s in kept], [0.1, 0.9])
    assert statistic < limit


def test_without_replacement_no_sample_comes_twice_and_a_short_buffer_gives_all_it_has():
    for alpha in (0, 1, 1000):
        buffer, kept = filled(0.5, -0.25, 0.125, 0.75, alpha=alpha, replacement=False)
        for n in (1, 3, 4):
            drawn = buffer.draw(n)
            assert len(drawn) == len(set(drawn)) == n
        assert set(buffer.draw(9)) == set(kept) and len(buffer) == 4
        assert len(replay_batch(samples(0.0) * 9, buffer, size=9)) == 4


def test_effective_sample_size_by_hand():
    assert effective_sample_size([2.0] * 5) == 5
    assert effective_sample_size([1.0, 0.5]) == pytest.approx(1.5**2 / 1.25)
    assert effective_sample_size([1.0, 0.0, 0.0]) == 1
    assert effective_sample_size([]) == effective_sample_size([0.0]) == 0


def test_a_negative_alpha_is_refused():
    for alpha in (-1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            ReplayBuffer(alpha)


# ---------------------------------------------------------------------------- state


def test_draws_are_a_function_of_the_seed():
    def draws(seed):
        buffer, kept = filled(*range(1, 30), seed=seed)
        return [[kept.index(s) for s in buffer.draw(10)] for _ in range(3)]

    first = draws(5)
    assert draws(5) == first
    assert draws(6) != first
    assert len({tuple(d) for d in first}) == 3, "each call draws anew"


@pytest.mark.parametrize("replacement", [True, False])
def test_the_samples_and_one_number_are_the_whole_state(replacement):
    """A buffer made from them goes on as the first one would have."""
    buffer, _ = filled(*range(1, 30), alpha=2, seed=7, replacement=replacement)
    for n in (3, 0, 5):
        buffer.draw(n)
    buffer.clear()
    fresh = samples(*range(1, 20))
    buffer.add(fresh)
    again = ReplayBuffer(alpha=2, seed=7, replacement=replacement)
    again.samples, again.draws = copy.copy(buffer.samples), buffer.draws
    for n in (4, 9):
        assert again.draw(n) == buffer.draw(n)
