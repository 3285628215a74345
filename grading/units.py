r"""Quantities: a number with a unit, a currency or a scale word; clock times; calendar dates.

The idea: a unit is a tag and never part of the arithmetic. quantity() splits the tag from the end (or a
currency from the front) of a value; a unit's exponent belongs to the tag, so 5 cm^2 is 5 and not 25, and
nothing is converted. Synonyms share one canonical tag (m, meters, metres). After a plain number one ordinary
word counts as a unit too (12 students).
"""

import re
from fractions import Fraction

from grading.expression import END, FUNCTIONS, Token, Tree, Unreadable, node, parse, scan
from grading.value import symbols

Unit = tuple  # ((name, exponent), ...) sorted; () is no unit


# Symbol, two names, the prefixes it takes.
_BASES = """
m meter metre kcmdun; g gram gramme kcmdun; L liter litre kcmdun; s second sec mun; N newton newtons k;
J joule joules k; W watt watts k; V volt volts km; A ampere amp m; Pa pascal pascals k; Hz hertz hertzs k;
mol mole moles m; C coulomb coulombs u; cal calorie calories k; ohm ohms Omega k"""
_PREFIXES = {"k": "kilo", "c": "centi", "m": "milli", "d": "deci", "u": "micro", "n": "nano", "": ""}
# The first of each group is its canonical name.
_SYNONYMS = """
in inch inches; m 米 м; cm 厘米 см; mm 毫米 мм; km 千米 公里 км; nmi 海里; g 克 г; kg 千克 公斤 кг; L l 升 л;
mL ml 毫升 мл; cL cl; dL dl; s 秒; ft foot feet; yd yard; mi mile; lb pound lbs £ GBP gbp; oz ounce;
t ton tonne; min minute 分钟; h hr hour 小时; day 天; week wk; month; year yr 年 岁; gal gallon; ha hectare;
acre; K kelvin Kelvin; F farad; T tesla; rad radian; deg degree ° 度; celsius; fahrenheit;
% percent percentage pct; eV; MeV; MW megawatt; MHz megahertz; GHz gigahertz; MPa megapascal; kWh;
dB decibel; GB gigabyte; MB megabyte; M molar; Bq; mph; kph kmph kmh; unit units; dollar $ USD usd US$;
cent ¢; euro € EUR eur; yen ¥ JPY; yuan RMB CNY 元; rupee ₹ Rs INR"""


def _table() -> dict[str, str]:
    """Every accepted spelling -> the unit's canonical name."""
    table = {}
    for symbol, *names, prefixes in map(str.split, _BASES.split(";")):
        for prefix in (*prefixes, ""):
            spellings = (prefix + symbol, *(_PREFIXES[prefix] + name for name in names))
            table |= dict.fromkeys(spellings, prefix + symbol)
    for first, *others in map(str.split, _SYNONYMS.split(";")):
        table |= dict.fromkeys((first, *others), first)
    return table


UNITS = _table()
CURRENCIES = {UNITS[c] for c in "$€£¥₹¢"} | {"yuan"}
COMPOUND = {"mph": (("h", -1), ("mi", 1)), "kph": (("h", -1), ("km", 1))}
SCALES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
_UNIT_SIGNS = {"(", "/", "°", "%", "$", "€", "£", "¥", "₹", "¢", "\\Omega"}
_SILENT = {"{", "}", "(", ")", "old", "long", "tall", "wide", "high", "deep"}
# Letters that people attach to a number as a unit; 2h and 3t look more like algebra.
GLUED = {"m", "g", "s", "L", "l"}
# Words that change the number before them or are not nouns: 5 halves is not 5.
_NO_NOUN = """
and or not to by of the times plus minus over less more than half halves third thirds quarter quarters
fourth fourths fifth fifths sixth sixths seventh eighth eighths ninth ninths tenth tenths hundredth
hundredths thousandth factorial point negative only mod choose per percent percentage if else elif for
while with from import lambda return yield none true false nan exit quit eval exec print pass del raise
assert global max min sum int float noon midnight clock through until till versus but nor fold one two
three four five six seven eight nine ten squared cubed root sin cos tan log approximately about is are was
were wrong correct incorrect right left it its this that what why how so then because 半 倍"""
NO_NOUN = set(_NO_NOUN.split())


