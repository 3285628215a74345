"""The walk through one question: it runs, and it says what training does."""

import re
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import toy
import train
from config import parse
from data import UserError
from model import Sample, encode, response_logprobs
from pages import walk
from rethink import TRIGGERS

WRONG, RIGHT = "Looks like \\boxed{plum}.", "So \\boxed{%s}."
FORCED = TRIGGERS["self_questioning"]


def say(policy, prompt, *texts: str) -> Sample:
    """A response; of three texts the second is forced."""
    ids = [policy.tokenizer(text).input_ids for text in texts]
    ids[-1].append(policy.eos_ids[0])
    tokens = torch.tensor([i for piece in ids for i in piece])
    mask = torch.tensor([part != 1 for part, piece in enumerate(ids) for _ in piece])
    with torch.no_grad():
        logprobs = response_logprobs(policy, [(prompt, [tokens])])[0][0]
    sample = Sample(prompt, tokens, logprobs, mask, "".join(texts), "stop")
    sample.answered, sample.right = True, train.is_right(sample)
    sample.reward = float(sample.right)
    return sample


@pytest.fixture
def groups(own_policy):
    """(one to follow, one without advantages): the third response is wrong and then put right."""
    questions = toy.toy_questions(toy.LEVELS["easy"], 2, 0)
    prompt, other = (encode(own_policy, question, "bare") for question in questions)
    right = RIGHT % questions[0].answer
    group = [say(own_policy, prompt, text) for text in (right, right, WRONG, WRONG)]
    group[2].second_look = say(own_policy, prompt, WRONG, FORCED, "\n" + right)
    group[2].second_look.rethought = "self_questioning"
    idle = [say(own_policy, other, WRONG) for _ in range(4)]
    train.compare([group, idle], "mean")
    return group, idle


def test_a_question_is_followed_to_the_loss_and_drawn_where_out_says(
    own_policy, groups, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(toy, "load_toy", lambda recipe: own_policy)
    monkeypatch.setattr(walk, "find_questions", lambda run, steps: groups)
    assert train.main(["--explain", "--out", str(tmp_path / "docs")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("# One question")
    assert re.findall("^## (.)", told, re.MULTILINE) == list("1234567")
    assert max(map(len, told.splitlines())) <= 100
    assert "wrong → right 1; 1 kept" in told and "|A_j|^1" in told
    assert "P(j)   0.250   0.250   0.250   0.250" in told
    # Each row of section 7 is about its own response: before the step, log pi is as it was sampled.
    merged = [*groups[0][:2], groups[0][2].second_look, groups[0][3]]
    before = [float(line.split()[4]) for line in told[told.index("## 7") :].splitlines() if " x  " in line]
    assert before == [pytest.approx(float(s.logprobs[s.mask].sum()), abs=2e-3) for s in merged]
    assert Image.open(tmp_path / "docs/toy.png").size == (3 * 4 * 28, 2 * 4 * 28)
    svg = ElementTree.parse(tmp_path / "docs/tree.svg").getroot()
    assert [x.text for x in svg.iter() if x.get("text-anchor") == "middle"] == [
        "prompt", "#1", "#2", "#3", "#4",
    ]  # fmt: skip


def test_a_policy_that_never_finds_an_answer_ends_in_one_line(policy, monkeypatch):
    monkeypatch.setattr(walk, "EPISODES", 1)
    flags = "--episode_queries 2 --group_size 2 --batch_size 4 --max_new_tokens 9"
    c = parse(flags.split())
    with pytest.raises(UserError, match="none of 2 questions shows it all"):
        walk.find_questions(walk.new_run(c, policy), train)
