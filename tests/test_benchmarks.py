"""The promises of readers.py, rules.py, mega.py and sources.py, on invented rows.

Every row has the columns of the published files. How answers are found and marked stands in benchmark_cases.txt.
"""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image
from test_data import stored, write_jsonl, write_parquet

from benchmarks import mega, mega_metrics, readers, rules, scores
from benchmarks.readers import BENCHMARKS
from benchmarks.sources import load
from data import UserError, check_images
from grading import choices

PNG = stored(Image.new("RGB", (40, 30), "red"), "PNG")
STORED = {"bytes": PNG, "path": None}
ONE_OF_7 = {"image_1": STORED} | dict.fromkeys([f"image_{i}" for i in range(2, 8)])
TEN = str([f"option {i}" for i in range(10)])
ROWS = {
    "mathvista": {
        "pid": "2001", "question": "How many bars?", "image": "images/2001.jpg", "decoded_image": STORED,
        "choices": None, "unit": None, "precision": None, "answer": "3", "question_type": "free_form",
        "answer_type": "integer", "query": "Hint: Please answer with an integer.\nQuestion: How many bars?",
        "metadata": {
            "category": "general-vqa", "context": "bar chart", "grade": "high school", "img_height": 30,
            "img_width": 40, "language": "english", "skills": ["statistical reasoning", "arithmetic"],
            "source": "invented", "split": "testmini", "task": "figure question answering"},
    },
    "mathverse": {
        "sample_index": "9001", "problem_index": "1801", "problem_version": "Text Lite", "image": STORED,
        "question": "Find angle AOB ()\nChoices:\nA:20°\nB:40°\nC:60°\nD:80°", "answer": "B",
        "question_type": "multi-choice", "query_wo": "Please directly answer.\nQuestion: Find angle AOB ...",
        "query_cot": "Please first conduct reasoning.\nQuestion: Find angle AOB ...",
        "question_for_eval": "Find angle AOB ()\nChoices:\nA:20°\nB:40°\nC:60°\nD:80°",
        "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
    },
    "mathvision": {
        "id": "5001", "question": "Which piece completes the square?\n<image1>", "level": 2, "answer": "C",
        "options": ["1", "2", "3", "4", "5"], "image": "images/5001.jpg", "decoded_image": STORED,
        "solution": None, "subject": "combinatorial geometry",
    },
    "mmmu": ONE_OF_7 | {
        "id": "validation_Physics_31", "question": "In <image 1>, which block is first?", "answer": "C",
        "options": "['block P', 'block Q', 'both together', 'neither']", "explanation": "",
        "img_type": "['Diagrams']", "topic_difficulty": "Medium", "question_type": "multiple-choice",
        "subfield": "Classical Mechanics",
    },
    "mmmu_pro": ONE_OF_7 | {
        "id": "test_History_1", "question": "What does <image 1> show?", "options": TEN, "answer": "J",
        "explanation": "?", "img_type": "['Paintings']", "topic_difficulty": "Easy", "subject": "History",
    },
    "mmmu_pro, vision": {
        "id": "test_History_1", "image": STORED, "options": TEN, "answer": "J", "subject": "History"},
    "emma": {
        "pid": "chem_9001", "question": "How many carbon atoms are in <image_1>?", "options": [], "answer": "14",
        "image_1": STORED, "image_2": None, "image_3": None, "image_4": None, "image_5": None, "solution": "",
        "subject": "Chemistry", "task": "", "category": "Knowledge-based counting", "source": "new",
        "type": "Open-ended", "context": "",
    },
    "megabench": {
        "id": "77", "task_name": "toy_gauge_reading", "task_description": "Read the gauge.",
        "global_media": "[]", "example_text": "Example 1:\n<image>\nAnswer: 2.5",
        "example_media": "['./data/toy/0.png']", "query_text": "<image>", "query_media": "['./data/toy/1.png']",
        "eval_context": "{}", "taxonomy_tree_path": "Perception", "application": "Perception",
        "input_format": "Photographs", "output_format": "numerical_data",
    },
}  # fmt: skip
ROWS["emma_mini"] = ROWS["emma"]


def row(name: str, metric="general_single_numerical_match", **changes) -> dict:
    """A published row; of MEGA-Bench, one that is scored by this metric."""
    changes = ROWS[name] | changes
    if name == "megabench":
        info = {"field_score_function": {"reading": metric}, "response_parse_function": "answer_string",
                "aggregation": {"function": "mean", "field_weights": {"reading": 1}}}  # fmt: skip
        changes |= {"answer": str({"reading": changes.get("answer", "3.5")}), "metric_info": str(info)}
    return changes


def marked(name: str, row: dict, response: str) -> float:
    return scores.credit(scores.mark(BENCHMARKS[name].read(row), {"response": response}))


def read_cases() -> dict[str, list[list[str]]]:
    """kind -> the parts of each case, from the table (its first lines give the format)."""
    kinds = {}
    for line in Path(__file__).with_name("benchmark_cases.txt").read_text(encoding="utf-8").split("\n")[3:]:
        if line.startswith("# "):
            cases = kinds[line[2:]] = []
        elif line:
            cases.append(line.replace("⏎", "\n").split("  ->  "))
    return kinds