def quantity(text: str) -> tuple[Tree, Unit]:
    r"""A tidied text -> (tree, unit), or Unreadable.

    >>> quantity("5 square meters"), quantity("-$1.5 million")
    ((Fraction(5, 1), (('m', 2),)), (Fraction(-1500000, 1), (('dollar', 1),)))
    """
    tokens, currency = _currency_in_front(scan(text))
    for k in range(max(1, len(tokens) - 14), len(tokens)):
        after = tokens[k + 1] if k + 1 < len(tokens) else END
        kind, text, _ = tokens[k]
        sign = text in _UNIT_SIGNS and (after.kind in ("word", "end") or after.text in "/*°")
        if sign or (kind == "word" and (len(text) > 1 or text in UNITS or not text.isascii())):
            found = _split_at(tokens, k, currency)
            if found:
                return found
    return parse(tokens), currency


def _currency_in_front(tokens: list[Token]) -> tuple[list[Token], Unit]:
    k = 1 if tokens and tokens[0].text == "-" else 0
    if len(tokens) > k + 1 and UNITS.get(tokens[k].text) in CURRENCIES:
        sign = tokens[k + 1].text if k == 0 and tokens[1].text == "-" else ""
        if sign or tokens[k + 1].kind in ("number", "command"):
            return tokens[:k] + tokens[k + 1 :], ((UNITS[tokens[k].text], 1),)
        raise Unreadable("a currency without a number")
    return tokens, ()


def _split_at(tokens: list[Token], k: int, currency: Unit) -> tuple[Tree, Unit] | None:
    """A value before token k, then a scale word and a unit; None if the text is not like that."""
    first, before = tokens[k], tokens[:k]
    scale = SCALES.get(first.text.lower())
    rest = tokens[k + 1 :] if scale else tokens[k:]
    unit = _unit(rest) if rest else ()
    if unit is None and not any(token.kind == "word" for token in before):
        unit = _noun(rest)
    if unit is None:
        return None
    try:
        tree = parse(before)
    except Unreadable:
        return None
    if not _separable(tree, before, first, len(tokens) == k + 1):
        return None
    return node("*", tree, Fraction(scale)) if scale else tree, tuple(sorted({*currency, *unit}))


def _separable(tree: Tree, before: list[Token], first: Token, last: bool) -> bool:
    """May a unit begin at this token? 5 m and 5m, yes; 2h and \\sin 30°, no: that is algebra."""
    if first.text in ("°", "%"):
        functions = any(token.text.removeprefix("\\") in FUNCTIONS for token in before)
        return before[-1].text not in ("°", "%") and not functions
    if first.text == "/":
        return last is False and not symbols(tree)
    letter = first.kind == "word" and len(first.text) == 1
    if symbols(tree):
        return first.spaced and not letter and any(token.kind == "number" for token in before)
    glued = letter and last and not first.spaced and first.text.isascii()
    return not glued or first.text in GLUED


def _noun(tokens: list[Token]) -> Unit | None:
    """One or two ordinary words: 12 students; or a word of another script: 12人."""
    words = [token.text for token in tokens]
    foreign = len(words) == 1 and words[0] > "\u0400" and not any(map(str.isnumeric, words[0]))
    plain = all(t.kind == "word" and t.spaced and len(t.text) > 2 and t.text[1:].islower() for t in tokens)
    if len(words) > 2 or not (plain or foreign) or not NO_NOUN.isdisjoint(map(str.lower, words)):
        return None
    return ((" ".join(words).lower().removesuffix("s"), 1),)


_UNIT_PART = re.compile(
    r"(/ |per )?(?:\* )?(?:(square|sq|cubic|cu) )?(\S+)"
    r"(?: (?:\^ )?((?:- )?[1-4])(?!\S)| (squared|cubed)(?!\S))?(?: |$)"
)


