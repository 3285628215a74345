"""The promises of readers.py, rules.py, mega.py and sources.py, on invented rows.

Every row has the columns of the published files; every picture is a real PNG made here.
"""

import io
import json

import pytest
from PIL import Image

from benchmarks import mega, mega_metrics, readers, rules, scores
from benchmarks.readers import BENCHMARKS
from benchmarks.sources import load
from data import UserError, check_images
from grading import choices


def png(colour="red", size=(40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def stored(colour="red") -> dict:
    return {"bytes": png(colour), "path": None}


def mathvista_row(pid="2001", **changes) -> dict:
    meta = {
        "category": "general-vqa", "context": "bar chart", "grade": "high school", "img_height": 30,
        "img_width": 40, "language": "english", "skills": ["statistical reasoning", "arithmetic"],
        "source": "invented", "split": "testmini", "task": "figure question answering",
    }  # fmt: skip
    return {
        "pid": pid, "question": "How many bars?", "image": f"images/{pid}.jpg",
        "decoded_image": stored(), "choices": None, "unit": None, "precision": None, "answer": "3",
        "question_type": "free_form", "answer_type": "integer", "metadata": meta,
        "query": "Hint: Please answer with an integer.\nQuestion: How many bars?",
    } | changes  # fmt: skip


def mathverse_row(sample_index="9001", **changes) -> dict:
    text = "Find angle AOB ()\nChoices:\nA:20°\nB:40°\nC:60°\nD:80°"
    return {
        "sample_index": sample_index, "problem_index": "1801", "problem_version": "Text Lite",
        "question": text, "image": stored(), "answer": "B", "question_type": "multi-choice",
        "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry",
                     "subfield": "Angle"},
        "query_wo": f"Please directly answer.\nQuestion: {text}",
        "query_cot": f"Please first conduct reasoning.\nQuestion: {text}",
        "question_for_eval": text,
    } | changes  # fmt: skip


def mathvision_row(id_="5001", **changes) -> dict:
    return {
        "id": id_, "question": "Which piece completes the square?\n<image1>",
        "options": ["1", "2", "3", "4", "5"], "image": f"images/{id_}.jpg",
        "decoded_image": stored(), "answer": "C", "solution": None, "level": 2,
        "subject": "combinatorial geometry",
    } | changes  # fmt: skip


def mmmu_row(id_="validation_Physics_31", **changes) -> dict:
    images = {f"image_{i}": stored() if i == 1 else None for i in range(1, 8)}
    return {
        "id": id_, "question": "In <image 1>, which block is first?",
        "options": "['block P', 'block Q', 'both together', 'neither']", "explanation": "",
        **images, "img_type": "['Diagrams']", "answer": "C", "topic_difficulty": "Medium",
        "question_type": "multiple-choice", "subfield": "Classical Mechanics",
    } | changes  # fmt: skip


def mmmu_pro_row(id_="test_History_1", **changes) -> dict:
    images = {f"image_{i}": stored() if i == 1 else None for i in range(1, 8)}
    return {
        "id": id_, "question": "What does <image 1> show?",
        "options": str([f"option {i}" for i in range(10)]), "explanation": "?", **images,
        "img_type": "['Paintings']", "answer": "J", "topic_difficulty": "Easy",
        "subject": "History",
    } | changes  # fmt: skip


def vision_row(id_="test_History_1", **changes) -> dict:
    options = str([f"option {i}" for i in range(10)])
    row = {"id": id_, "image": stored(), "options": options, "answer": "J", "subject": "History"}
    return row | changes


def emma_row(pid="chem_9001", **changes) -> dict:
    images = {f"image_{i}": stored() if i == 1 else None for i in range(1, 6)}
    return {
        "pid": pid, "question": "How many carbon atoms are in <image_1>?", "options": [],
        "answer": "14", **images, "solution": "", "subject": "Chemistry", "task": "",
        "category": "Knowledge-based counting", "source": "new", "type": "Open-ended",
        "context": "",
    } | changes  # fmt: skip


def mega_row(id_="77", metric="general_single_numerical_match", answer="3.5", **changes) -> dict:
    info = {
        "field_score_function": {"reading": metric},
        "aggregation": {"function": "mean", "field_weights": {"reading": 1}},
        "response_parse_function": "answer_string",
    }
    return {
        "id": id_, "task_name": "toy_gauge_reading", "task_description": "Read the gauge.",
        "global_media": "[]", "example_text": "Example 1:\n<image>\nAnswer: 2.5",
        "example_media": "['./data/toy/0.png']", "query_text": "<image>",
        "query_media": "['./data/toy/1.png']", "answer": str({"reading": answer}),
        "metric_info": str(info), "eval_context": "{}", "taxonomy_tree_path": "Perception",
        "application": "Perception", "input_format": "Photographs",
        "output_format": "numerical_data",
    } | changes  # fmt: skip


def is_right(name: str, row: dict, response: str) -> bool:
    item = BENCHMARKS[name].read(row)
    return scores.mark(item, {"response": response})["correct"]


# ---------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: B, <answer>C</answer> \\boxed{A} or \\boxed{D}. Answer: B", "D"),  # the last box
        ("\\boxed{\\frac{1}{2}} and then \\boxed{3", "\\frac{1}{2}"),
        ("Answer: B\n<answer> C </answer>\nAnswer: D", "C"),
        ("**Answer:** (B)\nmore words", "(B)"),
        ("The correct answer is:\n\n**A.**", "A"),
        ("Answer: **X**", "X"),
        ("Therefore, 'Answer: A'", "A"),
        ("Therefore, the correct option is C.", "C"),
        ("The correct answer option is **I**.", "I"),
        ("The answer (B) is correct.", "(B) is correct"),
        ("The answer is approximately:\n\\[ 101,950 \\]\nThe correct choice is:\n**C. 102,000 N**",
         "C. 102,000 N"),
        ('Answer:\n```json\n["B", "C"]\n```', '["B", "C"]'),
        ("So:\n\\[\n\\text{Answer: C}\n\\]", "C"),
        ("### Answer\n$x = 5$", "x = 5"),
        ("The answer is 60. Therefore the area is 30 or so.", "60"),
        ("The answer is 2, as there are two stores.", "2"),
        ("The answer is D. South Dakota", "D. South Dakota"),
        ("The answer is 50 N, as the mass doubles.", "50 N"),
        ("The correct letter is:\n- `B`", "B"),
        ("正确答案是B", "B"),
        ("So the answer is $\\frac{3}{4}$.\nI am sure.", "\\frac{3}{4}"),
        ("Answer: .5", ".5"),
        ("<think>The answer is A.</think> a </think> Answer: B", "B"),
        ("B", "B"), ("(D)", "(D)"), ("14 cm", "14 cm"), ("Powdery mildew", "Powdery mildew"),
        ("<think>\\boxed{A}</think> It is hard.", None),
        ("I'm sorry", None), ("I'm sorry, but I can't see the picture.", None),
        ("I like option B, and 7 of them.", None), ("The answer isn't B", None), ("\\boxed{}", None),
        ("I cannot answer this question without more context.", None), ("", None),
        ("The picture shows a cat.\nIt is grey.", None),
    ],
)  # fmt: skip
def test_the_answer_of_a_response_is_found_and_never_guessed(response, answer):
    assert rules.extract(response) == answer


