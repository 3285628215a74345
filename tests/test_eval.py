"""The promises of eval.py, asking.py and scores.py: files, resuming, intervals, errors.

The policy is the toy's with random weights: what it says is nonsense, and that is enough here.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_benchmarks import (
    emma_row,
    mathverse_row,
    mathvision_row,
    mathvista_row,
    mega_row,
    mmmu_pro_row,
    mmmu_row,
    png,
    vision_row,
    write_jsonl,
    write_parquet,
)

import eval as evaluation
import toy
from benchmarks import asking, readers, scores
from data import TEMPLATES
from model import save_policy

ROOT = Path(__file__).parent.parent


def run(*argv) -> int:
    return evaluation.main([str(argument) for argument in argv])


def responses_file(path, **responses) -> Path:
    rows = [{"id": id_, "response": text} for id_, text in responses.items()]
    return write_jsonl(path, rows)


def marked(tmp_path, name, data, responses: Path, *more) -> dict:
    """The summary of marking responses, into tmp_path/out."""
    flags = ["--benchmark", name, "--data", data, "--responses", responses, "--out", tmp_path / "out"]
    assert run(*flags, *more) == 0
    return summary_of(tmp_path / "out", name)


def summary_of(out, name) -> dict:
    return json.loads((out / "summary.json").read_text())[name]


def lines_of(out, name) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def mmmu(tmp_path):
    rows = [mmmu_row(f"validation_Art_{i}") for i in range(4)]
    return write_parquet(tmp_path / "Art" / "validation-0.parquet", rows).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_policy(toy.new_policy(hidden=32, layers=1), directory)
    return directory


def test_marking_counts_right_wrong_unanswered_truncated_and_missing(tmp_path, mmmu, capsys):
    responses = write_jsonl(tmp_path / "r.jsonl", [
        {"id": "validation_Art_0", "response": "\\boxed{C}"},
        {"id": "validation_Art_1", "response": "I think", "finish": "length", "tokens": 9},
        {"id": "validation_Art_2", "response": "\\boxed{A}"},
    ])  # fmt: skip
    summary = marked(tmp_path, "mmmu", mmmu, responses)
    counts = {key: summary[key] for key in ("accuracy", "n", "no_answer", "truncated", "missing")}
    assert counts == {"accuracy": 0.25, "n": 4, "no_answer": 1, "truncated": 1, "missing": 1}
    assert summary["ci95"][0] < 0.25 < summary["ci95"][1]
    assert summary["groups"]["multiple-choice"] == {"accuracy": 0.25, "n": 4}
    lines = lines_of(tmp_path / "out", "mmmu")
    assert [line["correct"] for line in lines] == [True, False, False, False]
    assert {"id", "response", "extracted", "gold", "correct", "finish", "tokens", "category"} <= set(lines[0])
    printed = capsys.readouterr().out
    assert "partial: 4 of 900" in printed
    assert "VL-Rethinker-7B" in printed


def test_what_was_not_found_is_reported_by_reason_and_shown(tmp_path, mmmu, capsys):
    finishes = ("stop", "length", "overlong")
    rows = [
        {"id": f"validation_Art_{i}", "response": "I am not sure.", "finish": finish}
        for i, finish in enumerate(finishes)
    ]
    responses = write_jsonl(tmp_path / "r.jsonl", rows)
    shares = marked(tmp_path, "mmmu", mmmu, responses, "--show")["no_answer_by"]
    assert shares == {"no box or phrase": 0.25, "cut at the limit": 0.25, "prompt too long": 0.25}
    printed = capsys.readouterr().out
    assert printed.count("...I am not sure.") == 3
    assert "25.0 % cut at the limit" in printed


def test_the_papers_protocol_is_the_default():
    config = evaluation.parse(["--benchmark", "mathvista", "--model", "any/model"])
    made = asking.made_with(config, "mathvista")
    paper = {"temperature": 0, "samples": 1, "max_new_tokens": 8192, "template": "plain",
             "min_pixels": 256 * 28 * 28, "max_pixels": 1280 * 28 * 28,
             "force_rethink": False}  # fmt: skip
    assert {key: made[key] for key in paper} == paper
    assert TEMPLATES["plain"].endswith("put your final answer within \\boxed{}.")
    item = readers.mathvista(mathvista_row())
    assert item.template == "" and item.question.text.startswith("<image>Hint: ")


def test_marking_twice_and_marking_the_result_give_the_same_files(tmp_path, mmmu):
    responses = responses_file(tmp_path / "r.jsonl", validation_Art_0="Answer: C")
    seen = []
    for source in (responses, responses, tmp_path / "out" / "mmmu.jsonl"):
        summary = marked(tmp_path, "mmmu", mmmu, source)
        summary.pop("settings")
        seen.append(((tmp_path / "out" / "mmmu.jsonl").read_text(), summary))
    assert seen[0] == seen[1] == seen[2]


@pytest.fixture
def own(tmp_path):
    """Two pictures, options in a column, a bare number."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png())
    return write_jsonl(tmp_path / "mine.jsonl", [
        {"question": "<image>Same as <image>?", "image": ["a.png", "b.png"], "answer": "B",
         "choices": ["no", "yes"], "category": "pairs"},
        {"question": "How many?", "images": ["a.png"], "answer": 3},
    ])  # fmt: skip


