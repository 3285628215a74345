r"""What kind of answer is this text, and are two answers the same? (All but multiple choice.)

The idea: tidy() brings a text to one spelling; read() finds its outermost structure and
returns a tuple that begins with its kind; same() compares two of them kind by kind. What has
no structure and is no mathematics is words, and words equal only words.

    kind       looks like                       compared as
    value      5, \frac12, 2x+1, 5 cm, 50%      value and unit (mathvalue.py, measures.py)
    list       1, 2   x=1 or x=2   \{1,2\}   (-1,0) \cup (1,2)   \pm 3       in any order
    tuple      (1,2)   [0,1)   \langle 1,2 \rangle                  in order, with its brackets
    matrix     \begin{pmatrix} ... \end{pmatrix}   [[1,2],[3,4]]        entry by entry
    relation   x = 5   2x + y = 3   1 < x \le 4     up to a factor; a lone name = value is a value
    ratio      3:4   3 to 4                         in order, never divided
    clock      3:45 pm                              date   March 5, 2020   2020-03-05
    words      isosceles                            case, quotes, one article, final period
"""

import re
from functools import lru_cache

from mathexpr import Unreadable, parse
from mathvalue import proportional, same_value, symbols
from measures import clock, date, measure, same_clock

MAX_LIST, MAX_NESTING = 50, 8

# ------------------------------------------------------------------------------ tidy

_CHARACTERS = {
    **dict.fromkeys("−–—‐‑‒﹣－", "-"), **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u3000", " "),
    **dict.fromkeys("·⋅∙×✕", "*"), **dict.fromkeys("÷∕⁄", "/"), **dict.fromkeys("º˚", "°"),
    **dict.fromkeys("“”„", '"'), **dict.fromkeys("‘’′`", "'"),
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "⩽": "≤", "⩾": "≥",
    "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∈": r"\in ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∠": " angle ", "△": " triangle ", "⊥": r"\perp ",
    "∥": r"\parallel ", "℃": "° C", "℉": "° F", "％": "%", "（": "(", "）": ")", "，": ",",
    "：": ":", "；": ";", "＝": "=", "＋": "+", "″": "''", "⟨": r"\langle ", "⟩": r"\rangle ",
    "Δ": r"\Delta ", "Ω": r"\Omega ", "Ω": r"\Omega ", "Φ": r"\Phi ", "ϕ": r"\phi ",
}  # fmt: skip
_GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi _ _ rho _ sigma"
_GREEK += " tau upsilon phi chi psi omega"
_CHARACTERS |= {chr(0x3B1 + k): rf"\{n} " for k, n in enumerate(_GREEK.split()) if n != "_"}
_VULGAR = "½12 ⅓13 ⅔23 ¼14 ¾34 ⅕15 ⅖25 ⅗35 ⅘45 ⅙16 ⅚56 ⅐17 ⅛18 ⅜38 ⅝58 ⅞78 ⅑19"
_CHARACTERS |= {v[0]: rf"\frac{{{v[1]}}}{{{v[2]}}}" for v in _VULGAR.split()}
_TABLE = str.maketrans(_CHARACTERS)
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
_PLAIN = str.maketrans(_RAISED + _LOWERED, "0123456789+-n" * 2)

