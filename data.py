"""Questions, and the files they come from.

A `Question` is what the environment asks: text, pictures, and the answer that only the reward sees.
It is read from a row of a .parquet, .jsonl or .csv file:

    question  text, with an `<image>` marker where each picture belongs
    answer    text or number, bare or "\\boxed{...}"; of a multiple-choice question a letter or the text
    image     a path relative to the file, or a list of paths (in a parquet also {"bytes": ...})
    choices   optional: list of option texts; they are printed below the question unless it lists them
    qid       optional, as are category and columns of pass rates

In a CSV the paths and options of a list are separated by "|". The columns `images` and `file_name`
(of Hugging Face's image folders) are read as `image`, `options` as `choices`, `id` as `qid`. This is
the layout of ViRL39K, the paper's data (Section 4.1, hub id TIGER-Lab/ViRL39K).

What we do differently: about 850 rows of ViRL39K have a picture and no marker; their pictures come
first. A row that cannot be used is never skipped: it is an error that names file, line and fix.

Next: train.py, the loop.
"""

import csv
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from grading.choices import LETTERS, named, parse_choices, with_choices
from reward import extract_answer

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

IMAGE_COLUMNS = ("image", "images", "file_name")
CHOICE_COLUMNS = ("choices", "options")
_PICTURE = re.compile(r"\.(?:png|jpe?g|webp|gif|bmp|tiff?)$", re.IGNORECASE)


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
    """One thing to ask. `text` holds exactly one `<image>` marker per picture, in order."""

    id: str
    text: str
    images: list  # of PIL images, paths, or encoded bytes: opened when the question is encoded
    answer: str
    choices: list[str] | None = None  # option texts from A on, where the question has them
    category: str = ""
    place: str = field(default="", compare=False)  # file and row, for error messages
    pass_rate: float | None = None  # how often a model already solves it; ViRL39K: -1 where not measured


def prompt_text(question: Question, template: str) -> str:
    """The text of the user turn: the question inside one of TEMPLATES."""
    return TEMPLATES[template].replace("{question}", question.text)


def place_markers(text: str, n_images: int) -> str:
    """Give `text` one marker per picture; pictures that have none come first.

    >>> place_markers("What is it?", 2)
    '<image><image>What is it?'
    """
    missing = n_images - text.count(MARKER)
    if missing < 0:
        raise ValueError(f"{n_images - missing} {MARKER} markers but {n_images} images; fix the row")
    return MARKER * missing + text


# PIL reports broken files by any of these, PNG chunks even by SyntaxError.
BROKEN_IMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def open_image(source) -> Image.Image:
    """Any stored picture as upright RGB, no side under MIN_SIDE pixels, transparency laid on white.

    `source` is a PIL image, a path, or the encoded bytes. Raises one of BROKEN_IMAGE.
    """
    image = source
    if not isinstance(source, Image.Image):
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL's own conversion would cut 16 bits off at 255: all white
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
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    return image


def load_pictures(question: Question) -> list[Image.Image]:
    """A question's pictures, opened. Raises UserError for one that is missing or broken."""
    pictures = []
    for source in question.images:
        where = question.place or f"question {question.id}"
        name = f"picture {source}" if isinstance(source, (str, Path)) else "embedded picture"
        try:
            pictures.append(open_image(source))
        except FileNotFoundError:
            how = "put it where the row says, relative to the data file (unpack an archive)"
            raise UserError(f"{where}: {name} does not exist; {how}") from None
        except BROKEN_IMAGE as error:
            reason = re.sub(r"<.*>", "unknown format", str(error))
            raise UserError(f"{where}: {name} cannot be read ({reason}); replace the picture") from None
    return pictures


def check_images(questions: list[Question], show: bool = False) -> list[list[tuple]]:
    """Each question's picture sizes, (width, height). Raises UserError for the first broken picture."""
    with ThreadPoolExecutor() as pool:
        try:
            sizes = pool.map(lambda q: [picture.size for picture in load_pictures(q)], questions)
            return list(tqdm(sizes, "checking pictures", len(questions), leave=False, disable=not show))
        except UserError:
            pool.shutdown(cancel_futures=True)  # the others need not be decoded
            raise


def parse_json(text: bytes, place: str, shape=None) -> dict:
    """The JSON object in `text`, which comes from `place` and must be of a `check_shape`."""

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
        raise UserError(f"{place}: half of a surrogate pair, which no tokenizer reads; fix it") from None
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


def read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path}: not a file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path, shape=None) -> dict:
    """The object that a .json file holds."""
    return parse_json(read_bytes(path), str(path), shape)


def read_jsonl(path: Path, shape=None, growing: bool = False) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl file, each with its place ("file:line").

    growing  a last line without its end is being written, or was cut by a kill: it is passed over
    """
    for number, line in enumerate(read_bytes(path).splitlines(keepends=True), 1):
        if line.strip() and not (growing and not line.endswith(b"\n")):
            place = f"{path}:{number}"
            row = parse_json(line, place, shape)
            if "line_crc32" in row and row.pop("line_crc32") != zlib.crc32(json.dumps(row).encode()):
                how = "remove the line, or its line_crc32 if that was meant"
                raise UserError(f"{place}: changed since it was written; {how}")
            yield place, row


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a file, each with its place ("file:line") for error messages."""
    readers = {".jsonl": read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: give a .parquet, .jsonl or .csv file")
    return readers[path.suffix.lower()](path)


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for row in chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(256)):
                number += 1
                yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not readable as parquet after row {number} ({reason})") from None