def test_one_line_that_names_an_option_is_an_answer_and_any_other_prose_is_not():
    options = ["The number of ducks will increase.", "There will be no effect"]
    assert rules.extract("The number of ducks will increase.", options) is not None
    assert rules.extract("There are many ducks in it.", options) is None
    assert rules.extract("No, they do not.", ["Yes", "No"]) == "No, they do not."


OPTIONS = ["40", "50", "60", "70"]


@pytest.mark.parametrize(
    ("letter", "texts"),
    [
        ("C", ["C", "(C)", "c", "[C]", "C.", "C. 60", "(C) 60°", "\\text{C}", "\\mathbf{(C)}", "$C$", "60",
               "60^\\circ", "Option C", "C: because it is", "C, since 60", "**C**"]),
        ("B", ["B. 40"]),  # the text of another option: it wins no reward, but counts here
        (None, ["Apple", "A circle", "A and B", "A, B", "A, b, c", "(A)(C)", "(A) 40, (C) 60", "not C",
                "neither", "40 or 50", "55", "I'm sorry"]),
    ],
)  # fmt: skip
def test_an_option_is_understood_in_any_usual_wrapping_and_never_guessed(letter, texts):
    for text in texts:
        named = choices.named(text, OPTIONS, strict=False) or ()
        assert (named == {letter}) if letter else len(named) != 1, text


