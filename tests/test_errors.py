"""What is wrong with a file or a flag is said in one line, without a traceback, without a wait."""

import json
import os
import shutil
from collections import Counter

import pytest
import torch
from mutate import FAILURES, absurd_flags, damaged_files
from safetensors.torch import load_file, save_file
from tiny import flags, make_base

import eval as evaluation
import train
from data import UserError, check_shape, parse_json
from model import load_policy

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


def pipe(d):
    (d / "config.json").unlink()
    os.mkfifo(d / "config.json")


# how the checkpoint is damaged -> what the line must name
CHECKPOINTS = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "a weight is missing": (lost_weight, "q_proj.weight"),
    "a weight is nan": (nan_weight, "norm.weight"),
    "a pickle": (pickled, "safetensors"),
    "another architecture": (change("config.json", '{"model_type": "bert"}'), "'bert'"),
    "config null": (change("config.json", "null"), ""),
    "config []": (change("config.json", "[]"), ""),
    "tokenizer null": (change("tokenizer.json", "null"), ""),
    "preprocessor []": (change("preprocessor_config.json", "[]"), ""),
    "generation null": (change("generation_config.json", "null"), ""),
    "chat template broken": (change("chat_template.jinja", "{% for"), ""),
    "chat template without pictures": (change("chat_template.jinja", "Hello."), "template"),
    "a pipe": (pipe, "config.json is not a file"),
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
    assert line.startswith(f"--model {model}: ") and word in line and line.isprintable()


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


# ---------------------------------------------------------------------------- the terminal


def test_what_data_say_reaches_the_terminal_escaped(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    row = {"qid": "a\x1b[2J\nerror: b", "question": "?", "answer": "1", "image": "gone\x07.png"}
    data.write_text(json.dumps(row) + "\n")
    assert train.main(flags(make_base(), tmp_path / "out", data=data, heldout=0)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "gone" in line]
    assert len(said) == 1 and said[0].isprintable() and "\\x07" in said[0]


def test_a_picture_that_is_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.png")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "?", "answer": "1", "image": "a.png"}) + "\n")
    assert train.main(flags(make_base(), tmp_path / "out", data=data, heldout=0)) == 2
    assert "a.png" in capsys.readouterr().err.splitlines()[-1]


FLAGS = (["--heldout", "2147483648"], ["--group_size", "2147483648"], ["--max_new_tokens", "9" * 5000],
         ["--seed", "9223372036854775808"], ["--temperature", "inf"], ["--max_pixels", "-1"])  # fmt: skip


@pytest.mark.parametrize("argv", FLAGS, ids=lambda argv: f"{argv[0]} {argv[1][:20]}")
@pytest.mark.parametrize("program", [train, evaluation])
def test_a_flag_out_of_bounds_is_refused_at_once(program, argv, capsys):
    assert program.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------- a minute of tests/mutate.py


@pytest.mark.parametrize(("trial", "count"), [(damaged_files, 12), (absurd_flags, 8)])
def test_no_damaged_file_and_no_absurd_flag_ends_in_a_traceback_a_hang_or_another_result(
    trial, count, tmp_path
):
    counts: Counter = trial(tmp_path, count, 0)
    assert counts.total() == count and not any(counts[name] for name in FAILURES)
