"""recipes/study_gradients.py measures training's own gradients; recipes/imitate_first.py imitates what is right."""

import imitate_first
import pytest
import study_gradients
import torch
from conftest import relative_difference
from tiny import flags, heldout_of, steps_of

import train
from config import parse
from prepare import prepare

pytestmark = pytest.mark.usefixtures("reward_by_luck")


@pytest.fixture
def run(base, tmp_path):
    """A run whose optimiser has taken two steps, and then only catches gradients."""
    run = prepare(parse(flags(base, tmp_path, ssr="off", episode_queries=8)))
    run.fresh, _ = study_gradients.sample(run, 0, 8)
    for _ in range(2):
        train.train_step(run, 0.0)
    run.real, run.optimizer = run.optimizer, study_gradients.Catch(run.optimizer)
    return run


def test_the_mean_of_all_batches_gradients_is_that_of_the_whole_and_no_weight_moves(run):
    before = [p.detach().clone() for p in run.policy.parameters()]
    samples, effective = study_gradients.sample(run, 1, 8)
    assert len(samples) == 64 and 0 < effective < 1
    [(at_once, numbers)] = study_gradients.gradients(run, samples, batch_size=64, max_grad_norm=0.0)
    batches = list(study_gradients.gradients(run, samples, batch_size=16, max_grad_norm=0.0))
    assert len(batches) == 4 and numbers["tokens"] == sum(n["tokens"] for _, n in batches)
    mean = sum(g * n["tokens"] for g, n in batches) / numbers["tokens"]
    whole, ceiling = study_gradients.whole_gradient(run, samples)
    assert relative_difference(mean, at_once) < 1e-4 > relative_difference(whole, at_once)
    assert 0 < ceiling < 1
    assert all(torch.equal(p, q) for p, q in zip(run.policy.parameters(), before))


def test_filtering_keeps_a_batch_s_direction_and_replay_fills_the_batch(run):
    samples, _ = study_gradients.sample(run, 1, 8)
    run.config.batch_size = 8  # one question, so that some batches have no gradient
    plain, filtered, ssr = (
        list(study_gradients.gradients(run, samples, ssr=s)) for s in ("off", "filter", "replay")
    )
    assert [g is None for g, _ in plain] == [g is None for g, _ in filtered]
    without = [sum(g is None for g, _ in found) for found in (plain, ssr)]
    assert without[0] > without[1]
    for (a, _), (b, _) in zip(plain, filtered):
        assert a is None or study_gradients.cosine(a, b) == pytest.approx(1, abs=1e-5)
    assert any(numbers["replayed"] == 1 for _, numbers in ssr)
    whole = study_gradients.gradients(run, samples, study_gradients.WholeEpisode(0), ssr="replay")
    assert all(numbers["grad_norm"] > 0 for _, numbers in whole) and run.config.ssr == "off"


def test_what_adam_makes_of_a_gradient_is_its_step_without_momentum(run):
    samples, _ = study_gradients.sample(run, 1, 8)
    [(g, _), *_] = study_gradients.gradients(run, samples)
    mine = run.optimizer.as_adam(g)
    parameters, [group] = run.optimizer.parameters, run.real.param_groups
    group |= {"lr": 1.0, "betas": (0.0, group["betas"][1])}
    before = run.optimizer.flat(p.detach().clone() for p in parameters)
    for p, part in zip(parameters, g.split([p.numel() for p in parameters])):
        p.grad = part.view_as(p).clone()
    run.real.step()
    assert relative_difference(before - run.optimizer.flat(p.detach() for p in parameters), mine) < 1e-3


def test_imitation_trains_the_base_on_right_responses_alone_and_rl_goes_on_from_there(
    base, tmp_path, monkeypatch
):
    update, seen = train.update, []

    def watched(run, branches):
        seen.append((branches, [p.detach().clone() for p in run.policy.parameters()]))
        return update(run, branches)

    monkeypatch.setattr(train, "update", watched)
    options = flags(base, tmp_path, ssr="off", eval_every=2)
    imitate_first.main("imitate:2,rl:2,imitate:2", *options)
    starts = [weights for _, weights in seen]
    same = [[all(map(torch.equal, a, b)) for b in starts] for a in starts]
    assert same[0] == [True, False, False, False, True, False]  # the base, at both phases of imitation
    imitates = [all(b.imitate for b in branches) for branches, _ in seen]
    assert imitates == [True, True, False, False, True, True]
    for (branches, _), row in zip(seen, steps_of(tmp_path)):
        if branches[0].imitate:
            assert len(branches) == 16 and all(b.sample.right and not b.draws for b in branches)
            assert row["sft_loss"] > 0 == row["loss"]
        else:
            assert not all(b.sample.right for b in branches) and row["sft_loss"] == 0
    assert [row["step"] for row in heldout_of(tmp_path)] == [0, 2, 4, 6]
    assert (tmp_path / "checkpoint-6").is_dir()


def test_a_batch_without_a_gradient_counts_in_the_share_that_have_one_and_not_in_the_cosine():
    # Of two episodes; the last, of its mean.
    cosines = {"1": ["0.2", "", "0.4", "0.8"], "2": ["", "0.1", "0.3", "0.6"]}
    rows = [{"episode": e, "cosine": c, "adam": c} for e, values in cosines.items() for c in values]
    numbers = study_gradients.summary(rows)
    means = [numbers[name][0] for name in ("given", "one", "spread", "mean", "adam")]
    assert means == pytest.approx([2 / 3, 0.25, 0.1, 0.7, 0.7])