def test_numbers_are_ascii_exact_and_without_units():
    values = {"1,234": 1234, "3.0": 3, "$5": 5, "50\\%": 50, "3 years": 3, "x = 7": 7, "-2": -2,
              "12 \\mathrm{ cm}^2": 12, "69°": 69, "\\approx 5": 5, "\\sqrt{9}": 3}  # fmt: skip
    assert {text: rules.value(text) for text in values} == values
    for text in ("three", "٣", "1_000", "nan", "inf", "1,2", "3 4", "", "9^{9^{9}}", "5 or 6", "i"):
        assert rules.value(text) is None, text


# ---------------------------------------------------------------------------- marks

WORDS = {"question_type": "multi_choice", "answer_type": "text"}
OPEN = {"question_type": "open", "options": "[]"}
AREA = {"question_type": "free-form", "question": "Find the area.", "question_for_eval": "Find the area."}
FREE, NINE, TWELVE = {"options": []}, str([f"thing {i}" for i in range(9)]), str([f"o{i}" for i in range(12)])

# (benchmark, what of its row is changed, boxes that are right, boxes that are wrong)
MARKS = [
    ("mathvista", {}, "3 | 3.0 | 3 years | x=3", "3.9 | 4 | three | \u0663"),  # never truncated
    ("mathvista", {"answer": "1.5", "answer_type": "float", "precision": 1.0},
     "1.54 | 1.55 | \\frac{3}{2}", "1.56"),
    ("mathvista", {"answer": "1.53", "answer_type": "float", "precision": 2.0}, "1.534", "1.5"),
    ("mathvista", WORDS | {"answer": "No", "choices": ["Yes", "No"]}, "B | (B) No | no", "A | Noo"),
    ("mathvista", WORDS | {"answer": "5", "choices": ["5", "5", "6"]}, "A | B | 5 | (B) 5", "6"),
    ("mathvista", {"answer": "[1, 2.5]", "answer_type": "list"}, "[1, 2.50] | [1.0,2.5]",
     "[2.5, 1] | __import__('os').getcwd()"),
    ("mathverse", {}, "B | 40^\\circ | B:40°", "20°"),
    ("mathverse", {"answer": "(C)"}, "C", "B"),
    ("mathverse", {"answer": "A\nC"}, "A, C | C and A", "A"),
    ("mathverse", AREA | {"answer": "Area $= 25 \\pi \\mathrm{~cm}^2$"},
     "25\\pi | A = 25\\pi | 25 \\pi \\text{ cm}^2", "25"),
    ("mathverse", AREA | {"answer": "50掳"}, "50^\\circ | 50", "51"),
    ("mathverse", AREA | {"answer": "x^2+y^2=25"}, "x^2 + y^2 = 25", "x + y = 25"),
    ("mathvision", {"options": ["C", "A", "E", "B", "D"], "answer": "C"}, "C", "E"),  # a letter is a letter
    ("mathvision", {}, "3", "5"),  # the value of option C
    ("mathvision", {"options": ["1:4", "1:3", "1:2"], "answer": "B"}, "1/3", "1/2"),
    ("mathvision", FREE | {"answer": "2.77"}, "\\frac{36}{13} | 2.774", "2.76"),
    ("mathvision", FREE | {"answer": "\x0crac{36}{13}"}, "36/13", "13/36"),
    ("mathvision", FREE | {"answer": "69{degrees} "}, "69^\\circ", "68"),
    ("mathvision", FREE | {"answer": "$\\boxed{18}$"}, "18", "1"),
    ("mathvision", FREE | {"answer": "3:4"}, "\\frac{3}{4} | 3:4", "4:3"),
    ("mathvision", FREE | {"answer": "1"}, "1:1", "1:2"),
    ("mathvision", FREE | {"answer": "C"}, "C", "B"),
    # Two exact forms that round alike are two values.
    ("mathvision", FREE | {"answer": "$\\frac{1}{60}$"}, "1/60", "\\frac{1}{55}"),
    ("mathvision", FREE | {"answer": "$\\frac{7^3}{2^{12} 13^2}$"}, "\\frac{343}{692224}", "0"),
    ("mmmu", {"options": NINE, "answer": "I"}, "I | thing 8", "A is I"),
    ("mmmu", OPEN | {"answer": "['24/7', '3.429']"}, "24/7 | 3.43 | 3.4286", "3.45"),
    ("mmmu", OPEN | {"answer": "250"}, "250.00", "251"),
    ("mmmu", OPEN | {"answer": "['Tampa', 'Florida']"}, "florida", "Miami"),
    ("mmmu", OPEN | {"answer": "C"}, "C", "B"),
    ("mmmu_pro", {"options": TWELVE, "answer": "L"}, "L", "K"),
    ("mmmu_pro", {"options": "['only']", "answer": "A"}, "A", "B"),
    ("emma", {}, "14 | 14.0 | fourteen | 14.001", "15"),
]  # fmt: skip
ROWS = {"mathvista": mathvista_row, "mathverse": mathverse_row, "mathvision": mathvision_row,
        "mmmu": mmmu_row, "mmmu_pro": mmmu_pro_row, "emma": emma_row}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "right", "wrong"), MARKS)