def test_own_questions_are_a_benchmark_of_their_own(tmp_path, own, model):
    responses = responses_file(tmp_path / "r.jsonl", **{"0": "\\boxed{yes}", "1": "\\boxed{4}"})
    out = tmp_path / "out"
    assert run("--data", own, "--responses", responses, "--out", out) == 0
    summary = summary_of(out, "own")
    assert (summary["accuracy"], summary["label"]) == (0.5, "mine.jsonl")
    assert summary["groups"] == {"pairs": {"accuracy": 1.0, "n": 1}}
    flags = ["--model", model, "--data", own, "--max_new_tokens", 3, "--out", tmp_path / "asked"]
    assert run(*flags) == 0 and len(lines_of(tmp_path / "asked", "own")) == 2


def test_own_questions_are_asked_as_in_training(tmp_path, own, model):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(model, checkpoint)
    trained = {"template": "rethink", "max_new_tokens": 7, "min_pixels": 0, "max_pixels": 1 << 20}
    (checkpoint / "trainer.json").write_text(json.dumps({"config": trained | {"lr": 1.0}}))
    config = evaluation.parse(["--model", str(checkpoint), "--data", str(own)])
    assert trained.items() <= asking.made_with(config, "own").items()
    config = evaluation.parse(["--model", str(checkpoint), "--data", str(own), "--template", "bare"])
    assert asking.made_with(config, "own")["template"] == "bare"
    assert asking.made_with(config, "mmmu") | asking.PAPER == asking.made_with(config, "mmmu") | {
        "template": "plain"
    }


