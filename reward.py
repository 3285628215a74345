r"""Is this answer right? 1.0 if the last box of a response means the same as the answer, else 0.0.

The idea: the reward is the only teacher, so a right answer in an unusual form must not be graded wrong, a
near miss must not be graded right, and no text may execute code, hang or raise. Cheap comparisons come first:
strings, options (grading/choices.py), structures (structure.py), values (value.py). Nothing is evaluated by
Python, sympy or a LaTeX parser; caps on length, depth and size bound the time, so this is safe in threads and
workers.

    answer    := [\boxed{] ["The answer is"] (option | structure) [}] [.]
    structure := list | tuple | matrix | relation | ratio | time | date | value | words
    value     := [currency] expression [million] [unit]

The policy as cases: prediction | answer | verdict. A test runs this table.

    0.50                      | \frac{1}{2}              | True    a value, in any form
    2(x+1)                    | 2x+2                     | True    algebra, where both are defined
    0.333                     | \frac{1}{3}              | False   exact: no rounding
    1\,234                    | 1,234                    | True    separators: groups of three
    12,34                     | 1234                     | False
    50\%                      | 0.5                      | True
    50\%                      | 50                       | True    a percent sign is a unit, too
    5 cm                      | 5                        | True    a unit on one side only
    5 cm                      | 5 m                      | False   on both sides it must agree
    5 cm^2                    | 25                       | False   units are not arithmetic
    \$1,200                   | 1200 dollars             | True
    x = 5                     | 5                        | True    a name for the value
    2x = 10                   | 10                       | False
    2x + 2y = 6               | x + y = 3                | True    equations, up to a factor
    x > 5                     | 5 < x                    | True
    x > 5                     | x \ge 5                  | False
    (1, 2)                    | (2, 1)                   | False   round brackets: in order
    [0, 1)                    | [0, 1]                   | False   the ends matter
    \{1, 2\}                  | \{2, 1\}                 | True    sets and bare lists: in any order
    1, 2                      | 2 and 1                  | True
    1, 1, 2                   | 1, 2                     | False   with equal counts
    \pm 3                     | 3, -3                    | True
    3:4                       | 3 to 4                   | True    never divided: ratios, times
    2020-03-05                | March 5, 2020            | True
    The cat.                  | cat                      | True    words: case, article, period
    act                       | cat                      | False   words are not algebra
    The answer is (B)         | B                        | True    letters in their usual wrappings
    B. 12                     | \text{B}                 | True
    Area                      | A                        | False   a letter is never part of a word
    not B                     | B                        | False
    A or C                    | A                        | False   unclear is wrong

Source: the paper (arXiv 2504.08837, training setup) uses a rule-based binary reward. What we do differently:
the released code calls a LaTeX-to-sympy library and adds a bonus for the word "wait" that the paper does not
mention; we use neither, and the reward has no other term.
"""

import re

from grading.choices import named, same_text
from grading.spelling import tidy

MAX_LENGTH = 1000
# A brace, or a backslash with what it escapes: \\{ is a line break and a brace, \{ is neither.
_BRACE = re.compile(r"[\\{}](?:(?<=\\)(?:\\?boxed\s*\{|.))?", re.DOTALL)
# Control characters, zero-width and direction marks and lone surrogates belong in no answer.
_FOUL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff]"
)


def extract_answer(response: str) -> str | None:
    r"""The content of the last balanced \boxed{...}, stripped; None if there is none. Linear time.

    >>> extract_answer(r"First \boxed{3}, no: \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    if not isinstance(response, str) or "\\boxed" not in response:
        return None
    stack, last = [], None
    for match in _BRACE.finditer(response, response.find("\\boxed")):
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
    r"""Does the prediction mean the same as the answer? Never raises.

    choices: the option texts in order from A; a letter and its text are then interchangeable.

    >>> is_correct("x = 5", "5"), is_correct("dog", "B", ["cat", "dog"])
    (True, True)
    """
    try:
        return _judge(prediction, answer, choices)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError, RecursionError):
        return False  # RecursionError: the caller's own stack is nearly full


def _judge(prediction: str, answer: str, choices: list[str] | None) -> bool:
    prediction, answer = _content(prediction), _content(answer)
    if max(len(prediction), len(answer)) > MAX_LENGTH and prediction != answer:
        return False
    if not prediction or not answer or _FOUL.search(prediction) or _FOUL.search(answer):
        return False
    if prediction == answer:
        return True
    if choices and tidy(prediction) != tidy(answer):  # as options: "B", "B. cat" or "cat"
        chosen, right = (named(text, choices) for text in (prediction, answer))
        if chosen is not None and right is not None:
            both = chosen & right
            # Two options may share one text: then the text is right, alone or after either letter.
            alike = both in (chosen, right) and same_text(prediction, answer)
            return bool(both) and (chosen == right or alike)
    return same_text(prediction, answer)


def _content(text: str) -> str:
    r"""The text without surrounding blanks and without a \boxed{} around it."""
    if "\\boxed" in text:
        boxed = extract_answer(text)
        text = text if boxed is None else boxed
    return text.strip()
