"""What a run is made of: a small file is a normal first try, and mistakes are found before training."""

import json
import types
from dataclasses import replace

import pytest
import tiny

import parallel
import prepare
import toy
import train
from config import Config
from data import Question, UserError

BARE = {"template": "bare", "steps": 1, "batch_size": 32, "heldout": 1, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Twenty own questions, as someone writes them down: no ids, two pictures, options in a list."""
    folder = tmp_path_factory.mktemp("mine")
    for i, question in enumerate(toy.toy_questions(toy.LEVELS["easy"], 2, "mine")):
        question.images[0].save(folder / f"{i}.png")
    rows = [
        {"question": f"{i}: which colour?", "images": ["0.png", "1.png"], "choices": ["red", "green"],
         "answer": "AB"[i % 2]}
        for i in range(20)
    ]  # fmt: skip
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------------------- a small file


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
    path = tmp_path / "mine.jsonl"
    rows = [{"qid": i, "question": "?", "answer": 1, "rate": i % 10 / 10} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert {q.id for q in prepare.load_data(replace(config, seed=1))[1]} == heldout


@pytest.mark.parametrize(("n", "group_size"), [(1, 8), (7, 5), (63, 2)])
def test_sizes_that_do_not_fit_are_lowered_and_said_in_one_line(n, group_size, capsys):
    config = Config(data="mine.csv", heldout=2, episode_queries=64, group_size=group_size,
                    batch_size=16 * group_size)  # fmt: skip
    prepare.fit_sizes(config, n)
    assert config.episode_queries == n and config.group_size == group_size
    assert n * group_size % config.batch_size == 0 < config.batch_size <= 16 * group_size
    [line] = capsys.readouterr().out.splitlines()
    assert f"--episode_queries 64 -> {n}" in line and f"{n} questions to train on, 2 held out" in line
    again = replace(config)
    prepare.fit_sizes(again, n)  # as when the run is resumed
    assert again == config and "->" not in capsys.readouterr().out


def test_twenty_own_questions_train_and_are_recorded(base, mine, tmp_path, capsys):
    """Everything else is the preset's: only what bounds the test's time is given."""
    flags = {"model": base, "data": mine, "out": tmp_path, "max_new_tokens": 12, "passes": 1,
             "group_size": 2, "batch_size": 64, "max_pixels": 64 * 28 * 28, "min_pixels": 28 * 28}  # fmt: skip
    assert train.main([word for k, v in flags.items() for word in (f"--{k}", str(v))]) == 0
    said = capsys.readouterr().out
    assert "settings: preset own (" in said and "--batch_size 64 -> 36" in said
    assert len(tiny.steps_of(tmp_path)) == 1 and len(tiny.heldout_of(tmp_path)) == 2
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = [config[name] for name in ("heldout", "episode_queries", "batch_size", "preset")]
    assert sizes == [2, 18, 36, "own"]


def test_more_ranks_than_questions_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 4)
    with pytest.raises(UserError, match="--episode_queries 3 cannot be shared by 4 ranks"):
        prepare.fit_sizes(Config(data="mine.csv"), 3)


# ---------------------------------------------------------------------------- a reward of one's own


REWARDS = """
def length(response, question):
    return len(response) / 100

def crash(response, question):
    return question.choices[7]

def never(response, question):
    return float("nan")
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARDS)
    path.with_name("broken.py").write_text("def length(:\n")
    path.with_name("borrows.py").write_text("from mine import crash\n")
    return path


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("mine.py", "must be FILE.py:NAME"),
        ("gone.py:length", "FileNotFoundError"),
        ("broken.py:length", "SyntaxError.*line 1"),
        ("borrows.py:crash", r"IndexError.*mine.py:6, question q"),  # of a file beside it
        ("mine.py:missing", "has no function missing"),
        ("mine.py:crash", r"IndexError.*mine.py:6, question q"),
        ("mine.py:never", "nan for question q; make it finite"),
    ],
)
def test_a_mistake_in_a_reward_is_one_line(rewards, place, message):
    config = Config(reward=str(rewards.parent / place))
    with pytest.raises(UserError, match=message) as error:
        prepare.own_reward(config, None)("text", Question("q", "?", [], "A", ["red", "green"]))
    assert "\n" not in str(error.value)


def test_an_own_reward_is_recorded_and_not_left_out_when_resuming(base, rewards, tmp_path, capsys):
    place = f"{rewards}:length"
    settings = BARE | {"heldout": 0}
    out = tiny.run_training(base, tmp_path / "own", reward=place, **settings)
    assert json.loads((out / "config.json").read_text())["reward"] == place
    again = tiny.flags(base, out, **settings | {"steps": 2}, resume="true")
    assert train.main(again) == 2
    assert f"--reward was '{place}'" in capsys.readouterr().err
    assert train.main([*again, "--reward", place]) == 0


def test_a_reward_given_to_main_is_recorded_by_its_name():
    config = Config()
    assert prepare.own_reward(config, None) is None and config.reward == ""
    grade = prepare.own_reward(config, lambda response, question: len(response))
    assert grade("four", types.SimpleNamespace(id="q")) == 4.0
    assert config.reward.startswith("test_prepare:")
