"""Selective Sample Replay: Algorithm 1 worked by hand, and the law of its draws."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
from buffers import BUFFERS
from conftest import follows

from ssr import ReplayBuffer, is_effective, replay_batch


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
    # max(0, N - |D_eff|): where more are effective than the batch holds, none is cut.
    assert replay_batch([a, c, f], buffer, size=2) == [a, c, f]


# ---------------------------------------------------------------------------- the law of the draws


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2])
def test_draw_frequencies_follow_the_power_of_the_advantage(alpha):
    advantages = [0.125, -0.25, 0.5, 0.5, -0.75, 0.875]
    buffer, kept = filled(*advantages, alpha=alpha, seed=1)
    counts = Counter(s for _ in range(40) for s in buffer.draw(250))
    weights = [abs(a) ** alpha for a in advantages]
    assert follows([counts[s] for s in kept], [w / sum(weights) for w in weights])
    other = [abs(a) ** (alpha + 0.2) for a in advantages]  # an exponent so close is told apart
    assert not follows([counts[s] for s in kept], [w / sum(other) for w in other])


@pytest.mark.parametrize("alpha", [0, 0.01, 2])
def test_what_has_no_finite_gradient_is_never_stored_nor_drawn(alpha):
    """With alpha = 0 the weight of a zero advantage would be 0^0 = 1."""
    buffer, kept = filled(0.0, 0.5, -0.0, math.nan, math.inf, -math.inf, -0.5, 0.0, alpha=alpha)
    assert buffer.samples == [kept[1], kept[6]]
    assert set(buffer.draw(600)) == {kept[1], kept[6]}


# ---------------------------------------------------------------------------- state


def test_the_seed_the_samples_and_one_number_are_the_whole_state():
    """A buffer made from them goes on as the first one would have."""
    buffer, kept = filled(*range(1, 30), alpha=2, seed=7)
    assert buffer.draw(10) != buffer.draw(10), "each call draws anew"
    again, other = ReplayBuffer(alpha=2, seed=7), ReplayBuffer(alpha=2, seed=8)
    again.samples = other.samples = kept
    again.draws = other.draws = buffer.draws
    for n in (0, 4, 9):
        assert again.draw(n) == buffer.draw(n)
    assert again.draw(9) != other.draw(9)


# ---------------------------------------------------------------------------- other buffers


EPISODES = [samples(0.5, 0.0, -0.5, 0.25), samples(0.0, 0.75, 0.0, 0.0), samples(0.0, 0.0, 0.5, 0.0)]


def within_reach(buffer) -> list:
    """Before each draw for a batch of two, what could be drawn, by (episode, place)."""
    places = {s: (e, i) for e, episode in enumerate(EPISODES) for i, s in enumerate(episode)}
    found = []
    for episode in EPISODES:
        buffer.begin(episode)
        for fresh in (episode[:2], episode[2:]):
            batch = replay_batch(fresh, buffer, size=2)
            found.append([places[s] for s in buffer.samples])
            assert len(batch) == 2 if buffer.samples else batch == []
            assert all(is_effective(s) for s in batch)
    return found


def test_what_each_buffer_draws_from_worked_by_hand():
    a, b, c, d, e = (0, 0), (0, 2), (0, 3), (1, 1), (2, 2)  # the effective ones
    assert within_reach(ReplayBuffer()) == [[a], [a, b, c], [d], [d], [], [e]]
    assert within_reach(BUFFERS["whole"](seed=0)) == [[a, b, c], [a, b, c], [d], [d], [e], [e]]
    assert within_reach(BUFFERS["two"](seed=0)) == [[a], [a, b, c], [a, b, c, d], [a, b, c, d], [d], [d, e]]


def test_no_sample_is_drawn_more_often_than_allowed():
    buffer, (a, b) = BUFFERS["most4"](seed=0), samples(0.5, 1e-9)
    buffer.begin([a, b])
    buffer.add([a])
    assert buffer.draw(3) == [a] * 3
    buffer.add([b])
    assert Counter(buffer.draw(9)) == {a: 1, b: 4}  # a batch that cannot be filled
    assert buffer.samples == [] and buffer.draw(2) == []
    buffer.begin([a])
    buffer.add([a])
    assert buffer.draw(9) == [a] * 4  # allowed again


@pytest.mark.parametrize("name", ["whole", "two", "most4"])
def test_each_buffer_draws_in_proportion_to_the_advantage(name):
    counts, kept = Counter(), samples(0.125, -0.25, 0.5, -0.75)
    for seed in range(1500):
        buffer = BUFFERS[name](seed)
        buffer.begin(kept)
        buffer.add(kept)
        counts.update(buffer.draw(2))
    assert follows([counts[s] for s in kept], [1 / 13, 2 / 13, 4 / 13, 6 / 13])
