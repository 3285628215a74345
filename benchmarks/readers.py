"""Seven benchmarks as their authors publish them: from rows to Questions and marking rules.

The paper evaluates on MathVista, MathVerse, MathVision, MMMU, MMMU-Pro, EMMA and MEGA-Bench core
(Section 4.2, Tables 1 and 2). A reader turns a row of the published schema into an `Item`: the
Question to ask, the rule that marks an answer, and how it is reported. `BENCHMARKS`, at the end, has one
line per benchmark.

What we do differently: pictures come first and the text follows, as in the paper's evaluation, and
a picture that the text names ("<image 2>") is called [Image 2]; options are laid out as in the
training data; every rule is a rule (no language model extracts or judges), so MathVerse's free-form
half and MEGA-Bench are labelled with what is covered.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from benchmarks import mega
from benchmarks.rules import close, equal_lists, extract, literal, pick, quotient, same_quantity, value
from data import MARKER, Question, parse_choices, place_markers, with_choices
from grading.choices import LETTERS, named
from grading.spelling import compact, tidy
from reward import is_correct


@dataclass
class Item:
    """A Question and what its benchmark needs to mark and report a response to it."""

    question: Question
    rule: Callable[[str], float]  # the answer found in a response -> its mark, 0 to 1
    groups: list[str]  # the rows of the report that it counts in
    cluster: str = ""  # items that are not independent; "" is a cluster of its own
    stratum: str = ""  # the headline is the mean over strata; for MEGA-Bench these are its tasks
    template: str = ""  # "" takes the one the user chose
    unsupported: str = ""  # why its whole stratum cannot be marked
    unaskable: str = ""  # why its whole stratum cannot be shown to our models
    extract: Callable[[str], str | None] | None = None  # None: rules.extract


@dataclass
class Benchmark:
    """What a benchmark's rows mean, and which files of its repository on the hub hold them."""

    read: Callable[[dict], Item]
    hub: str
    split: str
    files: str  # pattern of paths in the repository
    size: int
    beside: str = "(?!)"  # matches paths of another setting or variant: not to be read


def ask(id_, text: str, images: list, gold: str, choices: list[str], category: str) -> Question:
    """A Question whose pictures all come before its words."""
    text = place_markers(text.replace(MARKER, "").strip(), len(images))
    return Question(str(id_), text, images, gold, choices or None, category)


def picture(stored):
    """Bytes, a path, or None, from {"bytes", "path"} (parquet) or a path (jsonl)."""
    return stored.get("bytes") or stored.get("path") if isinstance(stored, dict) else stored or None


def numbered_pictures(row: dict, text: str) -> tuple[str, list]:
    """The pictures in columns image_1, image_2, ..., and the text with their tags replaced by their places.

    A tag's number counts, not the order of mention: MMMU-Pro has shuffled its options.

    >>> numbered_pictures({"image_1": "a.png", "image_2": None, "image_3": "b.png"}, "<image 3>, <image_1>?")
    ('[Image 2], [Image 1]?', ['a.png', 'b.png'])
    """
    columns = sorted((int(name[6:]), name) for name in row if re.fullmatch("image_[0-9]+", name))
    found = {number: picture(row[name]) for number, name in columns if picture(row[name]) is not None}
    numbers = list(found)

    def place(tag: re.Match) -> str:
        number = int(tag[1])
        return f"[Image {numbers.index(number) + 1 if number in found else number}]"

    return re.sub(r"<image[ _]?([0-9]+)>", place, text), list(found.values())


def options_of(row: dict) -> list[str]:
    return [str(option) for option in literal(row.get("options")) or []]


def filled(row: dict, *names: str) -> list[str]:
    return [row[name] for name in names if row.get(name)]


def gold_text(row: dict) -> str:
    answer = str(row["answer"] if row["answer"] is not None else "").strip()
    if answer in ("", "?"):
        raise ValueError("no answer; the answers of some test splits are withheld")
    return answer


