r"""Do two expressions have one value? Exact where rational, to 50 digits elsewhere.

The idea: two trees are equal if they have equal values at a handful of fixed points. Rational functions are
evaluated exactly; anything else with 80 digits, of which rounding loses few, and two different values share
fewer still: 0.333 is not 1/3. Caps on the size of numbers bound the time of every step.

What we do differently from graders built on a computer algebra system: no simplification and no sympy (it is
the slow twin in the tests). Equality is meant where both sides are defined on the real line: x^2/x = x, but
sqrt(x^2) is |x| and not x.
"""

import math
import threading
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from operator import neg, pos
from typing import NamedTuple

import mpmath

from grading.expression import ARITHMETIC, CONSTANTS, FUNCTIONS, Tree, mentions

MAX_BITS = 8000  # of an exact number
DIGITS = 80
ROUNDING = 1e-50  # how far apart, relative to their size, one value may come out in two ways


class Point(NamedTuple):
    """Where trees are evaluated: a value for each free symbol, and a number line."""

    names: tuple[str, ...]  # of the free symbols, sorted; () for constants
    index: int  # which of the fixed points
    counts: bool  # whole numbers only
    real: bool  # True: a value off the real line is an error, as sqrt(-1) is in school
    mp: mpmath.ctx_mp.MPContext


@lru_cache(maxsize=64)
def _context(thread: int) -> mpmath.ctx_mp.MPContext:
    # mpmath's functions change the precision of their context while they work: one for each thread.
    context = mpmath.ctx_mp.MPContext()
    context.dps = DIGITS
    return context


# mpmath memoises pi, e and logarithms without a lock, in two writes; a thread that reads between
# them gets garbage. Computed once at import, to more digits than are used later, they never change.
for _constant in ("mpf_pi", "mpf_e", "mpf_ln2", "mpf_ln10"):
    getattr(mpmath.libmp, _constant)(4000)


@lru_cache(maxsize=4096)
def evaluate(tree: Tree, at: Point):
    """The tree's value at a point: a Fraction where possible, else a number of at.mp, or None."""
    try:
        return _checked(_value(tree, at), at)  # i alone is off the real line, too
    except (ArithmeticError, ValueError):
        return None


def _value(tree: Tree, at: Point):
    if isinstance(tree, Fraction):
        return tree
    if isinstance(tree, tuple):
        return _checked(_apply(tree[0], [_value(part, at) for part in tree[1:]], at), at)
    if tree in CONSTANTS:
        return at.mp.mpc(0, 1) if tree == "i" else +getattr(at.mp, tree)
    k = at.names.index(tree)
    place = (at.index + 2 * k) % 6
    return _COUNTS[place] + k if at.counts else _COORDINATES[place] + Fraction(k, 19)


# Fixed coordinates, of both signs and on both sides of 1. Every other point is positive in all
# symbols, so that roots and logarithms have a domain in common; odd and even numerators, so
# that (-1)^n is neither 1 nor -1.
_COORDINATES = [Fraction(*f) for f in ((4, 7), (-13, 5), (31, 9), (-6, 11), (17, 3), (8, 13))]
_COUNTS = [Fraction(n) for n in (7, 4, 9, 5, 11, 6)]
_OPERATORS = ARITHMETIC | {"neg": neg, "degrees": pos, "abs": abs}
_ROUNDING = {"floor": math.floor, "ceil": math.ceil}


def _apply(operation: str, values: list, at: Point):
    if operation == "^":
        return _raise(*values, at)
    if operation in ("factorial", "binom"):
        return _count(operation, values)
    exact = all(isinstance(value, Fraction) for value in values)
    if exact and operation in _ROUNDING:
        return Fraction(_ROUNDING[operation](*values))
    if not exact or operation not in _OPERATORS:
        values = [_inexact(value, at) for value in values]
    if operation in _OPERATORS:
        return _OPERATORS[operation](*values)
    if abs(values[0]) > 10**6:  # sin(10^4000) needs pi to 4000 digits
        raise ArithmeticError("too large for a function")
    return getattr(at.mp, FUNCTIONS.get(operation, operation))(values[0])


def _count(operation: str, values: list) -> Fraction:
    counts = [int(v) for v in values if isinstance(v, Fraction) and v.denominator == 1 and v >= 0]
    if len(counts) < len(values) or counts[0] > (200 if operation == "factorial" else 1000):
        raise ArithmeticError("not a count, or too large")
    return Fraction((math.factorial if operation == "factorial" else math.comb)(*counts))


def _inexact(value, at: Point):
    if isinstance(value, Fraction):
        return at.mp.mpf(value.numerator) / value.denominator
    return value


def _checked(value, at: Point):
    """Keep exact numbers small and inexact ones finite, and on the real line if so agreed."""
    if isinstance(value, Fraction):
        if value.numerator.bit_length() + value.denominator.bit_length() <= MAX_BITS:
            return value
        if not at.names:  # a constant must stay exact: 2^100 + 1 is not 2^100
            raise ArithmeticError("too large")
        value = _inexact(value, at)
    if not at.mp.isfinite(value):
        raise ArithmeticError("a pole")
    if at.real and isinstance(value, at.mp.mpc):
        if value.imag:
            raise ArithmeticError("off the real line")
        value = value.real
    return value


