r"""One spelling for texts that look alike, and splitting a text outside its brackets.

The idea: LaTeX, Unicode and plain text write the same thing in many ways (\tfrac12, ½, 1/2; \le, ≤, <=;
1{,}234, 1,234). tidy() maps them to one spelling by tables and linear substitutions, so the parsers know only
that one; most right answers equal the reference once both are tidy. Meaning is kept: \{ is not {, and 12,34
is not 1234.
"""

import re
from functools import lru_cache

from grading.expression import Unreadable

MAX_LIST = 50
_NAMED = """
π pi ∞ infty √ sqrt ± pm ∓ mp ∪ cup ∩ cap ∅ emptyset ∈ in ⊥ perp ∥ parallel ≅ cong ∼ sim ⟨ langle ⟩ rangle
Φ Phi ϕ phi Δ Delta \u03a9 Omega \u2126 Omega α alpha β beta γ gamma δ delta ε epsilon ζ zeta η eta θ theta
ι iota κ kappa λ lambda μ mu µ mu ν nu ξ xi ρ rho σ sigma τ tau υ upsilon φ phi χ chi ψ psi ω omega"""
_VULGAR = "½12 ⅓13 ⅔23 ¼14 ¾34 ⅕15 ⅖25 ⅗35 ⅘45 ⅙16 ⅚56 ⅐17 ⅛18 ⅜38 ⅝58 ⅞78 ⅑19"
_TABLE = str.maketrans({
    **{sign: rf"\{name} " for sign, name in zip(*[iter(_NAMED.split())] * 2)},
    **{sign: rf"\frac{{{above}}}{{{below}}}" for sign, above, below in _VULGAR.split()},
    **dict.fromkeys("−–—‐‑‒﹣－", "-"), **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u3000", " "),
    **dict.fromkeys("·⋅∙×✕∗", "*"), **dict.fromkeys("÷∕⁄", "/"), **dict.fromkeys("º˚", "°"),
    **dict.fromkeys("“”„", '"'), **dict.fromkeys("‘’′`", "'"), "″": "''", "℃": "° C", "℉": "° F",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∠": " angle ", "△": " triangle ", "∛": r"\sqrt[3]",
    # The last is how GBK shows the two bytes of a degree sign, in golds of MathVerse.
    **dict(zip("⩽⩾≧≦＞＜。、∴％（），：∶；＝＋掳", "≤≥≥≤><., %(),::;=+°")),
})  # fmt: skip
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ"
_DIGITS = str.maketrans(_RAISED + _LOWERED, "0123456789+-n" * 2)

_STYLES = "text textbf textit textrm textsf texttt textnormal mathrm mathbf mathit mathsf mathtt mathcal"
_STYLES += " mathnormal mbox hbox fbox operatorname boldsymbol bm emph underline ce"
_COMMANDS = {
    name: replacement
    for names, replacement in (
        ("left right big Big bigl bigr Bigl Bigr bigg Bigg biggl biggr Biggl Biggr middle", ""),
        ("displaystyle textstyle scriptstyle limits nolimits nonumber rm bf it therefore !", ""),
        ("tiny scriptsize footnotesize small normalsize large Large LARGE huge Huge", ""),
        (_STYLES, ""),
        ("quad qquad enspace thinspace space hfill , ; : > ( ) [ ]", " "),
        ("dfrac tfrac cfrac nicefrac sfrac", r"\frac"), ("dbinom tbinom", r"\binom"),
        ("leq le leqslant leqq", "≤"), ("geq ge geqslant geqq", "≥"), ("neq ne", "≠"),
        ("lt", "<"), ("gt", ">"), ("approx simeq approxeq", "≈"), ("times cdot ast", "*"),
        ("div", "/"), ("lbrace", r"\{"), ("rbrace", r"\}"), ("lbrack", "["), ("rbrack", "]"),
        ("lvert rvert vert Vert |", "|"), ("colon", ":"), ("degree textdegree", "°"), ("%", "%"),
        ("$ textdollar", "$"), ("euro", "€"), ("pounds", "£"), ("#", ""), ("&", "&"), ("_", "_"),
        ("varnothing", r"\emptyset "), ("to rightarrow longrightarrow", "→"), ("prime", "'"),
        ("lor vee", " or "), ("land wedge", " and "), ("angle measuredangle", " angle "),
        ("triangle", " triangle "), ("dots ldots cdots", "..."), ("varphi", r"\phi "),
        ("varepsilon", r"\epsilon "), ("vartheta", r"\theta "), ("infin", r"\infty "),
    )
    for name in names.split()
}  # fmt: skip
_COMMANDS[" "] = " "
_COMMAND = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
_STYLED = re.compile(rf"\\(?:{'|'.join(_STYLES.split())})\*?\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")


