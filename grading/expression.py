r"""One mathematical expression: text -> tokens -> tree. Nothing is executed, nothing is guessed.

The idea: a linear tokeniser and a bounded recursive-descent parser turn the text into a small tree of tuples,
which value.py compares. A text outside the grammar or beyond a cap on length, depth or digits is Unreadable;
the caps replace timers and signals, so this works in threads and workers.

Grammar (a tree is a Fraction, a symbol's name, or (operation, tree, ...)):

    sum      := ['+'] product (('+' | '-') product)*
    product  := ['-'] power (('*' | '/' | nothing) ['-'] power)*
    power    := primary ('!' | '%' | '°')* ['^' [sign] power]
    primary  := number | mixed number | symbol [_index] | function [^power] operand
              | '(' sum ')' | '{' sum '}' | '[' sum ']' | '|' sum '|' | floor | ceiling
              | \frac arg arg | \binom arg arg | \sqrt ['[' sum ']'] arg

The text must be tidied (spelling.py): one spelling for each sign and command.
"""

import re
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import NamedTuple

MAX_TOKENS, MAX_DEPTH, MAX_DIGITS = 200, 40, 60

Tree = Fraction | str | tuple  # a value, a symbol, (operation, tree, ...)


class Unreadable(ValueError):
    """The text is not an expression of the grammar above, or exceeds one of the caps."""


class Token(NamedTuple):
    kind: str  # "number", "word" (a run of letters), "command" (\name), "op", "end"
    text: str
    spaced: bool  # white space before it: "1 1/2" is not "11/2", "5 m" is not "5m"


END = Token("end", "", False)
ARITHMETIC = {"+": add, "-": sub, "*": mul, "/": truediv}


def node(operation: str, left: Tree, right: Tree) -> Tree:
    """left operation right, computed at once where both are numbers."""
    if isinstance(left, Fraction) and isinstance(right, Fraction) and (right or operation != "/"):
        return ARITHMETIC[operation](left, right)
    return (operation, left, right)


# [0-9] and not \d: other scripts' digits are not numbers here.
_TOKEN = re.compile(
    r"(?P<space>\s*)(?:"
    r"(?P<number>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![A-Za-z0-9]))?)"
    r"|(?P<word>(?:sin|cos|tan|cot|sec|csc|ln|log)(?=[xy](?![A-Za-z]))|[A-Za-z]+"
    r"|(?:(?!\d)[\u0400-\u1fff\u3040-\ud7af])+)"  # of another script: a unit, or unreadable
    r"|(?P<command>\\[A-Za-z]+|\\[{}])"
    r"|(?P<op>\*\*|[-+*/^_!%°'|(){}\[\],$€£¥₹¢]))"
)


def scan(text: str) -> list[Token]:
    """Cut a text into tokens, in linear time; Unreadable at the first foreign character."""
    text, tokens, at = text.strip(), [], 0
    for match in _TOKEN.finditer(text):
        if match.start() != at or len(tokens) > MAX_TOKENS:
            break
        at, kind = match.end(), match.lastgroup
        word = match[kind]
        tokens.append(Token(kind, "^" if word == "**" else word, match[1] != ""))
    if at < len(text):
        raise Unreadable(text[at : at + 10])
    return tokens