def mathvista(row: dict) -> Item:
    """AI4Math/MathVista. The gold answer of a choice is its text, never a letter."""
    gold, choices, kind = gold_text(row), row.get("choices"), row["answer_type"]
    if choices and gold not in choices:
        raise ValueError(f"the answer {gold!r} is none of the choices")
    # Two options may share one text: then the text is right, and so are both letters.
    right = {letter for letter, choice in zip(LETTERS, choices or []) if choice == gold}
    target, precision = value(gold), row.get("precision")
    decimals = len(gold.partition(".")[2]) if precision is None else int(precision)

    def rule(text):
        if choices:
            found = named(text, choices, strict=False)
            return bool(found) and found <= right
        if kind == "list":
            return equal_lists(text, gold)
        number = value(text)
        if number is None or target is None:
            return is_correct(text, gold)
        if kind == "integer":  # 3.9 is not 3, though the official scorer truncates it
            return number == target
        return abs(number - target) <= Fraction(1, 2 * 10**decimals)

    images = [picture(row.get("decoded_image")) or picture(row["image"])]
    query = row.get("query") or with_choices(row["question"], choices or [])
    meta = row.get("metadata") or {}
    groups = [row["question_type"], kind, *filled(meta, "task", "category", "context", "grade")]
    question = ask(row["pid"], query, images, gold, choices, meta.get("task") or "")
    return Item(question, rule, groups + list(meta.get("skills") or []))


def mathverse(row: dict) -> Item:
    """AI4Math/MathVerse: 788 problems in five versions, so a problem is a cluster.

    Options stand inside the question. In the Vision Only version the question is empty (it is drawn
    in the picture) and question_for_eval holds its text.
    """
    gold, version = gold_text(row), row["problem_version"]
    choices = parse_choices(row["question"] or row.get("question_for_eval") or "") or []
    # Of 436 choices, ten golds are odd: "C\nD", "False", a bearing.
    multiple = row["question_type"] == "multi-choice"
    right = named(gold, choices, strict=False) if multiple else None

    def rule(text):
        return named(text, choices, strict=False) == right if right else same_quantity(text, gold)

    query = row.get("query_cot") or row["question"] or "Answer the question in the picture."
    question = ask(row["sample_index"], query, [picture(row["image"])], gold, choices, version)
    groups = [version, row["question_type"], *filled(row.get("metadata") or {}, "subject", "subfield")]
    return Item(question, rule, groups, cluster=row["problem_index"])


def mathvision(row: dict) -> Item:
    """MathLLMs/MathVision. One merged picture, however many tags the text has.

    A box that is a letter is a letter, even if some option has that value. Free-form decimals are
    equal if they agree after rounding to two places, the official tolerance.
    """
    choices = options_of(row)
    # One gold has a form feed in place of \f; some are in dollars or in a box.
    gold = gold_text({"answer": str(row["answer"]).replace("\x0crac", "\\frac")})
    clean = gold.replace("{degrees}", "").strip("$ ")
    clean = extract(clean) if "\\boxed" in clean else clean
    right = pick(clean, choices) if choices else lambda text: is_correct(text, clean)

    def rule(text):
        if right(text) or (not choices and close(text, clean, decimals=2)):
            return True
        # As in the official scorer, the ratio 3:4 is the number 3/4.
        if ":" not in "".join([text, clean, *choices]):
            return False
        if not choices:
            return is_correct(quotient(text), quotient(clean))
        if named(text, choices, strict=False):
            return False
        return pick(clean, [quotient(choice) for choice in choices])(quotient(text))

    text, *shown = (re.sub(r"<image[ _]?[0-9]+>", "", x).strip() for x in (row["question"], *choices))
    # Options that read "(A)" or "A" are part of the picture: print no list.
    if [named(option, []) for option in choices] != [{letter} for letter in "ABCDE"]:
        text = with_choices(text, shown)
    images = [picture(row.get("decoded_image")) or picture(row["image"])]
    groups = ["multiple choice" if choices else "free form", row["subject"]]
    groups += [f"level {row['level']}"] if row.get("level") is not None else []
    return Item(ask(row["id"], text, images, gold, choices, row["subject"]), rule, groups)


DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}
DOMAIN = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects.split()}


def mmmu(row: dict) -> Item:
    """MMMU/MMMU. Options are a list printed as text, and so is a gold answer with several aliases.

    An open answer is right if it equals an alias as a text, as an expression or to two decimals.
    """
    choices, gold, kind = options_of(row), gold_text(row), row["question_type"]
    aliases = [str(alias) for alias in literal(gold)] if gold.startswith("[") else [gold]

    def open_answer(text):
        return any(is_correct(text, alias) or close(text, alias, decimals=2) for alias in aliases)

    multiple = kind == "multiple-choice"
    text, images = numbered_pictures(row, with_choices(row["question"], choices if multiple else []))
    subject = "_".join(row["id"].split("_")[1:-1])
    question = ask(row["id"], text, images, gold, choices, subject)
    rule = pick(gold, choices) if multiple else open_answer
    return Item(question, rule, [kind, DOMAIN.get(subject, "other"), subject])


