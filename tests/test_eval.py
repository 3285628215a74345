"""The promises of eval.py, asking.py and scores.py: files, resuming, intervals, errors.

The policy is the toy's with random weights: what it says is nonsense, and that is enough here.
"""

import json
import math

import pytest
from test_benchmarks import row
from test_data import write_jsonl, write_parquet

import eval as evaluation
import toy
from benchmarks import asking, readers, scores
from model import save_policy


def run(*argv) -> int:
    return evaluation.main([str(argument) for argument in argv])


def marked(tmp_path, name, data, responses, *more) -> dict:
    """The summary of marking responses, {id: text} or rows or a file of them, into tmp_path/out."""
    if isinstance(responses, dict):
        responses = [{"id": id_, "response": text} for id_, text in responses.items()]
    if isinstance(responses, list):
        responses = write_jsonl(tmp_path / "r.jsonl", responses)
    flags = ["--benchmark", name, "--data", data, "--responses", responses, "--out", tmp_path / "out"]
    assert run(*flags, *more) == 0
    return summary_of(tmp_path / "out", name)


def summary_of(out, name) -> dict:
    return json.loads((out / "summary.json").read_text())[name]


def lines_of(out, name) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def mmmu(tmp_path):
    rows = [row("mmmu", id=f"validation_Art_{i}") for i in range(5)]
    return write_parquet(tmp_path / "Art" / "validation-0.parquet", rows).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_policy(toy.new_policy(hidden=32, layers=1), directory)
    return directory


def test_marking_counts_right_wrong_unanswered_truncated_and_missing(tmp_path, mmmu, capsys):
    responses = [
        {"id": "validation_Art_0", "response": "\\boxed{C}"},
        {"id": "validation_Art_1", "response": "I am not sure.", "finish": "length", "tokens": 9},
        {"id": "validation_Art_2", "response": "\\boxed{A}"},
        {"id": "validation_Art_3", "response": "I am not sure."},
    ]
    summary = marked(tmp_path, "mmmu", mmmu, responses, "--show")
    counts = {key: summary[key] for key in ("accuracy", "n", "no_answer", "truncated", "missing")}
    assert counts == {"accuracy": 0.2, "n": 5, "no_answer": 2, "truncated": 1, "missing": 1}
    assert summary["no_answer_by"] == {"no box or phrase": 0.2, "cut at the limit": 0.2}
    assert summary["ci95"][0] < 0.2 < summary["ci95"][1]
    assert summary["groups"]["multiple-choice"] == {"accuracy": 0.2, "n": 5}
    lines = lines_of(tmp_path / "out", "mmmu")
    assert [line["correct"] for line in lines] == [True, False, False, False, False]
    assert {"id", "response", "extracted", "gold", "correct", "finish", "tokens", "category"} <= set(lines[0])
    printed = capsys.readouterr().out
    assert "partial: 5 of 900" in printed and "VL-Rethinker-7B" in printed
    assert printed.count("...I am not sure.") == 2 and "20.0 % cut at the limit" in printed
    # A result can be marked again.
    again = marked(tmp_path, "mmmu", mmmu, tmp_path / "out" / "mmmu.jsonl")
    assert again | {"settings": 0} == summary | {"settings": 0}
    assert lines_of(tmp_path / "out", "mmmu") == lines


def test_the_papers_protocol_is_the_default():
    config = evaluation.parse(["--benchmark", "mathvista", "--model", "any/model"])
    made = asking.made_with(config, "mathvista")
    paper = {"temperature": 0, "samples": 1, "max_new_tokens": 8192, "template": "plain",
             "force_rethink": False, "min_pixels": 256 * 28 * 28, "max_pixels": 1280 * 28 * 28}  # fmt: skip
    assert {key: made[key] for key in paper} == paper
    assert readers.mathvista(row("mathvista")).template == ""  # none of its own


def test_own_questions_are_a_benchmark_of_their_own(tmp_path):
    """Two pictures, options in a column, a bare number."""
    own = write_jsonl(tmp_path / "mine.jsonl", [
        {"question": "<image>Same as <image>?", "image": ["a.png", "b.png"], "answer": "B",
         "choices": ["no", "yes"], "category": "pairs"},
        {"question": "How many?", "images": ["a.png"], "answer": 3},
    ])  # fmt: skip
    summary = marked(tmp_path, "own", own, {"0": "\\boxed{yes}", "1": "\\boxed{4}"})
    assert (summary["accuracy"], summary["label"]) == (0.5, "mine.jsonl")
    assert summary["groups"] == {"pairs": {"accuracy": 1.0, "n": 1}}