CASES = read_cases()

# ---------------------------------------------------------------------------- answers and marks


def number(text: str) -> str | None:
    found = rules.value(text)
    return None if found is None else str(found)


def option(text: str) -> str | None:
    letters = choices.named(text, ["40", "50", "60", "70"], strict=False) or ()
    return "".join(letters) if len(letters) == 1 else None


def listed(text: str) -> str | None:
    found = choices.parse_choices(text)
    return found and " | ".join(found)


READ = {"answers": rules.extract, "numbers": number, "one option": option, "lists of options": listed}


@pytest.mark.parametrize("kind", READ)
def test_what_a_text_says_is_found_and_never_guessed(kind):
    for text, *wanted in [*CASES[kind], [""]]:
        assert READ[kind](text) == (wanted[0] if wanted else None), text


def test_one_line_that_names_an_option_is_an_answer_and_any_other_prose_is_not():
    options = ["The number of ducks will increase.", "There will be no effect"]
    assert rules.extract("The number of ducks will increase.", options) is not None
    assert rules.extract("There are many ducks in it.", options) is None
    assert rules.extract("No, they do not.", ["Yes", "No"]) == "No, they do not."


@pytest.mark.parametrize("name", [name for name in CASES if name in ROWS and name != "megabench"])
def test_boxes_are_marked_by_the_rule_of_the_benchmark(name):
    for changes, right, wrong in CASES[name]:
        asked = row(name, **json.loads(changes))
        for boxes, mark in ((right, 1), (wrong, 0)):
            for box in boxes.split(" | "):
                assert marked(name, asked, f"\\boxed{{{box}}}") == mark, (changes, box)
        assert not marked(name, asked, f"there are {wrong.split(' | ')[0]} of them, or not")


def test_megabench_metrics_score_as_published():
    for metric, answer, response, score in CASES["megabench"]:
        found = marked("megabench", row("megabench", metric, answer=answer), response)
        assert found == pytest.approx(float(Fraction(score))), (metric, response)


@pytest.mark.parametrize("metric", sorted(mega_metrics.METRICS))
def test_megabench_metrics_survive_any_answer(metric):
    for response in ("Answer: nonsense", "Answer: [[[", 'Answer: {"x": [1, {}]}', "Answer: 1/0"):
        assert 0 <= marked("megabench", row("megabench", metric, answer="5"), response) <= 1


def test_megabench_json_answers_are_weighted_or_take_the_least():
    info = {"field_score_function": {"a": "exact_str_match", "b": "positive_int_match"},
            "aggregation": {"function": "mean", "field_weights": {"a": 1, "b": 3}},
            "response_parse_function": "json"}  # fmt: skip
    formulas = "x_{1}" * 300
    text = formulas + 'Thinking {of} it.\nAnswer: ```json\n{"a": "x", "b": 3}\n```'
    assert mega.score(mega.extract(text, info), {"a": "x", "b": "2"}, info) == 0.25
    # A field where neither amount is positive is dropped from the mean.
    assert mega.score('{"a": "x", "b": 0}', {"a": "x", "b": "0"}, info) == 1
    info["aggregation"]["function"] = "min"
    assert mega.score(mega.extract(text, info), {"a": "x", "b": "2"}, info) == 0


def test_megabench_metrics_that_run_code_or_ask_a_judge_are_not_supported():
    for metric in ("program_judge", "gpt_4o_as_judge", "geo_proximity_location_dict", "new_metric"):
        assert readers.megabench(row("megabench", metric)).unsupported == metric
    assert readers.megabench(row("megabench")).unsupported == ""


# ---------------------------------------------------------------------------- questions