ROWS = {
    "mathvista": mathvista_row(), "mathverse": mathverse_row(), "mathvision": mathvision_row(),
    "mmmu": mmmu_row(), "mmmu_pro": mmmu_pro_row(), "emma": emma_row(), "emma_mini": emma_row(),
    "megabench": mega_row(),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_every_benchmark_is_marked_from_its_published_schema(tmp_path, name):
    data = write_parquet(tmp_path / "data.parquet", [ROWS[name]])
    item = readers.BENCHMARKS[name].read(ROWS[name])
    right = {item.question.id: f"\\boxed{{{item.question.answer}}}"}
    assert marked(tmp_path, name, data, responses_file(tmp_path / "r.jsonl", **right))["accuracy"] == 1


def test_marking_needs_no_torch(tmp_path, mmmu):
    responses = responses_file(tmp_path / "r.jsonl", validation_Art_0="Answer: C")
    code = ("import sys, eval; code = eval.main(sys.argv[1:]); "
            "sys.exit(code or 'torch' in sys.modules)")  # fmt: skip
    flags = ["--benchmark", "mmmu", "--data", str(mmmu), "--responses", str(responses)]
    command = [sys.executable, "-c", code, *flags, "--out", str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_mmmu_pro_is_the_mean_of_its_two_settings(tmp_path):
    rows = [mmmu_pro_row(f"test_Art_{i}") for i in range(4)]
    write_parquet(tmp_path / "standard (10 options)" / "test-0.parquet", rows)
    write_parquet(tmp_path / "vision" / "test-0.parquet", [vision_row("test_Art_0")])
    answers = {f"standard:test_Art_{i}": "Answer: J" for i in range(2)}
    responses = responses_file(tmp_path / "r.jsonl", **answers, **{"vision:test_Art_0": "(A)"})
    summary = marked(tmp_path, "mmmu_pro", tmp_path, responses)
    assert summary["accuracy"] == 0.25
    assert summary["groups"]["standard"] == {"accuracy": 0.5, "n": 4}
    assert summary["groups"]["vision"] == {"accuracy": 0.0, "n": 1}


def test_megabench_is_a_mean_over_tasks_and_says_what_it_leaves_out(tmp_path):
    judge = mega_row(metric="program_judge")["metric_info"]
    rows = [mega_row(id_, task_name="a") for id_ in "123"]
    rows += [mega_row("4", "number_rel_diff_ratio", "10", task_name="b")]
    rows += [mega_row("5", task_name="c"), mega_row("6", task_name="c", metric_info=judge)]
    data = write_jsonl(tmp_path / "test.jsonl", rows)
    answers = {"1": "Answer: 3.5", "2": "Answer: 1", "3": "Answer: 1", "4": "Answer: 9", "5": "3"}
    summary = marked(tmp_path, "megabench", data, responses_file(tmp_path / "r.jsonl", **answers))
    assert summary["accuracy"] == pytest.approx((1 / 3 + 0.9) / 2, abs=1e-6)
    assert (summary["tasks_scored"], summary["tasks_total"], summary["samples_scored"]) == (2, 3, 4)
    assert summary["label"].startswith("core (2/3 tasks, 4/6 samples)")
    assert summary["unsupported_metrics"] == {"program_judge": 2}
    partial = lines_of(tmp_path / "out", "megabench")[3]
    assert partial["score"] == pytest.approx(0.9)
    assert partial["correct"] is False


def items(n, cluster=lambda i: "", stratum=lambda i: ""):
    def item(i):
        question = readers.Question(str(i), "", [], "")
        return readers.Item(question, bool, [], cluster=cluster(i), stratum=stratum(i))

    return [item(i) for i in range(n)]


def test_the_interval_is_wilsons_and_wider_for_clusters():
    values = [1.0] * 30 + [0.0] * 70
    low, high = scores.interval(items(100), values)
    assert (round(low, 4), round(high, 4)) == (0.2189, 0.3958)  # Wilson's for 30 of 100
    of_five = scores.interval(items(100, cluster=lambda i: str(i // 5)), values)
    assert of_five[1] - of_five[0] > 2 * (high - low)
    assert scores.interval(items(10), [1.0] * 10)[0] == pytest.approx(0.7225, abs=1e-3)


def test_the_interval_of_a_mean_over_tasks_is_that_of_the_task_means():
    tasks = items(40, cluster=lambda i: str(i % 4), stratum=lambda i: str(i % 4))
    values = [float(i % 4 in (0, 1)) for i in range(40)]  # two tasks right, two wrong
    low, high = scores.interval(tasks, values)
    assert scores.headline(tasks, values) == pytest.approx(0.5)
    assert high - low > 0.65  # as wide as of four coin flips


def test_pass_at_k_is_unbiased_and_the_majority_needs_an_answer():
    assert scores.pass_at(2, 4, 2) == pytest.approx(1 - 1 / 6)
    item = readers.mmmu(mmmu_row())
    texts = ["\\boxed{A}", "\\boxed{C}", "\\boxed{both together}", "no idea", "nor here", "hm"]
    lines = scores.mark_all(item, [{"response": text} for text in texts], 6)
    assert scores.majority(item, lines) == 1
    assert scores.majority(item, lines[3:]) == 0


def test_several_samples_give_mean_pass_and_majority(tmp_path, mmmu):
    rows = [{"id": "validation_Art_0", "response": f"\\boxed{{{x}}}"} for x in "CCAB"]
    responses = write_jsonl(tmp_path / "r.jsonl", rows)
    summary = marked(tmp_path, "mmmu", mmmu, responses, "--limit", 1, "--samples", 4)
    assert (summary["mean@4"], summary["pass@1"], summary["pass@4"]) == (0.5, 0.5, 1)
    assert summary["pass@2"] == pytest.approx(5 / 6, abs=1e-6)
    assert summary["maj@4"] == 1
    assert "first 1 only" in summary["label"]
    assert [line.get("sample", 0) for line in lines_of(tmp_path / "out", "mmmu")] == [0, 1, 2, 3]


def test_comparing_two_results_is_paired(tmp_path, capsys):
    def result(name, right):
        rows = [{"id": str(i), "correct": i in right} for i in range(20)]
        return write_jsonl(tmp_path / name, rows)

    a, b = result("a.jsonl", range(5)), result("b.jsonl", range(1, 14))
    assert run("--compare", a, b) == 0
    printed = capsys.readouterr().out
    assert "B - A = +40.0" in printed
    assert "B better on 9, A on 1, equal on 10" in printed
    assert f"p = {scores.sign_test(9, 1):.3g}" in printed
    assert scores.sign_test(9, 1) == pytest.approx(2 * (1 + 10) / math.pow(2, 10))
    assert run("--compare", a, tmp_path / "none.jsonl") == 2


@pytest.fixture
def asked(tmp_path, model, monkeypatch):
    bring = asking.bring_policy  # in float64: rows beside others round differently
    monkeypatch.setattr(asking, "bring_policy", lambda *args: bring(*args).double())
    rows = [mathvision_row(str(i), options=[], answer="1") for i in range(6)]
    data = write_parquet(tmp_path / "test.parquet", rows)
    flags = ["--benchmark", "mathvision", "--data", data, "--model", model, "--rows", 4,
             "--max_new_tokens", 6, "--min_pixels", 784, "--max_pixels", 3136,
             "--samples", 2]  # fmt: skip
    return [str(flag) for flag in flags]


def test_forced_second_looks_stand_beside_the_first_and_resume_with_them(tmp_path, model):
    # Long enough for a trigger; a random policy that stops at once is forced to go on.
    out = tmp_path / "out"
    flags = ["--model", model, "--force_rethink", "--limit", 12, "--max_new_tokens", 40,
             "--temperature", 1, "--out", out]  # fmt: skip
    assert run(*flags) == 0
    lines = [json.loads(line) for line in (out / "toy.jsonl").read_text().splitlines()]
    forced = [line for line in lines if "again" in line]
    assert forced and all(line["finish"] == "stop" for line in forced)
    for line in forced:
        assert "Wait" in line["again"]["response"]
        assert line["again"]["response"].startswith(line["response"])
    summary = summary_of(out, "toy")
    counts = summary["force_rethink"]
    assert counts["forced"] == len(forced)
    assert counts["only_wrong"] >= max(counts["before"], counts["after"])
    assert run(*flags) == 0
    assert summary_of(out, "toy") == summary


def test_a_second_look_without_an_answer_of_its_own_is_no_answer():
    item = readers.Item(readers.Question("q", "", [], "green"), lambda said: said == "green", [])
    first, trigger = "So \\boxed{green}.", "\n\nWait, does it seem right?"
    for y2, correct, outcome in (("green}.", False, "no_answer"), ("\\boxed{red}", False, "right_wrong")):
        again = {"response": first + trigger + y2, "finish": "stop", "tokens": 9, "trigger": "x"}
        line = scores.mark(item, {"response": first, "again": again})
        assert line["correct"] and line["again"]["correct"] == correct
        assert line["again"]["response"] == first + trigger + y2
        assert scores.rethinking([item], [[line]])["force_rethink"][outcome] == 1


def test_overthinking_counts_tokens_after_an_answer_that_was_right_already():
    item = readers.Item(readers.Question("q", "", [], "green"), lambda said: said == "green", [])
    for first, after, spent in (("green", "blue", 10), ("blue", "green", 0)):
        before = f"So \\boxed{{{first}}}."
        text = (
            before
            + "Wait, does it seem right?".ljust(len(before) - len(after) - 8, "?")
            + f"\\boxed{{{after}}}"
        )
        line = scores.mark(item, {"response": text, "tokens": 10 * len(text) / (len(text) - len(before))})
        numbers = scores.rethinking([item], [[line]])
        assert numbers["overthinking"] == spent and numbers["rethinks_helped"] == (-1 if spent else 1)


def kill_after(number: int, monkeypatch):
    """Ctrl-C arrives when so many responses have been written."""
    done, answer_of = [], asking.answer_of

    def killed(sample):
        if len(done) == number:
            raise KeyboardInterrupt
        done.append(1)
        return answer_of(sample)

    monkeypatch.setattr(asking, "answer_of", killed)


def test_a_killed_run_goes_on_by_id_and_ends_as_if_it_had_not_been(tmp_path, asked, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*asked, "--out", whole) == 0
    with monkeypatch.context() as patch:
        kill_after(8, patch)
        assert run(*asked, "--out", cut) == 130
    path = cut / "mathvision.jsonl"
    assert len(path.read_text().splitlines()) == 8
    # The kill also cut the last line that was being written.
    path.write_bytes(path.read_bytes()[:-20])
    assert run(*asked, "--rows", 7, "--out", cut) == 0
    assert path.read_text() == (whole / "mathvision.jsonl").read_text()
    assert summary_of(cut, "mathvision") == summary_of(whole, "mathvision")
    # A complete run only reads what is there.
    with monkeypatch.context() as patch:
        kill_after(0, patch)
        assert run(*asked, "--out", cut) == 0


def test_responses_of_other_settings_are_never_mixed_in_or_overwritten(tmp_path, asked, capsys):
    out = tmp_path / "out"
    assert run(*asked, "--out", out) == 0
    before = (out / "mathvision.jsonl").read_text()
    assert run(*asked, "--out", out, "--seed", 1) == 2
    assert "was made with seed 0, not 1" in capsys.readouterr().err
    responses = responses_file(tmp_path / "r.jsonl", **{"0": "Answer: 1"})
    flags = [*asked[:4], "--responses", responses, "--out", out]
    assert run(*flags) == 2
    assert (out / "mathvision.jsonl").read_text() == before


def test_two_ranks_answer_what_one_would_have_answered(tmp_path, asked, monkeypatch):
    assert run(*asked, "--out", tmp_path / "one") == 0
    monkeypatch.setattr(asking, "WORLD", 2)
    for rank in (1, 0):  # ranks share nothing but files, so one may run after the other
        for module in (asking, evaluation):
            monkeypatch.setattr(module, "RANK", rank)
        assert run(*asked, "--out", tmp_path / "two") == 0
        parts = sorted(path.name for path in (tmp_path / "two").glob("*.jsonl"))
        assert parts == (["mathvision.rank1.jsonl"] if rank else ["mathvision.jsonl"])
    one, two = (lines_of(tmp_path / out, "mathvision") for out in ("one", "two"))
    assert one == two


def test_prompts_that_are_too_long_are_counted_and_not_asked(tmp_path, asked):
    assert run(*asked, "--out", tmp_path / "out", "--max_prompt_tokens", 3) == 0
    summary = summary_of(tmp_path / "out", "mathvision")
    assert (summary["overlong"], summary["no_answer"], summary["accuracy"]) == (12, 12, 0)


def test_tasks_with_videos_are_left_out_when_a_model_is_asked(tmp_path, model):
    rows = [mega_row("1", task_name="a"), mega_row("2", task_name="b", query_text="<video>")]
    data = write_jsonl(tmp_path / "test.jsonl", rows)
    for place in ("0.png", "1.png"):
        (tmp_path / "data" / "toy").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "toy" / place).write_bytes(png())
    flags = ["--benchmark", "megabench", "--data", data, "--model", model, "--max_new_tokens", 3,
             "--min_pixels", 784, "--max_pixels", 3136, "--out", tmp_path / "out"]  # fmt: skip
    assert run(*flags) == 0
    summary = summary_of(tmp_path / "out", "megabench")
    assert (summary["tasks_scored"], summary["tasks_total"]) == (1, 2)
    assert summary["unsupported_metrics"] == {"video": 1}


def test_the_toy_world_is_asked_by_default(tmp_path, model, capsys):
    flags = ["--model", model, "--max_new_tokens", 4, "--out", tmp_path / "out", "--limit", 5]
    assert run(*flags) == 0
    assert summary_of(tmp_path / "out", "toy")["n"] == 5
    assert "held-out toy questions, first 5 only" in capsys.readouterr().out
    said = (tmp_path / "out" / "toy.jsonl").read_text()
    assert run(*flags[:-1], 2) == 0
    assert summary_of(tmp_path / "out", "toy")["n"] == 2
    assert (tmp_path / "out" / "toy.jsonl").read_text() == said  # nothing computed is lost


def test_wrong_responses_are_named_and_earlier_results_stay(tmp_path, mmmu, capsys):
    good = responses_file(tmp_path / "good.jsonl", validation_Art_0="Answer: C")
    flags = ["--benchmark", "mmmu", "--data", mmmu, "--out", tmp_path / "out", "--responses"]
    assert run(*flags, good) == 0
    before = (tmp_path / "out" / "mmmu.jsonl").read_text()
    for rows, message in (
        ([{"id": "validation_Art_99", "response": "C"}], "id 'validation_Art_99' is not in the data"),
        ([], "the file is empty"),  # no score of 0
        ([{"id": "validation_Art_0"}], 'expected {"id": ..., "response": "text"}'),
        ([{"id": "validation_Art_0", "response": "C"}] * 2, "2 responses to id 'validation_Art_0'"),
    ):
        bad = write_jsonl(tmp_path / "bad.jsonl", rows)
        assert run(*flags, bad) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "out" / "mmmu.jsonl").read_text() == before
