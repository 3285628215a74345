"""Checkpoints: whole or not there, and a resumed run is the run that was not interrupted."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_data import write_jsonl
from transformers import AutoModelForImageTextToText

import checkpoint
import parallel
import toy
import train
from checkpoint import list_checkpoints, rows_from
from record import lock_folder

# Two episodes of four steps with both ideas of the paper.
BOTH = {"steps": 8, "batch_size": 8, "rethink_fraction": 0.5, "save_every": 3, "keep_last": 9,
        "eval_every": 2}  # fmt: skip
pytestmark = pytest.mark.usefixtures("reward_by_luck")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory, by_luck):
    """A run that nothing interrupted, with a checkpoint at steps 3, 6 and 8. It has something to lose: they
    hold a part of an episode, a buffer, a second look, and Adam's moments."""
    with by_luck():
        out = tiny.run_training(base, tmp_path_factory.mktemp("whole"), **BOTH)
    held = json.loads((out / "checkpoint-6" / "samples.json").read_text())
    assert len(held["fresh"]) == 16 and held["buffer"]
    assert any(row["rethought"] for part in held.values() for row in part)
    assert any(row["replayed"] > 0 for row in tiny.steps_of(out)[3:])
    return out


def at_step(monkeypatch, step: int, action) -> None:
    """Call `action` in the middle of optimiser step `step`."""
    real = train.update

    def update(run, branches):
        if run.step + 1 == step:
            action()
        return real(run, branches)

    monkeypatch.setattr(train, "update", update)


def assert_same_run(out: Path, whole: Path) -> None:
    """The same metrics, but for the clock's, and the same final weights, bit for bit."""
    assert tiny.steps_of(out) == tiny.steps_of(whole)
    assert tiny.heldout_of(out) == tiny.heldout_of(whole)
    last, expected = (list_checkpoints(path)[-1] for path in (out, whole))
    assert last.name == expected.name
    assert tiny.same_tensors(tiny.weights_of(last), tiny.weights_of(expected))
    assert tiny.read_jsonl(out / "samples.jsonl") == tiny.read_jsonl(whole / "samples.jsonl")


# ---------------------------------------------------------------------------- resuming exactly


@pytest.mark.parametrize(("step", "number"), [(4, signal.SIGTERM), (6, signal.SIGINT)],
                         ids=["between_episodes", "within_an_episode"])  # fmt: skip
def test_a_signal_ends_the_step_and_saves_and_resuming_is_exact(
    base, whole, tmp_path, monkeypatch, capsys, step, number
):
    """Accuracy on held-out questions was due at that step, and is measured when resuming."""
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        assert train.main(tiny.flags(base, tmp_path, **BOTH)) == 0
    captured = capsys.readouterr()
    assert "finishing this step, then saving" in captured.err
    last = captured.out.splitlines()[-1]
    assert f"checkpoint-{step}" in last and f"--resume --out {tmp_path}" in last
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert len(tiny.steps_of(tmp_path)) == step
    tiny.run_training(base, tmp_path, **BOTH, resume="true")
    assert_same_run(tmp_path, whole)
    assert tiny.read_jsonl(tmp_path / "heldout.jsonl") == tiny.read_jsonl(whole / "heldout.jsonl")