_COMMANDS = {
    name: replacement
    for names, replacement in (
        ("left right big Big bigl bigr Bigl Bigr bigg Bigg biggl biggr Biggl Biggr middle", ""),
        ("displaystyle textstyle scriptstyle limits nolimits nonumber rm bf it therefore !", ""),
        ("text textbf textit textrm textsf texttt textnormal mathrm mathbf mathit mathsf", ""),
        ("mathtt mathcal mathnormal mbox hbox operatorname boldsymbol bm emph underline ce", ""),
        ("quad qquad enspace thinspace space hfill , ; : > ( ) [ ]", " "),
        ("dfrac tfrac cfrac nicefrac sfrac", r"\frac"), ("dbinom tbinom", r"\binom"),
        ("leq le leqslant leqq", "≤"), ("geq ge geqslant geqq", "≥"), ("neq ne", "≠"),
        ("lt", "<"), ("gt", ">"), ("approx simeq approxeq", "≈"), ("times cdot ast", "*"),
        ("div", "/"), ("lbrace", r"\{"), ("rbrace", r"\}"), ("lbrack", "["), ("rbrack", "]"),
        ("lvert rvert vert", "|"), ("colon", ":"), ("degree textdegree", "°"), ("%", "%"),
        ("$ textdollar", "$"), ("euro", "€"), ("pounds", "£"), ("# &", ""), ("_", "_"),
        ("varnothing", r"\emptyset "), ("to rightarrow longrightarrow", "→"), ("prime", "'"),
        ("lor vee", " or "), ("land wedge", " and "), ("angle measuredangle", " angle "),
        ("triangle", " triangle "), ("dots ldots cdots", "..."), ("varphi", r"\phi "),
        ("varepsilon", r"\epsilon "), ("vartheta", r"\theta "), ("infin", r"\infty "),
    )
    for name in names.split()
}  # fmt: skip
_COMMANDS[" "] = " "
_COMMAND = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
_STYLED = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|cal|normal)|mbox|hbox"
    r"|operatorname\*?|boldsymbol|bm|emph|underline|ce)\s*\{([^{}]*)\}"
)
_BLANKS = re.compile(r"\\(?:[hv]space\*?|[hv]?phantom|color|textcolor)\s*\{[^{}]*\}")
# $ around all of it, or around a part as in pandoc: no space inside, no digit after the closing.
_DOLLARS = [
    re.compile(r"^\s*\$\$?((?:[^$\\]|\\.)*)\$\$?[\s.,;]*$"),
    re.compile(r"(?<!\\)\$\$?(?![\s$])((?:[^$\\]|\\.)*)(?<![\s\\])\$\$?(?![0-9])"),
]
_BOLD = re.compile(r"(?<![\w)}*])(\*\*?)([^*]+)\1(?!\*)")  # in Markdown
_CIRCLE = re.compile(r"\^\s*(?:\{\s*(?:\\circ|°)\s*\}|\\circ(?![A-Za-z])|°|\{?\\degree\}?)")
_RECURRING = re.compile(r"([0-9]{0,20})\.([0-9]{0,20})\\(?:overline|bar|dot)\s*\{([0-9]{1,20})\}")
_GROUPED = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])")
_SPACED = re.compile(r"(?<![0-9.,])(?<![0-9] )[1-9][0-9]{0,2}(?: [0-9]{3})+(?! ?[0-9]|,[0-9]|/)")
_ANSWER_IS = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:(?:correct|final|right|best) )*"
    r"(?:answer|solution|result|choice|option)s?(?: choice| option)?(?: is ?:?| are| ?[:=]) *",
    re.IGNORECASE,
)
_SMALL_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"([0-9]) ?\^? ?\{ ?(st|nd|rd|th) ?\}", r"\1\2"),  # 5^{\text{th}}
        (r"([0-9]) ?\^? ?(st|nd|rd|th)\b", r"\1\2"),
        (r"(?<=[0-9]) ?\^ ?(?:\{o\}|o\b)", "°"),
        (r"(?<![A-Za-z.])(sq|cu|in|ft|yd|mi|lb|oz|hr|min|sec)\.(?= |$)", r"\1"),
        (r"(?<=[0-9.]) ?[xX] ?(?=10 ?\^)", "*"),  # 3 x 10^5
        (r"\^ ?\{?'+ ?\}?", "'"),
        (r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac ?([0-9]) ?\{", r"\\frac{\1}{"),
        (r"\\frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", r"\\frac{\1}{\2}"),
        (r"(?<=[0-9} ])\\frac ?\{ ?([a-z]+) ?\} ?\{ ?([a-z]+(?:\^\{?[23]\}?)?) ?\}$", r" \1/\2"),
        (r"\\overline ?\{ ?([A-Z]{2}) ?\}", r"\1"),
        (r"\\\{ *\\\}", r"\\emptyset"),
        (r"° ?([CF])\b", r" ° \1"),
        (r"^([`'\"])(.*)\1$", r"\2"),
        (r" +", " "),
    )
]


@lru_cache(maxsize=4096)
def tidy(text: str) -> str:
    r"""One spelling for what looks alike: signs, wrappers, spacing, thousands separators.

    >>> tidy(r"$\dfrac{1}{2}\,\text{cm}$."), tidy(r"1{,}234"), tidy("1 234"), tidy("12,34")
    ('\\frac{1}{2} cm', '1234', '1234', '12,34')
    """
    text = _ungrouped(text)
    return _SPACED.sub(lambda m: m[0].replace(" ", ""), _GROUPED.sub(_without_commas, text))


def _without_commas(match: re.Match) -> str:
    return match[0].replace(",", "")


@lru_cache(maxsize=4096)
def _ungrouped(text: str) -> str:
    """tidy() before thousands separators are taken out."""
    text = _BOLD.sub(r"\2", text)
    if "$" in text:
        text = _DOLLARS[1].sub(r"\1", _DOLLARS[0].sub(r"\1", text))
    if not text.isascii():
        text = re.sub("³√", r"\\sqrt[3]", text)
        text = re.sub(f"[{_RAISED}]+", lambda m: f"^{{{m[0].translate(_PLAIN)}}}", text)
        text = re.sub(f"[{_LOWERED}]+", lambda m: f"_{{{m[0].translate(_PLAIN)}}}", text)
        text = re.sub("[µμ](?=[mgsLAFCV])", "u", text).translate(_TABLE)
    if "\\" in text:
        text = _BLANKS.sub("", text).replace(r"\left.", "").replace(r"\right.", "")
        text = _CIRCLE.sub("°", text)
        for _ in range(3):
            text = _STYLED.sub(_unstyled, text)
        text = _RECURRING.sub(_recurring, text)
        text = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m[0]), text)
    text = text.replace("{,}", ",").replace("~", " ").strip()
    if "\n" in text and "\\begin" not in text:
        text = re.sub(r"(?<=[\w)}\]])\s*\n\s*(?=[\w\\({\[])", "; ", text)
    text = _bare(text)
    for pattern, replacement in _SMALL_RULES:
        text = pattern.sub(replacement, text)
    return re.sub(r"^[=≈] ?(?![=<>])", "", _bare(text))


