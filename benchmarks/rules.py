"""Is this text that answer? What the rules of the seven benchmarks have in common.

A benchmark's accuracy is decided as much by finding the answer in a response as by the response:
the same outputs of one 7B model score 37 or 60 on MathVista under two extractors. So extraction
here is short and the same everywhere (`extract`), and what is found is compared by small rules
that readers.py puts together: a choice (`choose`), a number within a tolerance (`value`), or
an expression (reward.is_correct).

What we do differently from the official scorers: nothing is guessed. MMMU's draws a random letter
when it finds none and MathVista's takes the choice at the smallest edit distance; here no answer is
no answer, wrong and counted. No text is ever executed (MathVision's and MEGA's scorers eval() what
the model wrote): numbers go through a parser of 60 lines.
"""

import ast
import re
from fractions import Fraction

import mpmath

from grading.structure import tidy
from grading.expression import Unreadable
from grading.value import Point, evaluate, symbols
from grading.units import measure
from reward import extract_answer, is_correct

# ---------------------------------------------------------------------------- finding the answer

# "Answer: B", "**Answer**: B", "the answer is B"; but not "the answer isn't B".
ANSWER = re.compile(r"\banswer\**\s*(?:[:：]|\bis\b)[*: ]*(.*)", re.IGNORECASE)


def extract(response: str) -> str | None:
    r"""The final answer: last balanced box, else last <answer>, else after 'Answer:', else None.

    >>> extract("So \\boxed{3}. Wait: \\boxed{\\frac{1}{2}}, I mean \\boxed{\\frac{1}{")
    '\\frac{1}{2}'
    >>> extract("<think>The answer is A.</think> Hence **Answer: (B)**")
    '(B)'
    """
    final = response.rpartition("</think>")[2]
    boxed = extract_answer(final)
    if boxed and boxed.strip():
        return boxed.strip()
    end = final.rfind("</answer>")
    start = final.rfind("<answer>", 0, max(end, 0))
    if start >= 0 and final[start + 8 : end].strip():
        return final[start + 8 : end].strip()
    found = ANSWER.findall(final)
    # A leading full stop stays: ".5" is a number.
    return found[-1].strip(" \t\r*$").rstrip(" .*$") or None if found else None


# ---------------------------------------------------------------------------- plain text

WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|mathsf|rm|bf|mbox)\s*\{([^{}]*)\}")


def bare(text: str) -> str:
    r"""Text without what only dresses it: dollars, \text{..}, bold, spacing, an end stop.

    >>> bare("**\\text{ (B) }**."), bare("\\(12~\\mathrm{cm}\\)")
    ('(B)', '12 cm')
    """
    text = text.replace("\\$", "").replace("**", " ")
    text = re.sub(r"\\[()\[\],;:! ]|\\(?:left|right|displaystyle|quad)\b|[$~\s]", " ", text)
    for _ in range(3):  # \mathbf{\text{B}}
        text = WRAPPER.sub(r"\1", text)
    return re.sub(r" +", " ", text).strip(" *").removesuffix(".").strip(" *")


def normal(text: str) -> str:
    r"""For comparing option texts: no case, no spaces, no dollars, no degree sign.

    >>> normal("$40^\\circ$ North.") == normal("40° north")
    True
    """
    text = re.sub(r"\^?\{?\\(?:circ|degree)\}?|[°º掳]", "", bare(text))
    return re.sub(r"\s", "", text).replace("dfrac", "frac").replace("tfrac", "frac").lower()


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


# ---------------------------------------------------------------------------- choices

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONE = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer)(?: is)?:? )?[(\[{]?([A-Z])[)\]}]?[.:,]?",
    re.IGNORECASE,
)
LEADING = re.compile(r"[(\[]?([A-Z])([)\].:,;]|\s?[-–—]\s|\s(?=\S))[)\].:]*\s*(.*)", re.DOTALL)
ANOTHER = re.compile(
    r"(?:(?:and|or)\b|[&/,;\s])*[(\[]?[A-Z][)\]]?(?:$|[.,;&/]|\s(?:and|or|because|since)\b)"
)
REASON = re.compile(r"(?:because|since|as|is|which|for|due|given|so)\b")


def letters(text: str) -> str:
    """All of a text that is nothing but option letters, sorted; else "".

    >>> letters("(C)"), letters("C and A"), letters("A\\nC"), letters("A cat")
    ('C', 'AC', 'AC', '')
    """
    parts = re.sub(r"\b(?:and|or)\b|[&,;/()\[\].]", " ", bare(text)).split()
    return (
        "".join(sorted(parts)) if all(part in LETTERS and len(part) == 1 for part in parts) else ""
    )


