"""What a run is made of: a small file is a normal first try, and mistakes are found before training."""

import json
from dataclasses import replace

import pytest
from test_data import write_jsonl
from tiny import flags, run_training

import parallel
import prepare
import train
from config import Config
from data import Question, UserError


@pytest.mark.parametrize(("n", "expected"), [(1, 0), (2, 1), (20, 2), (1000, 100), (2000, 128)])
def test_by_default_a_tenth_of_a_file_is_held_out_and_never_more_than_128(monkeypatch, n, expected):
    questions = [Question(str(i), "?", [], "1") for i in range(n)]
    monkeypatch.setattr(prepare, "load_questions", lambda *_: questions)
    config = Config(model="m", data="mine.csv")
    training, heldout = prepare.load_data(config)
    assert (len(heldout), config.heldout, len(training)) == (expected, expected, n - expected)
    assert not {q.id for q in training} & {q.id for q in heldout}
    assert prepare.load_data(replace(config, heldout=0)) == (questions, [])


def test_the_same_questions_are_held_out_whatever_the_pass_rate_the_order_and_the_seed(tmp_path):
    rows = [{"qid": i, "question": "?", "answer": 1, "rate": i % 10 / 10} for i in range(100)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    config = Config(model="m", data=str(path), heldout=20)
    ranges = [("", 0, 1), ("rate", 0.5, 1), ("rate", 0, 0.4)]
    runs = [
        prepare.load_data(replace(config, pass_rate_column=column, pass_rate_min=low, pass_rate_max=high))
        for column, low, high in ranges
    ]
    sizes = [len(training) for training, _ in runs]
    assert sizes[0] == 80 == sizes[1] + sizes[2] and min(sizes) > 20
    assert min(q.pass_rate for q in runs[1][0]) == 0.5 and max(q.pass_rate for q in runs[2][0]) == 0.4
    heldout = {q.id for q in runs[0][1]}
    for training, kept_out in runs:
        assert {q.id for q in kept_out} == heldout and not heldout & {q.id for q in training}
    write_jsonl(path, rows[::-1])
    assert {q.id for q in prepare.load_data(replace(config, seed=1))[1]} == heldout


@pytest.mark.parametrize(("n", "group_size", "queries"), [(1, 8, 1), (7, 5, 7), (63, 2, 48)])
def test_sizes_that_do_not_fit_are_lowered_and_said_in_one_line(n, group_size, queries, monkeypatch, capsys):
    config = Config(data="mine.csv", heldout=2, episode_queries=64, group_size=group_size,
                    batch_size=16 * group_size)  # fmt: skip
    prepare.fit_sizes(config, n)
    assert config.episode_queries == queries and config.group_size == group_size
    assert config.batch_size == min(queries, 16) * group_size
    [line] = capsys.readouterr().out.splitlines()
    assert f"--episode_queries 64 -> {queries}" in line and f"{n} questions to train on, 2 held out" in line
    again = replace(config)
    prepare.fit_sizes(again, n)  # as when the run is resumed
    assert again == config and "->" not in capsys.readouterr().out
    monkeypatch.setattr(parallel, "world", lambda: n + 1)
    with pytest.raises(UserError, match=f"--episode_queries {queries} cannot be shared by {n + 1} ranks"):
        prepare.fit_sizes(config, n)


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(text, question): return len(text) / 100\n"
        "def crash(text, question): return question.choices[7]\n"
        "def never(text, question): return float('nan')\n"
        "def leaves(text, question): raise SystemExit(0)\n"
        "def late(text, question):\n import borrows\n borrows.crash(text, question)\n"
    )
    path.with_name("borrows.py").write_text("from mine import crash\n")
    return path


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("mine.py", "must be FILE.py:NAME"),
        ("borrows.py:crash", r"IndexError.*mine.py:2, question q"),  # of a file beside it
        ("mine.py:late", r"IndexError.*mine.py:2, question q"),  # imported when it is called
        ("mine.py:missing", "has no function missing"),
        ("mine.py:never", "nan for question q; make it finite"),
        ("mine.py:leaves", r"SystemExit.*mine.py:4, question q"),
    ],
)
def test_a_mistake_in_a_reward_is_one_line(rewards, place, message):
    config = Config(reward=str(rewards.parent / place))
    with pytest.raises(UserError, match=message) as error:
        prepare.own_reward(config, None)("text", Question("q", "?", [], "A", ["red", "green"]))
    assert "\n" not in str(error.value)


def test_an_own_reward_is_recorded_and_not_left_out_when_resuming(base, rewards, tmp_path, capsys):
    place, settings = f"{rewards}:length", {"steps": 1, "batch_size": 32, "heldout": 0}
    run_training(base, tmp_path, reward=place, **settings)
    assert json.loads((tmp_path / "config.json").read_text())["reward"] == place
    again = flags(base, tmp_path, **settings | {"steps": 2}, resume="true")
    assert train.main(again) == 2
    assert f"--reward was '{place}'" in capsys.readouterr().err
    assert train.main([*again, "--reward", place]) == 0
