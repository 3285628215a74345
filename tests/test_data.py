"""Questions from files, and pictures of every kind."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from data import (
    MIN_SIDE,
    Question,
    UserError,
    check_images,
    load_questions,
    open_image,
    parse_choices,
    prompt_text,
)
from reward import reward

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def close(a, b, by=0) -> bool:
    return all(abs(x - y) <= by for x, y in zip(a, b))


def stored(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------- templates


def test_the_templates_are_the_paper_s_to_the_character():
    question = Question("q", "What is it?", [], "")
    assert prompt_text(question, "plain") == (
        "What is it?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert prompt_text(question, "rethink") == (
        "What is it?\n\nGuidelines: \nPlease think step by step, and **regularly perform "
        "self-questioning, self-verification, self-correction to check your ongoing "
        'reasoning**, using connectives such as "Wait a moment", "Wait, does it seem right?", '
        "etc. Remember to put your final answer within \\boxed{}."
    )
    assert prompt_text(question, "bare") == "What is it?"


def test_choices_are_read_in_virl39k_s_form_and_in_others():
    assert parse_choices("Which?\nChoices:\n(A) 3 cm\n(B) 4 cm\n(C) \n(D) 5") == [
        "3 cm", "4 cm", "", "5",
    ]  # fmt: skip
    assert parse_choices("Choices: none.\nWhich?\nChoices:\nA. x\n B: y ") == ["x", "y"]
    for text in (
        "Which?\nOptions:\nA. red\nB. green", "Which? OPTIONS: (A)red (B)green", "Which?\nA) red\nB) green\n",
        "Answer choices:\na) red\nb) green", "Which of these options: Choices: A. red, B. green",
    ):  # fmt: skip
        assert parse_choices(text) == ["red", "green"], text
    for text in (
        "Which?", "Choices:\n(A) one", "Choices:\n(B) x\n(C) y", "Choices:\n(A) x\n(C) y",
        "(A) x\n(B) y\nWhich is longer?", "Find\n(a) its area\n(b) its height", "What are the options: or none?",
    ):  # fmt: skip
        assert parse_choices(text) is None, text


@pytest.mark.parametrize("choices", [["3 cm", "4 cm"], ["A. 3 cm", "B. 4 cm"], [" 3 cm", "4 cm "]])
def test_choices_of_a_column_are_shown_to_the_policy_once(choices, tmp_path):
    shown = "Which?\nChoices:\n(A) 3 cm\n(B) 4 cm"
    for text in ("Which?", shown):
        for answer in ("B", "\\boxed{B}", "4 cm", "(B) 4 cm"):
            rows = [{"question": text, "choices": choices, "answer": answer}]
            [question] = load_questions(write_jsonl(tmp_path / "data.jsonl", rows))
            assert question.text == shown and question.choices == ["3 cm", "4 cm"]
            assert reward("\\boxed{4 cm}", question.answer, question.choices) == 1
            assert reward("\\boxed{A}", question.answer, question.choices) == 0


# ---------------------------------------------------------------------------- pictures


def plain(mode: str, colour) -> Image.Image:
    return Image.new(mode, (40, 30), colour)


def palette(transparent: bool) -> Image.Image:
    """Red, with an entry of the palette, the left half's, that may be transparent."""
    image = plain("P", 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(0, (0, 0, 20, 30))
    if transparent:
        image.info["transparency"] = 0
    return image


def half_seen() -> Image.Image:
    image = plain("RGBA", (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 20, 30))
    return image


# (picture, form to store it in, colour of the left half, of the right half)
PICTURES = {
    "RGB": (plain("RGB", RED), "PNG", RED, RED),
    "grayscale": (plain("L", 100), "PNG", (100,) * 3, (100,) * 3),
    "grayscale and alpha": (plain("LA", (0, 0)), "PNG", WHITE, WHITE),
    "grayscale of 16 bits": (plain("I;16", 100 * 256 + 7), "PNG", (100,) * 3, (100,) * 3),
    "black and white": (plain("1", 1), "PNG", WHITE, WHITE),
    "RGBA, transparent on the left": (half_seen(), "PNG", WHITE, RED),
    "RGBA, half transparent": (plain("RGBA", (255, 0, 0, 128)), "PNG", (255, 127, 127),
                               (255, 127, 127)),
    "palette": (palette(False), "PNG", BLUE, RED),
    "palette, transparent on the left": (palette(True), "PNG", WHITE, RED),
    "GIF, transparent on the left": (palette(True), "GIF", WHITE, RED),
    "CMYK": (plain("CMYK", (0, 255, 255, 0)), "TIFF", RED, RED),
    "CMYK in a JPEG": (plain("CMYK", (0, 255, 255, 0)), "JPEG", RED, RED),
    "JPEG": (plain("RGB", BLUE), "JPEG", BLUE, BLUE),
    "WebP": (half_seen(), "WEBP", WHITE, RED),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("source", ["bytes", "path", "image"])
def test_every_kind_of_picture_comes_out_as_rgb_on_white(name, source, tmp_path):
    image, form, left, right = PICTURES[name]
    data = stored(image, form)
    if source == "path":
        (tmp_path / "picture").write_bytes(data)
        data = tmp_path / "picture"
    opened = open_image(Image.open(io.BytesIO(data)) if source == "image" else data)
    assert opened.mode == "RGB" and opened.size == (40, 30)
    assert close(opened.getpixel((5, 15)), left, 3) and close(opened.getpixel((35, 15)), right, 3)


def test_a_photograph_held_sideways_comes_out_upright():
    """EXIF orientation 6: the camera was turned, the stored picture's left is its top."""
    image = Image.new("RGB", (60, 40), GREEN)
    image.paste(RED, (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(stored(image, "PNG", exif=exif))
    assert opened.size == (40, 60)
    assert (opened.getpixel((20, 5)), opened.getpixel((20, 55))) == (RED, GREEN)


@pytest.mark.parametrize("size", [(1, 1), (27, 100), (100, 3), (28, 28), (29, 28)])
def test_no_side_is_shorter_than_a_visual_token_and_the_shape_stays(size):
    opened = open_image(stored(Image.new("RGB", size, BLUE), "PNG"))
    assert min(opened.size) >= MIN_SIDE
    scale = max(1, MIN_SIDE / min(size))
    assert opened.size == (round(size[0] * scale), round(size[1] * scale))
    assert opened.getpixel((5, 5)) == BLUE


def test_a_picture_too_narrow_for_the_model_is_refused():
    assert open_image(Image.new("RGB", (28 * 150, 28))).size == (28 * 150, 28)
    with pytest.raises(ValueError, match="factor"):
        open_image(Image.new("RGB", (2000, 10)))


def test_check_images_gives_the_sizes_that_open_image_makes(tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    questions = [
        Question("1", "<image><image>", [tmp_path / "a.png", Image.new("L", (14, 28))], ""),
        Question("2", "", [], ""),
        Question("3", "<image>", [stored(Image.new("RGB", (30, 60)), "PNG")], ""),
    ]
    assert check_images(questions) == [[(50, 40), (28, 56)], [], [(30, 60)]]


BROKEN = {
    "not a picture": b"hello",
    "nothing": b"",
    "cut short": stored(Image.effect_noise((300, 300), 80).convert("RGB"), "PNG")[:2000],
    "a JPEG cut short": stored(Image.effect_noise((300, 300), 80), "JPEG")[:2000],
}


@pytest.mark.parametrize("name", [*BROKEN, "missing"])
def test_a_broken_or_missing_picture_is_named_with_its_question(name, tmp_path):
    path = tmp_path / "broken.png"
    if name != "missing":
        path.write_bytes(BROKEN[name])
    good = Question("fine", "<image>", [Image.new("RGB", (30, 30))], "")
    questions = [good, Question("q17", "<image>", [path], ""), good]
    with pytest.raises(UserError, match="q17: picture .*broken.png") as error:
        check_images(questions)
    assert "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    question = Question("q17", "<image>", [stored(Image.new("RGB", (50, 50)), "PNG")], "")
    with pytest.raises(UserError, match="q17.*embedded"):
        check_images([question])


# ---------------------------------------------------------------------------- files


def row(**changes) -> dict:
    """A row as ViRL39K has it."""
    return {
        "question": "<image>What is it?", "answer": "\\boxed{5}", "qid": "a-1",
        "PassRate_32BTrained": 0.5, "PassRate_7BBase": 0.25, "category": "Geometric",
        "source": "x", "image": ["images/a.jpg"],
    } | changes  # fmt: skip


ROWS = [
    row(),
    row(qid="a-2", question="No marker", PassRate_7BBase=-1.0),
    row(qid="a-3", question="Text only", image=[], PassRate_7BBase=0.0),
    row(qid="a-4", question="<image> and <image>", image=["b.png", "c.png"], PassRate_7BBase=1.0),
    row(qid="a-5", question="<image>?\nChoices:\n(A) x\n(B) y", answer="\\boxed{B}"),
]


def write_jsonl(path: Path, rows) -> Path:
    """Rows, or lines as they are."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows) -> Path:
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("form", WRITERS)
def test_rows_become_questions(form, tmp_path):
    questions = load_questions(WRITERS[form](tmp_path / f"data.{form}", ROWS), "PassRate_7BBase")
    assert [q.pass_rate for q in questions] == [0.25, -1, 0, 1, 0.25]
    assert [q.id for q in questions] == ["a-1", "a-2", "a-3", "a-4", "a-5"]
    assert [q.text for q in questions] == [
        "<image>What is it?", "<image>No marker", "Text only", "<image> and <image>",
        "<image>?\nChoices:\n(A) x\n(B) y",
    ]  # fmt: skip
    assert questions[0].images == [tmp_path / "images/a.jpg"]
    assert [len(q.images) for q in questions] == [1, 1, 0, 2, 1]
    assert questions[0].answer == "\\boxed{5}" and questions[0].category == "Geometric"
    assert [q.choices for q in questions] == [None, None, None, None, ["x", "y"]]


def write_csv(path: Path, rows) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for line in rows:
            lists = {k: "|".join(v) for k, v in line.items() if isinstance(v, list)}
            writer.writerow(line | lists)
    return path


def test_a_csv_says_the_same_as_jsonl(tmp_path):
    """Commas, quotes and line breaks within a cell, lists, an empty cell, a byte order mark."""
    rows = [*ROWS, row(qid="a-6", question='<image>"So, what?"', category=None)]
    want = load_questions(write_jsonl(tmp_path / "data.jsonl", rows), "PassRate_7BBase")
    path = write_csv(tmp_path / "data.csv", rows)
    assert load_questions(path, "PassRate_7BBase") == want
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_questions(path, "PassRate_7BBase") == want


def test_pictures_inside_a_parquet_are_read(tmp_path):
    data = stored(Image.new("RGB", (30, 30), RED), "PNG")
    pictures = [{"bytes": data, "path": None}, {"bytes": None, "path": "images/a.jpg"}]
    path = write_parquet(tmp_path / "data.parquet", [row(image=pictures)])
    [question] = load_questions(path)
    assert question.images == [data, tmp_path / "images/a.jpg"]
    assert open_image(question.images[0]).getpixel((3, 3)) == RED


def test_optional_columns_may_be_left_out(tmp_path):
    rows = [
        {"question": "a?", "answer": 5},
        {"question": "b?", "answer": "5", "image": None, "qid": None, "category": None},
        {"question": "c?", "answer": "5", "image": "c.png", "qid": 7},
        {"question": "d?", "answer": 0.5, "images": ["d.png", "e.png"], "id": "d"},
        {"question": "f?", "answer": "A", "file_name": "f.png", "options": ["x", "y"]},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark is no part of the first row
    a, b, c, d, f = load_questions(path)
    assert (a.id, a.answer, a.images, a.category) == ("0", "5", [], "")
    assert (b.id, b.images, b.category) == ("1", [], "")
    assert (c.id, c.text, c.images) == ("7", "<image>c?", [tmp_path / "c.png"])
    assert (d.id, d.text, d.answer) == ("d", "<image><image>d?", "0.5")
    assert d.images == [tmp_path / "d.png", tmp_path / "e.png"]
    assert (f.id, f.choices, f.images) == ("4", ["x", "y"], [tmp_path / "f.png"])