def _unit(tokens: list[Token]) -> Unit | None:
    """m / s^2, square miles per hour, (cm), degrees Celsius -> canonical pairs; None if no unit."""
    if tokens[0].text == "/" and len(tokens[1:]) == 1 and len(tokens[1].text) < 3:
        return None  # $12/hour; but 2/m is algebra
    words = [token.text for token in tokens if token.text not in _SILENT]
    if words[:1] in (["°"], ["degrees"], ["degree"]) and len(words) == 2:
        # 217°T is a true bearing.
        scale = {"c": "celsius", "f": "fahrenheit", "t": "deg"}.get(words[1].lower()[:1])
        return ((scale, 1),) if scale else None
    pairs, sign = {}, 1
    for per, before, word, exponent, after in _UNIT_PART.findall(" ".join(words)):
        name = _unit_name(word)
        if name is None or name in pairs:
            return None
        sign = -1 if per else sign
        power = sign * int(exponent.replace(" ", "") or 1) * POWERS.get(before or after, 1)
        for part, times in COMPOUND.get(name, ((name, 1),)):
            pairs[part] = pairs.get(part, 0) + times * power
    return tuple(sorted(pair for pair in pairs.items() if pair != ("unit", 1))) if pairs else None


def _unit_name(word: str) -> str | None:
    lower = word.lower() if len(word) > 1 else word
    spellings = (word, lower, lower.removesuffix("s"), word.removeprefix("\\"))
    return next((UNITS[s] for s in spellings if s in UNITS and (len(s) > 1 or s == word)), None)


_CLOCK = re.compile(r"([0-9]{1,2})(?::([0-9]{2}))?(?::([0-9]{2}))? ?(?:([ap])\.? ?m\.?|o'? ?clock)")
_MONTH_NAMES = "january february march april may june july august september october november december"
_MONTHS = _MONTH_NAMES.split()
_MAYBE_DATE = re.compile(rf"[0-9]([-/.])[0-9]{{1,2}}\1[0-9]|\b(?i:{'|'.join(m[:3] for m in _MONTHS)})")
_NUMERIC_DATE = re.compile(r"([0-9]{4}|[0-9]{1,2})([-/.])([0-9]{1,2})\2([0-9]{4}|[0-9]{1,2})")
# A weekday, an article, the end of 5th.
_BESIDE_DATE = re.compile(
    r"^(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,? )?(?:the )?|(?<=[0-9])(?:st|nd|rd|th)\b|\bof\b|[.,]"
)


def clock(text: str) -> tuple | None:
    """('clock', hour, minute, second, 'a' | 'p' | '') for an explicit time of day, else None."""
    match = _CLOCK.fullmatch(text.lower()) if text[-1] in "mM.kK" else None
    if match is None:
        return None
    hour, minute, second, half = match.groups()
    return ("clock", int(hour), int(minute or 0), int(second or 0), half or "")


def same_clock(a: tuple, b: tuple) -> bool:
    """Equal times; a missing a.m. or p.m. matches either, and 15:45 is 3:45 p.m."""
    if bool(a[4]) == bool(b[4]):
        return a == b
    said, bare = (a, b) if a[4] else (b, a)
    hours = said[1], said[1] % 12 + (12 if said[4] == "p" else 0)
    return said[2:4] == bare[2:4] and bare[1] in hours


def date(text: str) -> tuple | None:
    """('date', year, month, day), with None for a missing part; None if it is not a date.

    The order of month and day in 3/5/2020 differs by country: such a date stays as written.

    >>> date("March 5th, 2020") == date("5 March 2020") == date("2020-03-05")
    True
    """
    if not _MAYBE_DATE.search(text):
        return None
    numeric = _NUMERIC_DATE.fullmatch(text)
    if numeric and (len(numeric[1]) == 4 or len(numeric[4]) in (2, 4)):
        parts = tuple(int(numeric[k]) for k in (1, 3, 4))
        return ("date", *parts) if parts[0] > 99 else ("date", "as written", *parts)
    found = {}
    for part in _BESIDE_DATE.sub("", text.lower()).split():
        months = (k for k, name in enumerate(_MONTHS, 1) if len(part) > 2 and name.startswith(part))
        month = next(months, None)
        kind = "month" if month else {4: "year", 2: "day", 1: "day"}.get(len(part))
        number = month or (int(part) if part.isdecimal() and part.isascii() else None)
        if kind is None or number is None or kind in found or "year" in found:
            return None
        found[kind] = number
    date = tuple(found.get(kind) for kind in ("year", "month", "day"))
    return ("date", *date) if len(found) > 1 and date[1] else None