def test_marks(name, changes, right, wrong):
    row = ROWS[name](**changes)
    for boxes, correct in ((right, True), (wrong, False)):
        for box in boxes.split(" | "):
            assert is_right(name, row, f"\\boxed{{{box}}}") == correct, box
    assert not is_right(name, row, f"there are {wrong.split(' | ')[0]} of them, or not")


# ---------------------------------------------------------------------------- questions


def test_mathvista_asks_the_query_after_its_picture():
    item = readers.mathvista(mathvista_row())
    assert item.question.text.startswith("<image>Hint: ")
    assert {"arithmetic", "figure question answering"} <= set(item.groups)


def test_mathverse_vision_only_has_no_question_and_is_still_asked_and_marked():
    row = mathverse_row(question="", problem_version="Vision Only",
                        query_cot="According to the question shown, reason.")  # fmt: skip
    item = readers.mathverse(row)
    assert item.question.text == "<image>According to the question shown, reason."
    assert is_right("mathverse", row, "\\boxed{40°}")
    bare = readers.mathverse(row | {"query_cot": ""})
    assert bare.question.text == "<image>Answer the question in the picture."


def test_mathverse_versions_of_a_problem_are_one_cluster():
    item = readers.mathverse(mathverse_row())
    assert item.cluster == "1801"
    assert item.groups == ["Text Lite", "multi-choice", "Plane Geometry", "Angle"]


def test_mathvision_shows_its_merged_picture_once_however_many_tags():
    row = mathvision_row(question="Compare <image1> with <image2> and <image3>.")
    item = readers.mathvision(row)
    assert item.question.text.count("<image>") == 1
    assert "<image2>" not in item.question.text
    assert len(item.question.images) == 1


def test_mathvision_prints_no_list_of_options_that_are_drawn():
    drawn = readers.mathvision(mathvision_row(options=["A", "B", "C", "D", "E"]))
    assert "Choices" not in drawn.question.text
    assert is_right("mathvision", mathvision_row(options=["A", "B", "C", "D", "E"]), "\\boxed{C}")
    listed = readers.mathvision(mathvision_row())
    assert "Choices:\n(A) 1\n(B) 2" in listed.question.text


def test_mmmu_reads_printed_lists_and_names_its_pictures():
    item = readers.mmmu(mmmu_row(image_2=stored("blue"), question="Is <image 2> in <image 1>?"))
    assert item.question.choices == ["block P", "block Q", "both together", "neither"]
    assert item.question.text.startswith("<image><image>Is [Image 2] in [Image 1]?\nChoices:\n(A)")
    assert item.groups == ["multiple-choice", "Science", "Physics"]