def _recurring(match: re.Match) -> str:
    r"""0.1\overline{6} -> (\frac{15}{90})"""
    whole, fixed, period = match.groups()
    above = int(whole + fixed + period) - int((whole + fixed) or 0)
    return rf"(\frac{{{above}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}})"


def _rules(*rules: tuple) -> list[tuple]:
    """(what a text must contain for the rule to apply, pattern, replacement)"""
    return [(needed, re.compile(pattern), replacement) for needed, pattern, replacement in rules]


def _apply(rules: list[tuple], text: str) -> str:
    for needed, pattern, replacement in rules:
        if needed in text:
            text = pattern.sub(replacement, text)
    return text


_UNICODE = _rules(
    ("³√", "³√", r"\\sqrt[3]"),
    ("平方", "平方", " square "),
    ("立方", "立方", " cubic "),
    ("", f"[{_RAISED}]+", lambda m: f"^{{{m[0].translate(_DIGITS)}}}"),
    ("", f"[{_LOWERED}]+", lambda m: f"_{{{m[0].translate(_DIGITS)}}}"),
)
_MARKDOWN = _rules(
    ("`", r"^(`+)(?:[a-z]*\n)?\s*([^`]+?)\s*\1$", r"\2"),
    ("__", r"(?<![\w}])__([^_]+)__(?![\w{])", r"\1"),
    ("*", r"(?<![\w)}*^])(\*\*?)([^*]+)\1(?!\*)", r"\2"),
    # a mark whose partner was cut off with the sentence before the answer
    ("**", r"(?<=[A-Za-z.)])\*\*(?=[\s.:,]|$)|^\*\*(?=\S)", ""),
    # $ around the whole text, or around a part as in pandoc: no space inside, no digit after it
    ("$", r"^\s*\$\$?((?:[^$\\]|\\.)*)\$\$?[\s.,;]*$", r"\1"),
    ("$", r"(?<!\\)\$\$?(?![\s$])((?:[^$\\]|\\.)*)(?<![\s\\])\$\$?(?![0-9])", r"\1"),
)
_LATEX = _rules(
    ("\\!", r"\\!\s*", ""),
    ("{", r"\\(?:[hv]space\*?|[hv]?phantom|color|textcolor)\s*\{[^{}]*\}", ""),
    (".", r"\\(?:left|right)\.", ""),
    ("^", r"\^\s*(?:\{\s*(?:\\circ|°)\s*\}|\\circ(?![A-Za-z])|°|\{?\\degree\}?)", "°"),
    (".", r"([0-9]{0,20})\.([0-9]{0,20})\\(?:overline|bar|dot)\s*\{([0-9]{1,20})\}", _recurring),
)
_FRACTION = r"\\frac ?\{[^{}]*\} ?\{[^{}]*\}"
# 5 \frac{m}{s^2}, a unit that is written as a fraction
_UNIT_FRACTION = r"(?<=[0-9} ])\\frac ?\{ ?([a-z]+) ?\} ?\{ ?([a-z]+(?:\^\{?[23]\}?)?) ?\}$"
_PLAIN = _rules(
    ("^", r"([0-9]) ?\^ ?\{? ?(st|nd|rd|th)\b ?\}?", r"\1\2"),  # 5^{\text{th}}
    (" ", r"([0-9]) (st|nd|rd|th)\b", r"\1\2"),
    ("^", r"(?<=[0-9]) ?\^ ?(?:\{o\}|o\b)", "°"),
    (".", r"(?<![A-Za-z.])(sq|cu|in|ft|yd|mi|lb|oz|hr|min|sec|deg|Rs)\.(?= |$)", r"\1"),
    ("$", r"(?<![A-Za-z])(?:US|HK|NZ|[ACS])\$", "$"),
    ("^", r"(?<=[0-9.]) ?[xX] ?(?=10 ?\^)", "*"),  # 3 x 10^5
    ("^", r"\^ ?\{?'+ ?\}?", "'"),
    ("\\frac", r"\\frac ?([0-9]) ?([0-9])", r"\\frac{\1}{\2}"),
    ("\\frac", _UNIT_FRACTION, r" \1/\2"),
    ("\\overline", r"\\overline ?\{ ?([A-Z]{2}) ?\}", r"\1"),
    ("\\mu", r"(?<=[0-9 ])\\mu ?(?=[mgsLAFCV]\b)", "u"),
    ("\\Omega", r"(?<=[0-9 ])k ?\\Omega", "kohm"),
    # 69{degrees}, \sqrt{3}{cm}, and not \frac{3}{ab}
    ("{", rf"^((?:[^\\]|\\sqrt|\\pi|{_FRACTION})+)(?<=[0-9}}i]) ?\{{ ?([A-Za-z/.]{{2,}}) ?\}}$", r"\1 \2"),
    ("square", r"\bsquare(?=[a-z]{2})", "square "),
    ("cubic", r"\bcubic(?=[a-z]{2})", "cubic "),
    ("per", r"\bper ?cent(?:age)?(?: points?)?\b", "percent"),
    (")", r"[, ]*\((?:≈|approximately|approx\.?|about) ?([^()]*)\)$", r" ≈ \1"),  # 5 (≈ 5.1)
    ("\\{", r"\\\{ *\\\}", r"\\emptyset"),
    ("R", r"\\mathbb ?\{?R\}?$", r"(-\\infty,\\infty)"),
    ("real", r"^(?:[Aa]ll )?(?:real numbers|reals)$", r"(-\\infty,\\infty)"),
)
_SEPARATORS = _rules(
    (",", r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?!,?[0-9])", lambda m: m[0].replace(",", "")),
    (" ", r"(?<![0-9.,])(?<![0-9] )[1-9][0-9]{0,2}(?: [0-9]{3})+(?! ?[0-9]|,[0-9]|/)",
     lambda m: m[0].replace(" ", "")),
)  # fmt: skip
_ANSWER_IS = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:(?:correct|final|right|best) )*"
    r"(?:answer|solution|result|choice|option)s?(?: choice| option)?(?: is ?:?| are| ?[:=]) *",
    re.IGNORECASE,
)