def _bare(text: str) -> str:
    """Without final punctuation, 'The answer is' and braces around all of it."""
    text = " ".join(text.split())
    for _ in range(2):
        text = text.strip(" ").rstrip(".,; ")
        if text[:1] == "{" and text[-1:] == "}" and _enclosed(text):
            text = text[1:-1]
        match = _ANSWER_IS.match(text) if len(text) > 5 else None
        text = text[match.end() :] if match else text
    return text.strip(" ").rstrip(".,; ")


def _unstyled(match: re.Match) -> str:
    """A wrapper's content; a space keeps letters of two wrappers, or a unit, apart."""
    inner, text = match[1], match.string
    before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
    left = " " if inner[:1].isalpha() and (before.isalnum() or before in ("}", ")")) else ""
    right = " " if inner[-1:].isalpha() and after.isalpha() else ""
    return left + inner + right


def _recurring(match: re.Match) -> str:
    r"""0.1\overline{6} -> (\frac{15}{90})"""
    whole, fixed, period = match.groups()
    above = int(whole + fixed + period) - int((whole + fixed) or 0)
    return rf"(\frac{{{above}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}})"


# ------------------------------------------------------------------------------ read

_BRACKET = r"(?P<open>\\\{|\\langle|\\begin(?=\{)|[(\[{])|(?P<close>\\\}|\\rangle|\\end(?=\{)|[)\]}])"


def _splitter(separator: str) -> re.Pattern:
    return re.compile(f"(?P<separator>{separator})|{_BRACKET}")


