"""The study's runner and its report, on runs that are made up."""

import study

import config
import toy

WRITE = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(flags["--out"])
if flags["--seed"] == "1" and flags["--arm"] == "b":
    sys.exit("no more room")
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
        assert c.steps * c.batch_size == 16 * c.episode_queries * c.group_size  # equal samples
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
    script.write_text(WRITE.replace('== "1"', '== "2"'))
    assert study.main(["run", "x", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "4 runs, 3 done before"