def test_mmmu_pro_pictures_keep_their_number_when_options_are_shuffled():
    row = mmmu_pro_row(options="['<image 3>', '<image 2>']", answer="B", image_2=stored("blue"),
                       image_3=stored("green"))  # fmt: skip
    item = readers.mmmu_pro(row)
    assert item.question.text.endswith("(A) [Image 3]\n(B) [Image 2]")
    assert [Image.open(io.BytesIO(data)).getpixel((0, 0)) for data in item.question.images] == [
        (255, 0, 0), (0, 0, 255), (0, 128, 0)]  # fmt: skip


def test_mmmu_pro_settings_share_ids_and_are_distinguished():
    standard, vision = readers.mmmu_pro(mmmu_pro_row()), readers.mmmu_pro(vision_row())
    assert standard.question.id == "standard:test_History_1"
    assert vision.question.id == "vision:test_History_1"
    assert standard.cluster == vision.cluster
    assert (standard.stratum, vision.stratum) == ("standard", "vision")
    assert "Choices" not in vision.question.text


@pytest.mark.parametrize("kind", ["Multiple Choice", "Multiple choice", "multiple choice "])
def test_emma_types_are_read_in_any_case(kind):
    row = emma_row(type=kind, options=["<image_2>", "x", "y"], answer="B", image_2=stored())
    item = readers.emma(row)
    assert "(A) [Image 2]" in item.question.text
    assert item.groups[:2] == ["multiple choice", "Chemistry"]
    for response in ("\\boxed{b}", "\\boxed{\\text{B}}", "\\boxed{x}"):
        assert is_right("emma", row, response), response


def test_emma_context_comes_first_and_fifth_pictures_are_shown():
    row = emma_row(context="See <image_5>.", image_5=stored("blue"), category="a;b", task="t")
    item = readers.emma(row)
    assert item.question.text.startswith("<image><image>See [Image 2].\nHow many")
    assert item.groups[2:] == ["Chemistry: t", "Chemistry: a", "Chemistry: b"]


# ---------------------------------------------------------------------------- MEGA-Bench


def mega_score(metric, answer, response, parser="answer_string") -> float:
    info = {"field_score_function": {"x": metric}, "response_parse_function": parser,
            "aggregation": {"function": "mean", "field_weights": {"x": 1}}}  # fmt: skip
    found = mega.extract(response, info)
    return mega.score(found, {"x": answer}, info)


@pytest.mark.parametrize(
    ("metric", "answer", "response", "score"),
    [
        ("exact_str_match", "B", "Answer: (B)", 1),
        ("exact_str_match", "A", "Answer: Apple", 0),
        ("exact_str_match", "B", "Answer: B\nThe second picture shows it.", 1),
        ("exact_str_match", "B", "Answer:\n```\nB\n```", 1),
        ("sequence_equality", "[1, 6, 3]", "Answer: [1, 6, 3].", 1),
        ("sequence_equality", "[1, 6]", "Answer: [1,\n6]\nas counted", 1),
        ("set_precision", "['a', 'b']", "Answer: [[[", 0),
        ("exact_str_match", "Ab", "Answer: ab", 0),
        ("exact_str_match_case_insensitive", "Ab", "Answer: aB", 1),
        ("simple_str_match", "New-York City", "Answer: new york city.", 1),
        ("multi_ref_phrase", "['colour', 'color']", "Answer: Color", 1),
        ("set_equality", "['a', 'b']", "Answer: b, a", 1),
        ("set_equality", "['a', 'b']", "Answer: b, a, c", 0),
        ("set_equality_case_insensitive", "['A', 'b']", "Answer: B, a", 1),
        ("sequence_equality", "[1, 2]", "Answer: [2, 1]", 0),
        ("sequence_equality", "[1, 2]", "Answer: [1, 2]", 1),
        ("jaccard_index", "['a', 'b']", "Answer: ['b', 'c']", 1 / 3),
        ("set_precision", "['a', 'b']", "Answer: ['b', 'c']", 1 / 2),
        ("longest_common_list_prefix_ratio", "['a', 'b', 'c']", "Answer: a, b, x", 2 / 3),
        ("general_single_numerical_match", "3.5", "Answer: 3.53", 1),
        ("general_single_numerical_match", "3.5", "Answer: 3.54", 0),
        ("general_single_numerical_match", "0.5", "Answer: 50%", 1),
        ("boxed_single_numerical_match", "\\boxed{3.5}", "\\boxed{7/2}", 1),
        ("number_rel_diff_ratio", "10", "Answer: 9", 0.9),
        ("near_str_match", "Eiffel Tower", "Answer: The Eifel tower", 1 - 1 / 12),
        ("near_str_match", "Eiffel Tower", "Answer: Big Ben", 0),
        ("nbbox_iou_single", "(0, 0, 1, 1)", "Answer: (0, 0, 0.5, 1)", 0.5),
        ("latex_expr_equality", "x^2+1", "Answer: $1 + x^{2}$", 1),
        ("set_equality", "['a']", "Answer: __import__('os')", 0),
    ],
)  # fmt: skip
def test_megabench_metrics_score_as_published(metric, answer, response, score):
    assert mega_score(metric, answer, response) == pytest.approx(score)


