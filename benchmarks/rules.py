r"""Finding an answer in a response, and reading it as a number or a printed value.

A benchmark's accuracy is decided as much by finding the answer in a response as by the response:
the same outputs of one 7B model score 37 or 60 on MathVista under two extractors. So `extract` is
the same everywhere; what it finds is compared by the rules that readers.py puts together from
grading/choices.py (an option), `value` (a number within a tolerance) and reward.is_correct.

    answer := last \boxed{} | last <answer> | after the last "answer is" | one short line
    after  := on that line or the next, in bold, quotes, display mathematics or a fence

What we do differently from the official scorers: nothing is guessed. MMMU's draws a random letter
when it finds none and MathVista's takes the choice at the smallest edit distance; here no answer is
no answer, wrong and counted. No text is ever executed (MathVision's and MEGA's scorers eval() what
the model wrote).
"""

import ast
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from grading.choices import named
from grading.spelling import tidy, ungrouped
from grading.structure import readings, same, value_of
from grading.value import constant
from reward import MAX_LENGTH, extract_answer, is_correct

_BEST = "(?:correct|right|best|final|closest|nearest|(?:most )?appropriate|available)"
# "Answer: B", "**Answer**: B", "the correct option letter is B"; but not "the answer isn't B".
ANSWER = re.compile(
    rf"(?:^[#*_ ]*(?:final )?answer[*_ ]*\n"
    rf"|(?:\b|(?=答))(?:answer|答案|(?:{_BEST}\s+)+(?:option|choice|letter))"
    r"(?:\s+(?:option|choice|letter))*(?:\s+to\s(?:\"[^\"\n]*\"|[^.:\n\"]){1,40}?)?[*_\"']*\s*"
    r"(?:[:：=是为]|\b(?:is|are|would be|should be|must be|will be)\b"
    r"|(?=\(?[A-Z]\)?\s+is\s+(?:the\s+)?(?:correct|right|best))))"
    r"(?:\s*(?:therefore|thus|then|most|likely|probably|definitely|clearly|indeed|still"
    r"|approximately|about|roughly|given by|(?:option|choice|letter)(?=\W+[A-Z]\b))\b)*"
    r"[\s:：*_#>]*(?:[-•]\s+[*_]*)?",
    re.IGNORECASE | re.MULTILINE,
)
FENCE = re.compile(r"```\w*[ \t]*\n?(.*?)\s*```", re.DOTALL)
# Frames that may hold the answer instead of a line.
_FRAMES = [
    re.compile(pattern, re.DOTALL)
    for pattern in (FENCE.pattern, r"\\\[(.+?)\\\]", r"\$\$(.+?)\$\$", r"[\"'“]([^\n]{1,80}?)[.,]?[\"'”]")
]
# The end of a sentence that another follows: "60. Therefore", and not "D. South"; or a reason.
_SENTENCE = re.compile(
    r"(?:(?<=[^\s.(][^\s.(])|(?<=[)\]}$*%°]))[.!?]\s+(?=[A-Z(\\\"*])"
    r"|(?<=[0-9)\]}$*%°]),?\s+(?=(?:because|since|as|with|which|where|when)\b)"
    r"|,\s+(?=(?:because|since|as|which|not)\b)"
)
_SPECIAL = re.compile(r"(?:</s>|<\|[a-z_]+\|>)\s*$")  # tokens that some decoders leave
_PROSE = re.compile(
    r"\b(?:i|we|you|they|it|there|this|that|is|are|am|was|were|has|have|had|do|does|did|can|cannot"
    r"|could|will|would|should|seems?|appears?|shows?|sorry|please)\b|n't\b|'m\b",
    re.IGNORECASE,
)


def extract(response: str, choices: Sequence[str] = ()) -> str | None:
    r"""The final answer of a response, or None.

    >>> extract("<think>The answer is A.</think> Hence **Answer: (B)**"), extract("14 cm")
    ('(B)', '14 cm')
    """
    final = _SPECIAL.sub("", response.rpartition("</think>")[2].strip()).strip()
    boxed = extract_answer(final)
    if boxed:
        return boxed
    end = final.rfind("</answer>")
    start = final.rfind("<answer>", 0, max(end, 0))
    if start >= 0 and final[start + 8 : end].strip():
        return final[start + 8 : end].strip()
    for phrase in reversed(list(ANSWER.finditer(final))):
        found = _after(final[phrase.end() : phrase.end() + 2000])
        if re.search(r"\w", found):
            return found
    return _whole(final, choices)