def mmmu_pro(row: dict) -> Item:
    """MMMU/MMMU_Pro, settings "standard (10 options)" and "vision"; 1 to 12 options.

    All ids occur in both settings, so ours are standard:ID and vision:ID; the headline is the mean
    of the two settings, and the two forms of a question are one cluster.
    """
    gold, choices = gold_text(row), [str(option) for option in literal(row["options"])]
    if row.get("question") is not None:
        setting = "standard"
        text, images = numbered_pictures(row, with_choices(row["question"], choices))
    else:  # the picture shows the options too
        setting, images = "vision", [picture(row["image"])]
        text = "Write out the multiple-choice question in the image and then solve it."
    question = ask(f"{setting}:{row['id']}", text, images, gold, choices, row["subject"])
    groups = [setting, row["subject"]]
    return Item(question, pick(gold, choices), groups, cluster=row["id"], stratum=setting)


WORDS = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
]


def emma(row: dict) -> Item:
    """luckychao/EMMA and EMMA-mini. The type's case varies; the tags have an underscore.

    Open answers: equal expressions, equal to two decimals, or a number word (EMMA's own rule).
    """
    kind, choices, gold = row["type"].strip().lower(), options_of(row), gold_text(row)

    def open_answer(text):
        word = compact(tidy(text))
        text = str(WORDS.index(word)) if word in WORDS else text
        return is_correct(text, gold) or close(text, gold, decimals=2)

    multiple = kind == "multiple choice"
    text = "\n".join(part.strip() for part in (row.get("context"), row["question"]) if part)
    text, images = numbered_pictures(row, with_choices(text, choices if multiple else []))
    rule = pick(gold.upper() if len(gold) == 1 else gold, choices) if multiple else open_answer
    question = ask(row["pid"], text, images, gold, choices, row["subject"])
    # Coding questions have several categories: one group for each.
    parts = ";".join(filled(row, "task", "category")).split(";")
    groups = [kind, row["subject"], *(f"{row['subject']}: {part.strip()}" for part in parts if part)]
    return Item(question, rule, groups)


def megabench(row: dict) -> Item:
    """TIGER-Lab/MEGA-Bench core: 440 tasks, each with its own metrics (mega.py).

    Every column is text; dicts and lists are printed. Media are relative paths, in the order of the
    placeholders in description, example and query.
    """
    task = row["task_name"]
    info, answer = literal(row["metric_info"]), literal(row["answer"])
    if not isinstance(info, dict) or not isinstance(answer, dict):
        raise TypeError("metric_info and answer must be printed dicts")
    columns = ("global_media", "example_media", "query_media")
    media = [path for column in columns for path in literal(row[column] or "[]")]
    parts = (row["task_description"], row["example_text"], row["query_text"])
    text = "\n".join(part for part in parts if part)
    unaskable = "video" if "<video>" in text else ""
    if not unaskable and text.count(MARKER) > len(media):
        unaskable = "more placeholders than pictures"
    text = text if unaskable else place_markers(text, len(media))
    gold = str(next(iter(answer.values()))) if len(answer) == 1 else str(answer)
    return Item(
        Question(str(row["id"]), text, media, gold, None, task),
        lambda found: mega.score(found, answer, info),
        groups=filled(row, "application", "output_format"),
        cluster=task,
        stratum=task,
        template="bare",  # every task says how to answer
        unsupported=", ".join(sorted(mega.unsupported(info, answer))),
        unaskable=unaskable,
        extract=lambda response: mega.extract(response, info),
    )


# What the rules can mark of each is in docs/benchmarks.md.
BENCHMARKS = {
    "mathvista": Benchmark(mathvista, "AI4Math/MathVista", "testmini", "data/testmini-*", 1000),
    "mathverse": Benchmark(mathverse, "AI4Math/MathVerse", "testmini", "testmini.parquet", 3940, "text_only"),
    "mathvision": Benchmark(mathvision, "MathLLMs/MathVision", "test", "data/test-*", 3040),
    "mmmu": Benchmark(mmmu, "MMMU/MMMU", "validation", "*/validation-*", 900),
    "mmmu_pro": Benchmark(mmmu_pro, "MMMU/MMMU_Pro", "test", "*/test-*", 3460, "4 options"),
    "emma": Benchmark(emma, "luckychao/EMMA", "test", "*/test-*", 2788, "mini"),
    "emma_mini": Benchmark(emma, "luckychao/EMMA-mini", "test", "*/test-*", 400),
    "megabench": Benchmark(
        megabench, "TIGER-Lab/MEGA-Bench", "test", "core/test-*", 6531, "(^|/)open|single_image"
    ),
}