@pytest.mark.parametrize("metric", sorted(mega_metrics.METRICS))
def test_megabench_metrics_survive_any_answer(metric):
    for response in ("Answer: nonsense", "Answer: [[[", 'Answer: {"x": [1, {}]}', "Answer: 1/0"):
        assert 0 <= mega_score(metric, "5", response) <= 1


def test_megabench_json_answers_are_weighted_or_take_the_least():
    info = {"field_score_function": {"a": "exact_str_match", "b": "positive_int_match"},
            "aggregation": {"function": "mean", "field_weights": {"a": 1, "b": 3}},
            "response_parse_function": "json"}  # fmt: skip
    answer = {"a": "x", "b": "2"}
    formulas = "x_{1}" * 300
    text = formulas + 'Thinking {of} it.\nAnswer: ```json\n{"a": "x", "b": 3}\n```'
    assert mega.score(mega.extract(text, info), answer, info) == 0.25
    info["aggregation"]["function"] = "min"
    assert mega.score(mega.extract(text, info), answer, info) == 0
    # A field where neither amount is positive is dropped from the mean.
    info["aggregation"]["function"] = "mean"
    assert mega.score('{"a": "x", "b": 0}', {"a": "x", "b": "0"}, info) == 1


def test_megabench_metrics_that_run_code_or_ask_a_judge_are_not_supported():
    for metric in ("program_judge", "gpt_4o_as_judge", "geo_proximity_location_dict", "new_metric"):
        assert readers.megabench(mega_row(metric=metric)).unsupported == metric
    assert readers.megabench(mega_row()).unsupported == ""


def test_megabench_pictures_fill_the_placeholders_in_order():
    item = readers.megabench(mega_row(global_media="['./data/toy/g.png']"))
    assert item.question.images == ["./data/toy/g.png", "./data/toy/0.png", "./data/toy/1.png"]
    assert item.question.text.startswith("<image>Read the gauge.\nExample 1:\n<image>")
    assert item.template == "bare"
    assert readers.megabench(mega_row(query_text="<video>")).unaskable == "video"


# ---------------------------------------------------------------------------- files


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_of_a_snapshot_of_mmmu_only_validation_is_read(tmp_path):
    for subject in ("Art", "Physics"):
        for split in ("dev", "validation", "test"):
            row = mmmu_row(f"{split}_{subject}_1", answer="A" if split != "test" else "?")
            write_parquet(tmp_path / subject / f"{split}-00000-of-00001.parquet", [row])
    ids = [item.question.id for item in load("mmmu", str(tmp_path))]
    assert ids == ["validation_Art_1", "validation_Physics_1"]