_COMMA = _splitter(r",? +(?:and|or) +|[,;]")
_CUP = _splitter(r"\\cup(?![A-Za-z])|(?<=[)\]]) ?U ?(?=[(\[])")
_RELATION = _splitter(r"<=|>=|!=|[=<>≤≥≠≈]|\\in(?![A-Za-z])")
_COLON = _splitter(r":| to ")
_NEVER = _splitter(r"(?!)")
_SIGNS = {"<=": "≤", ">=": "≥", "!=": "≠", "≈": "=", "\\in": "="}
_PAIRS = {("(", ")"), ("(", "]"), ("[", ")"), ("[", "]"), ("\\langle", "\\rangle"), ("\\{", "\\}")}
_MATRIX = re.compile(
    r"\\begin\{([bpvBV]?matrix|array)\}(?:\{[lcr| ]*\})?((?:(?!\\begin|\\end).)*)\\end\{\1\}"
)
_CHAIN = re.compile(r"[A-Z][a-z]?(?:-[A-Z][a-z]?)+")  # H-O-H, and not a difference
_BUILDER = re.compile(r"[a-z] ?(?:\\in ?\\mathbb ?\{R\} ?)?(?:\\mid|\||:)(.+)")
_NAME = (
    r"(?:[A-Za-z][A-Za-z]*|\\[A-Za-z]+(?:\{[A-Za-z ]*\})?)(?: ?_ ?(?:\{[^{}]*\}|[0-9A-Za-z]))?'*"
)
_LABEL = re.compile(
    rf"(?:{_NAME}(?:\^\{{-1\}})?(?: {_NAME}){{0,7}} ?(?:\([^()=<>]{{1,20}}\))?)|\|[A-Z]{{1,2}}\|"
    r"|\\frac ?\{d[a-z]?\} ?\{d[a-z]\}|d[a-z] ?/ ?d[a-z]|\([a-zA-Z](?: ?, ?[a-zA-Z]){1,3}\)"
)