# Our name -> mpmath's. The keys are the whole vocabulary of functions.
_PLAIN = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp"
FUNCTIONS = {name: name for name in _PLAIN.split()}
FUNCTIONS |= {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot"}
FUNCTIONS |= {"ln": "log", "log": "log10", "lg": "log10", "abs": "fabs"}
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot"}
PREFIXES = {*FUNCTIONS, "sqrt", "cbrt", "frac", "binom"}
_SYMBOLS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau"
_SYMBOLS += " upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega"
SYMBOLS = {*_SYMBOLS.split(), "pi", "infty", "ell", "hbar", "emptyset"}
DECORATIONS = {"vec", "hat", "bar", "overline", "tilde", "dot", "ddot", "overrightarrow", "mathbb"}
NAMES = {"pi": "pi", "infinity": "infty", "inf": "infty", "oo": "infty", "infty": "infty"}
CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
CONSTANTS = {"pi", "e", "i"}
POSTFIX = {"!": "factorial", "°": "degrees"}
ENCLOSED = {"|": "abs", "\\lfloor": "floor", "\\lceil": "ceil"}


def parse(tokens: list[Token]) -> Tree:
    r"""The tree of a whole list of tokens, or Unreadable.

    >>> parse(scan(r"\frac{1}{2} + 3x"))
    ('+', Fraction(1, 2), ('*', Fraction(3, 1), 'x'))
    """
    rest = [END, *reversed(spell(tokens))]  # a stack: the next token is the last element
    tree = _sum(rest, 0)
    if rest[-1] is not END:
        raise Unreadable(rest[-1].text)
    return tree


def spell(tokens: list[Token]) -> list[Token]:
    """Replace every run of letters by function names and one-letter symbols, or Unreadable.

    Letters are a product only if they spell no word: xy, 2ab, mgh, a + bi; not cat, not on. A text
    of one word is algebra only in x, y, z. Capitals (AB, a segment) are one symbol.
    """
    spelled = []
    for k, token in enumerate(tokens):
        kind, text, spaced = token
        if kind != "word":
            spelled.append(token)
            continue
        before, after = tokens[k - 1] if k else END, tokens[k + 1] if k + 1 < len(tokens) else END
        if text in PREFIXES or text in NAMES:
            spelled.append(Token("command", "\\" + NAMES.get(text, text), spaced))
        elif text.isascii() and (len(text) == 1 or (text.isupper() and len(text) <= 3 and len(tokens) > 1)):
            indexed = after.kind == "number" and not after.spaced
            if indexed and before.kind == "number" and not spaced:
                raise Unreadable("0x10 is no product")
            spelled.append(token)
        elif set(text) <= set("xyz") or (len(tokens) > 1 and _is_product(text, after.text)):
            spelled += [Token("word", c, spaced and not i) for i, c in enumerate(text)]
        else:
            raise Unreadable(text)
    if len(spelled) > MAX_TOKENS:
        raise Unreadable("too long")
    return spelled


def _is_product(word: str, following: str) -> bool:
    lower = word.lower()
    if lower.endswith("e") and following == "^":  # xe^x
        lower = lower[:-1]
    if len(word) == 2 and lower.endswith("i"):  # a + bi
        lower = lower[:-1]
    if lower in ("ix", "iy", "iz", "it"):  # e^{ix}
        lower = lower[1:]
    known = set(lower) <= set("abcdxyz") or not set(lower) & set("aeiou")
    return known and len(word) <= 4 and word.isascii()


def _take(rest: list[Token], text: str, expected: bool = False) -> bool:
    found = rest[-1].text == text
    if found:
        rest.pop()
    elif expected:
        raise Unreadable(f"no {text}")
    return found


def _sum(rest: list[Token], depth: int, inside: str = "") -> Tree:
    if depth > MAX_DEPTH:
        raise Unreadable("too deep")
    _take(rest, "+")
    tree = _product(rest, depth, inside)
    while rest[-1].text in ("+", "-"):
        tree = node(rest.pop().text, tree, _product(rest, depth, inside))
    if _take(rest, "\\over"):
        return node("/", tree, _sum(rest, depth + 1, inside))
    return tree


def _product(rest: list[Token], depth: int, inside: str) -> Tree:
    tree = _signed_power(rest, depth)
    while True:
        sign = rest[-1].text
        if sign == "*":
            rest.pop()
            tree = node("*", tree, _signed_power(rest, depth))
        elif sign == "/":
            rest.pop()
            below = _signed_power(rest, depth)
            # 1/2x is a half of x, as people write it; but 1/xy has xy below.
            while isinstance(below, str) or (isinstance(below, tuple) and below[0] == "*"):
                if not _juxtaposed(rest, below, inside):
                    break
                below = ("*", below, _power(rest, depth))
            tree = node("/", tree, below)
        elif _juxtaposed(rest, tree, inside):
            tree = node("*", tree, _power(rest, depth))
        else:
            return tree


def _juxtaposed(rest: list[Token], left: Tree, inside: str) -> bool:
    """Does a factor follow with no sign between? A number does only after a power: 2^3 5^2."""
    token = rest[-1]
    if token.kind == "number":
        return isinstance(left, tuple) and left[0] == "^"
    if token.kind == "command":
        return token.text not in ("\\}", "\\rfloor", "\\rceil", "\\over")
    if token.text == "|":
        return inside != "|"
    if token.text == "[":  # 2[x + 1] is a product, [5][0] is something else
        return isinstance(left, Fraction)
    return token.kind == "word" or token.text in ("(", "{")


def _signed_power(rest: list[Token], depth: int) -> Tree:
    if not _take(rest, "-"):
        return _power(rest, depth)
    tree = _power(rest, depth)
    return -tree if isinstance(tree, Fraction) else ("neg", tree)


def _power(rest: list[Token], depth: int) -> Tree:
    tree = _primary(rest, depth)
    while rest[-1].text in ("!", "%", "°"):
        mark = rest.pop().text
        if mark == "°" and mentions(tree, "degrees"):
            raise Unreadable("5°°")
        tree = node("/", tree, Fraction(100)) if mark == "%" else (POSTFIX[mark], tree)
    if not _take(rest, "^"):
        return tree
    _take(rest, "+")
    return ("^", tree, _signed_power(rest, depth + 1))


def _primary(rest: list[Token], depth: int) -> Tree:
    if depth > MAX_DEPTH or rest[-1] is END:
        raise Unreadable("too deep, or too short")
    kind, text, _ = rest.pop()
    if kind == "number":
        return _mixed(text, rest)
    if text in CLOSING:
        inner = _sum(rest, depth + 1, text)
        _take(rest, CLOSING[text], expected=True)
        return (ENCLOSED[text], inner) if text in ENCLOSED else inner
    if kind == "word":
        return _symbol(text, rest)
    name = text.removeprefix("\\")
    if name in PREFIXES:
        return _prefix(name, rest, depth)
    if name in SYMBOLS:
        return _symbol(name, rest)
    if name in DECORATIONS:
        return _symbol(f"{name}({_group_text(rest)})", rest)
    raise Unreadable(text)


def number(text: str) -> Fraction:
    """The exact value of digits, perhaps with a sign, a point and an exponent."""
    # int() refuses long digit strings with an error of its own, and 1e999999 is a bomb.
    if len(text) > MAX_DIGITS:
        raise Unreadable("too many digits")
    if "e" in text or "E" in text:
        return Fraction(text)
    whole, _, decimals = text.partition(".")  # several times faster than the parser of Fraction
    return Fraction(int(whole + decimals), 10 ** len(decimals)) if decimals else Fraction(int(whole))


def _mixed(text: str, rest: list[Token]) -> Fraction:
    r"""1\frac{1}{2} and 1 1/2 are three halves; 2\frac{5}{3} could mean two things: Unreadable."""
    following = rest[-1]
    if not (following.text == "\\frac" or (following.spaced and following.kind == "number")):
        return number(text)
    ahead = [token.text for token in rest[:-8:-1]]
    if ahead[:2] + ahead[3:5] + ahead[6:] == ["\\frac", "{", "}", "{", "}"]:
        above, below, used = ahead[2], ahead[5], 7
    elif following.spaced and ahead[1] == "/":
        above, below, used = ahead[0], ahead[2], 3
    else:
        return number(text)
    if not (text.isdigit() and above.isdigit() and below.isdigit()):
        return number(text)
    if number(above) >= number(below):
        raise Unreadable("neither a mixed number nor a clear product")
    del rest[-used:]
    return number(text) + number(above) / number(below)


def _symbol(name: str, rest: list[Token]) -> str:
    """A symbol with its index and primes: x, x_1, x_{n+1}, x1 (read as x_1), f'."""
    if _take(rest, "_"):
        name += "_" + _group_text(rest)
    elif rest[-1].kind == "number" and not rest[-1].spaced and len(name) <= 3:
        name += "_" + rest.pop().text
    while _take(rest, "'"):
        name += "'"
    return name


def _group_text(rest: list[Token]) -> str:
    """The text of one token or of one {group}, unread: an index is a name, not arithmetic."""
    words = []
    while rest[-1] is not END and (not words or words.count("{") > words.count("}")):
        words.append(rest.pop().text)
    if not words:
        raise Unreadable("too short")
    return "".join(words).strip("{}")


def _prefix(name: str, rest: list[Token], depth: int) -> Tree:
    if name in ("frac", "binom"):
        above, below = _argument(rest, depth), _argument(rest, depth)
        return node("/", above, below) if name == "frac" else ("binom", above, below)
    if name in ("sqrt", "cbrt"):
        degree = Fraction(2 if name == "sqrt" else 3)
        if _take(rest, "["):
            degree = _sum(rest, depth + 1)
            _take(rest, "]", expected=True)
        return ("^", _argument(rest, depth, False), node("/", Fraction(1), degree))
    base, power = None, None
    if name == "log" and _take(rest, "_"):
        base = _argument(rest, depth)
    if _take(rest, "^"):
        power = _signed_power(rest, depth + 1)
    if power == -1 and name in INVERSE:
        name, power = INVERSE[name], None
    inner = _operand(rest, depth + 1)
    if name in TRIGONOMETRIC and mentions(inner, "degrees"):
        inner = ("/", ("*", inner, "pi"), Fraction(180))
    tree = ("/", ("ln", inner), ("ln", base)) if base is not None else (name, inner)
    return tree if power is None else ("^", tree, power)


def _argument(rest: list[Token], depth: int, one_digit: bool = True) -> Tree:
    r"""What \frac, \sqrt and \binom apply to: a group, or (TeX) a single digit: \frac12."""
    kind, text, _ = rest[-1]
    if kind == "number" and one_digit and len(text) > 1:
        rest[-1] = Token("number", text[1:], False)
        return number(text[:1])
    return _primary(rest, depth + 1)


def _operand(rest: list[Token], depth: int) -> Tree:
    """What a function applies to: sin(x), or a product without functions: sin 2x cos y."""
    if rest[-1].text in ("(", "{", "["):
        return _primary(rest, depth)
    tree = _signed_power(rest, depth)
    while _juxtaposed(rest, tree, "|") and rest[-1].text.removeprefix("\\") not in FUNCTIONS:
        tree = ("*", tree, _power(rest, depth))
    return tree


def mentions(tree: Tree, *names: str) -> bool:
    """Is one of these operations or symbols in the tree?"""
    if isinstance(tree, tuple):
        return any(mentions(part, *names) for part in tree)
    return isinstance(tree, str) and tree in names