@lru_cache(maxsize=4096)
def tidy(text: str) -> str:
    r"""One spelling for texts that look alike: signs, wrappers, spacing, thousands separators.

    >>> tidy(r"$\dfrac{1}{2}\,\text{cm}$."), tidy(r"1{,}234"), tidy("1 234"), tidy("12,34")
    ('\\frac{1}{2} cm', '1234', '1234', '12,34')
    """
    return _apply(_SEPARATORS, ungrouped(text))


@lru_cache(maxsize=4096)
def ungrouped(text: str) -> str:
    """tidy() before it removes thousands separators."""
    text = _apply(_MARKDOWN, text)
    if not text.isascii():
        text = _apply(_UNICODE, text).translate(_TABLE)
    if "\\" in text:
        text = _apply(_LATEX, text)
        for _ in range(3):
            if (plainer := _STYLED.sub(_unstyled, text)) == text:
                break
            text = plainer
        text = _COMMAND.sub(lambda m: _COMMANDS.get(m[1], m[0]), text)
    text = text.replace("{,}", ",").replace("~", " ").strip()
    if "\n" in text and "\\begin" not in text:
        text = re.sub(r"(?<=[\w)}\]])\s*\n\s*(?=[\w\\({\[])", "; ", text)
    text = _bare(text)
    if text.isdigit():
        return text
    spelled = _apply(_PLAIN, text)
    if text[:1] in ("'", '"', "`") and text[:1] == text[-1:]:
        spelled = spelled[1:-1]
    spelled = spelled if spelled == text else _bare(spelled)
    return re.sub("^[=≈] ?(?![=<>])", "", spelled) if spelled[:1] in ("=", "≈") else spelled


