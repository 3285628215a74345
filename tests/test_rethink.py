"""Forced Rethinking: who looks again, what is kept, and what it earns."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import follows

import train
from config import Config
from data import Question
from model import Prompt, Sample
from rethink import TRIGGERS, extender, is_kept, merge_rethought, rethinks
from reward import extract_answer
from rollout import question_keys

EVERY = Config(rethink_fraction=1.0)


def prompt() -> Prompt:
    question = Question("q", "", [], "")
    return Prompt(question, "bare", torch.zeros(1), torch.zeros(3, 1), torch.zeros(0, 3), None)


def said(policy, text="Looks like \\boxed{red}.", finish="stop", reward=0.0) -> Sample:
    """A response that ended by itself, or ran into the limit."""
    ids = policy.tokenizer(text, add_special_tokens=False).input_ids
    ids += [policy.tokenizer.eos_token_id] if finish == "stop" else []
    R = len(ids)
    return Sample(
        prompt(), torch.tensor(ids), torch.zeros(R), torch.ones(R) > 0, text, finish, True, reward > 0, reward
    )


def again(first=4, forced=3, second=5, reward=1.0, finish="stop") -> Sample:
    """The whole of y1 + trigger + y2, of so many tokens each."""
    R = first + forced + second
    mask = torch.ones(R, dtype=torch.bool)
    mask[first : first + forced] = False
    return Sample(
        prompt(), torch.arange(R), torch.zeros(R), mask, "", finish, True, reward > 0, reward,
        rethought="self_correction",
    )  # fmt: skip


def group(*rewards, second_looks=()) -> list[Sample]:
    """Samples of these rewards; `second_looks` maps places to what their second looks became."""
    made = []
    for i, reward in enumerate(rewards):
        sample = again(forced=0, reward=reward)
        sample.rethought, sample.second_look = None, dict(second_looks).get(i)
        made.append(sample)
    return made


def ask(policy, settings, samples, limit=100, grade=None):
    extend = extender(replace(settings, max_new_tokens=limit), policy.tokenizer, grade, ["a"])
    return [extend(0, g, sample) for g, sample in enumerate(samples)]


# ---------------------------------------------------------------------------- who looks again


@pytest.mark.parametrize("fraction", [0.1, 0.65])
def test_the_share_of_eligible_responses_is_q_and_the_triggers_are_uniform(policy, fraction):
    sample = said(policy)
    asked = ask(policy, Config(rethink_fraction=fraction), [sample] * 3000)
    for e in filter(None, asked):
        assert policy.tokenizer.decode(e.forced) == TRIGGERS[e.kind]
        assert e.keep == len(sample.tokens) - 1, "the trigger stands in the place of EOS"
    kinds = Counter(e and e.kind for e in asked)
    third = fraction / 3
    counts = [kinds[kind] for kind in (None, *TRIGGERS)]
    assert follows(counts, [1 - fraction, third, third, third])


def test_a_response_that_was_cut_off_or_would_be_cut_back_to_nothing_is_not_extended(policy):
    assert ask(policy, EVERY, [said(policy, finish="length")] * 20) == [None] * 20
    cut_back = replace(EVERY, rethink_cutback=1.0)
    assert ask(policy, cut_back, [said(policy, "\\boxed{blue}")] * 20) == [None] * 20


def test_there_must_be_room_for_the_trigger_and_the_least_second_look(policy):
    sample, settings = said(policy), replace(EVERY, rethink_min_tokens=6)
    unbound = ask(policy, settings, [sample] * 12, 1000)
    for limit in range(len(sample.tokens), len(sample.tokens) + 40):
        for free, second_look in zip(unbound, ask(policy, settings, [sample] * 12, limit)):
            fits = free.keep + len(free.forced) + 6 <= limit
            assert (second_look is not None) == fits
    assert fits, "with 40 tokens more there is room for every trigger"


def test_the_trigger_is_drawn_without_looking_at_the_label_by_default(policy):
    def grade(sample):
        raise AssertionError("the label was looked at")

    right, wrong = said(policy, reward=1.0), said(policy, reward=0.0)
    settings = Config(rethink_fraction=0.5)
    assert ask(policy, settings, [right] * 50, 100, grade) == ask(policy, settings, [wrong] * 50, 100, grade)


def test_the_triggers_oracle_and_wrong_go_by_whether_y1_is_right(policy):
    samples = [said(policy, reward=r) for r in (1.0, 0.0, 0.0, 1.0)]
    looks = ask(policy, replace(EVERY, rethink_trigger="oracle"), samples, grade=lambda s: s.right)
    right, wrong = "self_verification", "self_correction"
    assert [e.kind for e in looks] == [right, wrong, wrong, right]
    looks = ask(policy, replace(EVERY, rethink_trigger="wrong"), samples, grade=lambda s: s.right)
    assert [e is None for e in looks] == [True, False, False, True]


def test_one_response_s_luck_depends_on_its_question_s_key_and_its_number_alone(policy):
    keys = question_keys([said(policy).prompt.question] * 2, 0, 1)  # one question, asked twice
    settings = Config(rethink_fraction=0.5, rethink_cutback=0.5, max_new_tokens=100)

    def luck(n, keys, text="Looks like \\boxed{red}."):
        extend = extender(settings, policy.tokenizer, None, keys)
        looks = [extend(n, g, said(policy, text)) for g in range(30)]
        return [look and look.kind for look in looks]

    assert luck(0, keys) == luck(1, [*"z", keys[0]], "red to blue. So \\boxed{blue}.")
    assert luck(0, keys) != luck(1, keys)


# ---------------------------------------------------------------------------- cutting back


def test_the_share_that_is_cut_back_to_before_its_last_answer_is_the_one_asked_for(policy):
    sample = said(policy, "\\boxed{日本}? So \\boxed{\\frac{1}{2}}.")
    asked = ask(policy, replace(EVERY, rethink_cutback=0.3), [sample] * 2000)
    kept = Counter(policy.tokenizer.decode(sample.tokens[: e.keep]).strip() for e in asked)
    counts = [kept[sample.text], kept["\\boxed{日本}? So"]]
    assert sum(counts) == 2000
    assert follows(counts, [0.7, 0.3])


# ---------------------------------------------------------------------------- what is kept


def test_a_second_look_is_kept_when_right_ended_and_of_fit_length():
    settings = Config(rethink_min_tokens=3, rethink_max_tokens=7)
    assert [is_kept(settings, again(second=n)) for n in (2, 3, 7, 8)] == [False, True, True, False]
    assert not is_kept(settings, again(reward=0.0))
    assert not is_kept(settings, again(finish="length"))


@pytest.mark.parametrize("quota", [0, 1, 2, 8])
def test_no_more_than_the_quota_are_kept_a_question(quota):
    def one():
        return group(*[0.0] * 5, second_looks=[(i, again(reward=float(i != 0))) for i in range(5)])

    groups = [one(), one()]
    merged, counts = merge_rethought(replace(EVERY, rethink_quota=quota), groups)
    for before, after in zip(groups, merged):
        replaced = [i for i in range(5) if after[i] is not before[i]]
        assert replaced == [1, 2, 3, 4][:quota]  # the first, being wrong, takes no place
        assert all(after[i] is before[i].second_look for i in replaced)
    assert counts["kept"] == 2 * min(quota, 4) and counts["attempted"] == 10


def test_every_attempt_is_counted_by_what_became_of_it():
    first = group(0.0, 0.0, 1.0, 1.0, 0.0, 1.0, second_looks=[
        (0, again(second=2, reward=1.0)), (1, again(second=3, reward=0.0)),
        (2, again(second=4, reward=1.0)), (3, again(second=5, reward=0.0)),
        (4, again(second=6, reward=1.0, finish="length")),
    ])  # fmt: skip
    _, counts = merge_rethought(EVERY, [first, group(0.0, 1.0)])
    assert [s.second_look.first_right for s in first[:5]] == [False, False, True, True, False]
    assert counts == {
        "attempted": 5, "kept": 2, "tokens": 20,
        "wrong_right": 2, "wrong_wrong": 1, "right_right": 1, "right_wrong": 1,
    }  # fmt: skip


def test_a_second_look_without_a_box_of_its_own_is_no_answer_and_not_kept(policy):
    """y2 is a fragment: y1's box must not pass for its answer."""
    first = said(policy, "So \\boxed{green}.", reward=1.0)
    pieces = [first.text, TRIGGERS["self_correction"], "green}."]
    ids = [policy.tokenizer(text).input_ids for text in pieces]
    tokens = torch.tensor([i for piece in ids for i in piece] + policy.eos_ids[:1])
    mask = torch.ones(len(tokens), dtype=torch.bool)
    mask[len(ids[0]) : len(ids[0]) + len(ids[1])] = False
    second = Sample(first.prompt, tokens, torch.zeros(len(tokens)), mask, "".join(pieces), "stop",
                    rethought="self_correction")  # fmt: skip
    first.prompt.question.answer = "green"
    run = SimpleNamespace(policy=policy, grade=None, step=0)
    for sample in (first, second):
        train.grade(run, sample)
    assert first.right and extract_answer(second.text) == "green" and not second.right
    first.second_look = second
    merged, counts = merge_rethought(EVERY, [[first]])
    assert merged == [[first]] and counts["no_answer"] == 1 and counts["kept"] == 0


