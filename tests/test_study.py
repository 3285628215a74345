"""The study's runner and its report, on runs that are made up."""

import csv
import json
import shutil
from xml.etree import ElementTree

import looks
import pytest
import study
import study_tables
import torch
from conftest import random_response

import config
import toy
from model import response_logprobs
from rethink import OUTCOMES

WRITE = """
import json, pathlib, sys
_, _, arm, _, seed, _, out = sys.argv
if (arm, seed) == ("b", "1"):
    sys.exit("no more room")
out = pathlib.Path(out)
out.mkdir()
(out / "config.json").write_text(json.dumps({"steps": 4}))
(out / "metrics.jsonl").write_text(json.dumps({"step": 4, "heldout_accuracy": 1.0}))
"""


def test_every_arm_parses_and_has_a_name_of_its_own():
    arms = [(arm, command) for e in study.EXPERIMENTS.values() for arm, command in e.arms.items()]
    assert len(dict(arms)) == len(arms)
    for arm, command in arms:
        assert "-" not in arm  # ARM-SEED
        flags = command.split()[command.split().index("--toy_level") :]
        c = config.parse(flags)
        episodes = c.steps * c.batch_size / (c.episode_queries * c.group_size)
        assert episodes == (32 if "_10_" in arm else 44 if arm.endswith("long") else 16)  # equal samples
        toy.level(c.toy_level)
    assert {e.against for e in study.EXPERIMENTS.values()} <= dict(arms).keys()


def test_a_second_call_makes_only_what_is_missing_and_failures_are_named(tmp_path, monkeypatch, capsys):
    script = tmp_path / "write.py"
    script.write_text(WRITE)
    arms = {arm: f"{script} --arm {arm}" for arm in "ab"}
    monkeypatch.setattr(study, "EXPERIMENTS", {"x_1": study.Experiment("?", arms, 2, against="a")})
    out = tmp_path / "runs"
    assert study.main(["run", "x", "--out", str(out), "--jobs", "1"]) == 1
    said = capsys.readouterr()
    assert [line.split("/")[-1] for line in said.out.splitlines()[1:]] == ["a-0", "b-0", "a-1", "b-1 failed"]
    assert f"{out}/b-1.log" in said.err and "no more room" in (out / "b-1.log").read_text()
    script.write_text(WRITE.replace('"1"', '"2"'))
    assert study.main(["run", "x", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "4 runs, 3 done before"


def make_run(folder, rewards, accuracies, length=10):
    """Two steps per episode of 4 x 2 responses, measured after every episode."""
    folder.mkdir(parents=True)
    settings = {"steps": 2 * len(rewards), "episode_queries": 4, "group_size": 2}
    (folder / "config.json").write_text(json.dumps(settings))
    rows = []

    def measure(accuracy):
        held = dict.fromkeys(study_tables.HELDOUT.values(), 0.5) | {"heldout_accuracy": accuracy}
        held["heldout_categories"] = {"1 step": 1.0, "5 steps": 0.25, "7 steps": 0.75}
        rows.append({"step": 2 * (len(rows) // 3)} | held)

    measure(accuracies[0])
    for i, reward in enumerate(rewards):
        looks = {f"rethink_{name}": 3 for name in ("attempted", "kept", *OUTCOMES)} | {"rethink_tokens": 20}
        sampled = {"episode": i + 1, "reward": reward, "effective_queries": 0.25 * i} | looks
        sampled |= {"rethinks": 0.5, "overthinking": 1.0, "response_length": length}
        rows += [{"step": 2 * i + 1} | sampled, {"step": 2 * i + 2} | sampled]
        measure(accuracies[i + 1])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path):
    """Episodes of 8 x 10 + 20 = 100 tokens, but 60 in seed 1 of ssr."""
    for arm in ("plain", "filter", "ssr"):
        for seed in (0, 1):
            gain = 0.25 * (arm == "ssr")
            length = 5 if (arm, seed) == ("ssr", 1) else 10
            make_run(tmp_path / f"runs/{arm}-{seed}", [0.5, 0.75 + gain], [0.0, 0.5, 0.5 + gain], length)
            make_run(tmp_path / f"runs/{arm}_60_4-{seed}", [0.5, 0.9], [0.0, 0.5, 0.5 + gain])
    (tmp_path / "runs/rethink-0").mkdir()  # was ended before it began
    return tmp_path / "runs"


def test_runs_are_compared_at_equal_tokens(runs, tmp_path):
    study.main(["report", str(tmp_path / "results"), "--runs", str(runs)])
    with open(tmp_path / "results/runs.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["experiment"] == "main"]
    found = {(row["arm"], row["seed"]): row for row in rows}
    assert len(found) == 6 and {row["tokens"] for row in rows} == {"120"}  # two episodes of ssr, seed 1
    slow, fast = found["ssr", "0"], found["ssr", "1"]
    assert (fast["accuracy"], slow["accuracy"]) == ("0.75", "0.55")  # 0.5 + 0.25 * 20 / 100
    assert (fast["area"], slow["area"]) == ("0.75", f"{(100 * 0.5 + 20 * 1.0) / 120:.6g}")
    assert (slow["steps_to"], found["plain", "0"]["steps_to"]) == ("2", "inf")
    assert (slow["long"], slow["effective"], slow["attempted"]) == ("0.5", "0.25", "6")
    text = (tmp_path / "results/main.md").read_text()
    assert "120 sampled tokens" in text
    assert "| 0.150 ± 1.271 |" in text  # paired: 0.05 and 0.25, 12.706 * 0.1


def test_tables_and_figures_follow_from_the_csv_files(runs, tmp_path):
    results = tmp_path / "results"
    study.main(["report", str(results), "--runs", str(runs)])
    first = {path.name: path.read_text() for path in results.iterdir()}
    made = "episodes.csv heldout.csv runs.csv main.md main.svg map_60_4.md map.svg"
    assert first.keys() == set(made.split())
    for name, text in first.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(text)
            assert "nan" not in text
        if name not in ("episodes.csv", "heldout.csv"):
            (results / name).unlink()
    study.main(["report", str(results)])
    assert {path.name: path.read_text() for path in results.iterdir()} == first
    gone = next(runs.glob("plain-*"))
    shutil.rmtree(gone)
    study.main(["report", str(results), "--runs", str(runs)])
    arm, _, seed = gone.name.rpartition("-")
    assert int(seed) in study_tables.read_csv(results / "heldout.csv")[arm]  # what results/ holds stays


def test_a_prompt_with_a_look_behind_it_goes_on_as_the_response_would(policy, prompts):
    first, second = (random_response(n, n, policy) for n in (5, 7))
    groups = [(prompt, [torch.cat((first, second))]) for prompt in prompts]
    want, _ = response_logprobs(policy, groups)
    groups = [(looks.continued(prompt, first.tolist()), [second]) for prompt in prompts]
    found, _ = response_logprobs(policy, groups)
    torch.testing.assert_close(found, want[:, 5:], rtol=1e-4, atol=1e-4)
