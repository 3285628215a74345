"""README's promises: its Python snippets run as they stand, and it names every file."""

import re
from pathlib import Path
from types import SimpleNamespace as S

import pytest
import torch

import rethink
import train
from benchmarks import readers
from config import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def leave_no_trace(monkeypatch):
    monkeypatch.setattr(rethink, "TRIGGERS", dict(rethink.TRIGGERS))
    monkeypatch.setattr(readers, "BENCHMARKS", dict(readers.BENCHMARKS))


def snippet(word: str) -> dict:
    found = [code for code in SNIPPETS if word in code]
    assert len(found) == 1
    names: dict = {}
    exec(found[0], names)  # noqa: S102  (our own README)
    return names


def test_the_new_reward_is_what_training_calls():
    short_and_right = snippet("short_and_right")["short_and_right"]
    question = S(id="q", answer="5", choices=None)
    run = S(grade=short_and_right, step=0, policy=None)
    for filler, earned in (("", 1.0), ("so " * 100, 0.0)):
        sample = S(text=filler + "\\boxed{5}", rethought=None, prompt=S(question=question))
        train.grade(run, sample)
        assert (sample.right, sample.reward) == (True, earned)


def test_the_new_trigger_is_drawn_like_the_others():
    snippet("self_simplification")
    extend = rethink.extender(Config(rethink_fraction=1.0), lambda text, **_: S(input_ids=[1]), None, ["a"])
    sample = S(finish="stop", tokens=torch.zeros(5), prompt=S(question=S(id="q")))
    assert "self_simplification" in {extend(0, g, sample).kind for g in range(50)}


def test_the_new_benchmark_marks_its_rows():
    snippet("counting")
    row = {"id": "1", "question": "How many?", "image": "1.png", "answer": "5", "kind": "dots"}
    item = readers.BENCHMARKS["counting"].read(row)
    assert item.rule("5.0") and not item.rule("6") and item.groups == ["dots"]


def test_every_file_is_in_the_reading_order():
    table = README[README.index("| file | concept |") :]
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in table, path.name


def test_links_lead_to_files():
    for link in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", README):
        target = link[0] or link[1]
        assert (ROOT / target).exists(), target
