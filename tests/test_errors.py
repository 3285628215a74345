"""What is wrong with a file or a flag is said in one line, without a traceback, without a wait."""

import errno
import json
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
from test_data import row, write_jsonl, write_parquet
from tiny import flags, make_base

import eval as evaluation
import prepare
import report
import train
from data import UserError, check_shape, load_questions, parse_json
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
    "--preset 3b": "--preset.*'3b'.*72b",
    "--steps many": "--steps.*'many'",
    "--resume maybe": "--resume.*true or false.*'maybe'",
    "--lr": "--lr",
    "toy": "toy",
    "--lr inf": "--lr inf.*at most",
    "--lr nan": "--lr nan",
    "--steps -1": "--steps -1.*at least 0",
    "--group_size 1": "--group_size 1.*at least 2",
    "--rethink_fraction 1.5": "--rethink_fraction 1.5.*at most 1",
    "--heldout 2000000000": "--heldout 2000000000.*at most 100000",
    "--temperature 0": "--temperature 0.*at least 0.01",
    "--lora_rank 4 --train_vision true": "--train_vision true.*--lora_rank",
    "--seed 9223372036854775808": "--seed",
    f"--max_new_tokens {'9' * 5000}": "--max_new_tokens",
    "--episode_queries 3 --group_size 8 --batch_size 16": "--batch_size 16.*24 responses.*_queries 3.*_size 8",
    "--batch_size 512": "--batch_size 512.*256 responses",
    "--data file.jsonl": "file.jsonl.*--model",
    "--model \udcff": "udcff",  # a name that is not UTF-8
    "eval --benchmark mmlu": "no such benchmark; there are toy, own, mathvista",
    "eval --benchmark mmmu --data no/such/place --model x": "no such file",
    "eval --samples 0": "--samples 0: must be at least 1",
    "eval --temperature inf": "--temperature",
    "eval --benchmark mmmu,emma --responses x": "give one --benchmark",
    "eval --benchmark mmmu": "give a --model",
    "eval --benchmark own": "--benchmark own: give --data FILE",
    "eval --benchmark own,mmmu --data x": "--benchmark own: give --data FILE",
    "eval --benchmark toy --data x": "leave out --data",
    "eval --modle x": "unrecognized arguments",
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
    "blank answer": (row(answer="  "), "no answer"),
    "empty box": (row(answer="\\boxed{}"), "no answer"),
    "several answers": (row(answer=["1"]), "a list; give one text or number"),
    "no question": (row(question=None), "no question; .*'question'"),
    "a column of another name": ({"prompt": "?", "answer": "1"}, "no question.*has prompt, answer"),
    "blank question": (row(question=" \n"), "no question"),
    "a qid twice": (row(qid="a-1"), "duplicate qid 'a-1', first at .*data.jsonl:1"),
    "more markers than images": (row(qid="b", question="<image> <image>"), "2 <image>.* fix"),
    "markers and no image": (row(qid="b", image=None), "1 <image> markers but 0 images"),
    "a marker in a choice": (
        row(qid="b", image=None, choices=["<image>", "y"], answer="B"), "2 <image> markers but 0 images"),
    "an answer that is not a number": ('{"question": "?", "answer": NaN}', "no answer"),
    "an image that is a number": (row(qid="b", image=[3]), "a picture must be a path.*int"),
    "pictures in two columns": (row(qid="b", images=["b.png"]), "both 'image' and 'images'; keep one"),
    "pictures in an unknown column": (row(image=[], photo="b.JPG"), "'photo'.* call .*'image'"),
    "choices that are no list": (row(choices="red, green"), "'choices' must be a list"),
    "one choice": (row(choices=["red"]), "'choices' must be a list of 2"),
    "an answer that is no choice": (row(answer="Blue", choices=["red", "green"]), "'Blue' is none"),
    "a choice counted from 0": (row(answer=1, choices=["red", "green"]), "'1' is none.*letter"),
    "other choices in the text": (
        row(question="?\nA. x\nB. y", choices=["y", "x"]), "other options.*keep one"),
    "invalid JSON": ('{"question": ', "invalid JSON"),
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
    ("data.jsonl", GOOD + b'\n{"question": "caf\xe9"}\n', "data.jsonl:2: not UTF-8"),
    ("data.jsonl", b"\n" + GOOD + b'\n  \n{"question": "?"}', "data.jsonl:4: no answer"),  # blank lines count
    ("data.tsv", b"question\tanswer\n", "data.tsv: give a .parquet, .jsonl or .csv file"),
    ("data.parquet", b"PAR1 is how it starts, but", "data.parquet: not readable as parquet after row 0"),
    ("data.csv", b"question,answer\na?,1\nWhich, then?,1\n", "data.csv:3: more cells.*quotes"),
    ("data.csv", b"question,answer\na?,1\nb?,\n", "data.csv:3: no answer"),
    ("data.csv", b'question,answer\na?,1\n"b?,2\n', "data.csv:3: invalid CSV"),
    ("data.csv", b"question;answer\na?;1\n", "data.csv:2: no question.*has question;answer"),
    ("data.csv", b"question,answer\ncaf\xe9?,1\n", "data.csv: not UTF-8"),
    ("data.csv", b"question,answer\n", "data.csv: the file is empty"),
    ("", b"", "give a .parquet, .jsonl or .csv file"),  # a folder
]


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_a_file_that_cannot_be_read_is_named_with_its_line(name, content, message, tmp_path):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_questions(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_row_of_a_parquet_is_named_by_its_number_and_without_pyarrow_what_to_install(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "data.parquet", [row(), row(qid="a-2", answer="")])
    with pytest.raises(UserError, match=f"^{path}: row 2: no answer"):
        load_questions(path)
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_questions(path)


# ---------------------------------------------------------------------------- what a run is given


def questions(folder: Path, **changes) -> str:
    return str(write_jsonl(folder / "bad.jsonl", [row(qid="6", image=[], question="?"), row() | changes]))


def a_run(d: Path) -> list:
    (d / "metrics.jsonl").write_text('{"step": 1}\n')
    return ["--out", d]


def a_file(d: Path) -> Path:
    (d / "file").write_text("")
    return d / "file"


# what the flags are made of -> the refusal
RUNS = {
    "no answer": (lambda d: ["--data", questions(d, answer=" ")], "bad.jsonl:2.*answer"),
    "missing picture": (lambda d: ["--data", questions(d, question="?", image=["gone\x07.png"]), "--heldout", 0],
                        r"bad.jsonl:2.*gone\\x07.png.*does not exist"),
    "no data": (lambda d: ["--data", d / "gone.jsonl"], "gone.jsonl: cannot be read .No such file"),
    "all held out": (lambda d: ["--data", questions(d, image=[], question="?"), "--heldout", 2],
                     "2 questions none is left.*--heldout 2"),
    "no model": (lambda d: ["--model", d / "nothing"], "nothing"),
    "no reward": (lambda d: ["--reward", d / "gone.py:f"], "gone.py:f"),
    "out is a file": (lambda d: ["--out", a_file(d)], "/file"),
    "out in a file": (lambda d: ["--out", a_file(d) / "run"], "/file/run"),
    "out holds a run": (a_run, "--resume"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_is_given_is_checked_before_it_trains(name, tmp_path, capsys):
    make, message = RUNS[name]
    argv = [*flags(make_base(), tmp_path / "out"), *make(tmp_path)]
    before = sorted(path.stat() for path in tmp_path.iterdir() if path.name == "metrics.jsonl")
    assert re.search(message, refusal(capsys, train, argv))
    assert not (tmp_path / "out/metrics.jsonl").exists()
    assert before == sorted(path.stat() for path in tmp_path.iterdir() if path.name == "metrics.jsonl")


def test_a_disk_that_is_full_or_not_to_be_written_is_found_before_training(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 << 20))
        line = refusal(capsys, train, flags(make_base(), tmp_path / "full"))
        assert "3 MiB free" in line and "--keep_last" in line

    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(prepare, "lock_folder", refuse)
    line = refusal(capsys, train, flags(make_base(), tmp_path / "out"))
    assert str(tmp_path / "out") in line and "Read-only" in line


# ---------------------------------------------------------------------------- a run that is reported

# (a file of the run, what is in it instead: None for nothing, a folder for {}, the refusal)
DAMAGED = [
    ("", None, "no such run"),
    ("metrics.jsonl", None, "no metrics.jsonl"),
    ("metrics.jsonl", b'{"step": 1}\n{"step": \n{"step": 3}\n', "jsonl:2: invalid"),
    ("metrics.jsonl", b'{"step": "one"}\n', "jsonl:1: .step. must be int"),
    ("metrics.jsonl", b"\xff\xfe\x00\n", "not UTF-8"),
    ("samples.jsonl", b'{"step": 1}\n', "no .question"),
    ("heldout.jsonl", b'{"step": 0, "id": "1"}\n', "heldout.jsonl:1: the object has no 'text'"),
    ("config.json", b"{", "config.json: invalid"),
    ("report.html", {}, "cannot be written"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_a_run_that_cannot_be_reported_is_one_line(name, content, message, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    if content is None:
        (folder / "metrics.jsonl").unlink()
    elif content == {}:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content)
    if not name:
        folder.rmdir()
    assert re.search(message, refusal(capsys, report, [folder]))


# ---------------------------------------------------------------------------- a checkpoint


def change(name, text):
    return lambda d: (d / name).write_text(text)


def nan_weight(d):
    weights = load_file(d / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, d / "model.safetensors", {"format": "pt"})


def pickled(d):
    torch.save(load_file(d / "model.safetensors"), d / "pytorch_model.bin")
    (d / "model.safetensors").unlink()


def lost_weight(d):
    weights = load_file(d / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("q_proj.weight"))]
    save_file(weights, d / "model.safetensors", {"format": "pt"})


# how the checkpoint is damaged -> what the line must name
CHECKPOINTS = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "a weight is missing": (lost_weight, "q_proj.weight"),
    "a weight is nan": (nan_weight, "norm.weight"),
    "a pickle": (pickled, "safetensors"),
    "weights cut short": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:100]), ""),
    "another architecture": (change("config.json", '{"model_type": "bert"}'), "'bert' model.*qwen2_5_vl"),
    "an empty folder": (lambda d: [path.unlink() for path in d.iterdir()], ""),
    "chat template lost": (lambda d: (d / "chat_template.jinja").unlink(), "chat template"),
    "config []": (change("config.json", "[]"), ""),
    "tokenizer null": (change("tokenizer.json", "null"), ""),
    "preprocessor []": (change("preprocessor_config.json", "[]"), ""),
    "chat template broken": (change("chat_template.jinja", "{% for"), ""),
    "chat template without pictures": (change("chat_template.jinja", "Hello."), "template"),
    "a deep config": (change("config.json", "[" * 100_000), ""),
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
    names = {
        "AutoConfig": "evil.Evil",
        "AutoModelForImageTextToText": "evil.Evil",
        "AutoTokenizer": ["evil.Evil"] * 2,
    }
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


def test_shapes_reach_into_lists_and_pairs():
    shape = {"pieces": [[str, bool]], "more?": {"n": (int, float)}}
    check_shape({"pieces": [["x", True], ["y", False]], "more": {"n": 1.5}}, shape, "f")
    for wrong in ({"pieces": [["x"]]}, {"pieces": [[1, True]]}, {"pieces": [], "more": {"n": None}}, {}):
        with pytest.raises(UserError, match="^f: "):
            check_shape(wrong, shape, "f")


# ---------------------------------------------------------------------------- a minute of tests/mutate.py


def test_no_damaged_file_ends_in_a_traceback_a_hang_or_another_result(tmp_path):
    counts = damaged_files(tmp_path, 12, 0)
    assert counts.total() == 12 and not any(counts[name] for name in FAILURES)
