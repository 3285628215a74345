"""reward.py: right in every form, wrong in every near miss, and never executed, hung or raised."""

import json
import random
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import sympy

import reward as reward_module
from reward import extract_answer, is_correct, reward

FOLDER = Path(__file__).parent
Case = tuple[str, str, bool, list[str] | None]  # prediction, answer, right, options


def read_cases() -> dict[str, list[Case]]:
    """kind -> cases, from the table (its first lines give the format)."""
    kinds, kind, options = {}, "", None
    for line in (FOLDER / "reward_cases.txt").read_text(encoding="utf-8").splitlines()[3:]:
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


@pytest.mark.parametrize("kind", CASES)
def test_each_case_of_the_table_has_its_verdict_also_with_the_sides_exchanged(kind):
    exchanged = [(answer, prediction, *rest) for prediction, answer, *rest in CASES[kind]]
    assert wrongly_judged(CASES[kind]) == wrongly_judged(exchanged) == []


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


BOXES = {
    r"\boxed{5}": "5", r"so \boxed{3}, no: \boxed{4}.": "4", r"\boxed {5}": "5", r"\boxed{ 5 }": "5",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}", r"\boxed{\{1, 2\}}": r"\{1, 2\}", r"\boxed{\{1}": r"\{1",
    r"\boxed{a \\{b} c}": r"a \\{b} c", r"{ } } \boxed{5} {": "5", r"\boxed{5} and \boxed{6": "5",
    r"\boxed{\text{no } \boxed{5}": "5", r"\\boxed{5}": "5", "\\boxed{1\n2}": "1\n2", r"\boxed{}": "",
    r"\boxed 5": None, r"\fbox{5}": None, r"\boxed{5": None, r"boxed{5}": None, "5": None, "": None, None: None,
}  # fmt: skip


@pytest.mark.parametrize("response", BOXES)
def test_the_last_balanced_box_is_the_answer(response):
    assert extract_answer(response) == BOXES[response]


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
    n, d = abs(value.numerator), value.denominator
    sign, k, (whole, rest) = "-" * (value < 0), rng.randint(2, 9), divmod(n, d)
    made = [
        f"{n}/{d}", rf"\frac{{{n}}}{{{d}}}", rf"\frac{{{n * k}}}{{{d * k}}}", rf"{n}\cdot {d}^{{-1}}",
        rf"{n}/{d}\text{{ cm}}",
    ]  # fmt: skip
    if whole and rest:
        made += [rf"{whole}\frac{{{rest}}}{{{d}}}", f"{whole} {rest}/{d}"]
    if d == 1:
        made += [f"{n}.0", f"{n:,}", f"{n:,}".replace(",", r"\,"), rf"\sqrt{{{n * n}}}", f"{n:,} cm"]
    if 1000 % d == 0:  # a finite decimal
        made += [f"{n / d:.3f}", rf"{n / d:.3f} \times 10^0", f"{100 * n / d:.1f}%"]
    made = [sign + text for text in made]
    return [*made, rf"\dfrac{{{sign}{n}}}{{{d}}}", f"({sign}{n})/({d})", f"x = ${sign}{n}/{d}$"]


def test_a_number_equals_itself_in_every_form_and_never_another_number():
    rng = random.Random(0)
    for _ in range(120):
        denominator = rng.choice([1, 1, 2, 3, 4, 7, 8, 20, 25])
        value = Fraction(rng.randint(-99999, 99999) or 1, denominator)
        other = value + Fraction(rng.choice([-1, 1]) * 10 ** rng.randint(0, 3), denominator)
        one, two = rng.choice(forms(value, rng)), rng.choice(forms(value, rng))
        if "%" in one + two and "cm" in one + two:
            continue  # a percentage of metres is left undecided
        assert is_correct(one, two), (one, two)
        wrong = rng.choice([text for text in forms(other, rng) if "%" not in text])
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


LISTED = (FOLDER / "hostile_cases.txt").read_text(encoding="utf-8").splitlines()[1:]
HOSTILE = [text for text in LISTED if text and not text.startswith("# ")] + [
    # sizes
    "9" * 1_000_000, "9" * 4301, "0." + "3" * 900, "a" * 200_000, "5" * 200_000, "$" * 200_000,
    r"\frac{" + "1" * 400 + "}{" + "1" * 400 + "}", r"0.\overline{" + "3" * 500 + "}",
    # depth and length
    "(" * 500 + "5" + ")" * 500, "{" * 100_000 + "5" + "}" * 100_000, "[" * 400 + "5" + "]" * 400,
    r"\{" * 200 + "5" + r"\}" * 200, r"\frac{1}{" * 150 + "5" + "}" * 150, r"\sqrt{" * 99 + "5" + "}" * 99,
    r"\text{" * 150 + "5" + "}" * 150, r"\boxed{" * 20_000, "-(" * 200 + "5" + ")" * 200, "|" * 300,
    r"\sin(" * 38 + "x" + ")" * 38, "+" * 500 + "5", "1+" * 450 + "1", "1/" * 149 + "1", "^" * 300,
    r"\begin{pmatrix}" * 60, r"\begin{pmatrix}" + "1&" * 300 + r"1\end{pmatrix}", r"\sqrt[" * 100,
    "1," * 400 + "1", r"\pm " * 50 + "5", "and " * 200, "The answer is " * 70, "(A)" * 200, "xyz" * 300,
    "A, " * 330, "B (6) or " * 100, r"\vec" * 190 + "=5", "__a" * 333, "(≈" * 400, "5 {a" * 240,
    # characters
    "", " ", "5\nimport os", "5\x00", "\x005", "5\ud800", "\udfff", "5\u202e", "\u200f5", "5\u200b",
    "\ufeff5", "5\x1b[31m", "5" + "\u0301" * 500, "\ufdfa" * 1000,
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
        check=False, cwd=FOLDER, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    assert json.loads(child.stdout) == {"accepted": [], "events": [], "ended in time": True}