def _split(text: str, splitter: re.Pattern) -> tuple[list[str], list[str]]:
    """Pieces and separators of a text, cut outside all brackets; Unreadable if unbalanced."""
    pieces, separators, depth, start = [], [], 0, 0
    for match in splitter.finditer(text):
        if match["separator"] is None:
            depth += 1 if match["open"] else -1
            if depth < 0:
                raise Unreadable("unbalanced")
        elif depth == 0:
            pieces.append(text[start : match.start()].strip())
            separators.append(match["separator"].strip())
            start = match.end()
    if depth:
        raise Unreadable("unbalanced")
    return [*pieces, text[start:].strip()], separators


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) if the first bracket closes at the very end of the text."""
    depth, first = 0, None
    for match in _NEVER.finditer(text):
        if first is None and match.start():
            return None
        first = first or match[0]
        depth += 1 if match["open"] else -1
        if depth <= 0:
            inside = text[len(first) : match.start()].strip()
            return (first, inside, match[0]) if match.end() == len(text) else None
    return None


@lru_cache(maxsize=4096)
def readings(text: str) -> tuple[tuple, ...]:
    """All readings of a raw text: two where 1,234 in brackets is one number or two, else one."""
    plain, raw = tidy(text), _ungrouped(text)
    if plain != raw and re.search(r"[(\[{].*[0-9],[0-9]", raw):
        return read(plain), read(raw)
    return (read(plain),)


def read(text: str, nesting: int = 0) -> tuple:
    """The structure of a tidied text: a tuple that begins with its kind (see the top)."""
    text = text.strip()
    if nesting > MAX_NESTING:
        raise Unreadable("too deep")
    simple = clock(text) or date(text)
    if simple:
        return simple
    if _CHAIN.fullmatch(text):
        return ("words", text)
    try:
        return _structure(text, nesting) or ("value", *measure(text))
    except (Unreadable, ArithmeticError):
        return ("words", words(text))


def _structure(text: str, nesting: int) -> tuple | None:
    """Whatever is more than one expression, or None."""
    below = nesting + 1
    pieces, separators = _split(text, _COMMA)
    if separators:
        joiners = {s.strip(", ") or "," for s in separators}
        pieces[0] = re.sub(r"^[Bb]oth ", "", pieces[0]) if "and" in joiners else pieces[0]
        joiner = next((j for j in ("or", "and") if j in joiners), ",")
        return _list([read(piece, below) for piece in pieces], joiner)
    pieces, separators = _split(text, _RELATION)
    if separators and all(pieces):
        signs = tuple(_SIGNS.get(s, s) for s in separators)
        if r"\pm" not in text:
            return _relation(signs, pieces, below)
    pieces, separators = _split(text, _CUP)
    if separators:
        return _list([read(piece, below) for piece in pieces], ",")
    if r"\pm" in text:
        return _list([read(t, below) for t in _both_signs(text)], ",")
    enclosed = _enclosed(text)
    if enclosed:
        return _bracketed(*enclosed, below)
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if row.strip()]
        determinant = matrix[1].lower() == "vmatrix"
        return ("matrix", determinant, tuple(tuple(read(c, below) for c in row) for row in rows))
    pieces, separators = _split(text, _COLON)
    if separators and len(set(separators)) == 1:
        return ("ratio", tuple(("value", *measure(piece)) for piece in pieces))
    point = re.fullmatch(r"([A-Z]'?) ?(\(.+\))", text)
    if point and "," in point[2]:
        return _relation(("=",), [point[1], point[2]], below)
    return None


def _list(items: list[tuple], joiner: str) -> tuple:
    flat = []
    for item in items:
        flat += item[1] if item[0] == "list" else [item]
    if len(flat) > MAX_LIST:
        raise Unreadable("too long")
    return ("list", tuple(flat), joiner)


def _bracketed(opening: str, inside: str, closing: str, nesting: int) -> tuple | None:
    if opening == "\\begin" or not inside:
        return None
    if (opening, closing) in (("{", "}"), ("(", ")")) and not _split(inside, _COMMA)[1]:
        inner = read(inside, nesting)
        return inner if inner[0] != "words" or opening == "{" else None
    if opening == "{":
        return read(inside, nesting)
    if (opening, closing) not in _PAIRS:
        raise Unreadable("no such brackets")
    if opening == "[" and _MATRIX.fullmatch(inside):
        return read(inside, nesting)
    if opening == "\\{":
        built = _BUILDER.fullmatch(inside)
        return read(built[1], nesting) if built else _list(_items(inside, nesting), ",")
    items = _items(inside, nesting)
    if opening == "[" and len(items) > 1 and all(i[:3:2] == ("tuple", "]") for i in items):
        return ("matrix", False, tuple(item[3] for item in items))
    return ("tuple", opening, closing, tuple(items))


def _items(inside: str, nesting: int) -> list[tuple]:
    pieces = _split(inside, _COMMA)[0]
    if len(pieces) > MAX_LIST or not all(pieces):
        raise Unreadable("an empty place, or too many")
    return [read(piece, nesting) for piece in pieces]


def _both_signs(text: str) -> list[str]:
    r"""a \pm b -> a + b and a - b; \mp goes against the first \pm; two \pm are independent."""
    parts = re.split(r"\\pm(?![A-Za-z])", text)
    if len(parts) > 3:
        raise Unreadable("too many signs")
    texts = [parts[0]]
    for part in parts[1:]:
        texts = [t + sign + part for t in texts for sign in "+-"]
    against = [text.replace(r"\mp", "-" if "+" in text[len(parts[0]) :][:1] else "+") for text in texts]
    return against


def _relation(signs: tuple, pieces: list[str], nesting: int) -> tuple:
    sides = tuple(read(piece, nesting) for piece in pieces)
    labels = tuple(words(p) if _LABEL.fullmatch(p) else "" for p in (pieces[0], pieces[-1]))
    return ("relation", signs, sides, labels)


_SUBSCRIPT = re.compile(r"(?<=[A-Za-z)\]])[_^] ?\{?([0-9]*[A-Za-z0-9+-])\}?")


def words(text: str) -> str:
    """The text as words: without case, quotes, one leading article, final period.

    >>> words('"The Eiffel  Tower."')
    'eiffel tower'
    """
    if not re.search(r"[^\W\d_]\.?[^\W\d_]", text):
        return text
    text = re.sub(r"\{([^{}]*)\}", r"\1", _SUBSCRIPT.sub(r"\1", text)).casefold()
    return re.sub(r"^(?:an?|the) (?=\w)", "", " ".join(text.strip("\"'. ").split()))


# ------------------------------------------------------------------------------ same


def same(a: tuple, b: tuple) -> bool:
    """Are two structures one answer? Symmetric; different kinds agree only as listed here."""
    kinds = (a[0], b[0])
    if kinds[0] == kinds[1]:
        return _SAME[kinds[0]](a, b)
    if "relation" in kinds:
        relation, other = (a, b) if a[0] == "relation" else (b, a)
        if other[0] == "list" and _is_inequality(relation):
            return _same_system(relation, other)
        value = _value_of(relation)
        return value is not None and same(value, other)
    if "list" in kinds:  # \{5\} is 5
        several, one = (a, b) if a[0] == "list" else (b, a)
        return len(several[1]) == 1 and same(several[1][0], one)
    if set(kinds) == {"clock", "ratio"}:
        time, ratio = (a, b) if a[0] == "clock" else (b, a)
        numbers = [int(value[1]) for value in ratio[1] if value[1].denominator == 1]
        bare = ("clock", *numbers, *[0] * (3 - len(numbers)), "")
        return len(numbers) == len(ratio[1]) <= 3 and same_clock(time, bare)
    return False


def _same_measure(a: tuple, b: tuple) -> bool:
    (_, tree_a, unit_a), (_, tree_b, unit_b) = a, b
    if unit_a and unit_b and unit_a != unit_b:
        return False
    if same_value(tree_a, tree_b):
        return True
    percent = (("%", 1),)
    if (unit_a == percent) != (unit_b == percent) and not (unit_a and unit_b):
        tree_a = ("/", tree_a, _HUNDRED) if unit_a else tree_a
        tree_b = ("/", tree_b, _HUNDRED) if unit_b else tree_b
        return same_value(tree_a, tree_b)
    return False


_HUNDRED = parse("100")


def _same_list(a: tuple, b: tuple) -> bool:
    """Equal counts, any order. And is not or, except between values (5 and -5, 5 or -5)."""
    if {a[2], b[2]} == {"and", "or"} and not all(map(_is_solution, a[1])):
        return False
    return _same_bag(a[1], b[1], same)


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


def _same_row(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def _same_matrix(a: tuple, b: tuple) -> bool:
    return a[1] == b[1] and len(a[2]) == len(b[2]) and all(map(_same_row, a[2], b[2]))


def _is_solution(item: tuple) -> bool:
    if item[0] == "relation":
        return set(item[1]) == {"="}
    return item[0] == "value" and not symbols(item[1])


def _is_inequality(item: tuple) -> bool:
    return item[0] == "relation" and "=" not in item[1]


def _value_of(relation: tuple) -> tuple | None:
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
            left, right = right, left
        atoms.append((sign.translate(_UPWARD), ("-", left[1], right[1])))
    return atoms


_UPWARD = str.maketrans("<≤", ">≥")


def _same_atom(a: tuple, b: tuple) -> bool:
    return a[0] == b[0] and proportional(a[1], b[1], positive=a[0] in ">≥")


def _same_relation(a: tuple, b: tuple) -> bool:
    if a[1] == b[1] and _same_row(a[2], b[2]):
        return True
    if a[1] == b[1] == ("=",) and a[3][0] and a[3][0] == b[3][0]:
        return same(a[2][1], b[2][1])
    try:
        return _same_bag(tuple(_atoms(a)), tuple(_atoms(b)), _same_atom)
    except Unreadable:
        return False


def _same_system(chain: tuple, several: tuple) -> bool:
    """1 < x < 5 against x > 1 and x < 5."""
    if several[2] == "or" or not all(map(_is_inequality, several[1])):
        return False
    try:
        atoms = [atom for relation in several[1] for atom in _atoms(relation)]
        return _same_bag(tuple(_atoms(chain)), tuple(atoms), _same_atom)
    except Unreadable:
        return False


_SAME = {
    "value": _same_measure,
    "list": _same_list,
    "tuple": lambda a, b: a[1:3] == b[1:3] and _same_row(a[3], b[3]),
    "matrix": _same_matrix,
    "relation": _same_relation,
    "ratio": lambda a, b: _same_row(a[1], b[1]),
    "clock": same_clock,
    "date": lambda a, b: a == b,
    "words": lambda a, b: a[1] == b[1] and bool(a[1]),
}
