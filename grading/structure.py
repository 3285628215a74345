r"""What kind of answer is this text, and are two answers the same? (All but multiple choice.)

The idea: tidy() brings a text to one spelling; read() finds its outermost structure and returns a tuple that
begins with its kind; same() compares two of them kind by kind. A text with no structure that is not
mathematics is words, and words equal only words.

    kind       looks like                       compared as
    value      5, \frac12, 2x+1, 5 cm, 50%      value and unit (value.py, units.py)
    list       1, 2   x=1 or x=2   \{1,2\}   (-1,0) \cup (1,2)   \pm 3       in any order
    tuple      (1,2)   [0,1)   \langle 1,2 \rangle                  in order, with its brackets
    matrix     \begin{pmatrix} ... \end{pmatrix}   [[1,2],[3,4]]        entry by entry
    relation   x = 5   2x + y = 3   1 < x \le 4     up to a factor; name = value is a value
    ratio      3:4   3 to 4                         in order, never divided
    clock      3:45 pm                              date   March 5, 2020   2020-03-05
    words      isosceles                            case, quotes, one article, final period
"""

import math
import re
from fractions import Fraction
from functools import lru_cache

from grading.expression import Unreadable, node, number
from grading.spelling import MAX_LIST, cut, enclosed, outside_brackets, tidy, ungrouped, words
from grading.units import clock, date, quantity, same_clock
from grading.value import constant, proportional, same_value, symbols

MAX_NESTING = 8

_DIGIT, _NUMBER = re.compile("[0-9]"), re.compile(r"-?[0-9]{1,30}(?:\.[0-9]{1,28})?")
_SIGNS = {"<=": "≤", ">=": "≥", "!=": "≠", "\\in": "="}
_PAIRS = {("(", ")"), ("(", "]"), ("[", ")"), ("[", "]"), ("\\langle", "\\rangle"), ("\\{", "\\}")}
_ENVIRONMENT = re.compile(
    r"\\begin\{([bpvBV]?matrix|array|cases|aligned|gathered)\}(?:\{[lcr| ]*\})?"
    r"((?:(?!\\begin|\\end).)*)\\end\{\1\}"
)
_NEW_ROW = re.compile(r"\\\\(?:\[[^\]]*\])?")
_COMPOUND_PART = re.compile(r"[0-9.]+ ?[A-Za-z]+")
_COMPOUND = re.compile(r"[0-9.]+ ?[A-Za-z]+(?: ?[0-9.]+ ?[A-Za-z]+){1,2}")
_POINT = re.compile(r"([A-Z]'?) ?(\(.+,.+\))")
_CHAIN = re.compile(r"[A-Z][a-z]?(?:-[A-Z][a-z]?)+")  # H-O-H, and not a difference
_BUILDER = re.compile(r"[a-z] ?(?:\\in ?\\mathbb ?\{R\} ?)?(?:\\mid|\||:)(.+)")
_NAME = (
    r"(?:[A-Za-z]+|\\(?!frac|sqrt)[A-Za-z]+(?:\{[A-Za-z ]*\})?)(?: ?_ ?(?:\{[^{}]*\}|[0-9A-Za-z])|[0-9])?'*"
    r"(?:\^(?:\{-1\}|\*|\{\*\}))?"
)
_THING = rf"(?:{_NAME}|\| ?{_NAME} ?\|)"
# What may stand before "=" without being part of the answer: x, f(x), Area of ABC, angle 1,
# |AB|, dy/dx, a:b, \frac{AB}{BC}, (x_1, y). Not 2x, x + y or x^2: those are equations.
_LABEL = re.compile(
    rf"{_THING}(?:(?: | ?(?=\\))[0-9]?{_NAME}){{0,7}}(?: [0-9])? ?"
    r"(?:[(\[](?:[^()\[\]]|\([^()]*\)){1,20}[)\]])?"
    rf"|{_THING}(?: ?[:/*] ?{_THING}){{1,2}}|\({_NAME}(?: ?, ?{_NAME}){{1,3}}\)"
    rf"|\\frac ?\{{ ?{_THING}(?: {_NAME})? ?\}} ?\{{ ?{_THING}(?: {_NAME})? ?\}}"
)


