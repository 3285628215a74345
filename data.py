"""Questions, and the files they come from.

A `Question` is what the environment asks: text, pictures, and the answer that only the reward
sees. Training reads the layout of ViRL39K, the paper's data (Section 4.1, hub id
TIGER-Lab/ViRL39K), from .parquet or from .jsonl with the same columns:

    question  text, with an `<image>` marker where each picture belongs
    answer    "\\boxed{...}", or the bare answer
    image     list of paths relative to the file (or {"bytes": ...} structs in a parquet)
    qid, category, PassRate_7BBase, PassRate_32BTrained   (optional)

Section 4.1 also selects questions by how often a model already solves them: that is
`load_questions(..., pass_rate=(column, low, high))`.

What we do differently: about 850 rows of ViRL39K have a picture and no marker; their pictures come
first. A row that cannot be used is an error that names it, before any training, never a skip.
"""

import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

MARKER = "<image>"
MIN_SIDE = 28  # pixels: one visual token of Qwen2-VL and Qwen2.5-VL covers 28 x 28

# What surrounds a question in the user turn, exact to the character (paper, appendix).
TEMPLATES = {
    "plain": "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "rethink": "{question}\n\nGuidelines: \nPlease think step by step, and **regularly perform "
    "self-questioning, self-verification, self-correction to check your ongoing reasoning**, using "
    'connectives such as "Wait a moment", "Wait, does it seem right?", etc. Remember to put your '
    "final answer within \\boxed{}.",
    "bare": "{question}",
}


