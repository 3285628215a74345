"""What is wrong with a file or a flag is said in one line, without a traceback, without a wait."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mutate import FAILURES, damaged_files
from safetensors.torch import load_file, save_file
from test_data import row, write_jsonl
from tiny import flags, make_base

import eval as evaluation
import report
import train
from data import UserError, load_questions, parse_json
from model import load_policy


def refusal(capsys, program, argv: list[str]) -> str:
    """The one line with which a program ends: exit 2, and nothing was begun."""
    assert program.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    *others, line = err.splitlines()
    starts = ("error: ", "eval.py: ")
    assert line.startswith(starts) and line.isprintable() and not any(x.startswith(starts) for x in others)
    assert "Traceback" not in out + err and "sampling" not in err
    return line


# ---------------------------------------------------------------------------- flags

# A command line -> what its refusal must name; "eval" in front is eval.py, else train.py.
FLAGS = {
    "--episode 4": "--episode",  # no abbreviation
    "--ssr maybe": "--ssr.*'maybe'.*replay.*filter.*off",
    "--steps many": "--steps.*'many'",
    "--resume maybe": "--resume.*true or false.*'maybe'",
    "toy": "toy",
    "--lr nan": "--lr nan",
    "--group_size 1": "--group_size 1.*at least 2",
    "--heldout 2000000000": "--heldout 2000000000.*at most 100000",
    "--temperature 0": "--temperature 0.*at least 0.01",
    "--lora_rank 4 --train_vision true": "--train_vision true.*--lora_rank",
    "--episode_queries 3 --group_size 8 --batch_size 16": "--batch_size 16.*_queries 3.*_size 8 = 24",
    "--rethink_min_tokens 9 --rethink_max_tokens 8": "min_tokens 9 is above.*max_tokens 8; lower it",
    "--data file.jsonl": "file.jsonl.*--model",
    "eval --benchmark mmlu": "no such benchmark; there are toy, own, mathvista",
    "eval --benchmark mmmu --data no/such/place --model x": "no such file",
    "eval --benchmark mmmu,emma --responses x": "give one --benchmark",
    "eval --benchmark mmmu": "give a --model",
    "eval --benchmark own": "--benchmark own: give --data FILE",
    "eval --benchmark toy --data x": "leave out --data",
}


@pytest.mark.parametrize("command", FLAGS, ids=lambda command: command[:60])
def test_a_wrong_flag_is_refused_at_once_and_named(command, capsys):
    program, argv = train, shlex.split(command)
    if argv[0] == "eval":
        program, argv = evaluation, argv[1:]
    assert re.search(FLAGS[command], refusal(capsys, program, argv))


# ---------------------------------------------------------------------------- rows and files of questions

BAD_ROWS = {
    "no answer": (row(answer=None), "no answer; .*'answer'"),
    "empty box": (row(answer="\\boxed{}"), "no answer"),
    "several answers": (row(answer=["1"]), "a list; give one text or number"),
    "a column of another name": ({"prompt": "?", "answer": "1"}, "no question.*has prompt, answer"),
    "a qid twice": (row(qid="a-1"), "duplicate qid 'a-1', first at .*data.jsonl:1"),
    "more markers than images": (row(qid="b", question="<image> <image>"), "2 <image>.* fix"),
    "an answer that is not a number": ('{"question": "?", "answer": NaN}', "no answer"),
    "an image that is a number": (row(qid="b", image=[3]), "a picture must be a path.*int"),
    "pictures in two columns": (row(qid="b", images=["b.png"]), "both 'image' and 'images'; keep one"),
    "pictures in an unknown column": (row(image=[], photo="b.JPG"), "'photo'.* call .*'image'"),
    "choices that are no list": (row(choices="red, green"), "'choices' must be a list"),
    "an answer that is no choice": (row(answer="Blue", choices=["red", "green"]), "'Blue' is none"),
    "other choices in the text": (
        row(question="?\nA. x\nB. y", choices=["y", "x"]), "other options.*keep one"),
    "no pass rate": (row(qid="b", PassRate_7BBase=None), "PassRate_7BBase.*--pass_rate_column"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named_with_file_and_line(name, tmp_path):
    bad, message = BAD_ROWS[name]
    path = write_jsonl(tmp_path / "data.jsonl", [row(), row(qid="a-2"), bad, row(qid="a-9")])
    with pytest.raises(UserError, match=message) as error:
        load_questions(path, "PassRate_7BBase")
    assert str(error.value).startswith(f"{path}:3")
    assert "\n" not in str(error.value)


GOOD = json.dumps(row()).encode()
# (name of a file, what is in it, the refusal)
FILES = [
    ("data.jsonl", b"", "data.jsonl: the file is empty"),
    ("data.jsonl", b"\n" + GOOD + b'\n  \n{"question": "?"}', "data.jsonl:4: no answer"),  # blank lines count
    ("data.tsv", b"question\tanswer\n", "data.tsv: give a .parquet, .jsonl or .csv file"),
    ("data.parquet", b"PAR1 is how it starts, but", "data.parquet: not readable as parquet after row 0"),
    ("data.csv", b"question,answer\na?,1\nWhich, then?,1\n", "data.csv:3: more cells.*quotes"),
    ("data.csv", b'question,answer\na?,1\n"b?,2\n', "data.csv:3: invalid CSV"),
    ("data.csv", b"question;answer\na?;1\n", "data.csv:2: no question.*has question;answer"),
    ("data.csv", b"question,answer\ncaf\xe9?,1\n", "data.csv: not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_a_file_that_cannot_be_read_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_questions(tmp_path / name)
    assert "\n" not in str(error.value)


def test_without_pyarrow_a_parquet_says_what_to_install(tmp_path, monkeypatch):
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_questions(tmp_path / "data.parquet")


# ---------------------------------------------------------------------------- what a run is given


def questions(folder: Path, **changes) -> str:
    return str(write_jsonl(folder / "bad.jsonl", [row(qid="6", image=[], question="?"), row() | changes]))


# what the flags are made of -> the refusal
RUNS = {
    "missing picture": (lambda d: ["--data", questions(d, question="?", image=["gone\x07.png"]), "--heldout", 0],
                        r"bad.jsonl:2.*gone\\x07.png.*does not exist"),
    "no data": (lambda d: ["--data", d / "gone.jsonl"], "gone.jsonl: cannot be read .No such file"),
    "all held out": (lambda d: ["--data", questions(d, image=[], question="?"), "--heldout", 2],
                     "2 questions none is left.*--heldout 2"),
    "no model": (lambda d: ["--model", d / "nothing"], "nothing"),
    "out in a file": (lambda d: ["--out", Path(questions(d)) / "run"], "/bad.jsonl/run"),
    "out holds a run": (lambda d: ["--out", d / "other"], "--resume"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_is_given_is_checked_before_it_trains(name, tmp_path, capsys):
    make, message = RUNS[name]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_text('{"step": 1}\n')
    argv = [*flags(make_base(), tmp_path / "out"), *make(tmp_path)]
    assert re.search(message, refusal(capsys, train, argv))
    assert not (tmp_path / "out/metrics.jsonl").exists()
    assert (tmp_path / "other/metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_disk_that_is_full_is_found_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 20))
    line = refusal(capsys, train, flags(make_base(), tmp_path / "out"))
    assert "3 MiB free" in line and "--keep_last" in line


# ---------------------------------------------------------------------------- a run that is reported


def change(name, text):
    return lambda d: (d / name).write_text(text)


def remove(name):
    return lambda d: (d / name).unlink()


# what is done to the folder of a run -> the refusal
REPORTED = {
    "no such run": (shutil.rmtree, "no such run"),
    "no metrics": (remove("metrics.jsonl"), "no metrics.jsonl"),
    "half a line within": (change("metrics.jsonl", '{"step": 1}\n{"step": \n{"step": 3}\n'), "jsonl:2: invalid"),
    "a text for a number": (change("metrics.jsonl", '{"step": "one"}\n'), "jsonl:1: .step. must be int"),
    "rollouts without questions": (change("samples.jsonl", '{"step": 1}\n'), "no .question"),
    "settings cut short": (change("config.json", "{"), "config.json: invalid"),
    "a folder in the page's place": (lambda d: (d / "report.html").mkdir(), "cannot be written"),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_a_run_that_cannot_be_reported_is_one_line(name, tmp_path, capsys):
    damage, message = REPORTED[name]
    run = tmp_path / "run"
    run.mkdir()
    change("metrics.jsonl", '{"step": 1}\n')(run)
    damage(run)
    assert re.search(message, refusal(capsys, report, [run]))


# ---------------------------------------------------------------------------- a checkpoint


def weights(change):
    """`change` the weights of a checkpoint."""

    def damage(d):
        found = load_file(d / "model.safetensors")
        change(found)
        save_file(found, d / "model.safetensors", {"format": "pt"})

    return damage


def pickled(d):
    torch.save(load_file(d / "model.safetensors"), d / "pytorch_model.bin")
    (d / "model.safetensors").unlink()


# how the checkpoint is damaged -> what the line must name
CHECKPOINTS = {
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "a weight is missing": (weights(lambda w: w.pop("model.layers.0.self_attn.q_proj.weight")), "q_proj.weight"),
    "a weight is nan": (weights(lambda w: w["model.norm.weight"][3].fill_(torch.nan)), "norm.weight"),
    "a pickle": (pickled, "safetensors"),
    "weights cut short": (lambda d: os.truncate(d / "model.safetensors", 100), ""),
    "another architecture": (change("config.json", '{"model_type": "bert"}'), "'bert' model.*qwen2_5_vl"),
    "chat template lost": (remove("chat_template.jinja"), "chat template"),
    "preprocessor []": (change("preprocessor_config.json", "[]"), ""),
    "chat template without pictures": (change("chat_template.jinja", "Hello."), "template"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used_is_one_line(name, tmp_path):
    damage, word = CHECKPOINTS[name]
    model = shutil.copytree(make_base(), tmp_path / "model")
    damage(model)
    with pytest.raises(UserError) as raised:
        load_policy(str(model))
    line = str(raised.value)
    assert line.startswith(f"--model {model}: ") and re.search(word, line) and line.isprintable()


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    """transformers would ask on the terminal; whoever answers "y" has run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    model, trace = shutil.copytree(make_base(), tmp_path / "model"), tmp_path / "trace"
    (model / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil",
             "AutoTokenizer": ["evil.Evil"] * 2}  # fmt: skip
    for kind in ("qwen2_5_vl", "evil"):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": names}))
        try:
            load_policy(str(model))
        except UserError:
            assert kind == "evil"
        assert not trace.exists()


# ---------------------------------------------------------------------------- JSON from outside

LINES = {
    "cut": (b'{"a": ', "invalid JSON"), "deep": (b"[" * 100_000, "invalid JSON"), "a list": (b"[1]", "object"),
    "bytes": (b'{"a": "\xff"}', "UTF-8"), "half a pair": (b'{"a": "\\ud83d"}', "surrogate"),
    "a huge number": (b'{"a": 1' + b"0" * 400 + b"}", "digits"), "another type": (b'{"a": true}', "'a' must be int"),
    "missing": (b"{}", "no 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_json_that_is_not_as_expected_is_named_with_its_place(name):
    text, word = LINES[name]
    with pytest.raises(UserError, match=f"^f.jsonl:7: .*{word}"):
        parse_json(text, "f.jsonl:7", {"a": int})


# ---------------------------------------------------------------------------- a minute of tests/mutate.py


def test_no_damaged_file_ends_in_a_traceback_a_hang_or_another_result(tmp_path, reward_by_luck):
    counts = damaged_files(tmp_path, 12, 0)
    assert counts.total() == 12 and not any(counts[name] for name in FAILURES)