@lru_cache(maxsize=4096)
def readings(text: str) -> tuple[tuple, ...]:
    """All readings of a raw text: two if 1,234 in brackets may be one number or two, else one."""
    plain, raw = tidy(text), ungrouped(text)
    if plain != raw and re.search(r"[(\[{].*[0-9],[0-9]", raw):
        return read(plain), read(raw)
    return (read(plain),)


def read(text: str, nesting: int = 0) -> tuple:
    """The structure of a tidied text: a tuple that begins with its kind (see the table above)."""
    text = text.strip()
    if nesting > MAX_NESTING:
        raise Unreadable("too deep")
    if _NUMBER.fullmatch(text):
        return ("value", number(text), ())
    if len(text) == 1 and text.isalpha() and text.isascii():
        return ("value", text, ())
    if _CHAIN.fullmatch(text):
        return ("words", words(text))
    moment = clock(text) or date(text) if _DIGIT.search(text) else None
    if moment:
        return moment
    try:
        return _structure(text, nesting + 1) or ("value", *quantity(text))
    except (Unreadable, ArithmeticError):
        return ("words", words(text))


def _structure(text: str, below: int) -> tuple | None:
    """Anything that is more than one expression; None for a single one."""
    bracketed = enclosed(text)
    if bracketed and r"\pm" not in text:
        return _bracketed(*bracketed, below)
    separators = outside_brackets(text)
    kinds = {match.lastgroup for match in separators}
    if "comma" in kinds and all(pieces := cut(text, separators, "comma")):
        joiners = {match[0].strip(", ") or "," for match in separators if match.lastgroup == "comma"}
        pieces[0] = re.sub(r"^[Bb]oth ", "", pieces[0]) if "and" in joiners else pieces[0]
        joiner = next((j for j in ("or", "and") if j in joiners), ",")
        return _list([read(piece, below) for piece in pieces], joiner)
    if "relation" in kinds and r"\pm" not in text and all(pieces := cut(text, separators, "relation")):
        signs = (match[0] for match in separators if match.lastgroup == "relation")
        return _relation(tuple(_SIGNS.get(sign, sign) for sign in signs), pieces, below)
    if "union" in kinds:
        return _list([read(piece, below) for piece in cut(text, separators, "union")], ",")
    if r"\pm" in text:
        return _list([read(t, below) for t in _both_signs(text)], ",")
    if len({match[0].strip() for match in separators}) == 1:
        return ("ratio", tuple(("value", *quantity(piece)) for piece in cut(text, separators, "ratio")))
    return _environment(text, below) or _named_or_compound(text, below)


def _environment(text: str, nesting: int) -> tuple | None:
    if not (text.startswith("\\begin") and (match := _ENVIRONMENT.fullmatch(text))):
        return None
    rows = [row.strip(" ,") for row in _NEW_ROW.split(match[2]) if row.strip()]
    if match[1] in ("cases", "aligned", "gathered"):  # a system, one equation per row
        return _list([read(row.replace("&", " "), nesting) for row in rows], ",")
    cells = tuple(tuple(read(cell, nesting) for cell in row.split("&")) for row in rows)
    return ("matrix", match[1].lower() == "vmatrix", cells)


def _named_or_compound(text: str, nesting: int) -> tuple | None:
    """A(1,2) is a point with its name; 2 hours 30 minutes is a list of two quantities."""
    point = _POINT.fullmatch(text) if text[-1:] == ")" else None
    if point:
        return _relation(("=",), [point[1], point[2]], nesting)
    if not (text[-1:].isalpha() and _COMPOUND.fullmatch(text)):
        return None
    parts = [("value", *quantity(part)) for part in _COMPOUND_PART.findall(text)]
    return _list(parts, ",") if all(part[2] for part in parts) else None


def _list(items: list[tuple], joiner: str) -> tuple:
    flat = []
    for item in items:
        flat += item[1] if item[0] == "list" else [item]
    if len(flat) > MAX_LIST:
        raise Unreadable("too long")
    return ("list", tuple(flat), joiner)