def _after(text: str) -> str:
    """The answer at the start of a text that follows "answer is"."""
    framed = [match[1] for pattern in _FRAMES if (match := pattern.match(text))]
    found = framed[0] if framed else _SENTENCE.split(text.partition("\n")[0])[0]
    found = found.strip().removeprefix("\\boxed{").rstrip(" .*$\"'`")
    for closing, opening in (("\\]", "\\["), ("\\)", "\\("), ("}", "{")):
        while found.endswith(closing) and found.count(closing) > found.count(opening):
            found = found.removesuffix(closing).rstrip(" .*$")
    return found.strip(' $*`"')  # a leading full stop stays: ".5" is a number


def _whole(response: str, choices: Sequence[str]) -> str | None:
    """A response of one short line that is not prose, or of one line that names an option."""
    if not response or "\n" in response or "\\boxed" in response or len(response) > 500:
        return None
    if choices and named(response, choices, strict=False):
        return response
    sentence = response.endswith(".") and response.count(" ") > 3
    prose = sentence or (" " in response and _PROSE.search(response))
    return None if prose or len(response) > 80 else response


def literal(value):
    """A printed Python value, read; never executed. Raises ValueError where it is none.

    >>> literal("['block P', None]"), literal(["already a list"])
    (['block P', None], ['already a list'])
    """
    if not isinstance(value, str):
        return value
    if len(value) > 100_000:
        raise ValueError("too long for a printed list")
    try:
        return ast.literal_eval(value.strip())
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a printed value: {value[:60]!r}") from error


def value(text: str, percent=1):
    r"""The number that a text is, exact (a Fraction) where it can be, or None; units are dropped.

    Separators in groups of three, ASCII digits, no number words. `percent` is what "%" is worth.

    >>> [str(value(t)) for t in ["x = \\frac{36}{13}", "1,234", "$5", "50\\%", "3 years old"]]
    ['36/13', '1234', '5', '50', '3']
    """
    found = readings(text)[0] if len(text) <= 200 else None
    if found and found[0] == "relation":
        found = value_of(found)
    number = constant(found[1]) if found and found[0] == "value" else None
    if number is None:
        return None
    if not isinstance(number, Fraction):
        number = Fraction(str(number))  # so that numbers compare and round exactly
    return number * percent if found[2] == (("%", 1),) else number


def same_quantity(prediction: str, gold: str) -> bool:
    r"""is_correct, or equal right-hand sides where both are `label = value`, whatever the labels.

    >>> same_quantity("A = 25\\pi", "Area $= 25\\pi$ cm$^2$"), same_quantity("5 m", "x = 5 cm")
    (True, False)
    """
    if is_correct(prediction, gold):
        return True
    sides = [readings(text[:MAX_LENGTH])[0] for text in (prediction, gold)]
    a, b = (side[0] == "relation" and value_of(side) or side for side in sides)
    return a[0] == b[0] == "value" and same(a, b)


def pick(gold: str, choices: list[str]) -> Callable[[str], bool]:
    """The rule of a multiple-choice question whose gold answer is a letter, in any wrapping."""
    right = named(gold, choices, strict=False)
    if not right or len(right) > 1:
        raise ValueError(f"the answer {gold!r} is not the letter of an option")
    return lambda text: named(text, choices, strict=False) == right


def close(text: str, gold: str, decimals: int) -> bool:
    r"""Equal after rounding both numbers, if one is a decimal; exact forms are never rounded.

    >>> close("\\frac{36}{13}", "2.77", 2), close("1/55", "1/60", 2)
    (True, False)
    """
    if not re.search(r"\.[0-9]", text + " " + gold):
        return False
    ours, theirs = value(text), value(gold)
    return None not in (ours, theirs) and round(ours, decimals) == round(theirs, decimals)


def equal_lists(text: str, gold: str) -> bool:
    """Printed lists with equal elements in order."""
    try:
        ours, theirs = literal(ungrouped(text)), literal(gold)
    except ValueError:
        return False
    return isinstance(ours, (list, tuple)) and list(ours) == list(theirs)


def quotient(text: str) -> str:
    """A ratio of two as their quotient; any other text as it is.

    >>> quotient("$3: 4$"), quotient("3/4")
    ('(3)/(4)', '3/4')
    """
    parts = tidy(text).split(":")
    return f"({parts[0].strip()})/({parts[1].strip()})" if len(parts) == 2 else text
