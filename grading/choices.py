r"""One grammar of options, for rewards and benchmarks alike: which options does a text name?

    option   := [option] B   (B)   [B]   B.   "B"   B is correct      a label alone
              | label text      B. 12   (B) 12   B: 12   B (12)   B - 12   B, 12   B 12   B12
              | text (B)        12 (B)
              | text            equal to an option's text
    several  := A, C   A and C   AC   (A)(C)   (A) 12, (C) 14         no single option

A capital letter within the range of the options is a label. Otherwise a text that equals an option comes
first, so `R` among the options P, R, I is the second one. Texts are compared without blanks before any
algebra, which would make 2-5-3-1 and 2-3-5-1 equal. After a comma, a dash or a blank a letter is a label only
if its own option's text or a reason follows: "A circle" begins with an article.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from grading.spelling import compact, tidy
from grading.structure import readings, same

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_RIGHT = "(?:correct|right|best)"
_LEAD = rf"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:{_RIGHT} )?(?:(?:option|choice|answer|letter)\s+)?"
_LONE = re.compile(
    rf"{_LEAD}[(\[]?\s*([A-Z])\s*[)\]]?\s*[.:,)]*"
    rf"(?: is (?:the )?(?:{_RIGHT}|(?:{_RIGHT} )?(?:answer|option|choice)))?",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    rf"{_LEAD}(?:[(\[]\s*(?P<framed>[A-Z])\s*[)\]][.:,;]*|(?P<bare>[A-Z])"
    r"(?:\s?[.:)]+|\s(?=[(\[])|(?P<weak>[,;]|\s-|(?=[\s\d(-]))))\s*"
    r"(?![\s,;&]|and\b|or\b|[(\[][A-Z][)\]].)(?P<text>.+)",
    re.IGNORECASE,
)
_REASON = re.compile(rf"(?:because|since|as|which|for|due|given|so|is (?:the )?{_RIGHT})\b")
# B (6) or C (8)
_ANOTHER = re.compile(r"(?:\bor|\band|[,;])\s*[(\[]?[A-Z](?:[)\].:]|\s[(\[])|\s[(\[][A-Z][)\]](?=\s)")
_AFTER = re.compile(r"(.+?)\s?[(\[](?:option |choice )?([A-Z])[)\]]")
_SAID = re.compile(r"(yes|no|true|false)[,.;:-]", re.IGNORECASE)  # No, it is not
_FRAME = re.compile(r"[(\[](.*)[)\]]$")
_ONE = r"[(\[]?[A-Z][)\]]?"
_SEVERAL = re.compile(rf"(?:both )?{_ONE}(?:\s*[,;&]\s*(?:and )?(?:{_ONE}|[a-z])|(?:\s+and\s+|\s*){_ONE})+")
_LABELS = re.compile(r"(?:^|[,;]\s*(?:and )?|\sand )[(\[]?([A-Z])[)\].:]+(?=\s)")
_STARTS = {*LETTERS, *LETTERS.lower(), "(", "["}


class Label(NamedTuple):
    letter: str
    text: str  # what follows the letter
    sure: bool  # the mark between them makes the letter a label, whatever the text


def read_label(tidied: str) -> Label | None:
    """The letter that labels a tidied text: B of "B. 12", and A of "A circle", though not surely; or None."""
    if tidied[:1] not in _STARTS:
        return None
    match = _LONE.fullmatch(tidied)
    if match:
        return Label(match[1], "", True)
    match = _LABELLED.fullmatch(tidied)
    if match is None:
        return None
    letter, text = match["framed"] or match["bare"], match["text"]
    inner, strong = _LONE.fullmatch(text), match["weak"] is None
    if inner and strong and inner[1] == letter:  # B: B
        return Label(letter, "", True)
    hedged = inner or _ANOTHER.search(text)
    return Label(letter, text, bool(_REASON.match(text) or (strong and not hedged)))


def read_letters(tidied: str) -> frozenset[str]:
    """The letters of a text that names several options; empty for any other text.

    >>> sorted(read_letters("A and C")), sorted(read_letters("(A) 12, (C) 14")), read_letters("A")
    (['A', 'C'], ['A', 'C'], frozenset())
    """
    joined = _SEVERAL.fullmatch(tidied)
    plain = tidied.removeprefix("both ").replace("and ", "").upper()
    for letters in (re.findall("[A-Z]", plain) if joined else [], _LABELS.findall(tidied)):
        if 1 < len(letters) == len(set(letters)):
            return frozenset(letters)
    return frozenset()


def named(text: str, choices: Sequence[str], strict: bool = True) -> frozenset[str] | None:
    """The letters of the options that a text names; None if it names none, empty if ambiguous.

    A text that two options share names both. Without choices every letter is an option. strict: a
    letter with the text of another option is ambiguous (nobody should earn a reward by naming two);
    otherwise the letter counts, as in the benchmarks' own scorers.

    >>> options = ["red", "blue", "A and B"]
    >>> [sorted(named(t, options) or "-") for t in ["(b)", "Red.", "A and B", "B: red", "A, C"]]
    [['B'], ['A'], ['C'], ['-'], ['A', 'C']]
    """
    tidied = tidy(text)
    letters = set(LETTERS[: len(choices)] or LETTERS)
    found = read_label(tidied)
    letter = frozenset(found.letter.upper()) if found else frozenset()
    if found and not found.text and found.letter in letters:  # B
        return letter
    equal = _equal(tidied, choices)
    if equal or (found and not found.text):  # cat
        return equal or _equal(found.letter, choices) or letter
    found = found if letter <= letters else None
    meant = found and (_by_text(found.text, choices) or _by_text(_FRAME.sub(r"\1", found.text), choices))
    if meant and letter <= meant:  # B. cat, where B is the cat
        return letter
    several = read_letters(tidied)
    if several and several <= letters:  # A and C
        return _by_text(text, choices) or several
    if found and found.sure:  # B. and another text: ambiguous if it is another option's
        return frozenset() if strict and meant else letter
    said = None if strict else _SAID.match(tidied)
    if said and (equal := _equal(said[1], choices)):  # No, it is not
        return equal
    after = _AFTER.fullmatch(tidied)
    if after and after[2] in letters and (meant := _by_text(after[1], choices)):  # cat (B)
        return frozenset(after[2]) if after[2] in meant or not strict else frozenset()
    return _by_text(text, choices)


def same_text(a: str, b: str) -> bool:
    """Is it one answer, without options to choose from?"""
    tidy_a, tidy_b = tidy(a), tidy(b)
    if tidy_a == tidy_b:
        return bool(tidy_a)
    if tidy_a[:1] in _STARTS or tidy_b[:1] in _STARTS:
        several = read_letters(tidy_a), read_letters(tidy_b)
        if several[0] and several[0] == several[1] and not (tidy_a.isalpha() and tidy_b.isalpha()):
            return True
        labels = [None if letters else read_label(x) for letters, x in zip(several, (tidy_a, tidy_b))]
        if all(label and label.sure for label in labels):
            (letter_a, text_a, _), (letter_b, text_b, _) = labels
            return letter_a == letter_b and (not text_a or not text_b or same_text(text_a, text_b))
        for label, other in zip(labels, (b, a)):
            if label and label.sure and label.text and label.letter.isupper():
                return same_text(label.text, other)
    return any(same(x, y) for x in readings(a) for y in readings(b))


def _equal(tidied: str, choices: Sequence[str]) -> frozenset[str]:
    """The options with this text, ignoring blanks and the case of words."""
    wanted = compact(tidied)
    return frozenset(x for x, choice in zip(LETTERS, choices) if compact(tidy(choice)) == wanted)


def _by_text(text: str, choices: Sequence[str]) -> frozenset[str] | None:
    """The options that a whole text equals, as text or else in value; None if there is none."""
    equal = _equal(tidy(text), choices)
    return equal or frozenset(x for x, y in zip(LETTERS, choices) if same_text(text, y)) or None


# ---------------------------------------------------------------- lists of options in a question

_LISTED = re.compile(r"^[ \t]*\(?([A-Za-z])[).:][ \t]*(.*?)[ \t]*$", re.MULTILINE)
_HEADER = re.compile(r"\b(?:choices|options)[ \t]*:", re.IGNORECASE)


def parse_choices(text: str) -> list[str] | None:
    """The options that a question lists from A on, or None.

    They follow "Choices:" or "Options:", a line each or all on one, or are the last lines.

    >>> parse_choices("Which?\\nChoices:\\n(A) 3 cm\\n(B) 4 cm"), parse_choices("Options: A. red B. green")
    (['3 cm', '4 cm'], ['red', 'green'])
    """
    headers = list(_HEADER.finditer(text))
    tail = text[headers[-1].end() :].strip() if headers else ""
    if "\n" not in tail:
        tail = re.sub(r"[ \t,;]+(?=\([A-Z]\)|[A-Z][).:][ \t])", "\n", tail)
    lines = text.rstrip().split("\n")
    start = len(lines)
    while start and _LISTED.match(lines[start - 1]) and lines[start - 1].strip("( \t")[0].isupper():
        start -= 1
    for listing in (tail, "\n".join(lines[start:])):
        options = _LISTED.findall(listing)
        letters = "".join(letter for letter, _ in options)
        if len(options) > 1 and letters in (LETTERS[: len(options)], LETTERS.lower()[: len(options)]):
            return [option for _, option in options]
    return None


def with_choices(text: str, choices: list[str]) -> str:
    """Options under a question, as ViRL39K lays them out.

    >>> with_choices("Which?", ["3 cm", "4 cm"])
    'Which?\\nChoices:\\n(A) 3 cm\\n(B) 4 cm'
    """
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, choices)]
    return "\n".join([text, "Choices:", *lines]) if choices else text
