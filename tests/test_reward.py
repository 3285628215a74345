"""reward.py: right in every form, wrong in every near miss, and never executed, hung or raised."""

import json
import random
import re
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
import sympy

import reward as reward_module
from grading import spelling, structure, value
from reward import extract_answer, is_correct, reward

CASES_FILE = Path(__file__).with_name("reward_cases.txt")
Case = tuple[str, str, bool, list[str] | None]  # prediction, answer, right, options


def read_cases() -> dict[str, list[Case]]:
    """kind -> cases, from the table (its first lines give the format)."""
    kinds, kind, options = {}, "", None
    for line in CASES_FILE.read_text(encoding="utf-8").splitlines()[3:]:
        if line.startswith("# "):
            kind, options = line[2:], None
        elif line.startswith("@ "):
            options = line[2:].split("; ")
        elif line:
            right = "  ==  " in line
            prediction, answer = line.split("  ==  " if right else "  !=  ")
            kinds.setdefault(kind, []).append((prediction, answer, right, options))
    return kinds


CASES = read_cases()


def wrongly_judged(cases: list[Case]) -> list[Case]:
    return [case for case in cases if is_correct(case[0], case[1], case[3]) != case[2]]


def exchanged(cases: list[Case]) -> list[Case]:
    return [(answer, prediction, *rest) for prediction, answer, *rest in cases]


@pytest.mark.parametrize("kind", CASES)
def test_each_case_of_the_table_has_its_verdict(kind):
    assert wrongly_judged(CASES[kind]) == []


@pytest.mark.parametrize("kind", CASES)
def test_the_verdict_is_the_same_with_the_sides_exchanged(kind):
    assert wrongly_judged(exchanged(CASES[kind])) == []


def test_the_table_is_large_and_balanced():
    cases = [case for kind in CASES.values() for case in kind]
    assert len(cases) > 1500 and len(set(map(str, cases))) == len(cases)
    assert 0.3 < sum(not case[2] for case in cases) / len(cases) < 0.7


def test_the_policy_in_the_docstring_is_the_policy_of_the_code():
    rows = re.findall(r"^    (.+?) +\| (.+?) +\| (True|False)", reward_module.__doc__, re.MULTILINE)
    assert len(rows) > 30
    assert [(p, a, str(is_correct(p, a))) for p, a, _ in rows] == rows


