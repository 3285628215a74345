"""Recipes are run with stand-ins for python and torchrun: every line they launch must parse.

The worked example of own data is then run for real, with a policy of a few thousand parameters.
"""

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny

import config
import eval
import report
import train
from data import Question
from recipes import toy_ablation

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.sh"))
PARSERS = {"train.py": config.parse, "eval.py": eval.parse}

# Notes its arguments, one line a call, and leaves a checkpoint where a run would.
STUB = r"""#!/bin/sh
(IFS=$(printf '\t'); printf '%s\n' "$*" | tr '\n' ' '; echo) >>"$CALLS"
while [ $# -gt 1 ]; do
  [ "$1" = --out ] && mkdir -p "$2/checkpoint-1"
  shift
done
exit 0
"""


def launched(name: str, folder: Path, programs=tuple(PARSERS), **variables) -> list[tuple[str, list[str]]]:
    """[(script, its flags), ...] as the shell itself puts them together."""
    shutil.copytree(FOLDER, folder / "recipes")
    (folder / "bin").mkdir()
    for program in ("python", "torchrun"):
        (folder / "bin" / program).write_text(STUB)
        (folder / "bin" / program).chmod(0o755)
    # One job at a time: lines of two would mix.
    env = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(folder / "calls"),
        "HEAD": "node0", "JOBS": "1",
    } | variables  # fmt: skip
    command = ["bash", str(folder / "recipes" / f"{name}.sh")]
    command += [] if "toy" in name or name == "own_data" else ["data.parquet", "runs/x"]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
    lines = []
    for line in (folder / "calls").read_text(encoding="utf-8").splitlines():
        call = line.rstrip().split("\t")
        script = next((word for word in call if word in programs), None)
        if script:
            lines.append((script, call[call.index(script) + 1 :]))
    return lines


@pytest.mark.parametrize("name", sorted({*RECIPES} - {"toy_ablation"}))  # whose arms are a study
def test_every_line_that_a_recipe_launches_is_understood_and_every_flag_explained(name, tmp_path):
    text = (FOLDER / f"{name}.sh").read_text(encoding="utf-8")
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    explained = set(re.findall(r"--\w+", comments))
    lines = launched(name, tmp_path)
    assert "train.py" in [script for script, _ in lines]
    for script, flags in lines:
        assert PARSERS[script](flags).out.startswith("runs/")
        used = {word for word in flags if word.startswith("--")}
        assert used <= explained, sorted(used - explained)


def test_the_stages_of_the_paper_follow_each_other(tmp_path):
    lines = launched("eight_gpus_7b", tmp_path)
    first, second = (config.parse(flags) for script, flags in lines if script == "train.py")
    assert (first.template, first.ssr, first.rethink_fraction) == ("plain", "replay", 0)
    assert second.model == f"{first.out}/checkpoint-1"
    assert second.template == "rethink" and second.rethink_fraction > 0


def test_the_study_launches_every_arm_with_every_seed(tmp_path):
    runs = [PARSERS[script](flags) for script, flags in launched("toy_ablation", tmp_path)]
    seeds = {run.seed for run in runs}
    arms = {run.out.rpartition("-")[0] for run in runs}
    assert len({run.out for run in runs}) == len(runs) == len(arms) * len(seeds)
    assert len(seeds) == 5 and {"runs/ablation/plain", "runs/ablation/ssr_rethink"} <= arms


def test_the_example_of_own_data_trains_reports_and_evaluates(tmp_path, monkeypatch):
    programs = {"train.py": train.main, "report.py": report.main, "eval.py": eval.main}
    settings = {"MODEL": str(tiny.make_base()), "STEPS": "1"}
    lines = launched("own_data", tmp_path / "stub", tuple(programs), **settings)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER, "recipes")
    out = Path("runs/own-data")
    write = runpy.run_path("recipes/own_data.py")["write"]
    write(out / "data", "train", 10)
    write(out / "data", "heldout", 3)
    assert [script for script, _ in lines] == list(programs)
    few = {"train.py": ["--max_new_tokens", "16", "--group_size", "2"]}
    for script, flags in lines:
        assert programs[script]([*flags, *few.get(script, [])]) == 0
    settings = tiny.strict_json((out / "config.json").read_text())
    sizes = [settings[name] for name in ("preset", "heldout", "episode_queries", "batch_size")]
    assert sizes == ["own", 1, 9, 18] and settings["reward"] == "recipes/own_data.py:reward"
    assert tiny.strict_json((out / "eval/summary.json").read_text())["own"]["n"] == 3
    assert "<html" in (out / "report.html").read_text()


def test_the_example_s_reward_prefers_the_right_option_to_another_to_none():
    reward = runpy.run_path(str(FOLDER / "own_data.py"))["reward"]
    question = Question("q", "?", [], "B", ["red", "blue", "pink"])
    said = ["\\boxed{B}", "\\boxed{blue}", "\\boxed{A}", "\\boxed{pink}", "\\boxed{black}", "blue"]
    assert [reward(text, question) for text in said] == [1, 1, 0.2, 0.2, 0, 0]


def test_the_figure_of_the_study_is_drawn_from_its_numbers(tmp_path):
    results = FOLDER.parent / "results"
    shutil.copy(results / "curves.csv", tmp_path)
    toy_ablation.draw(tmp_path)
    assert (tmp_path / "ablation.svg").read_text() == (results / "ablation.svg").read_text()


@pytest.mark.parametrize(("name", "gpus"), [("one_gpu_3b", 1), ("eight_gpus_7b", 8), ("qwen72b", 32)])
def test_a_recipe_fits_its_cards_of_80_gb_with_a_tenth_to_spare(name, gpus, tmp_path):
    from recipes.memory import peaks

    flags = next(flags for script, flags in launched(name, tmp_path) if script == "train.py")
    size = name.rpartition("_")[2].removeprefix("qwen")
    found = peaks(size, gpus, config.parse(flags))
    assert max(found.values()) < 0.9 * 80e9, found