def test_of_a_snapshot_of_mmmu_pro_four_options_are_passed_over(tmp_path):
    for folder, row in (("standard (10 options)", mmmu_pro_row()), ("vision", vision_row()),
                        ("standard (4 options)", mmmu_pro_row())):  # fmt: skip
        write_parquet(tmp_path / folder / "test-00000-of-00001.parquet", [row])
    ids = {item.question.id for item in load("mmmu_pro", str(tmp_path))}
    assert ids == {"standard:test_History_1", "vision:test_History_1"}


def test_other_variants_in_a_directory_are_passed_over(tmp_path):
    write_parquet(tmp_path / "testmini.parquet", [mathverse_row(problem_index=1801)])
    write_parquet(tmp_path / "testmini_text_only.parquet", [mathverse_row("9002")])
    [item] = load("mathverse", str(tmp_path))
    assert item.cluster == "1801"  # a text, as --compare reads it, whatever the file's type
    write_parquet(tmp_path / "e" / "Math" / "test-0.parquet", [emma_row()])
    write_parquet(tmp_path / "e" / "EMMA-mini" / "test-0.parquet", [emma_row()])
    assert len(load("emma", str(tmp_path / "e"))) == 1
    assert len(load("emma_mini", str(tmp_path / "e" / "EMMA-mini"))) == 1
    assert len(load("emma", str(tmp_path / "e" / "EMMA-mini"))) == 1


def test_pictures_of_jsonl_rows_are_found_beside_the_file_or_above_it(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "2001.jpg").write_bytes(png())
    row = {k: v for k, v in mathvista_row().items() if k != "decoded_image"}
    beside = load("mathvista", str(write_jsonl(tmp_path / "testmini.jsonl", [row])))
    above = load("mathvista", str(write_jsonl(tmp_path / "data" / "testmini.jsonl", [row])))
    for (item,) in (beside, above):
        assert item.question.images == [tmp_path / "images" / "2001.jpg"]


def test_several_benchmarks_have_a_folder_each(tmp_path):
    write_parquet(tmp_path / "MathVista" / "testmini-0.parquet", [mathvista_row()])
    write_parquet(tmp_path / "MMMU_Pro" / "vision" / "test-0.parquet", [vision_row()])
    assert len(load("mathvista", str(tmp_path))) == len(load("mmmu_pro", str(tmp_path))) == 1
    with pytest.raises(UserError, match="no column 'type' of emma's published files"):
        load("emma", str(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (mathvista_row(answer=""), "row 2.*no answer"),
        ({"pid": "1"}, "row 2.*no column 'answer'"),
        ({"pid": "1", "answer": "4"}, "row 2.*no column 'answer_type'"),
        (mathvista_row("1", image=[["a.png"]]), "row 2.*'images' must be str"),
        (mathvista_row(answer="Maybe", choices=["Yes", "No"]), "row 2.*none of the choices"),
        (mathvista_row(), "row 2: duplicate id '2001', first at .*row 1"),
    ],
)
def test_a_bad_row_is_an_error_that_names_it(tmp_path, row, message):
    rows = [mathvista_row(), row]
    path = tmp_path / "testmini.jsonl"
    text = [json.dumps({k: v for k, v in r.items() if k != "decoded_image"}) for r in rows]
    path.write_text("\n".join(text))
    with pytest.raises(UserError, match=message.replace("row 2", "jsonl:2").replace("row 1", "jsonl:1")):
        load("mathvista", str(path))


def test_corrupt_files_and_pictures_are_named(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="broken.parquet"):
        load("mathvista", str(tmp_path / "broken.parquet"))
    good, cut = stored(), {"bytes": png()[:60], "path": None}
    rows = [mathvista_row("1", decoded_image=good), mathvista_row("2", decoded_image=cut)]
    items = load("mathvista", str(write_parquet(tmp_path / "testmini.parquet", rows)))
    with pytest.raises(UserError, match="testmini.parquet: row 2: embedded picture"):
        check_images([item.question for item in items])
    items = load("megabench", str(write_jsonl(tmp_path / "test.jsonl", [mega_row()])))
    with pytest.raises(UserError, match=r"jsonl:1: picture .*0.png does not exist"):
        check_images([items[0].question])
