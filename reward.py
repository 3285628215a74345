r"""Is this answer right? 1.0 if the last box of the response holds the answer, else 0.0.

DOCSTRING TO COME
"""

import re

from answers import readings, same
from tidy import tidy, words

MAX_LENGTH = 1000
# A brace, or a backslash with what it escapes: \\{ is a line break and a brace, \{ is no brace.
_BRACE = re.compile(r"[\\{}](?:(?<=\\)(?:\\?boxed\s*\{|.))?", re.DOTALL)
# NUL and other controls, zero-width and direction marks, lone surrogates: never in an answer.
_FOUL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff]"
)


def extract_answer(response: str) -> str | None:
    r"""The content of the last balanced \boxed{...}, stripped; None if there is none. Linear time.

    >>> extract_answer(r"First \boxed{3}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    if not isinstance(response, str):
        return None
    stack, last = [], None
    for match in _BRACE.finditer(response, max(response.find("\\boxed"), 0)):
        text = match[0]
        if text == "{" or len(text) > 2:
            stack.append(match.end() if len(text) > 2 else None)
        elif text == "}" and stack:
            start = stack.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
    return response[slice(*last)].strip() if last else None


def reward(response: str, answer: str, choices: list[str] | None = None) -> float:
    r"""1.0 if the response's last box is correct (see is_correct), else 0.0.

    >>> reward(r"So it is \boxed{0.5}.", r"\boxed{\frac12}")
    1.0
    """
    prediction = extract_answer(response)
    return float(prediction is not None and is_correct(prediction, answer, choices))


def is_correct(prediction: str, answer: str, choices: list[str] | None = None) -> bool:
    r"""Does the prediction mean the same as the answer? Never raises, whatever the texts.

    choices: the option texts in order from A; a letter and its text are then interchangeable.

    >>> is_correct("x = 5", "5"), is_correct("dog", "B", ["cat", "dog"])
    (True, True)
    """
    try:
        return _judge(prediction, answer, choices)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError):
        return False
    except RuntimeError:  # RecursionError, where the caller's own stack is nearly full
        return False


def _judge(prediction: str, answer: str, choices: list[str] | None) -> bool:
    prediction, answer = _content(prediction), _content(answer)
    if not prediction or not answer or _FOUL.search(prediction) or _FOUL.search(answer):
        return False
    if max(len(prediction), len(answer)) > MAX_LENGTH:
        return prediction == answer
    if choices and tidy(prediction) != tidy(answer):
        chosen, right = (_options(text, choices) for text in (prediction, answer))
        if chosen is not None and right is not None:
            return bool(chosen) and chosen == right
    return _same_text(prediction, answer)


def _content(text: str) -> str:
    r"""The text without blanks around it and without a \boxed{} around it."""
    if "\\boxed" in text:
        boxed = extract_answer(text)
        text = text if boxed is None else boxed
    return text.strip()


# -------------------------------------------------------------------- letters and options

_RIGHT = "(?:correct|right|best)"
_LETTER = re.compile(
    r"(?:the )?(?:(?:option|choice|answer|letter)\s+)?[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:)]?"
    rf"(?: is (?:the )?(?:{_RIGHT}|(?:{_RIGHT} )?(?:answer|option|choice)))?",
    re.IGNORECASE,
)
_LABELLED = re.compile(
    r"(?:(?:option|choice)\s+)?(?:\(([A-Za-z])\)|([A-Za-z])\s*(?:[.)]|:(?!\s*[A-Za-z]\b)))\s*"
    r"(?![\s,;&]|and\b|or\b|\([A-Z]\))(.+)",
    re.IGNORECASE,
)
_SEVERAL = re.compile(r"(?:both )?\(?[A-Z]\)?(?:(?:\s*[,;&]\s*(?:and )?|\s+and\s+|\s*)\(?[A-Z]\)?)+")


def _letter(text: str) -> tuple[str, str] | None:
    """('B', '') for B in its usual wrappings, ('B', '12') for 'B. 12'; None for anything else."""
    match = _LETTER.fullmatch(text)
    if match:
        return match[1], ""
    match = _LABELLED.fullmatch(text)
    if match and not _LETTER.fullmatch(match[3]):
        return match[1] or match[2], match[3]
    return None


def _letters(text: str) -> frozenset[str] | None:
    """{'A', 'C'} for 'A, C', 'A and C', 'AC', '(A)(C)'; None for anything else."""
    if not _SEVERAL.fullmatch(text):
        return None
    letters = re.findall("[A-Z]", text)
    return frozenset(letters) if len(set(letters)) == len(letters) else None


def _options(text: str, choices: list[str]) -> frozenset[int] | None:
    """Which options a text names, by letter or whole text; empty if unclear, None if none."""
    tidied = tidy(text)
    index = {chr(65 + k): k for k in range(min(len(choices), 26))}
    letter, rest = _letter(tidied) or ("", "")
    if letter in index and not rest:
        return frozenset({index[letter]})
    exact = [k for k, choice in enumerate(choices) if words(tidy(choice)) == words(tidied)]
    if exact:
        return _only(exact)
    if letter.upper() in index:
        named = frozenset({index[letter.upper()]})
        return named if not rest or _by_text(rest, choices) in (named, None) else frozenset()
    letters = _letters(tidied) or frozenset("?")
    if letters <= set(index) and _by_text(text, choices) is None:
        return frozenset(index[letter] for letter in letters)
    return _by_text(text, choices)


def _by_text(text: str, choices: list[str]) -> frozenset[int] | None:
    return _only([k for k, choice in enumerate(choices) if _same_text(text, choice)])


def _only(found: list[int]) -> frozenset[int] | None:
    return frozenset(found if len(found) == 1 else ()) if found else None


def _same_text(a: str, b: str) -> bool:
    """Is it one answer, without options to choose from?"""
    tidy_a, tidy_b = tidy(a), tidy(b)
    if tidy_a == tidy_b:
        return bool(tidy_a)
    letter_a, letter_b = _letter(tidy_a), _letter(tidy_b)
    if letter_a and letter_b:
        (letter_a, text_a), (letter_b, text_b) = letter_a, letter_b
        return letter_a == letter_b and (not text_a or not text_b or _same_text(text_a, text_b))
    for letter, other in ((letter_a, tidy_b), (letter_b, tidy_a)):
        if letter and letter[1] and letter[0].isupper():
            return _same_text(letter[1], other)
    letters = _letters(tidy_a)
    if letters and letters == _letters(tidy_b) and not (tidy_a.isalpha() and tidy_b.isalpha()):
        return True
    return any(same(x, y) for x in readings(a) for y in readings(b))