@pytest.mark.parametrize(
    ("scale", "baseline", "wins", "loses"),
    [("mean", "before", 0.75, -0.25), ("std", "before", 3**0.5, -(3**-0.5)), ("mean", "after", 0.5, -0.5)],
)
def test_the_baseline_is_the_group_s_before_replacement_or_by_flag_after(scale, baseline, wins, loses):
    """Of rewards 1 0 0 0 the mean is 1/4, the deviation sqrt(3)/4; of 1 0 1 0 the mean is 1/2."""
    kept = again(reward=1.0)
    first = group(1.0, 0.0, 0.0, 0.0, second_looks=[(2, kept)])
    train.compare([first], scale)
    c = Config(rethink_fraction=1.0, advantage=scale, rethink_baseline=baseline)
    [merged], _ = train.keep_second_looks(c, [first])
    assert merged == [first[0], first[1], kept, first[3]]
    assert [s.advantage for s in merged] == pytest.approx([wins, loses, wins, loses])


# ---------------------------------------------------------------------------- unforced


def test_a_response_that_looks_again_by_itself_is_told_from_one_that_does_not():
    for trigger in TRIGGERS.values():
        assert rethinks(f"It is 5.{trigger} It is 6.")
        assert rethinks(f"It is 5. {trigger.strip()}: it is 6.")
    assert not rethinks("Wait, it is 5.")
