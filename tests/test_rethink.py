"""Forced Rethinking: who looks again, what is kept, and what it earns."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import chi_squared

import train
from config import Config
from data import Question
from model import Prompt, Sample
from rethink import (
    TRIGGERS,
    Rethinking,
    before_rethinking,
    extender,
    imitated,
    is_kept,
    merge_rethought,
    rethinks,
    second_length,
    tokens_before_answer,
)
from reward import extract_answer
from rollout import generate, question_keys

EVERY = Rethinking(fraction=1.0)


def prompt(qid="q") -> Prompt:
    question = Question(qid, "", [], "")
    return Prompt(question, "bare", torch.zeros(1), torch.zeros(3, 1), torch.zeros(0, 3), None)


def said(policy, text="Looks like \\boxed{red}.", qid="q", finish="stop", reward=0.0) -> Sample:
    """A response that ended by itself, or ran into the limit."""
    ids = policy.tokenizer(text, add_special_tokens=False).input_ids
    ids += [policy.tokenizer.eos_token_id] if finish == "stop" else []
    R = len(ids)
    everywhere = torch.ones(R, dtype=torch.bool)
    return Sample(
        prompt(qid), torch.tensor(ids), torch.zeros(R), everywhere, text, finish, True, reward > 0, reward
    )


def again(first=4, forced=3, second=5, reward=1.0, finish="stop", cut=0) -> Sample:
    """The whole of y1 + trigger + y2, of so many tokens each."""
    R = first - cut + forced + second
    mask = torch.ones(R, dtype=torch.bool)
    mask[first - cut : first - cut + forced] = False
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
    extend = extender(settings, policy.tokenizer, grade, limit, ["a"])
    return [extend(0, g, sample) for g, sample in enumerate(samples)]


# ---------------------------------------------------------------------------- the triggers


def test_the_triggers_are_the_paper_s_to_the_character():
    assert TRIGGERS == {
        "self_questioning": "\n\nWait, does it seem right?",
        "self_correction": "\n\nWait, there might be a mistake",
        "self_verification": "\n\nWait, let's double check",
    }


def test_the_forced_ids_are_the_trigger_s_and_stand_in_the_place_of_eos(policy):
    kinds = set()
    for second_look in ask(policy, EVERY, [said(policy)] * 40):
        assert policy.tokenizer.decode(second_look.forced) == TRIGGERS[second_look.kind]
        assert second_look.keep == len(said(policy).tokens) - 1
        kinds.add(second_look.kind)
    assert kinds == set(TRIGGERS)


# ---------------------------------------------------------------------------- who looks again


@pytest.mark.parametrize("fraction", [0.1, 0.65])
def test_the_share_of_eligible_responses_is_q_and_the_triggers_are_uniform(policy, fraction):
    settings = Rethinking(fraction=fraction)
    asked = ask(policy, settings, [said(policy)] * 3000)
    kinds = Counter("none" if e is None else e.kind for e in asked)
    third = fraction / 3
    counts = [kinds["none"], *(kinds[kind] for kind in TRIGGERS)]
    statistic, limit = chi_squared(counts, [1 - fraction, third, third, third])
    assert statistic < limit


def test_a_response_that_was_cut_off_is_not_extended(policy):
    assert ask(policy, EVERY, [said(policy, finish="length")] * 20) == [None] * 20


@pytest.mark.parametrize("min_tokens", [1, 6])
def test_there_must_be_room_for_the_trigger_and_the_least_second_look(policy, min_tokens):
    sample = said(policy)
    settings = replace(EVERY, min_tokens=min_tokens)
    for limit in range(len(sample.tokens), len(sample.tokens) + 40):
        for free, second_look in zip(
            ask(policy, settings, [sample] * 12, 1000), ask(policy, settings, [sample] * 12, limit)
        ):
            fits = free.keep + len(free.forced) + min_tokens <= limit
            assert (second_look is not None) == fits
    assert fits, "with 40 tokens more there is room for every trigger"


def test_the_trigger_is_drawn_without_looking_at_the_label_by_default(policy):
    def grade(sample):
        raise AssertionError("the label was looked at")

    right, wrong = said(policy, reward=1.0), said(policy, reward=0.0)
    settings = Rethinking(fraction=0.5)
    assert ask(policy, settings, [right] * 50, 100, grade) == ask(policy, settings, [wrong] * 50, 100, grade)


def test_the_oracle_verifies_what_is_right_and_corrects_what_is_wrong(policy):
    settings = replace(EVERY, trigger="oracle")
    samples = [said(policy, reward=r) for r in (1.0, 0.0, 0.0, 1.0)]
    kinds = [e.kind for e in ask(policy, settings, samples, grade=lambda s: s.right)]
    right, wrong = "self_verification", "self_correction"
    assert kinds == [right, wrong, wrong, right]


def test_the_trigger_wrong_leaves_what_is_right_alone(policy):
    samples = [said(policy, reward=reward) for reward in (1.0, 0.0)]
    of_the_right, of_the_wrong = ask(
        policy, replace(EVERY, trigger="wrong"), samples, grade=lambda s: s.right
    )
    assert of_the_right is None and of_the_wrong.kind in TRIGGERS


def test_one_response_s_luck_depends_on_its_question_s_key_and_its_number_alone(policy):
    keys = question_keys([said(policy).prompt.question] * 2, 0, 1)  # one question, asked twice
    settings = Rethinking(fraction=0.5, cutback=0.5)

    def luck(n, keys, text="Looks like \\boxed{red}."):
        extend = extender(settings, policy.tokenizer, None, 100, keys)
        looks = [extend(n, g, said(policy, text)) for g in range(30)]
        return [look and look.kind for look in looks]

    assert luck(0, keys) == luck(1, [*"z", keys[0]], "red to blue. So \\boxed{blue}.")
    assert luck(0, keys) != luck(1, keys)


# ---------------------------------------------------------------------------- cutting back


def test_tokens_before_answer_is_the_longest_part_without_the_last_box(policy):
    decode = policy.tokenizer.decode
    texts = ["red to blue. So \\boxed{blue}.", "\\boxed{red}, no, \\boxed{\\frac{1}{2}} it is",
             "Ist die Lösung \\boxed{日本}?"]  # fmt: skip
    for text in texts:
        ids = [*policy.tokenizer(text).input_ids, policy.tokenizer.eos_token_id]
        keep = tokens_before_answer(ids, decode)
        before = text[: text.rindex("\\boxed")]
        assert before.startswith(decode(ids[:keep]))
        assert len(decode(ids[: keep + 1])) > len(before)


def test_cutting_back_leaves_what_stands_before_the_answer(policy):
    sample = said(policy, "red to blue. So \\boxed{blue}.")
    [second_look] = ask(policy, replace(EVERY, cutback=1.0), [sample])
    kept = policy.tokenizer.decode(sample.tokens[: second_look.keep])
    assert kept.strip() == "red to blue. So"


def test_a_response_that_is_all_answer_cannot_be_cut_back(policy):
    sample = said(policy, "\\boxed{blue}")
    assert ask(policy, replace(EVERY, cutback=1.0), [sample] * 10) == [None] * 10


def test_the_share_that_is_cut_back_is_the_one_asked_for(policy):
    sample = said(policy)
    asked = ask(policy, replace(EVERY, cutback=0.3), [sample] * 2000)
    whole = sum(e.keep == len(sample.tokens) - 1 for e in asked)
    statistic, limit = chi_squared([whole, 2000 - whole], [0.7, 0.3])
    assert statistic < limit


# ---------------------------------------------------------------------------- what is kept


def test_a_second_look_is_kept_when_right_ended_and_of_fit_length():
    settings = Rethinking(min_tokens=3, max_tokens=7)
    assert [is_kept(settings, again(second=n)) for n in (2, 3, 7, 8)] == [False, True, True, False]
    assert not is_kept(settings, again(reward=0.0))
    assert not is_kept(settings, again(finish="length"))


def test_a_kept_second_look_takes_the_place_of_its_first_with_its_own_reward():
    """The released code gives it the reward of another response."""
    kept, failed = again(reward=1.0), again(reward=0.0)
    first = group(1.0, 0.0, 0.0, 0.0, second_looks=[(1, kept), (2, failed)])
    [merged], counts = merge_rethought(EVERY, [first])
    assert merged == [first[0], kept, first[2], first[3]]
    assert [s.reward for s in merged] == [1.0, 1.0, 0.0, 0.0]
    assert first[1].reward == 0.0 and failed.reward == 0.0
    assert counts["kept"] == 1


@pytest.mark.parametrize("quota", [0, 1, 2, 8])
def test_no_more_than_the_quota_are_kept_a_question(quota):
    def one():
        return group(*[0.0] * 5, second_looks=[(i, again(reward=float(i != 0))) for i in range(5)])

    groups = [one(), one()]
    merged, counts = merge_rethought(replace(EVERY, quota=quota), groups)
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
    tokenize = policy.tokenizer
    first = said(policy, "So \\boxed{green}.", reward=1.0)
    ids = [
        tokenize(text).input_ids for text in ("So \\boxed{green}.", TRIGGERS["self_correction"], "green}.")
    ]
    tokens = torch.tensor([i for piece in ids for i in piece] + policy.eos_ids[:1])
    mask = torch.ones(len(tokens), dtype=torch.bool)
    mask[len(ids[0]) : len(ids[0]) + len(ids[1])] = False
    text = policy.tokenizer.decode(tokens[:-1])
    second = Sample(first.prompt, tokens, torch.zeros(len(tokens)), mask, text, "stop",
                    rethought="self_correction")  # fmt: skip
    first.prompt.question.answer = "green"
    run = SimpleNamespace(policy=policy, grade=None, step=0)
    for sample in (first, second):
        train.grade(run, sample)
    assert first.right and extract_answer(second.text) == "green" and not second.right
    first.second_look = second
    merged, counts = merge_rethought(EVERY, [[first]])
    assert merged == [[first]] and counts["no_answer"] == 1 and counts["kept"] == 0


@pytest.mark.parametrize("scale", ["mean", "std"])
def test_the_baseline_is_the_group_s_before_replacement(scale):
    """Rewards 1 0 0 0, mean 1/4, deviation sqrt(3)/4; the kept one gets 1 - 1/4 over it."""
    kept = again(reward=1.0)
    first = group(1.0, 0.0, 0.0, 0.0, second_looks=[(2, kept)])
    train.compare([first], scale)
    before = [s.advantage for s in first]
    [merged], _ = train.keep_second_looks(Config(rethink_fraction=1.0, advantage=scale), [first])
    size = {"mean": 1.0, "std": math.sqrt(3) / 4}[scale]
    assert merged[2] is kept and kept.advantage == pytest.approx(0.75 / size)
    for i in (0, 1, 3):  # siblings are neither lifted nor pushed down
        assert merged[i].advantage == before[i] == pytest.approx((first[i].reward - 0.25) / size)


@pytest.mark.parametrize("scale", ["mean", "std"])
@pytest.mark.parametrize(("reward", "advantage"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_group_of_equal_rewards_has_no_deviation_to_divide_by(scale, reward, advantage):
    kept = again(reward=1.0)
    first = group(*[reward] * 4, second_looks=[(0, kept)])
    train.compare([first], scale)
    assert kept.advantage == advantage
    assert [s.advantage for s in first[1:]] == [0, 0, 0]


def test_after_replacement_all_advantages_are_taken_anew():
    """The code's form: rewards 1 0 1 0 have the mean 1/2."""
    first = group(1.0, 0.0, 0.0, 0.0, second_looks=[(2, again(reward=1.0))])
    train.compare([first], "mean")
    after = Config(rethink_fraction=1.0, rethink_baseline="after")
    [merged], _ = train.keep_second_looks(after, [first])
    assert [s.advantage for s in merged] == [0.5, -0.5, 0.5, -0.5]