# (benchmark, what of its row is changed, what is asked, its pictures)
ONE, SEVERAL = [PNG], {"image_1": "1.png", "image_2": "2.png", "image_3": "3.png"}
ASKED = [
    ("mathvista", {}, "<image>Hint: Please answer with an integer.\nQuestion: How many bars?", ONE),
    ("mathverse", {}, "<image>Please first conduct reasoning.\nQuestion: Find angle AOB ...", ONE),
    ("mathverse", {"question": "", "query_cot": ""}, "<image>Answer the question in the picture.", ONE),
    # One merged picture, however many tags; options that are drawn are not listed.
    ("mathvision", {"question": "Is <image1> in <image2>?", "options": []}, "<image>Is  in ?", ONE),
    ("mathvision", {"options": [*"ABCDE"]}, "<image>Which piece completes the square?", ONE),
    ("mathvision", {"options": ["1", "2"], "answer": "A"},
     "<image>Which piece completes the square?\nChoices:\n(A) 1\n(B) 2", ONE),
    ("mmmu", SEVERAL | {"question": "Is <image 2> in <image 1>?", "options": "['no', 'yes']", "answer": "B"},
     "<image><image><image>Is [Image 2] in [Image 1]?\nChoices:\n(A) no\n(B) yes", [*SEVERAL.values()]),
    # A tag's number counts, not its place: the options are shuffled.
    ("mmmu_pro", SEVERAL | {"options": "['<image 3>', '<image 2>']", "answer": "B"},
     "<image><image><image>What does [Image 1] show?\nChoices:\n(A) [Image 3]\n(B) [Image 2]",
     [*SEVERAL.values()]),
    ("mmmu_pro, vision", {},
     "<image>Write out the multiple-choice question in the image and then solve it.", ONE),
    ("emma", {"context": "See <image_5>.", "image_5": "5.png"},
     "<image><image>See [Image 2].\nHow many carbon atoms are in [Image 1]?", [*ONE, "5.png"]),
    ("emma", {"type": "Multiple Choice", "options": ["<image_1>", "x"], "answer": "B"},
     "<image>How many carbon atoms are in [Image 1]?\nChoices:\n(A) [Image 1]\n(B) x", ONE),
    ("megabench", {"global_media": "['./data/toy/g.png']"},
     "<image>Read the gauge.\nExample 1:\n<image>\nAnswer: 2.5\n<image>",
     ["./data/toy/g.png", "./data/toy/0.png", "./data/toy/1.png"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "text", "images"), ASKED)
def test_a_question_is_asked_after_its_pictures_by_their_numbers(name, changes, text, images):
    question = BENCHMARKS[name.split(",")[0]].read(row(name, **changes)).question
    assert (question.text, question.images) == (text, images)


def test_a_row_counts_in_its_groups_with_the_rows_that_it_depends_on():
    item = readers.mathverse(row("mathverse"))
    assert item.cluster == "1801"  # the versions of a problem
    assert item.groups == ["Text Lite", "multi-choice", "Plane Geometry", "Angle"]
    assert readers.mmmu(row("mmmu")).groups == ["multiple-choice", "Science", "Physics"]
    assert {"arithmetic", "figure question answering"} <= set(readers.mathvista(row("mathvista")).groups)
    coding = {"category": "a;b", "task": "t", "type": "Multiple choice ", "options": ["x"], "answer": "A"}
    item = readers.emma(row("emma", **coding))
    assert item.groups == ["multiple choice", "Chemistry", "Chemistry: t", "Chemistry: a", "Chemistry: b"]
    standard, vision = readers.mmmu_pro(row("mmmu_pro")), readers.mmmu_pro(row("mmmu_pro, vision"))
    assert (standard.question.id, vision.question.id) == ("standard:test_History_1", "vision:test_History_1")
    assert standard.cluster == vision.cluster
    assert (standard.stratum, vision.stratum) == ("standard", "vision")
    item = readers.megabench(row("megabench", query_text="<video>"))
    assert (item.template, item.unaskable, item.stratum) == ("bare", "video", "toy_gauge_reading")


# ---------------------------------------------------------------------------- files


def test_pictures_of_jsonl_rows_are_found_beside_the_file_or_above_it(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "2001.jpg").write_bytes(PNG)
    rows = [row("mathvista", decoded_image=None)]
    for place in ("testmini.jsonl", "data/testmini.jsonl"):
        [item] = load("mathvista", str(write_jsonl(tmp_path / place, rows)))
        assert item.question.images == [tmp_path / "images" / "2001.jpg"]


def test_several_benchmarks_have_a_folder_each(tmp_path):
    write_parquet(tmp_path / "MathVerse" / "testmini.parquet", [row("mathverse", problem_index=1801)])
    write_parquet(tmp_path / "MMMU_Pro" / "vision" / "test-0.parquet", [row("mmmu_pro, vision")])
    [verse], [pro] = load("mathverse", str(tmp_path)), load("mmmu_pro", str(tmp_path))
    assert pro.question.id == "vision:test_History_1"
    assert verse.cluster == "1801"  # a text, as --compare reads it, whatever the file's type


BAD = row("mathvista", decoded_image=None)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (BAD | {"answer": ""}, "jsonl:2.*no answer"),
        ({"pid": "1"}, "jsonl:2.*no column 'answer'"),
        (BAD | {"pid": "1", "image": [["a.png"]]}, "jsonl:2.*'images' must be str"),
        (BAD, "jsonl:2: duplicate id '2001', first at .*jsonl:1"),
    ],
)
def test_a_bad_row_is_an_error_that_names_it(tmp_path, bad, message):
    with pytest.raises(UserError, match=message):
        load("mathvista", str(write_jsonl(tmp_path / "testmini.jsonl", [BAD, bad])))


def test_broken_and_missing_pictures_are_named(tmp_path):
    cut = {"bytes": PNG[:60], "path": None}
    rows = [row("mathvista", pid="1"), row("mathvista", pid="2", decoded_image=cut)]
    items = load("mathvista", str(write_parquet(tmp_path / "testmini.parquet", rows)))
    with pytest.raises(UserError, match="testmini.parquet: row 2: embedded picture"):
        check_images([item.question for item in items])
    [item] = load("megabench", str(write_jsonl(tmp_path / "test.jsonl", [row("megabench")])))
    with pytest.raises(UserError, match=r"jsonl:1: picture .*0.png does not exist"):
        check_images([item.question])
