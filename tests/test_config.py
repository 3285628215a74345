"""The command line: every field is a flag; presets."""

from dataclasses import asdict, fields

import pytest

from config import PRESETS, Config, parse, sources


def test_every_field_is_a_flag_of_its_name_and_type():
    texts = {str: "text", int: "64", float: "0.5", bool: "true"}
    for f in fields(Config):
        text = f.metadata["choices"][-1] if f.metadata["choices"] else texts[f.type]
        command = [f"--{f.name}", text]
        if f.name == "preset":
            command += ["--data", "file.jsonl"]
        if f.name == "data":
            command += ["--model", "directory"]
        value = getattr(parse(command), f.name)
        assert value == f.type(text) and type(value) is f.type, f.name


def test_presets_change_defaults_and_flags_change_presets():
    config = parse(["--preset", "7b", "--data", "file.parquet", "--lr", "3e-6"])
    assert config.model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert config.lr == 3e-6 != PRESETS["7b"]["lr"]
    assert config.group_size == Config().group_size == 8


def test_a_real_model_on_a_file_takes_no_setting_of_the_toy_s():
    """Unless --preset says so; the tiny policy on a file is a trial, with the toy's settings."""
    own = parse(["--model", "directory", "--data", "file.jsonl"])
    assert asdict(own) == asdict(parse(["--model", "directory", "--data", "file.jsonl", "--preset", "own"]))
    assert (own.preset, own.lr, own.max_new_tokens, own.template) == ("own", 1e-6, 1024, "rethink")
    for flags, preset in [
        (["--model", "toy", "--data", "file.jsonl"], "toy"),
        (["--model", "directory"], "toy"),
        (["--model", "directory", "--data", "file.jsonl", "--preset", "toy"], "toy"),
        (["--model", "directory", "--data", "file.jsonl", "--preset", "7b"], "7b"),
    ]:
        assert parse(flags).preset == preset


def test_a_run_says_which_settings_come_from_where():
    line = sources(parse(["--model", "M", "--data", "mine.csv", "--lr", "2e-6", "--passes", "10"]))
    preset, flags = line.split("; flags: ")
    assert flags == "model M, data mine.csv, lr 2e-06"  # --passes 10 is the preset's
    assert preset.startswith("settings: preset own (") and "max_new_tokens 1024" in preset


@pytest.mark.parametrize("name", ["7b", "72b"])
def test_the_large_presets_are_the_papers(name):
    """1024 questions x 8 in an episode, batches of 512, 2048 tokens, pixels, at most 3 passes."""
    config = parse(["--preset", name, "--data", "file.parquet"])
    assert (config.episode_queries, config.group_size, config.batch_size) == (1024, 8, 512)
    assert (config.max_new_tokens, config.lr, config.temperature) == (2048, 1e-6, 1.0)
    assert (config.min_pixels, config.max_pixels) == (256 * 28 * 28, 1280 * 28 * 28)
    assert (config.steps, config.passes, config.template) == (0, 3, "plain")
    assert (config.clip_low, config.clip_high, config.gradient_checkpointing) == (0.2, 0.35, True)
    column = {"7b": "PassRate_7BBase", "72b": "PassRate_32BTrained"}[name]
    assert config.pass_rate_column == column and config.pass_rate_min > 0


def test_help_tells_of_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(Config):
        assert f"--{f.name} " in text and (f.default in (None, "") or f"(default: {f.default})" in text)