def test_the_second_loss_is_taken_on_trigger_tokens_always_and_on_y1_by_flag():
    sample = again(first=2, forced=3, second=1)
    assert sample.mask.tolist() == [True, True, False, False, False, True]
    assert imitated(sample, "all").tolist() == [True] * 6
    assert imitated(sample, "second").tolist() == [False, False, True, True, True, True]


# ---------------------------------------------------------------------------- with a policy


def test_merged_ids_are_those_that_were_fed(policy, prompts):
    extend = extender(EVERY, policy.tokenizer, None, 60, [p.question.id for p in prompts])
    groups = generate(policy, prompts, 4, 60, 1.0, extend=extend)
    for samples in groups:
        for first in samples:
            if first.second_look:
                first.second_look.answered = first.second_look.right = True
    merged, counts = merge_rethought(replace(EVERY, quota=4), groups)
    assert counts["attempted"] >= counts["kept"] >= 4
    for before, after in zip(groups, merged):
        for first, sample in zip(before, after):
            if sample is first:
                assert sample.rethought is None and sample.mask.all()
                continue
            trigger = policy.tokenizer(TRIGGERS[sample.rethought]).input_ids
            keep, R = len(first.tokens) - 1, len(sample.tokens)
            start = keep + len(trigger)
            assert sample.tokens.tolist() == [
                *first.tokens.tolist()[:-1], *trigger, *sample.tokens.tolist()[start:],
            ]  # fmt: skip
            assert sample.mask.tolist() == [*[True] * keep, *[False] * len(trigger),
                                            *[True] * (R - start)]  # fmt: skip
            assert second_length(sample) == R - start
            assert sample.logprobs[:keep].equal(first.logprobs[:keep])


# ---------------------------------------------------------------------------- unforced


def test_a_response_that_looks_again_by_itself_is_told_from_one_that_does_not():
    for trigger in TRIGGERS.values():
        assert rethinks(f"It is 5.{trigger} It is 6.")
        assert rethinks(f"It is 5. {trigger.strip()}: it is 6.")
        assert before_rethinking(f"It is 5.{trigger} It is 6.") == "It is 5.\n\n"
    assert not rethinks("Wait, it is 5.")
    assert before_rethinking("Wait, it is 5.") == "Wait, it is 5."