WRAPPERS = [
    r"\boxed{%s}", "$%s$", r"\(%s\)", "%s.", "  %s ", "{%s}", r"\text{%s}", r"\mathbf{%s}",
    "The answer is %s", "Answer: %s", r"$\boxed{%s}$", r"\displaystyle %s", "**%s**", "\n%s\n",
]  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_changes_no_verdict(wrapper):
    sample = random.Random(0).sample([c for kind in CASES.values() for c in kind], 250)
    plain = [c for c in sample if not re.search(r"[$*`\"]|nswer|^\S\)", c[0])]
    assert wrongly_judged([(wrapper % p, *rest) for p, *rest in plain]) == []
    assert wrongly_judged([(p, wrapper % a, *rest) for p, a, *rest in plain]) == []


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        (r"\boxed{5}", "5"),
        (r"so \boxed{3}, no: \boxed{4}.", "4"),
        (r"\boxed {5}", "5"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{a \\{b} c}", r"a \\{b} c"),
        (r"{ } } \boxed{5} {", "5"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{\text{no } \boxed{5}", "5"),
        (r"\\boxed{5}", "5"),
        ("\\boxed{1\n2}", "1\n2"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
        (r"\boxed{5", None),
        (r"boxed{5}", None),
        ("5", None),
        ("", None),
        (None, None),
    ],
)
def test_the_last_balanced_box_is_the_answer(response, extracted):
    assert extract_answer(response) == extracted


def test_the_reward_is_one_for_a_right_box_and_zero_for_anything_else():
    assert reward(r"\boxed{0.5}", r"\boxed{\frac12}") == 1.0
    assert reward(r"\boxed{B}", "dog", ["cat", "dog"]) == 1.0
    assert reward(r"\boxed{0.4}", r"\boxed{\frac12}") == 0.0
    assert reward("0.5", "0.5") == 0.0  # right, and not in a box
    assert reward(r"\boxed{}", "") == 0.0
    assert isinstance(reward("", "5"), float)


@pytest.mark.parametrize("pair", [(None, "5"), ("5", None), (5, 5), (b"5", "5"), ([], {}), ("", "")])
def test_what_is_no_text_is_wrong_and_raises_nothing(pair):
    assert is_correct(*pair) is False and is_correct(*pair, ["5", "6"]) is False


def forms(value: Fraction, rng: random.Random) -> list[str]:
    """Ways to write one rational number."""
    n, d = value.numerator, value.denominator
    sign, n = ("-", -n) if n < 0 else ("", n)
    k = rng.randint(2, 9)
    made = [
        f"{sign}{n}/{d}", rf"{sign}\frac{{{n}}}{{{d}}}", rf"\dfrac{{{sign}{n}}}{{{d}}}",
        rf"{sign}\frac{{{n * k}}}{{{d * k}}}", f"({sign}{n})/({d})",
        rf"x = {sign}\tfrac{{{n}}}{{{d}}}",
        rf"${sign}\frac{{{n}}}{{{d}}}$", rf"{sign}{n}\cdot {d}^{{-1}}",
        rf"{sign}{n}/{d}\text{{ cm}}",
    ]  # fmt: skip
    whole, rest = divmod(n, d)
    if whole and rest:
        made += [rf"{sign}{whole}\frac{{{rest}}}{{{d}}}", f"{sign}{whole} {rest}/{d}"]
    if d == 1:
        made += [f"{sign}{n}", f"{sign}{n}.0", f"{sign}{n:,}", f"{sign}{n:,}".replace(",", r"\,")]
        made += [rf"{sign}\sqrt{{{n * n}}}", f"{sign}{n}e0", rf"\text{{{sign}{n}}}", f"{sign}{n:,} cm"]
    while d % 2 == 0:
        d //= 2
    while d % 5 == 0:
        d //= 5
    if d == 1:  # a finite decimal
        digits = f"{float(value):.12f}".rstrip("0").rstrip(".")
        made += [digits, rf"{digits} \times 10^0", f"{float(value * 100):.10f}%"]
    return made


def test_a_number_equals_itself_in_every_form_and_never_another_number():
    rng = random.Random(0)
    for _ in range(120):
        denominator = rng.choice([1, 1, 2, 3, 4, 7, 8, 20, 25])
        value = Fraction(rng.randint(-99999, 99999) or 1, denominator)
        other = value + Fraction(rng.choice([-1, 1]) * 10 ** rng.randint(0, 3), denominator)
        one, two = rng.choice(forms(value, rng)), rng.choice(forms(value, rng))
        if "%" in one + two and re.search("[cm]", one + two):
            continue  # a percentage of metres is left undecided
        assert is_correct(one, two), (one, two)
        wrong = rng.choice([t for t in forms(other, rng) if "%" not in t])
        assert not is_correct(wrong, one), (wrong, one)


X, Y = sympy.symbols("x y", positive=True)


def random_expression(rng: random.Random, depth: int):
    """A rational function of x and y with roots and sines of them here and there."""
    if depth == 0:
        return rng.choice([X, Y, X, Y, sympy.pi, sympy.Rational(rng.randint(1, 9), 4)])
    a, b = random_expression(rng, depth - 1), random_expression(rng, 0)
    forms = (a + b, a - b, a * b, a / (b + 2), (a + b) ** 2, a**-1, sympy.sqrt(a), sympy.sin(a))
    return rng.choice(forms)


def test_what_sympy_rewrites_keeps_its_value_and_what_it_changes_does_not():
    # sympy is the slow twin: it parses nothing here, it expands, factors and prints.
    rng, rewritings = random.Random(2), (sympy.expand, sympy.factor, sympy.together, sympy.cancel)
    verdicts = []
    while len(verdicts) < 60:
        one, change = random_expression(rng, 3), rng.choice([0, 0, sympy.Rational(1, 7), X - Y])
        texts = sympy.latex(one), sympy.latex(rng.choice(rewritings)(one + change))
        if one.is_number or max(map(len, texts)) > 150:
            continue
        verdicts.append(change == 0)
        assert is_correct(*texts) == verdicts[-1], texts
        assert is_correct(f"z = {texts[0]}", f"{texts[1]} - z = 0") == verdicts[-1], texts
    assert min(verdicts.count(True), verdicts.count(False)) > 20


def test_every_letter_in_every_wrapping_is_that_option_and_no_other():
    options = ["red", "green", "blue", "black", "white"]
    wrappings = ["%s", "(%s)", "%s.", "%s)", r"\text{%s}", r"\textbf{(%s)}", "Option %s", "[%s]"]
    wrappings += ["The answer is %s", "The correct answer is (%s).", "answer: %s", "**%s**"]
    for k, letter in enumerate("ABCDE"):
        for wrapping in wrappings:
            for j, answer in enumerate("ABCDE"):
                assert is_correct(wrapping % letter, answer) == (k == j)
                assert is_correct(wrapping % letter, options[j], options) == (k == j)
                assert is_correct(wrapping % letter.lower(), answer, options) == (k == j)
                if wrapping not in ("[%s]", "%s)", "Option %s"):  # wrappings of letters only
                    assert is_correct(wrapping % options[k], answer, options) == (k == j)


HOSTILE = [
    # code, attribute access, templates
    "__import__('os').system('x')", "().__class__.__bases__", "eval('5')", "exec('x=5')",
    "int('5')",
    "lambda: 5", "[x for x in range(10**9)]", "5 if True else 6", "5; import os", "5\nimport os",
    "(5).real", "5.__class__", "{'a': 5}", "[5][0]", "5 == 5", "5 or 1/0", "%s%s%n", "{{5*1}}x",
    r"\input{/etc/passwd}", r"\write18{ls}", r"\def\x{5}\x", r"\newcommand{\a}{5}\a", "<b>5</b",
    # towers, factorials, sizes
    "9**9**9**9", "9^{9^{9^{9}}}", "2^{2^{2^{2^{2^{2}}}}}", "10^{10^{10}}", "10^{-10^{10}}",
    "factorial(10**9)", "(10^9)!", "((((5!)!)!)!)!", r"\binom{10^9}{3}", "e^{e^{e^{e^{5}}}}",
    r"\sin(10^{5000})", r"\cos(9^{9^{9}})", "x^{x^{x^{x^{x}}}}", "(x+1)^{1000000}", "i^{10^{12}}",
    "1.0000001^{10^9}", r"(\sqrt{2})^{20000}", "1e999999999", "1e400", "(1+x)^{100}(1+y)^{100}",
    "9" * 1_000_000, "9" * 4301, "0." + "3" * 900, "a" * 200_000, "5" * 200_000, "$" * 200_000,
    r"\frac{" + "1" * 400 + "}{" + "1" * 400 + "}", r"0.\overline{" + "3" * 500 + "}",
    # depth and length
    "(" * 500 + "5" + ")" * 500, "{" * 100_000 + "5" + "}" * 100_000, "[" * 400 + "5" + "]" * 400,
    r"\{" * 200 + "5" + r"\}" * 200, r"\frac{1}{" * 150 + "5" + "}" * 150,
    r"\sqrt{" * 99 + "5" + "}" * 99,
    r"\text{" * 150 + "5" + "}" * 150, r"\boxed{" * 20_000, "-(" * 200 + "5" + ")" * 200, "|" * 300,
    r"\sin(" * 38 + "x" + ")" * 38, "+" * 500 + "5", "1+" * 450 + "1", "1/" * 149 + "1", "^" * 300,
    r"\begin{pmatrix}" * 60, r"\begin{pmatrix}" + "1&" * 300 + r"1\end{pmatrix}", r"\sqrt[" * 100,
    "1," * 400 + "1", r"\pm " * 50 + "5",
    "and " * 200, "The answer is " * 70, "(A)" * 200, "xyz" * 300, "A, " * 330, "B (6) or " * 100,
    r"\vec" * 190 + "=5", "__a" * 333, "(≈" * 400, "5 {a" * 240,
    # characters
    "5\x00", "\x005", "5\ud800", "\udfff", "5\u202e", "\u200f5", "5\u200b", "\ufeff5", "5\x1b[31m",
    "٥", "５", "५", "Ⅴ", "⑤", "5\u0301", "5" + "\u0301" * 500, "\ufdfa" * 1000, "\U0001d7d3",
    # no number at all
    "1/0", "0/0", r"\frac{5}{0}", "0^0", "0^{-1}", r"\log(0)", r"\tan 90°", "nan", "NaN", "inf",
    "-inf",
    r"\infty-\infty", r"0\cdot\infty", "5+nan", r"\arcsin(2)", r"\sqrt[0]{5}", r"\log_{1}{5}",
    # half-written
    "", " ", "\\", "{", "}", "{5", "5}", "(5", "5)", "(5]", r"\boxed{5", r"\text{5", "5^", "5_",
    "5+", "5*",
    "/5", "5**", "5//1", "=", "==5", "5=6", "5=5=6", "<5", "5:", ":5", "5,,5", ",", "5!!5", "%5",
    "5%%", "5°°",
    "1 2 3", "5 5", "5.5.5", "5..5", "1_0", "5_0", "0x5", "0b101", "5j", "& & &", r"\frac",
    r"\frac{}{}",
    r"\sqrt{}", r"\cup 5", r"\pm", "99:99 pm", "2020-99-99", "''", "5''",
]  # fmt: skip
TARGETS = ["5", r"\boxed{42}", "x+1", r"\sqrt{2}", "(1,2)", "1, 2", "cat", "B"]


def judge_the_hostile() -> dict:
    """Runs in a child: every pair both ways, with and without options, under an audit hook."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    is_correct("sqrt(2)", "1.5")  # builds the number contexts before the hook is listening
    events, accepted, slowest = [], [], 0.0
    watched = ("exec", "compile", "import", "open", "os.system", "subprocess.Popen", "socket.connect")
    sys.addaudithook(lambda event, _: events.append(event) if event in watched else None)
    for k, text in enumerate(HOSTILE):
        for target in TARGETS:
            start = time.thread_time()
            for options in (None, ["6", "7", "dog", r"\pi"]):
                if is_correct(text, target, options) or is_correct(target, text, options):
                    accepted.append((k, target))
            slowest = max(slowest, time.thread_time() - start)
            reward(r"\boxed{" + text + "}", target)
        extract_answer(text)
    return {"accepted": accepted, "events": events, "ended in time": slowest < 0.5}  # of four verdicts


def test_hostile_input_is_wrong_executes_nothing_and_ends_in_time():
    command = "import json, test_reward; print(json.dumps(test_reward.judge_the_hostile()))"
    child = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {command}"],
        check=False, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    assert json.loads(child.stdout) == {"accepted": [], "events": [], "ended in time": True}


def test_a_caller_deep_in_its_own_stack_gets_a_verdict():
    def descend(depth: int) -> bool:
        return descend(depth - 1) if depth else is_correct("(" * 30 + "5" + ")" * 30, "6")

    assert descend(sys.getrecursionlimit() - 120) is False


def test_ten_threads_at_once_give_the_same_verdicts_as_one():
    cases = [case for kind in CASES.values() for case in kind]
    mistakes = []

    def work(seed: int) -> None:
        mistakes.extend(wrongly_judged(random.Random(seed).sample(cases, 300)))

    for cached in (value.evaluate, structure.readings, spelling.tidy, value._context):
        cached.cache_clear()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mistakes == []
