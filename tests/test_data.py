"""Questions from files, and pictures of every kind."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from data import MIN_SIDE, Question, UserError, check_images, load_questions, open_image, prompt_text
from reward import reward

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


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


def half_seen(image: Image.Image, unseen) -> Image.Image:
    image.paste(unseen, (0, 0, 20, 30))
    return image


PALETTE = half_seen(plain("P", 1), 0)  # red, but for the left half
PALETTE.putpalette([0, 0, 255, 255, 0, 0])
PALETTE.info["transparency"] = 0
RGBA = half_seen(plain("RGBA", (255, 0, 0, 255)), (0, 0, 255, 0))

# (picture, form to store it in, colour of the left half, of the right half)
PICTURES = {
    "JPEG": (plain("RGB", BLUE), "JPEG", BLUE, BLUE),
    "CMYK in a JPEG": (plain("CMYK", (0, 255, 255, 0)), "JPEG", RED, RED),
    "grayscale and alpha": (plain("LA", (0, 0)), "PNG", WHITE, WHITE),
    "grayscale of 16 bits": (plain("I;16", 100 * 256 + 7), "PNG", (100,) * 3, (100,) * 3),
    "half transparent": (plain("RGBA", (255, 0, 0, 128)), "PNG", (255, 127, 127), (255, 127, 127)),
    "transparent on the left": (RGBA, "PNG", WHITE, RED),
    "WebP, transparent on the left": (RGBA, "WEBP", WHITE, RED),
    "palette, transparent on the left": (PALETTE, "PNG", WHITE, RED),
    "GIF, transparent on the left": (PALETTE, "GIF", WHITE, RED),
}


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
    assert opened.getpixel((5, 15)) == pytest.approx(left, abs=3)
    assert opened.getpixel((35, 15)) == pytest.approx(right, abs=3)


def test_a_photograph_held_sideways_comes_out_upright():
    """EXIF orientation 6: the camera was turned, the stored picture's left is its top."""
    image = Image.new("RGB", (60, 40), GREEN)
    image.paste(RED, (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(stored(image, "PNG", exif=exif))
    assert opened.size == (40, 60)
    assert (opened.getpixel((20, 5)), opened.getpixel((20, 55))) == (RED, GREEN)


@pytest.mark.parametrize("size", [(1, 1), (27, 100), (100, 3), (28, 28), (29, 28), (28 * 150, 28)])
def test_no_side_is_shorter_than_a_visual_token_and_the_shape_stays(size):
    opened = open_image(stored(Image.new("RGB", size, BLUE), "PNG"))
    scale = max(1, MIN_SIDE / min(size))
    assert opened.size == (round(size[0] * scale), round(size[1] * scale))
    assert opened.getpixel((5, 5)) == BLUE


BROKEN = {
    "not a picture": b"hello",
    "cut short": stored(Image.effect_noise((300, 300), 80), "PNG")[:2000],
    "a JPEG cut short": stored(Image.effect_noise((300, 300), 80), "JPEG")[:2000],
    "too narrow": stored(Image.new("RGB", (2000, 10)), "PNG"),
    "a decompression bomb": stored(Image.new("1", (20_000, 20_000)), "PNG"),
    "missing": None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_cannot_be_used_is_named_with_its_question(name, tmp_path):
    path = tmp_path / "broken.png"
    if BROKEN[name] is not None:
        path.write_bytes(BROKEN[name])
    good = Question("fine", "<image>", [Image.new("RGB", (30, 30))], "")
    with pytest.raises(UserError, match="q17: picture .*broken.png") as error:
        check_images([good, Question("q17", "<image>", [path], ""), good])
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- files


def row(**changes) -> dict:
    """A row as ViRL39K has it."""
    return {
        "question": "<image>What is it?", "answer": "\\boxed{5}", "qid": "a-1",
        "PassRate_32BTrained": 0.5, "PassRate_7BBase": 0.25, "category": "Geometric",
        "source": "x", "image": ["images/a.jpg"],
    } | changes  # fmt: skip


BOM = b"\xef\xbb\xbf"  # a byte order mark is no part of the first row
ROWS = [
    row(),
    row(qid="a-2", question="No marker", PassRate_7BBase=-1.0),
    row(qid="a-3", question='"Text", only\nof two lines', image=[], PassRate_7BBase=0.0, category=None),
    row(qid="a-4", question="<image> and <image>", image=["b.png", "c.png"], PassRate_7BBase=1.0),
    row(qid="a-5", question="<image>?\nChoices:\n(A) x\n(B) y", answer="\\boxed{B}"),
]


def write_jsonl(path: Path, rows) -> Path:
    """Rows, or lines as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


def write_csv(path: Path, rows) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"image": "|".join(row["image"])} for row in rows)
    return path


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_csv])
def test_rows_become_questions(write, tmp_path):
    path = write(tmp_path / f"data.{write.__name__[6:]}", ROWS)
    questions = load_questions(path, "PassRate_7BBase")
    assert [q.pass_rate for q in questions] == [0.25, -1, 0, 1, 0.25]
    assert [q.id for q in questions] == ["a-1", "a-2", "a-3", "a-4", "a-5"]
    assert [q.text for q in questions] == [
        "<image>What is it?", "<image>No marker", '"Text", only\nof two lines', "<image> and <image>",
        "<image>?\nChoices:\n(A) x\n(B) y",
    ]  # fmt: skip
    assert questions[0].images == [tmp_path / "images/a.jpg"]
    assert [len(q.images) for q in questions] == [1, 1, 0, 2, 1]
    assert questions[0].answer == "\\boxed{5}"
    assert [q.category for q in questions[:3]] == ["Geometric", "Geometric", ""]
    assert [q.choices for q in questions] == [None, None, None, None, ["x", "y"]]
    if write is not write_parquet:
        path.write_bytes(BOM + path.read_bytes())
        assert load_questions(path, "PassRate_7BBase") == questions


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
    a, b, c, d, f = load_questions(write_jsonl(tmp_path / "data.jsonl", rows))
    assert (a.id, a.answer, a.images, a.category) == ("0", "5", [], "")
    assert (b.id, b.images, b.category) == ("1", [], "")
    assert (c.id, c.text, c.images) == ("7", "<image>c?", [tmp_path / "c.png"])
    assert (d.id, d.text, d.answer) == ("d", "<image><image>d?", "0.5")
    assert d.images == [tmp_path / "d.png", tmp_path / "e.png"]
    assert (f.id, f.choices, f.images) == ("4", ["x", "y"], [tmp_path / "f.png"])