def test_a_second_ctrl_c_stops_at_once(base, tmp_path, monkeypatch, capsys):
    at_step(monkeypatch, 2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert train.main(tiny.flags(base, tmp_path)) == 130
    assert "stopped at once; go on with --resume" in capsys.readouterr().err
    assert len(tiny.steps_of(tmp_path)) == 1


@pytest.mark.parametrize("name", ["samples.json", "state-0-of-1.safetensors"])
def test_a_bit_that_flipped_is_found_and_the_checkpoint_before_offered(base, whole, tmp_path, capsys, name):
    out = shutil.copytree(whole, tmp_path / "copy")
    path = out / "checkpoint-8" / name
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    line = refused(capsys, base, out)
    assert str(path) in line and line.endswith("go on from checkpoint-6")
    shutil.rmtree(out / "checkpoint-8")
    tiny.run_training(base, out, **BOTH, resume="true")
    assert_same_run(out, whole)  # the lines of later steps were forgotten


def refused(capsys, base, out: Path, **changes) -> str:
    """Resume a run that cannot be; returns the one line that says so."""
    assert train.main(tiny.flags(base, out, **BOTH | {"resume": "true"} | changes)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before(base, whole, tmp_path, monkeypatch):
    """Killed at step 6 with the weights written and the rest not: resuming starts from step 3."""
    real, saves = checkpoint.save_settings, []

    def save_and_die(*args):
        real(*args)
        saves.append(args)
        if len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_settings", save_and_die)
        pid = tiny.start(lambda: train.main(tiny.flags(base, tmp_path, **BOTH)), tmp_path / "log")
    assert tiny.wait(pid, tiny.LIMIT) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert (tmp_path / "unfinished-6" / "model.safetensors").exists()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-3"]
    assert len(tiny.steps_of(tmp_path)) == 6
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "episode": 2, "rewa')  # killed while it wrote a line
    tiny.run_training(base, tmp_path, **BOTH, resume="true")
    assert_same_run(tmp_path, whole)
    assert not list(tmp_path.glob("unfinished-*"))


def test_a_finished_run_goes_on_when_it_is_given_more_steps_and_changed_flags_are_noted(
    base, whole, tmp_path, capsys
):
    out = shutil.copytree(whole, tmp_path / "copy")
    tiny.run_training(base, out, **BOTH, resume="true")  # nothing is left to do
    assert_same_run(out, whole)
    tiny.run_training(base, out, **BOTH | {"steps": 10, "lr": 2e-3, "ssr": "filter"}, resume="true")
    assert [row["step"] for row in tiny.steps_of(out)] == list(range(1, 11))
    assert tiny.steps_of(out)[:8] == tiny.steps_of(whole)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert notes == ["note: flags changed since: lr, ssr"]


def test_resuming_is_exact_where_the_vision_tower_has_seen_nothing_yet(base, tmp_path, monkeypatch):
    """Text for an episode, then pictures: the tower's Adam is younger than the others'."""
    toy.toy_questions(toy.LEVELS["easy"], 1, "late")[0].images[0].save(tmp_path / "picture.png")
    rows = [{"qid": f"q{i}", "question": f"{i} + {i}?", "answer": "4"} for i in range(4)]
    rows += [row | {"qid": f"p{i}", "image": "picture.png"} for i, row in enumerate(rows)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)

    def text_first(run):
        wanted = "q" if run.episode == 0 else "p"
        return [q for q in run.questions if q.id.startswith(wanted)]

    monkeypatch.setattr(train, "episode_questions", text_first)
    tiny.let_be_right(monkeypatch, tiny.odd_sum)
    settings = {"data": data, "heldout": 0, "steps": 4, "save_every": 1, "keep_last": 9}
    tiny.run_training(base, tmp_path / "whole", **settings)
    for step, later in ((1, "checkpoint-[234]"), (3, "checkpoint-4")):
        out = tmp_path / str(step)
        shutil.copytree(tmp_path / "whole", out, ignore=shutil.ignore_patterns(later))
        tiny.run_training(base, out, **settings, resume="true")
        assert_same_run(out, tmp_path / "whole")


def test_data_that_changed_within_an_episode_is_refused_and_config_json_stays(
    base, tmp_path, monkeypatch, capsys
):
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    rows = [{"qid": f"q{i}", "question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(8)]
    settings = {"data": data, "heldout": 0, "ssr": "off", "episode_queries": 8, "steps": 4}
    write_jsonl(data, rows)
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        tiny.run_training(base, out, **settings)
    config = (out / "config.json").read_text()
    for changed in (rows[1:], rows[::-1], [rows[0] | {"answer": "1"}, *rows[1:]]):
        write_jsonl(data, changed)
        assert f"the questions of {data}" in refused(capsys, base, out, **settings, lr=5e-4)
        assert (out / "config.json").read_text() == config
    write_jsonl(data, rows)
    tiny.run_training(base, out, **settings, resume="true")


def test_other_prompts_and_fewer_steps_than_are_done_are_refused(base, whole, tmp_path, capsys):
    out = shutil.copytree(whole, tmp_path / "copy")
    assert "--toy_level was 'easy'" in refused(capsys, base, out, toy_level="hard", steps=9)
    assert "--template was 'bare'" in refused(capsys, base, out, template="plain")
    assert "--steps 5" in refused(capsys, base, out, steps=5) and len(tiny.steps_of(out)) == 8


# ---------------------------------------------------------------------------- what a checkpoint is


def test_the_last_checkpoints_are_kept_and_what_others_put_beside_them(base, tmp_path):
    others = [tmp_path / name for name in ("checkpoint-best-1", "checkpoint-\u00b2", "checkpoint-2.bak")]
    for folder in others:
        folder.mkdir()
    tiny.run_training(base, tmp_path, steps=11, save_every=3, keep_last=2, heldout=0)
    # By number: 11 comes after 9.
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-11"]
    assert not list(tmp_path.glob("unfinished-*")) and all(map(Path.is_dir, others))


def test_a_checkpoint_loads_by_transformers_with_no_key_missing_or_left_and_is_a_model_to_train_on(
    whole, tmp_path
):
    directory = list_checkpoints(whole)[-1]
    model, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    with safe_open(directory / "state-0-of-1.safetensors", framework="pt") as state:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, state.get_tensor(f"param/model.{name}"))
    tiny.run_training(whole / "checkpoint-8", tmp_path, steps=1, batch_size=32)
    assert tiny.heldout_of(tmp_path)[0]["heldout_accuracy"] == tiny.heldout_of(whole)[-1]["heldout_accuracy"]


def test_nothing_is_pickled(base, whole, tmp_path, monkeypatch):
    names = {p.suffix for p in (whole / "checkpoint-8").iterdir()}
    assert names == {".json", ".jinja", ".safetensors", ""}  # SHA256SUMS

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    out = shutil.copytree(whole, tmp_path / "copy")
    tiny.run_training(base, out, **BOTH | {"steps": 9}, resume="true")


def test_a_checkpoint_of_another_model_or_version_or_that_lacks_a_part_is_named(
    base, whole, tmp_path, capsys
):
    out = shutil.copytree(whole, tmp_path / "copy")
    directory = out / "checkpoint-8"
    state, trainer = directory / "state-0-of-1.safetensors", directory / "trainer.json"

    def sign():
        """As if the files had been written so."""
        sums = checkpoint.digests(directory)
        (directory / checkpoint.SUMS).write_text("".join(f"{s}  {name}\n" for name, s in sums.items()))

    found = json.loads(trainer.read_text())
    trainer.write_text(json.dumps({key: value for key, value in found.items() if key != "draws"}))
    sign()
    assert "of another version" in refused(capsys, base, out)
    tensors = load_file(state)
    state.unlink()
    assert f"{state} is missing" in refused(capsys, base, out)
    save_file({name: x for name, x in tensors.items() if "layers.1." not in name}, state)
    sign()
    assert "another model" in refused(capsys, base, out)
    (directory / checkpoint.SUMS).write_text("")
    assert f"{checkpoint.SUMS} is missing or empty" in refused(capsys, base, out)


def test_a_folder_belongs_to_one_run_at_a_time(base, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with lock_folder(out):
        assert f"in use by process {os.getpid()}" in refused(capsys, base, out, steps=1)
    tiny.run_training(base, out, steps=1)


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 4), (4, 3), (3, 8)])
def test_any_number_of_ranks_finds_its_rows(tmp_path, monkeypatch, rows, before, after):
    """Parts are cut as torch.chunk cuts, empty ones included; what was split is whole again."""
    tensor = torch.arange(rows * 2.0).view(rows, 2)

    def parts_for(count: int) -> list[torch.Tensor]:
        chunks = list(tensor.chunk(count))
        return chunks + [tensor[:0]] * (count - len(chunks))

    for i, part in enumerate(parts_for(before)):
        save_file({"w": part.clone()}, tmp_path / str(i))
    files = [safe_open(tmp_path / str(i), framework="pt") for i in range(before)]
    for i, expected in enumerate(parts_for(after)):
        monkeypatch.setattr(parallel, "shard_place", lambda _, i=i: (i, after))
        assert torch.equal(rows_from(files, "w", *parallel.rows_of(tensor)), expected)