def _bracketed(opening: str, inside: str, closing: str, nesting: int) -> tuple | None:
    if not inside:
        return None
    pieces = cut(inside, outside_brackets(inside), "comma")
    if opening == "{" or (opening + closing == "()" and len(pieces) == 1):
        return read(inside, nesting)
    if (opening, closing) not in _PAIRS:
        raise Unreadable("no such brackets")
    built = _BUILDER.fullmatch(inside) if opening == "\\{" else None
    if built or (opening == "[" and _ENVIRONMENT.fullmatch(inside)):
        return read(built[1] if built else inside, nesting)
    if not all(pieces):
        raise Unreadable("an empty place")
    items = [read(piece, nesting) for piece in pieces]
    if opening == "\\{":
        return _list(items, ",")
    if opening == "[" and len(items) > 1 and all(i[:3:2] == ("tuple", "]") for i in items):
        return ("matrix", False, tuple(item[3] for item in items))
    return ("tuple", opening, closing, tuple(items))


def _both_signs(text: str) -> list[str]:
    r"""a \pm b -> a + b and a - b; \mp goes against the first \pm; two \pm are independent."""
    parts = re.split(r"\\pm(?![A-Za-z])", text)
    if len(parts) > 3:
        raise Unreadable("too many signs")
    texts = [parts[0]]
    for part in parts[1:]:
        texts = [text + sign + part for text in texts for sign in "+-"]
    return [t.replace(r"\mp", "-" if t[len(parts[0])] == "+" else "+") for t in texts]


def _relation(signs: tuple, pieces: list[str], nesting: int) -> tuple:
    sides = tuple(read(piece, nesting) for piece in pieces)
    if "≈" in signs:
        k = signs.index("≈")
        exact, rounded = sides[k : k + 2]
        # x = \sqrt{3} ≈ 1.73 is x = \sqrt{3}; but 5 ≈ 6 would name two answers.
        numbers = [constant(side[1]) for side in (exact, rounded) if side[0] == "value"]
        if len(numbers) == 2 and None not in numbers and math.isclose(*numbers, rel_tol=0.02):
            return sides[0] if k == 0 else _relation(signs[:k], pieces[: k + 1], nesting)
        signs = tuple("=" if sign == "≈" else sign for sign in signs)
    labels = tuple(words(p) if _LABEL.fullmatch(p) else "" for p in (pieces[0], pieces[-1]))
    return ("relation", signs, sides, labels)


def same(a: tuple, b: tuple) -> bool:
    """Are two structures one answer? Symmetric; different kinds agree only as listed here."""
    if a[0] == b[0]:
        return _SAME[a[0]](a, b)
    a, b = sorted((a, b), key=lambda side: list(_SAME).index(side[0]))
    if a[0] == "relation":
        if b[0] == "list" and _is_inequality(a):
            return b[2] != "or" and all(map(_is_inequality, b[1])) and _same_conditions((a,), b[1])
        if b[0] == "list" and (unpacked := _unpacked(a)):
            return same(unpacked, b)
        value = value_of(a)
        return value is not None and same(value, b)
    if a[0] == "list":  # \{5\} is 5; x = 1, y = 2 is (1, 2)
        solution = _solution(a[1]) if b[0] == "tuple" else None
        if solution:
            return b[1:3] == ("(", ")") and _same_row(solution, b[3])
        return len(a[1]) == 1 and same(a[1][0], b)
    if (a[0], b[0]) == ("clock", "ratio"):
        numbers = [int(value[1]) for value in b[1] if value[1].denominator == 1]
        bare = ("clock", *numbers, *[0] * (3 - len(numbers)), "")
        return len(numbers) == len(b[1]) <= 3 and same_clock(a, bare)
    return False


def _same_measure(a: tuple, b: tuple) -> bool:
    (_, x, unit_x), (_, y, unit_y) = a, b
    if unit_x and unit_y and unit_x != unit_y:
        return False
    shares = (node("/", tree, Fraction(100)) if unit else tree for _, tree, unit in (a, b))
    return same_value(x, y) or (unit_x + unit_y == (("%", 1),) and same_value(*shares))


def _same_list(a: tuple, b: tuple) -> bool:
    """Equal counts, any order. 5 or -5 is 5 and -5 (solutions); A or C is not A, C."""
    joiners = {a[2], b[2]}
    if "or" in joiners and len(joiners) > 1:
        loose = ("tuple", "relation") if "," in joiners else ()
        if not all(_is_solution(item) or item[0] in loose for item in a[1]):
            return False
    left, right = _solution(a[1]), _solution(b[1])
    if (left is None) != (right is None):
        named, bare = (a[1], b[1]) if left else (b[1], a[1])
        written = tuple(relation[2][1] for relation in named)
        return _same_row(left or right, bare) or _same_row(written, bare)
    return _same_bag(a[1], b[1], same)