def _read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows under a header line; an empty cell is None, "a.png|b.png" a list."""
    try:
        rows = csv.DictReader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        if twice := [x for x, n in Counter(rows.fieldnames or []).items() if n > 1]:
            raise UserError(f"{path}: two columns {twice[0]!r}; keep one")
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if None in row:
                raise UserError(f"{place}: more cells than columns; put a cell with a comma in quotes")
            row = {name: cell or None for name, cell in row.items()}
            for name in (*IMAGE_COLUMNS, *CHOICE_COLUMNS):
                if "|" in (row.get(name) or ""):
                    row[name] = [part.strip() for part in row[name].split("|")]
            yield place, row
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}:{rows.reader.line_num}: invalid CSV ({error})") from None


def _column(row: dict, names: tuple):
    """What stands in the one column of these that is filled, or None."""
    filled = [name for name in names if row.get(name) not in (None, "", [])]
    if len(filled) > 1:
        raise ValueError(f"both {filled[0]!r} and {filled[1]!r}; keep one column")
    return row[filled[0]] if filled else None


def _read_images(row: dict, folder: Path) -> list:
    """The pictures of a row; paths are relative to the file."""
    value = _column(row, IMAGE_COLUMNS)
    if value is None:
        for name, cell in row.items():
            if isinstance(cell, str) and _PICTURE.search(cell) and name not in ("question", "answer"):
                raise ValueError(f"column {name!r} names a picture; call that column 'image'")
        return []
    sources = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            item = item.get("bytes") or item.get("path")
        if not isinstance(item, (str, bytes)):
            kind = type(item).__name__
            raise TypeError(f"a picture must be a path, or bytes in a parquet, not {kind}")
        sources.append(folder / item if isinstance(item, str) else item)
    return sources


def _read_choices(row: dict, text: str, answer: str) -> tuple[str, list[str] | None]:
    """(the question's text with its options listed, the options or None)."""
    listed, choices = parse_choices(text), _column(row, CHOICE_COLUMNS)
    if choices is None:
        return text, listed
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"'choices' must be a list of 2 to {len(LETTERS)} option texts")
    choices = [str(choice).strip() for choice in choices]
    labelled = parse_choices("Choices:\n" + "\n".join(choices))  # ["A. red", "B. green"]
    choices = labelled if labelled and len(labelled) == len(choices) else choices
    if listed and listed != choices:
        raise ValueError("the question lists other options than 'choices'; keep one of the two")
    if not named(extract_answer(answer) or answer, choices):
        raise ValueError(f"the answer {answer!r} is none of the choices; give a letter or the text")
    return (text if listed else with_choices(text, choices)), choices


def read_question(row: dict, place: str, folder: Path, number: int) -> Question:
    """One row as a Question. Raises ValueError or TypeError with what is wrong and how to fix it.

    number  of the row, its id where it has none;  folder  what paths are relative to
    """
    text, answer = row.get("question"), row.get("answer")
    if not isinstance(text, str) or not text.strip():
        columns = ", ".join(map(str, row))
        raise ValueError(f"no question; a row needs a text in 'question', this one has {columns}")
    if isinstance(answer, (list, dict, bool)):
        raise TypeError(f"the answer is a {type(answer).__name__}; give one text or number")
    answer = "" if answer is None else str(answer).strip()
    if answer in ("", "\\boxed{}", "nan"):  # nan: a table's empty cell
        raise ValueError("no answer; a row needs a text or number in 'answer'")
    images = _read_images(row, folder)
    text, choices = _read_choices(row, text, answer)
    text = place_markers(text, len(images))  # once options are listed: one may hold a marker
    qid, category = _column(row, ("qid", "id")), str(row.get("category") or "")
    qid = str(number if qid is None else qid)
    return Question(qid, text, images, answer, choices, category, place)


def _read_pass_rate(row: dict, column: str) -> float:
    try:
        return float(row[column])
    except (KeyError, TypeError, ValueError, OverflowError):
        how = f'name another of {", ".join(map(str, row))}, or give --pass_rate_column "" to keep all'
        raise ValueError(f"no number in column {column!r} of --pass_rate_column; {how}") from None


def load_questions(path, pass_rate_column: str = "") -> list[Question]:
    """Read a file in ViRL39K's layout. Raises UserError naming file and row for what cannot be used."""
    found: dict[str, Question] = {}
    for place, row in read_rows(Path(path)):
        try:
            question = read_question(row, place, Path(path).parent, len(found))
            if pass_rate_column:
                question.pass_rate = _read_pass_rate(row, pass_rate_column)
            if question.id in found:
                raise ValueError(f"duplicate qid {question.id!r}, first at {found[question.id].place}")
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: {error}") from None
        found[question.id] = question
    if not found:
        raise UserError(f"{path}: the file is empty")
    return list(found.values())
