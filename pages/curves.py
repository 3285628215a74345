"""Curves as SVG: one small chart a number, all runs in it.

A chart is markup and nothing else: its axis begins at 0 and ends at a round number, and every line
carries its values, so that whoever opens the page can read them off (report.html).
"""

import math
from html import escape
from typing import NamedTuple

MOST_POINTS = 200  # of a curve; a longer one shows means of neighbouring steps
WIDTH, HEIGHT = 320, 150  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 8, 20  # margins within it


class Chart(NamedTuple):
    key: str  # of metrics.jsonl, or "speed"
    title: str
    note: str
    unit: str
    top: float | None = None  # end of the axis; None: just above the largest value


# ---------------------------------------------------------------------------- numbers


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def series(metrics: list[dict], key: str) -> list[tuple[int, float]]:
    """[(step, value)] of the rows that have a number there: null stands where none was finite.

    >>> series([{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}, {"step": 2}], "reward")
    [(1, 0.5)]
    >>> series([{"step": 1, "response_tokens": 300, "step_seconds": 1.5}], "speed")
    [(1, 200.0)]
    """
    if key == "speed":
        tokens, seconds = dict(series(metrics, "response_tokens")), series(metrics, "step_seconds")
        return [(step, tokens[step] / s) for step, s in seconds if s > 0 and step in tokens]
    return [(row["step"], row[key]) for row in metrics if is_number(row.get(key))]


def thin(points: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` points: means of equally many neighbours, each at its last step.

    >>> thin([(1, 0.0), (2, 1.0), (3, 1.0), (4, 0.0), (5, 7.0)], most=3)
    [(2, 0.5), (4, 0.5), (5, 7.0)]
    """
    size = max(1, math.ceil(len(points) / most))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def nice_top(value: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `value`.

    >>> nice_top(0.0347), nice_top(21), nice_top(0)
    (0.05, 25.0, 1.0)
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(float(f"{m * power:.3g}") for m in (1, 2, 2.5, 5, 10) if m * power >= value)


def show_number(value: float, unit: str = "") -> str:
    """A value as a reader wants it: three digits, shares in percent.

    >>> show_number(0.9609375, "%"), show_number(18.96, "tokens"), show_number(3285.4)
    ('96.1 %', '19 tokens', '3,285')
    """
    if unit == "%":
        return f"{100 * value:.3g} %"
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def ends(metrics: list[dict], key: str, unit: str) -> str:
    """Where a number began and where it is: "12 % → 93 %"; a dash where it was never measured."""
    values = [show_number(value, unit) for _, value in series(metrics, key)]
    if len(values) < 2:
        return "".join(values) or "–"
    return f"{values[0].removesuffix(' ' + unit)} → {values[-1]}"


# ---------------------------------------------------------------------------- curves


def looks(i: int) -> str:
    """The classes of run i: to be switched off, its colour, its dashes."""
    return f"run{i} c{i % 6} d{i % 4}"


def swatch(i: int) -> str:
    """A short piece of run i's line, to stand before its name."""
    line = '<line x1="0" y1="4" x2="26" y2="4"/>'
    return f'<svg class="swatch {looks(i)}" aria-hidden="true">{line}</svg>'


def place(step: float, value: float, end: int, top: float) -> tuple[float, float]:
    """Where a point is drawn. The axes begin at 0; SVG counts y downwards.

    >>> place(0, 0, 30, 1.0), place(30, 1.0, 30, 1.0)
    ((42.0, 130.0), (312.0, 8.0))
    """
    x = LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, end)
    y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(value, top) / top
    return round(x, 1), round(y, 1)


def grid(end: int, top: float, unit: str) -> str:
    """Three lines across with their values, and the steps below."""
    parts = []
    for value in (0.0, top / 2, top):
        _, y = place(0, value, end, top)
        label = show_number(value, "%" if unit == "%" else "")
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>')
    for step, anchor in ((0, "start"), (end, "end")):
        x, _ = place(step, 0, end, top)
        label = f"step {step:,}" if step else "0"
        parts.append(f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">{label}</text>')
    return "".join(parts)


def curve(i: int, name: str, points: list, end: int, chart: Chart, top: float) -> str:
    """One run's line; dots as well where points are few enough to be told apart."""
    where = [place(step, value, end, top) for step, value in points]
    steps = "|".join(f"{step:,}" for step, _ in points)
    values = "|".join(show_number(value, chart.unit) for _, value in points)
    path = " ".join(f"{x},{y}" for x, y in where)
    dots = [f'<circle class="{looks(i)}" cx="{x}" cy="{y}" r="3"/>' for x, y in where]
    return (f'<polyline class="{looks(i)}" points="{path}" data-run="{escape(name)}" '
            f'data-steps="{steps}" data-values="{values}"/>'
            + "".join(dots if len(dots) <= 16 else []))  # fmt: skip


def draw(chart: Chart, names: list[str], metrics: list[list[dict]], end: int) -> str:
    """A chart's card, over `end` steps; nothing where no run has a number to show."""
    lines = [thin(series(rows, chart.key)) for rows in metrics]
    if not any(lines):
        return ""
    top = chart.top or nice_top(max(value for line in lines for _, value in line))
    # The first run's line is solid and lies lowest: it shows through the dashes of the others.
    curves = "".join(
        curve(i, names[i], line, end, chart, top) for i, line in enumerate(lines) if line
    )
    texts = [ends(rows, chart.key, chart.unit) for rows in metrics]
    label = f"{chart.title}: {'; '.join(f'{name} {text}' for name, text in zip(names, texts))}"
    spans = "".join(
        f'<span class="{looks(i)}">{swatch(i) if len(names) > 1 else ""}{text}</span>'
        for i, text in enumerate(texts)
    )
    return (
        f'<article class="card chart"><h3>{chart.title}</h3><div class="note">{chart.note}</div>'
        f'<div class="ends">{spans}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(label)}. Arrow keys read the values.">{grid(end, top, chart.unit)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>{curves}</svg></article>'
    )
