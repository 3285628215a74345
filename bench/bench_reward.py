"""How fast is reward.is_correct, and where does it differ from math-verify?

    python bench/bench_reward.py [--disagreements]

Microseconds per call by kind of answer (median, p99, worst), over the cases of reward_cases.txt:
cold is with all caches empty, as for a text never seen before (the best of three calls, because a
shared machine interrupts some for milliseconds); warm is the second call. math-verify is measured
on the same cases if it is installed (both sides in a box, the answer as gold); --disagreements
lists each case on which it differs from the table, below the reason for the difference.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_reward

import reward
from grading import spelling, structure, value

CACHES = [spelling.tidy, spelling.ungrouped, spelling.compact, structure.readings, value.evaluate]

# Why math-verify's verdict differs, by kind: (kind, the table's verdict) -> reason.
REASONS = {
    ("numbers", True): "it reads spaces, recurring decimals or mixed numbers otherwise",
    ("numbers", False): "it compares decimals after rounding to six digits",
    ("radicals, powers, constants", True): "plain text (2**10, 2πr, √12) is no LaTeX to it",
    ("units, currency, percent", True): "it knows few units, no synonyms, no currency words",
    ("units, currency, percent", False): "it drops units on both sides: 5 cm equals 5 m",
    ("wrappers", True): "Markdown and sentences around the answer",
    ("equations", True): "it does not take labels, factors or systems into account",
    ("equations", False): "it takes the right-hand side of any equation, and drops units",
    ("algebra", True): "it does not simplify that far, or reads the function otherwise",
    ("algebra", False): "it does not tell x from X",
    ("intervals", True): "other spellings of infinity, union and membership",
    ("tuples", True): "names of points, signs in Unicode, separators",
    ("sets and lists", True): "bare lists in another order, words in lists, and/or",
    ("sets and lists", False): "it ignores repeated elements, and does not tell and from or",
    ("inequalities", True): "chains, factors and systems are compared by form",
    ("inequalities", False): "it does not tell and from or",
    ("matrices", True): "environments and lists of lists are compared by form",
    ("scientific notation, infinity", True): "3e5, 3 x 10^5 and words for infinity",
    ("scientific notation, infinity", False): "an absolute tolerance makes small numbers equal",
    ("complex numbers", True): "i is a symbol to it",
    ("unicode", True): "it does not map Unicode signs",
    ("ratios, times, dates", True): "structures to us, expressions or nothing to it",
    ("ratios, times, dates", False): "it divides ratios, subtracts dates, and cuts a time short",
    ("words, yes and no", True): "it compares words as strings, with case and article",
    ("words, yes and no", False): "words as products of letters: act equals cat",
    ("letters", True): "it knows few wrappings of a letter",
    ("letters", False): "it stops at the first part that it can read",
    ("several letters", True): "letters as a set, however they are joined",
    ("several letters", False): "it does not tell and from or",
    ("mixed", True): "as above, in combination",
    ("mixed", False): "as above, in combination",
}


def ours(prediction: str, answer: str) -> bool:
    return reward.is_correct(prediction, answer)


def load_math_verify():
    """Its judge as (prediction, answer) -> bool, or None where it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None
    return lambda p, a: bool(verify(parse(rf"\boxed{{{a}}}"), parse(rf"\boxed{{{p}}}")))


def timed(judge, cases: list, cold: bool) -> tuple[list[float], list[bool]]:
    """Microseconds and verdicts; cold: the best of three calls, each with our caches empty."""
    times, verdicts = [], []
    for prediction, answer, *_ in cases:
        best = float("inf")
        for _ in range(3 if cold else 1):
            for cache in CACHES if cold else ():
                cache.cache_clear()
            start = time.perf_counter()
            verdict = judge(prediction, answer)
            best = min(best, time.perf_counter() - start)
        verdicts.append(verdict)
        times.append(best * 1e6)
    return times, verdicts


def row(name: str, times: list[float], verdicts: list[bool], cases: list) -> str:
    agreed = sum(v == case[2] for v, case in zip(verdicts, cases)) / len(cases)
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    middle = statistics.median(ordered)
    return f"{name:42} {len(cases):5} {middle:9.0f} {p99:9.0f} {ordered[-1]:9.0f} {agreed:9.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--disagreements", action="store_true", help="list each with its reason")
    options = parser.parse_args()
    kinds = {kind: c for kind, c in test_reward.CASES.items() if kind != "options"}
    everything = [case for cases in kinds.values() for case in cases]
    reward.is_correct(r"\sqrt{2}", "1.5")  # builds the number contexts
    gc.freeze()
    print(f"{'us per call':42} {'cases':>5} {'median':>9} {'p99':>9} {'worst':>9} {'as table':>9}")
    for kind, cases in kinds.items():
        print(row(kind, *timed(ours, cases, True), cases))
    print(row("all, cold", *timed(ours, everything, True), everything))
    timed(ours, everything, False)
    print(row("all, warm", *timed(ours, everything, False), everything))
    judge = load_math_verify()
    if judge is None:
        print("math-verify is not installed: no comparison")
        return
    times, verdicts = timed(judge, everything, False)
    print(row("math-verify", times, verdicts, everything))
    if options.disagreements:
        report(kinds, dict(zip(map(str, everything), verdicts)))


def report(kinds: dict, theirs: dict[str, bool]) -> None:
    """Every case on which math-verify differs from the table, below the reason."""
    for kind, cases in kinds.items():
        for right in (True, False):
            differing = [c for c in cases if c[2] is right and theirs[str(c)] != right]
            if differing:
                reason = REASONS.get((kind, right), "not yet explained")
                print(f"\n{kind}, {'right' if right else 'wrong'}: {reason}")
            for prediction, answer, *_ in differing:
                print(f"    {prediction}  {'==' if right else '!='}  {answer}")


if __name__ == "__main__":
    main()