def choose(text: str, choices: list[str]) -> str | None:
    """The letter of the option that a text means, or None.

    A letter first, in any usual wrapping; then a text equal to exactly one option. Two options with
    the same text cannot be told apart by text, and several letters are no choice.

    >>> options = ["red", "blue", "A and B", "blue"]
    >>> [choose(t, options) for t in ["(B)", "b", "Red.", "A and B", "D: blue", "blue", "A, D"]]
    ['B', 'B', 'A', 'C', 'D', None, None]
    """
    text = bare(text)
    same = [LETTERS[i] for i, option in enumerate(choices) if option == text]
    lone = LONE.fullmatch(text)
    # Options may be variables called a, b, c: then a small letter is a text.
    if lone and not (len(same) == 1 and text.islower()):
        return lone[1].upper()
    wanted = normal(text)
    same = [LETTERS[i] for i, option in enumerate(choices) if wanted and normal(option) == wanted]
    if same:
        return same[0] if len(same) == 1 else None
    leading = LEADING.match(text)
    if leading:
        letter, mark, rest = leading.groups()
        own = choices[LETTERS.index(letter)] if LETTERS.index(letter) < len(choices) else ""
        if normal(rest) == normal(own):
            return letter
        # "A circle" begins with an article: without a stop, a reason must follow the letter.
        if not ANOTHER.match(rest) and (mark.strip() or REASON.match(rest)):
            return letter
    same = [LETTERS[i] for i, option in enumerate(choices) if option and is_correct(text, option)]
    return same[0] if len(same) == 1 else None


# ---------------------------------------------------------------------------- quantities

# Constants only: no symbol has a value.
NOWHERE = Point((), 0, counts=False, real=True, mp=mpmath.ctx_mp.MPContext())
LABEL = re.compile(r"[A-Za-z\\∠△⊙ (){}.'′]+(?:_\{?[\w\\ ]+\}?)?[ ()a-z]*[0-9]?")


def right_side(text: str) -> str:
    r"""The right-hand side of `label = value`. An equation is no label.

    >>> right_side("Area $= 25\\pi \\mathrm{cm}^2$"), right_side("x^2 + y^2 = 25")
    ('25\\pi cm^2', 'x^2 + y^2 = 25')
    """
    text = bare(text)
    if len(text) > 300:  # no answer, and the pattern's cost grows with the square
        return text
    parts = re.split(r"=|≈|\\approx|\\simeq", text)
    several = re.search(r"[,;]|\bor\b|\band\b", text)
    labelled = len(parts) > 1 and LABEL.fullmatch(parts[0].strip() or "x")
    return parts[-1].strip() if labelled and not several else text


def value(text: str, percent=1):
    r"""The number that a text is, exact (a Fraction) where it can be, or None; units are dropped.

    Separators in groups of three, ASCII digits, no number words. `percent` is what "%" is worth.

    >>> [str(value(t)) for t in ["x = \\frac{36}{13}", "1,234", "$5", "50\\%", "3 years old"]]
    ['36/13', '1234', '5', '50', '3']
    >>> value("1,2"), value("three"), value("5 or 6")
    (None, None, None)
    """
    text = right_side(text)
    if len(text) > 200:
        return None
    try:
        tree, unit = measure(tidy(text.removesuffix(" old")))
        if symbols(tree):
            return None
        number = evaluate(tree, NOWHERE)
        if number is None:
            return None
    except (Unreadable, ArithmeticError):
        return None
    if not isinstance(number, Fraction):
        number = Fraction(str(number))  # so that numbers compare and round exactly
    return number * percent if unit == (("%", 1),) else number


def same_quantity(prediction: str, gold: str) -> bool:
    r"""Equal as they stand, or once labels and degree signs are off; units must not disagree.

    >>> same_quantity("50", "\\angle AOB = 50^\\circ"), same_quantity("5 m", "5 cm")
    (True, False)
    """
    # A character of GBK that stands for a degree sign in many of MathVerse's golds.
    prediction, gold = (bare(text.replace("掳", "°")) for text in (prediction, gold))
    if normal(prediction) == normal(gold) or is_correct(prediction, gold):
        return True
    return is_correct(right_side(prediction), right_side(gold))
