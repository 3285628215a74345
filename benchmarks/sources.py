"""Where a benchmark's rows come from: a file, a directory, or the hub.

A snapshot of the hub works as it is, and so does any directory with the published files: it is
searched recursively, and of the files in it those of the benchmark's split are read (MMMU has 30
folders with dev, test and validation each; only validation counts). Pictures are bytes inside a
parquet file, or paths looked for beside the file and in the two folders above it.

What we do differently from the common kits: no file is converted, no mirror is asked, and an id
that occurs twice, a row of another schema and a picture that cannot be read are errors that name
file and row, where a skipped row would quietly change the denominator.
"""

import re
from pathlib import Path

from benchmarks.readers import BENCHMARKS, Item
from data import UserError, check_shape, read_rows

SPLITS = {"train", "dev", "validation", "val", "test", "testmini"}
# What marking and counting rely on, in an Item and its Question.
ITEM = {
    "text": str, "answer": str, "category": str, "choices": (list, type(None)),
    "images": [(str, bytes, type(None))], "groups": [str], "cluster": (str, int), "stratum": str,
}  # fmt: skip


def is_wanted(name: str, path: str) -> bool:
    """Whether a file of a directory holds the benchmark's split, judged by its path.

    >>> is_wanted("mmmu", "Art/dev-00000.parquet"), is_wanted("mmmu", "Art/validation-00000.parquet")
    (False, True)
    """
    path = path.lower()
    if re.search(BENCHMARKS[name].beside, path) or any(part.startswith(".") for part in path.split("/")):
        return False
    words = set(re.split(r"[^a-z]+", path.rsplit(".", 1)[0])) & SPLITS
    return not words or BENCHMARKS[name].split in {"validation" if w == "val" else w for w in words}


def find_files(name: str, data: str) -> list[Path]:
    """The files to read: the one given, or all of a directory that hold the benchmark's split."""
    path = find_data(name, data)
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    for suffix in (".parquet", ".jsonl"):
        found = sorted(file for file in path.rglob(f"*{suffix}") if file.is_file())
        wanted = [file for file in found if is_wanted(name, file.relative_to(path).as_posix())]
        if wanted:
            return wanted
        if found:
            raise UserError(
                f"{path}: no {suffix} file of {name}'s {BENCHMARKS[name].split} split among "
                f"{len(found)}, the first {found[0].name}; name the file to read it all the same"
            )
    raise UserError(f"{path}: holds no .parquet and no .jsonl file")


def find_data(name: str, data: str) -> Path:
    """A file, a directory, a hub id, or by default the benchmark's own hub id.

    A directory may hold one folder (or file) per benchmark, named as on the hub (MathVista).
    """
    path, hub = Path(data), BENCHMARKS[name].hub
    if not data or (not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", data)):
        return download(name, data or hub)

    def letters(text: str) -> str:
        return re.sub("[^a-z]", "", text.lower())

    for child in sorted(path.iterdir()) if path.is_dir() else []:
        # A file NAME.jsonl may be a result of ours.
        if child.suffix != ".jsonl" and letters(child.stem.split("--")[-1]) == letters(hub.split("/")[1]):
            return child
    return path


def download(name: str, hub: str) -> Path:
    """The benchmark's files from a data set on the hub, through its cache."""
    import huggingface_hub

    wanted = BENCHMARKS[name].files if hub == BENCHMARKS[name].hub else None
    try:
        return Path(huggingface_hub.snapshot_download(hub, repo_type="dataset", allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{hub}: not here, and not to be had from the hub ({reason}); give --data a file or a directory"
        ) from None


def find_picture(stored, folder: Path):
    """Published paths are relative to the file, or to a folder above it (hub snapshots)."""
    if not isinstance(stored, str):
        return stored
    places = [base / stored for base in (folder, *folder.parents[:2])]
    return next((place for place in places if place.is_file()), places[0])


def load(name: str, data: str) -> list[Item]:
    """All items of a benchmark. Raises UserError naming file and row for what cannot be read."""
    items, places = [], {}
    for file in find_files(name, data):
        for place, row in read_rows(file):
            try:
                item = BENCHMARKS[name].read(row)
                check_shape(vars(item) | vars(item.question), ITEM, place)
            except KeyError as error:
                columns = ", ".join(row)
                raise UserError(
                    f"{place}: no column {error} of {name}'s published files; it has: {columns}"
                ) from None
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{place}: not a row of {name} ({error})") from None
            question, item.question.place = item.question, place
            question.id, item.cluster = str(question.id), str(item.cluster)
            if question.id in places:
                first = places[question.id]
                raise UserError(
                    f"{place}: duplicate id {question.id!r}, first at {first}; is a file there twice?"
                )
            places[question.id] = place
            question.images = [find_picture(stored, file.parent) for stored in question.images]
            if None in question.images:
                raise UserError(f"{place} (id {question.id}): no picture")
            items.append(item)
    if not items:
        raise UserError(f"{data or BENCHMARKS[name].hub}: no rows")
    return items