def _solution(items: tuple) -> tuple | None:
    """The values of x = 1, y = 2 in the order of their letters; None if items are not like that.

    One letter twice (x = 1, x = 2) or an index (x_1 = 1, x_2 = 2) names roots, in no order.
    """
    values = {i[3][0]: i[2][1] for i in items if i[0] == "relation" and i[1] == ("=",)}
    if len(values) < max(len(items), 2) or not all(len(name) == 1 for name in values):
        return None
    return tuple(values[name] for name in sorted(values))


def _unpacked(relation: tuple) -> tuple | None:
    """(x, y) = (1, 2) -> x = 1, y = 2."""
    names, values = relation[2][0], relation[2][-1]
    if relation[1] != ("=",) or names[0] != "tuple" or values[0] != "tuple" or not relation[3][0]:
        return None
    pairs = zip(names[3], values[3], strict=True)
    return ("list", tuple(("relation", ("=",), (x, y), (str(x[1]), "")) for x, y in pairs), ",")


def _same_bag(a: tuple, b: tuple, equal) -> bool:
    if len(a) != len(b):
        return False
    left = list(b)
    for item in a:
        found = next((k for k, other in enumerate(left) if equal(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _same_row(a: tuple, b: tuple, equal=same) -> bool:
    return len(a) == len(b) and all(map(equal, a, b))


def _is_solution(item: tuple) -> bool:
    if item[0] == "tuple":
        return all(map(_is_solution, item[3]))
    equation = item[0] == "relation" and set(item[1]) == {"="}
    return equation or (item[0] == "value" and not symbols(item[1]))


def _is_inequality(item: tuple) -> bool:
    return item[0] == "relation" and "=" not in item[1]


def value_of(relation: tuple) -> tuple | None:
    """x = 5 -> 5; 5 = x -> 5; A = 2 * 3 = 6 -> 6; 2x = 10 -> None."""
    _, signs, sides, labels = relation
    if set(signs) != {"="}:
        return None
    if not labels[0] and labels[1] and len(sides) == 2:
        return sides[0]
    rest = sides[1:] if labels[0] else sides
    constants = [s for s in rest if s[0] == "value" and not symbols(s[1])]
    agree = all(same(side, rest[-1]) for side in constants)
    return rest[-1] if agree and (labels[0] or len(constants) == len(sides)) else None


def _atoms(relation: tuple) -> list[tuple]:
    """1 < x <= y -> differences that are positive (<), non-negative, zero, or non-zero."""
    atoms = []
    for sign, left, right in zip(relation[1], relation[2], relation[2][1:]):
        if left[0] != "value" or right[0] != "value":
            raise Unreadable("no algebra")
        if sign in "<≤":
            left, right, sign = right, left, {"<": ">", "≤": "≥"}[sign]
        atoms.append((sign, ("-", left[1], right[1])))
    return atoms


def _same_relation(a: tuple, b: tuple) -> bool:
    equation = a[1] == b[1] == ("=",)  # AB = CD needs no algebra, either way round
    if a[1] == b[1] and (_same_row(a[2], b[2]) or equation and _same_row(a[2], b[2][::-1])):
        return True
    if equation and a[3][0] and a[3][0] == b[3][0]:
        return same(a[2][1], b[2][1])
    return _same_conditions((a,), (b,))


def _same_conditions(a: tuple, b: tuple) -> bool:
    """Do relations joined by "and" say the same? 1 < x < 5 against x > 1 and x < 5."""
    try:
        sides = [tuple(atom for item in relations for atom in _atoms(item)) for relations in (a, b)]
    except Unreadable:
        return False
    same_sign_and_line = lambda a, b: a[0] == b[0] and proportional(a[1], b[1], positive=a[0] in ">≥")
    return _same_bag(*sides, same_sign_and_line)


_SAME = {
    "relation": _same_relation,
    "list": _same_list,
    "clock": same_clock,
    "value": _same_measure,
    "tuple": lambda a, b: a[1:3] == b[1:3] and _same_row(a[3], b[3]),
    "matrix": lambda a, b: a[1] == b[1] and _same_row(a[2], b[2], _same_row),
    "ratio": lambda a, b: _same_row(a[1], b[1]),
    "date": lambda a, b: a == b,
    "words": lambda a, b: a[1] == b[1] and bool(a[1]),
}