def test_own_and_toy_questions_are_asked_as_in_training(tmp_path):
    trained = {"template": "rethink", "max_new_tokens": 7, "min_pixels": 0, "max_pixels": 1 << 20}
    (tmp_path / "trainer.json").write_text(json.dumps({"config": trained | {"lr": 1.0}}))
    flags = ["--model", str(tmp_path), "--data", "mine.jsonl"]
    config = evaluation.parse(flags)
    for name in ("own", "toy"):
        assert trained.items() <= asking.made_with(config, name).items()
    assert asking.PAPER.items() <= asking.made_with(config, "mmmu").items()
    assert asking.made_with(evaluation.parse([*flags, "--template", "bare"]), "own")["template"] == "bare"


# Of a snapshot of the hub: the file that is read, and files of other splits and variants beside it.
SNAPSHOTS = {
    "mathvista": ("data/testmini-00000-of-00001.parquet", ["data/test-00000-of-00002.parquet"]),
    "mathverse": ("testmini.parquet", ["testmini_text_only.parquet"]),
    "mathvision": ("data/test-00000-of-00001.parquet", ["data/testmini-00000-of-00001.parquet"]),
    "mmmu": ("Art/validation-00000-of-00001.parquet", ["Art/dev-0.parquet", "Art/test-0.parquet"]),
    "mmmu_pro": ("standard (10 options)/test-0.parquet", ["standard (4 options)/test-0.parquet"]),
    "emma": ("Math/test-00000-of-00001.parquet", ["EMMA-mini/Math/test-00000-of-00001.parquet"]),
    "emma_mini": ("Math/test-00000-of-00001.parquet", []),
    "megabench": ("core/test-0.parquet", ["open/test-0.parquet", "core_single_image/test-0.parquet"]),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_every_benchmark_is_marked_from_a_snapshot_in_its_published_layout(tmp_path, name):
    read, others = SNAPSHOTS[name]
    write_parquet(tmp_path / "D" / read, [row(name)])
    for path in others:
        write_parquet(tmp_path / "D" / path, [{"id": "another"}])
    question = readers.BENCHMARKS[name].read(row(name)).question
    right = {question.id: f"\\boxed{{{question.answer}}}"}
    summary = marked(tmp_path, name, tmp_path / "D", right)
    assert (summary["accuracy"], summary["n"]) == (1, 1)


def test_mmmu_pro_is_the_mean_of_its_two_settings(tmp_path):
    rows = [row("mmmu_pro", id=f"test_Art_{i}") for i in range(4)]
    write_parquet(tmp_path / "standard (10 options)" / "test-0.parquet", rows)
    write_parquet(tmp_path / "vision" / "test-0.parquet", [row("mmmu_pro, vision", id="test_Art_0")])
    answers = {"standard:test_Art_0": "J", "standard:test_Art_1": "Answer: J", "vision:test_Art_0": "(A)"}
    summary = marked(tmp_path, "mmmu_pro", tmp_path, answers)
    assert summary["accuracy"] == 0.25
    assert summary["groups"]["standard"] == {"accuracy": 0.5, "n": 4}
    assert summary["groups"]["vision"] == {"accuracy": 0.0, "n": 1}


def test_megabench_is_a_mean_over_tasks_and_says_what_it_leaves_out(tmp_path):
    rows = [row("megabench", id=id_, task_name="a") for id_ in "123"]
    rows += [row("megabench", "number_rel_diff_ratio", id="4", answer="10", task_name="b")]
    kinds = {"5": "exact_str_match", "6": "program_judge"}
    rows += [row("megabench", metric, id=id_, task_name="c") for id_, metric in kinds.items()]
    rows[3]["query_text"] = "<video>"  # which responses of others may have seen
    data = write_jsonl(tmp_path / "test.jsonl", rows)
    answers = {"1": "Answer: 3.5", "2": "Answer: 1", "3": "Answer: 1", "4": "Answer: 9", "5": "3"}
    summary = marked(tmp_path, "megabench", data, answers)
    assert summary["accuracy"] == pytest.approx((1 / 3 + 0.9) / 2, abs=1e-6)
    assert (summary["tasks_scored"], summary["tasks_total"], summary["samples_scored"]) == (2, 3, 4)
    assert summary["label"].startswith("core (2/3 tasks, 4/6 samples)")
    assert summary["unsupported_metrics"] == {"program_judge": 2}
    partial = lines_of(tmp_path / "out", "megabench")[3]
    assert partial["score"] == pytest.approx(0.9) and partial["correct"] is False
    # A model of ours is not asked about a video, nor of the task that has one.
    config = evaluation.parse(["--benchmark", "megabench", "--data", str(data), "--model", "any"])
    kept, left_out, _ = evaluation.items_of("megabench", config)
    assert {item.stratum for item in kept} == {"a"} and {item.stratum for item in left_out} == {"b", "c"}


def item(i: int, cluster="", stratum="") -> readers.Item:
    return readers.Item(readers.Question(str(i), "", [], ""), bool, [], cluster, stratum)


def test_the_interval_is_wilsons_and_wider_for_clusters():
    values = [1.0] * 30 + [0.0] * 70
    low, high = scores.interval([item(i) for i in range(100)], values)
    assert (round(low, 4), round(high, 4)) == (0.2189, 0.3958)  # Wilson's for 30 of 100
    of_five = scores.interval([item(i, f"{i // 5}") for i in range(100)], values)
    assert of_five[1] - of_five[0] > 2 * (high - low)
    assert scores.interval([item(i) for i in range(10)], [1.0] * 10)[0] == pytest.approx(0.7225, abs=1e-3)
    # Of a mean over tasks it is that of the task means: two tasks right, two wrong.
    tasks, values = [item(i, f"{i % 4}", f"{i % 4}") for i in range(40)], [1.0, 1.0, 0.0, 0.0] * 10
    low, high = scores.interval(tasks, values)
    assert scores.headline(tasks, values) == pytest.approx(0.5)
    assert high - low > 0.65  # as wide as of four coin flips


def test_several_samples_give_mean_unbiased_pass_and_a_majority_of_answers(tmp_path, mmmu):
    texts = ["\\boxed{A}", "\\boxed{C}", "\\boxed{both together}", "no idea"]  # C twice; no idea, no vote
    rows = [{"id": "validation_Art_0", "response": text} for text in texts]
    rows.append({"id": "validation_Art_1", "response": "hm"})
    summary = marked(tmp_path, "mmmu", mmmu, rows, "--limit", 2, "--samples", 4)
    found = {name: 2 * summary[name] for name in ("mean@4", "pass@1", "pass@2", "pass@4", "maj@4")}
    expected = {"mean@4": 0.5, "pass@1": 0.5, "pass@2": 5 / 6, "pass@4": 1, "maj@4": 1}
    assert found == pytest.approx(expected, abs=1e-5)
    assert "first 2 only" in summary["label"]
    assert [line.get("sample", 0) for line in lines_of(tmp_path / "out", "mmmu")] == [0, 1, 2, 3] * 2


def test_comparing_two_results_is_paired(tmp_path, capsys):
    def result(name, right):
        rows = [{"id": str(i), "correct": i in right} for i in range(20)]
        return write_jsonl(tmp_path / name, rows)

    a, b = result("a.jsonl", range(5)), result("b.jsonl", range(1, 14))
    assert run("--compare", a, b) == 0
    printed = capsys.readouterr().out
    assert "B - A = +40.0" in printed and "B better on 9, A on 1, equal on 10" in printed
    assert f"p = {scores.sign_test(9, 1):.3g}" in printed
    assert scores.sign_test(9, 1) == pytest.approx(2 * (1 + 10) / math.pow(2, 10))
    assert run("--compare", a, tmp_path / "none.jsonl") == 2


@pytest.fixture
def asked(tmp_path, model, monkeypatch):
    bring = asking.bring_policy  # in float64: rows beside others round differently
    monkeypatch.setattr(asking, "bring_policy", lambda *args: bring(*args).double())
    rows = [row("mathvision", id=str(i), options=[], answer="1") for i in range(6)]
    data = write_parquet(tmp_path / "test.parquet", rows)
    flags = ["--benchmark", "mathvision", "--data", data, "--model", model, "--rows", 4, "--samples", 2,
             "--max_new_tokens", 6, "--min_pixels", 784, "--max_pixels", 3136]  # fmt: skip
    return [str(flag) for flag in flags]


def test_forced_second_looks_stand_beside_the_first_and_resume_with_them(tmp_path, model):
    # Long enough for a trigger; a random policy that stops at once is forced to go on.
    out = tmp_path / "out"
    flags = ["--model", model, "--force_rethink", "--limit", 12, "--max_new_tokens", 40,
             "--temperature", 1, "--out", out]  # fmt: skip
    assert run(*flags) == 0
    lines = lines_of(out, "toy")
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


GREEN = readers.Item(readers.Question("q", "", [], "green"), lambda said: said == "green", [])
TRIGGER = "\n\nWait, does it seem right?"


def test_a_second_look_without_an_answer_of_its_own_is_no_answer():
    first = "So \\boxed{green}."
    for y2, outcome in (("green}.", "no_answer"), ("\\boxed{red}", "right_wrong")):
        again = {"response": first + TRIGGER + y2, "finish": "stop", "tokens": 9, "trigger": "x"}
        line = scores.mark(GREEN, {"response": first, "again": again})
        assert line["correct"] and not line["again"]["correct"]
        assert line["again"]["response"] == first + TRIGGER + y2
        assert scores.rethinking([GREEN], [[line]])["force_rethink"][outcome] == 1


def test_a_second_look_keeps_partial_credit():
    item = readers.Item(GREEN.question, lambda said: 0.9, [])
    first = "So \\boxed{green}."
    again = {"response": first + TRIGGER + first, "finish": "stop", "tokens": 9, "trigger": "x"}
    line = scores.mark(item, {"response": first, "again": again})
    assert scores.credit(line) == scores.credit(line["again"]) == 0.9


def test_overthinking_counts_tokens_after_an_answer_that_was_right_already():
    for first, second, helped in (("green", "blue", -1), ("blue", "green", 1)):
        before, after = f"So \\boxed{{{first}}}.", f"{TRIGGER} \\boxed{{{second}}}"
        line = scores.mark(GREEN, {"response": before + after, "tokens": len(before + after)})
        spent = len(after.strip()) if helped < 0 else 0
        wanted = {"rethinks": 1, "rethinks_helped": helped, "overthinking": spent}
        assert scores.rethinking([GREEN], [[line]]) == wanted


def kill_after(number: int, monkeypatch):
    """Ctrl-C arrives when so many responses have been written."""
    left, answer_of = iter(range(number)), asking.answer_of

    def killed(sample):
        if next(left, None) is None:
            raise KeyboardInterrupt
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
    responses = write_jsonl(tmp_path / "r.jsonl", [{"id": "0", "response": "Answer: 1"}])
    assert run(*asked[:4], "--responses", responses, "--out", out) == 2
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
    assert (summary["overlong"], summary["accuracy"]) == (12, 0)
    assert summary["no_answer_by"] == {"prompt too long": 1}


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
    marked(tmp_path, "mmmu", mmmu, {"validation_Art_0": "Answer: C"})
    before = (tmp_path / "out" / "mmmu.jsonl").read_text()
    flags = ["--benchmark", "mmmu", "--data", mmmu, "--out", tmp_path / "out", "--responses"]
    for rows, message in (
        ([{"id": "validation_Art_99", "response": "C"}], "id 'validation_Art_99' is not in the data"),
        ([], "the file is empty"),  # no score of 0
        ([{"id": "validation_Art_0"}], 'expected {"id": ..., "response": "text"}'),
        ([{"id": "validation_Art_0", "response": "C"}] * 2, "2 responses to id 'validation_Art_0'"),
        (
            [{"id": "validation_Art_0", "response": "C", "tokens": "9"}],
            "'tokens' must be int or float or null",
        ),
    ):
        bad = write_jsonl(tmp_path / "bad.jsonl", rows)
        assert run(*flags, bad) == 2
        assert message in capsys.readouterr().err
    assert run(*flags, tmp_path / "out" / "mmmu.jsonl", "--limit", 1) == 2
    assert "--limit would drop the rest" in capsys.readouterr().err
    assert (tmp_path / "out" / "mmmu.jsonl").read_text() == before


def test_a_folder_with_marked_responses_is_not_the_default_of_another_run(tmp_path, mmmu, monkeypatch):
    monkeypatch.chdir(tmp_path)
    responses = write_jsonl(tmp_path / "r.jsonl", [{"id": "validation_Art_0", "response": "Answer: C"}])
    for folder in ("eval", "eval-2"):
        assert run("--benchmark", "mmmu", "--data", mmmu, "--responses", responses) == 0
        assert (tmp_path / "runs" / folder / "mmmu.jsonl").exists()