def _raise(base, exponent, at: Point):
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        exact = _exact_power(base, exponent)
        if exact is not None:
            return exact
        if exponent.denominator == 1 and not at.names:
            raise ArithmeticError("too large")
        if base < 0 and exponent.denominator % 2:  # the real cube root of -8 is -2
            sign = -1 if exponent.numerator % 2 else 1
            return sign * _raise(-base, exponent, at)
    base, exponent = _inexact(base, at), _inexact(exponent, at)
    if not base:
        raise ArithmeticError("a power of zero")
    if abs(exponent * at.mp.log(base)) > 10**4:
        raise ArithmeticError("too large")
    return at.mp.power(base, exponent)


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    """base ** exponent where it is rational and small enough, else None."""
    if base == 0:
        if exponent <= 0:
            raise ArithmeticError("0^0 or 1/0")
        return base
    if abs(base) == 1 and exponent.denominator == 1:
        return base ** (exponent.numerator % 2)
    bits = base.numerator.bit_length() + base.denominator.bit_length()
    if abs(exponent) * bits > MAX_BITS or exponent.denominator > 64:
        return None
    degree = exponent.denominator
    if degree > 1:
        above, below = _root(abs(base.numerator), degree), _root(base.denominator, degree)
        if above is None or below is None or (base < 0 and degree % 2 == 0):
            return None
        base = Fraction(above if base > 0 else -above, below)
    return base**exponent.numerator


def _root(n: int, degree: int) -> int | None:
    """The exact integer root, or None (a root beyond 2^50 is left to the numeric comparison)."""
    guess = round(math.exp(math.log(n) / degree)) if n.bit_length() < 50 * degree else 0
    return next((r for r in (guess, guess - 1, guess + 1) if r >= 0 and r**degree == n), None)


def symbols(tree: Tree) -> set[str]:
    """The names of a tree's free symbols."""
    if isinstance(tree, tuple):
        return set().union(*map(symbols, tree[1:]))
    return {tree} - CONSTANTS if isinstance(tree, str) else set()


def _lines(trees: tuple) -> Iterator[list[Point]]:
    """The points: on the real line first, unless i is mentioned, then off it."""
    names = tuple(sorted(set().union(*map(symbols, trees))))
    if "infty" in names or "emptyset" in names:
        return
    # Factorials and binomials live on whole numbers.
    counts = bool(names) and any(mentions(tree, "factorial", "binom") for tree in trees)
    mp = _context(threading.get_ident())
    for real in (False,) if any(mentions(tree, "i") for tree in trees) else (True, False):
        yield [Point(names, k, counts, real, mp) for k in range(6 if names else 1)]


def same_value(a: Tree, b: Tree) -> bool:
    r"""Do two trees have one value wherever both have one?

    >>> from grading.expression import parse, scan
    >>> trees = [parse(scan(text)) for text in (r"\frac{x}{\sqrt{2}}", r"\sqrt{2}x/2", r"\sqrt{2}/(2x)")]
    >>> same_value(*trees[:2]), same_value(*trees[1:])
    (True, False)
    """
    if a == b:
        return True
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return False
    for points in _lines((a, b)):
        agreed = 0
        for point in points:
            equal = _agree(a, b, point)
            if equal is False:
                return False
            agreed += equal is True
            if agreed == 3 or (equal and not point.names):
                return True
        if agreed == 2:  # the domains have little in common
            return True
    return False


def _agree(a: Tree, b: Tree, at: Point) -> bool | None:
    """Is it one value at this point? None where one of them has none."""
    left, right = evaluate(a, at), evaluate(b, at)
    if left is None or right is None:
        return None
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = _inexact(left, at), _inexact(right, at)
    # Around 0 nothing is left but what rounding made of larger numbers.
    return bool(abs(left - right) <= ROUNDING * max(abs(left), abs(right), 1e-10))


def constant(tree: Tree):
    """The value of a tree without symbols, on the real line, or None."""
    point = Point((), 0, False, True, _context(threading.get_ident()))
    return None if symbols(tree) else evaluate(tree, point)


def proportional(a: Tree, b: Tree, positive: bool) -> bool:
    """Is a a constant non-zero multiple of b (a positive one, for inequalities)?"""
    for points in _lines((a, b)):
        values = [(evaluate(a, point), evaluate(b, point), point) for point in points]
        pairs = [(_inexact(x, at), _inexact(y, at)) for x, y, at in values if None not in (x, y)]
        if len(pairs) < 2:
            continue
        x0, y0 = pairs[0]
        if not x0 or not y0 or (positive and (x0 / y0).real < 0):
            return False
        return all(abs(x * y0 - y * x0) <= ROUNDING * (abs(x * y0) + abs(y * x0)) for x, y in pairs)
    return False