def _bare(text: str) -> str:
    """Without final punctuation, 'The answer is' and braces around all of it."""
    text = " ".join(text.split()).rstrip(".,; ")
    for _ in range(2):
        if text[:1] == "{" and text[-1:] == "}" and enclosed(text):
            text = text[1:-1].strip(" ").rstrip(".,; ")
        match = _ANSWER_IS.match(text) if len(text) > 5 else None
        if match is None:
            break
        text = text[match.end() :]
    return text


def _unstyled(match: re.Match) -> str:
    """A wrapper's content; a space separates it from letters and units next to it."""
    inner, text = match[1], match.string
    before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
    left = " " if inner[:1].isalpha() and (before.isalnum() or before in ("}", ")")) else ""
    right = " " if inner[-1:].isalpha() and after.isalpha() else ""
    return left + inner + right


_WORD = re.compile(r"[^\W\d_]\.?[^\W\d_]")
_SUBSCRIPT = re.compile(r"(?<=[A-Za-z)\]])[_^] ?\{?([0-9]*[A-Za-z0-9+-])\}?")


def words(text: str) -> str:
    """The text as words: without case, quotes, one leading article, final period."""
    if not _WORD.search(text):
        return text
    text = re.sub(r"(\\[A-Za-z]+)", r" \1 ", text)
    text = re.sub(r"\{([^{}]*)\}", r"\1", _SUBSCRIPT.sub(r"\1", text)).casefold()
    return re.sub(r"^(?:an?|the) (?=\w)", "", " ".join(text.strip("\"'. ").split()))


@lru_cache(maxsize=4096)
def compact(text: str) -> str:
    """A tidied text for telling options apart: words() without any blanks."""
    return words(text).replace(" ", "")


_BRACKET = r"(?P<open>\\\{|\\langle|\\begin(?=\{)|[(\[{])|(?P<close>\\\}|\\rangle|\\end(?=\{)|[)\]}])"
_BRACKETS = re.compile(_BRACKET)
_SEPARATOR = (
    r"(?P<comma>,? *(?<![A-Za-z\\-])(?:and|or)(?![A-Za-z-]) *|[,;])"
    r"|(?P<relation><=|>=|!=|[=<>≤≥≠≈]|\\in(?![A-Za-z]))"
    r"|(?P<union>\\cup(?![A-Za-z])|(?<=[)\]]) ?U ?(?=[(\[]))|(?P<ratio>:| to )"
)
SEPARATOR, _SEPARATORS_AND_BRACKETS = re.compile(_SEPARATOR), re.compile(f"{_SEPARATOR}|{_BRACKET}")


def outside_brackets(text: str) -> list[re.Match]:
    """The separators outside all brackets, with their kind as lastgroup; Unreadable if unbalanced."""
    if not SEPARATOR.search(text):
        return []
    found, depth = [], 0
    for match in _SEPARATORS_AND_BRACKETS.finditer(text):
        if match.lastgroup == "open":
            depth += 1
        elif match.lastgroup == "close":
            depth -= 1
            if depth < 0:
                raise Unreadable("unbalanced")
        elif depth == 0:
            found.append(match)
    if depth or len(found) >= MAX_LIST:
        raise Unreadable("unbalanced, or too long")
    return found


def cut(text: str, separators: list[re.Match], kind: str) -> list[str]:
    """The pieces of a text between the separators of one kind."""
    ends = [match.span() for match in separators if match.lastgroup == kind]
    starts = [0, *(end for _, end in ends)]
    return [text[a:b].strip() for a, b in zip(starts, [*(start for start, _ in ends), len(text)])]


def enclosed(text: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) if the first bracket closes at the very end of the text."""
    first, depth = _BRACKETS.match(text), 0
    for match in _BRACKETS.finditer(text) if first else ():
        depth += 1 if match["open"] else -1
        if depth <= 0:
            inside = text[first.end() : match.start()].strip()
            return (first[0], inside, match[0]) if match.end() == len(text) else None
    return None