class UserError(Exception):
    """Something the user can put right. Its message is one line: what, where, what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    r"""One line that is safe to show on a terminal: ids and texts of data may hold escape sequences.

    >>> print(printable("clears \x1b[2J and \n breaks, é stays"))
    clears \x1b[2J and \n breaks, é stays
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass
class Question:
    """One thing to ask. `text` holds exactly one `<image>` marker a picture, in order."""

    id: str
    text: str
    images: list  # of PIL images, paths, or encoded bytes: opened when the question is encoded
    answer: str
    choices: list[str] | None = None  # option texts from A on, where the question has them
    category: str = ""


def prompt_text(question: Question, template: str) -> str:
    """The text of the user turn: the question inside one of TEMPLATES.

    >>> prompt_text(Question("1", "Is {x} red?", [], "yes"), "bare")
    'Is {x} red?'
    """
    return TEMPLATES[template].replace("{question}", question.text)


def place_markers(text: str, n_images: int) -> str:
    """Give `text` one marker a picture; pictures that have none come first.

    >>> place_markers("What is it?", 2)
    '<image><image>What is it?'
    """
    missing = n_images - text.count(MARKER)
    if missing < 0:
        raise ValueError(f"{n_images - missing} {MARKER} markers but {n_images} images")
    return MARKER * missing + text


def parse_choices(text: str) -> list[str] | None:
    """The options of a multiple-choice question in ViRL39K's form, or None.

    >>> parse_choices("Which?\\nChoices:\\n(A) 3 cm\\n(B) 4 cm")
    ['3 cm', '4 cm']
    """
    _, found, tail = text.rpartition("Choices:")
    if not found:
        return None
    options = re.findall(r"^[ \t]*\(?([A-Z])[).:][ \t]*(.*?)[ \t]*$", tail, flags=re.MULTILINE)
    letters = "".join(letter for letter, _ in options)
    if len(options) < 2 or letters != "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]:
        return None
    return [option for _, option in options]


# ---------------------------------------------------------------------------- pictures

# PIL reports broken files by any of these, PNG chunks even by SyntaxError.
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def open_image(source) -> Image.Image:
    """Any stored picture as upright RGB, no side under MIN_SIDE pixels.

    `source` is a PIL image, a path, or the encoded bytes. Transparency is laid on white, as a
    browser shows it. Raises one of BROKEN_IMAGE where the picture is broken.
    """
    if isinstance(source, Image.Image):
        image = source
    else:
        if not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
            raise ValueError("not a file")  # a pipe would be waited for
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(
        "I;16"
    ):  # PIL's own conversion would cut 16 bits off at 255: all white
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    width, height = image.size
    if max(width, height) > 190 * min(width, height):
        # Qwen's resizer refuses 200 and more, and its own rounding may add to ours.
        raise ValueError(f"its sides {width} x {height} differ by a factor of more than 190")
    if min(width, height) < MIN_SIDE:
        scale = MIN_SIDE / min(width, height)
        image = image.resize(
            (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
        )
    return image


def check_images(questions: list[Question], progress=lambda items: items) -> list[list[tuple]]:
    """Decode every picture once; return each question's list of (width, height).

    Raises UserError naming the first question whose picture is missing or broken.
    """

    def sizes(question: Question) -> list[tuple] | str:
        found = []
        for source in question.images:
            name = source if isinstance(source, (str, Path)) else "(embedded picture)"
            try:
                found.append(open_image(source).size)
            except FileNotFoundError:
                return f"qid {question.id}: image {name} does not exist; is images.zip unpacked?"
            except BROKEN_IMAGE as error:
                return f"qid {question.id}: image {name} cannot be read ({error}); replace it"
        return found

    results = []
    with ThreadPoolExecutor() as pool:
        for result in progress(pool.map(sizes, questions)):
            if isinstance(result, str):
                pool.shutdown(cancel_futures=True)
                raise UserError(result)
            results.append(result)
    return results


# ---------------------------------------------------------------------------- files


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's contents: a reader sees the old or the new, never a part."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def parse_json(text: bytes, place: str, shape=None) -> dict:
    """The JSON object in `text`. Every JSON file of the project is read here.

    shape  what the object must hold; see `check_shape`

    Raises UserError, which begins with `place`, for whatever is wrong with it.
    """

    def integer(digits: str) -> int:
        if len(digits) > 300:  # beyond any float: arithmetic with it would overflow
            raise ValueError("a number of more than 300 digits")
        return int(digits)

    try:
        found = json.loads(text.decode("utf-8-sig"), parse_int=integer)
        if re.search(rb"\\u[dD][89a-fA-F]", text):  # raises where half of a pair stands alone
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise UserError(f"{place}: not UTF-8; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise UserError(f"{place}: half of a surrogate pair, which no tokenizer reads") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: invalid JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(found, dict):
        raise UserError(f'{place}: expected an object, as {{"key": ...}}')
    check_shape(found, shape or {}, place)
    return found


NUMBER = (int, float)


def check_shape(value, shape, place: str, name: str = "the object") -> None:
    """Raise UserError where a value read from JSON is not of the shape that the code counts on.

    A shape is a type or a tuple of types; {"key": shape, "may be missing?": shape};
    [shape] for any number of them, or [shape, shape] for just these.

    >>> check_shape({"a": 1, "b": [["x", True]]}, {"a": NUMBER, "b": [[str, bool]], "c?": str}, "f:1")
    """
    kinds = (dict,) if isinstance(shape, dict) else (list,) if isinstance(shape, list) else shape
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in kinds:  # not isinstance: True is no number
        wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise UserError(f"{place}: {name} must be {wanted}, not {type(value).__name__}")
    if isinstance(shape, dict):
        for key, part in shape.items():
            optional, key = key.endswith("?"), key.removesuffix("?")
            if key not in value and not optional:
                raise UserError(f"{place}: {name} has no {key!r}")
            if key in value:
                check_shape(value[key], part, place, repr(key))
    elif isinstance(shape, list):
        if len(shape) > 1 and len(value) != len(shape):
            raise UserError(f"{place}: {name} must hold {len(shape)} values, not {len(value)}")
        for i, item in enumerate(value):
            check_shape(item, shape[i % len(shape)], place, f"a value of {name}")


def check_file(path: Path) -> None:
    """Raise UserError where there is no file, or what would be waited for: a pipe, a device."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    except OSError as error:  # such as a name that is too long
        raise UserError(f"{path}: {error.strerror}") from None


def read_bytes(path: Path) -> bytes:
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path, shape=None) -> dict:
    """The object that a .json file holds; see `parse_json`."""
    return parse_json(read_bytes(path), str(path), shape)


def read_jsonl(path: Path, shape=None, growing: bool = False) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl file, each with its place ("file:line"); see `parse_json`.

    growing  a last line without its end is being written, or was cut by a kill: it is passed over
    """
    for number, line in enumerate(read_bytes(path).splitlines(keepends=True), 1):
        if line.strip() and not (growing and not line.endswith(b"\n")):
            place = f"{path}:{number}"
            yield place, parse_json(line, place, shape)


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a .parquet or .jsonl file, each with its place ("file:line") for error messages."""
    path = Path(path)
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
        return
    check_file(path)
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}: row {number}", row
        except UnicodeDecodeError:
            raise UserError(f"{path}: after row {number}: a text that is not UTF-8") from None
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not a readable parquet file ({reason})") from None
    else:
        raise UserError(f"{path}: expected a .parquet or .jsonl file")


def _image_sources(value, folder: Path) -> list:
    """ViRL39K's image column: nothing, one path, or a list; paths are relative to the file."""
    if value is None or value == "":
        return []
    sources = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
        if not isinstance(item, (str, bytes)):
            raise TypeError(f"an image must be a path or bytes, not {type(item).__name__}")
        sources.append(folder / item if isinstance(item, str) else item)
    return sources


def load_questions(path, pass_rate: tuple[str, float, float] | None = None) -> list[Question]:
    """Read a file in ViRL39K's layout.

    pass_rate  (column, low, high) keeps the rows whose column lies in [low, high]; ViRL39K writes
               -1 where a model was not measured, which no range from 0 on contains.

    Raises UserError naming file and row for: no file, no rows, invalid JSON, no question, no
    answer, a qid that comes twice, more markers than images, a pass-rate column that is not there.
    """
    path = Path(path)
    questions, places = [], {}
    n_rows = 0
    for place, row in read_rows(path):
        n_rows += 1
        text, answer = row.get("question"), row.get("answer")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{place}: no question; a row needs a non-empty 'question' text")
        if isinstance(answer, (list, dict, bool)):
            raise UserError(
                f"{place}: the answer is a {type(answer).__name__}; give one text or number"
            )
        if answer is None or not str(answer).strip() or str(answer).strip() == "\\boxed{}":
            raise UserError(f"{place}: no answer; a row needs a non-empty 'answer'")
        qid = str(row["qid"] if row.get("qid") is not None else n_rows - 1)
        if qid in places:
            raise UserError(f"{place}: duplicate qid {qid!r}, first at {places[qid]}")
        places[qid] = place
        if pass_rate is not None:
            column, low, high = pass_rate
            if not isinstance(row.get(column), (int, float)):
                known = ", ".join(sorted(row))
                raise UserError(f"{place}: no number in column {column!r}; columns: {known}")
            if not low <= row[column] <= high:
                continue
        try:
            images = _image_sources(row.get("image"), path.parent)
            text = place_markers(text, len(images))
        except (TypeError, ValueError) as error:
            raise UserError(f"{place} (qid {qid}): {error}; mend the row") from None
        category = str(row.get("category") or "")
        questions.append(Question(qid, text, images, str(answer), parse_choices(text), category))
    if n_rows == 0:
        raise UserError(f"{path}: the file is empty")
    if not questions:
        raise UserError(f"{path}: none of {n_rows} rows has {pass_rate[0]} in the range asked for")
    return questions
