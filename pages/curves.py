"""Charts as SVG: lines of one or several metrics, or shares stacked to a whole.

A chart is markup and nothing else. Its axis ends at round numbers around the values, and every line
carries its values, so that the page's script can read them out (report.html).
"""

import math
from collections.abc import Callable
from html import escape
from typing import NamedTuple

MOST_POINTS = 200  # of a line; a longer one shows means of neighbouring steps
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20  # margins within a chart


class Chart(NamedTuple):
    title: str
    note: str
    unit: str
    keys: dict[str, str]  # of a row of metrics.jsonl -> what its line is called
    kind: str = "lines"  # "first": of the first run alone; "stack": so too, shares on each other
    wide: bool = False
    colours: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # of the keys, where there is one run


class Line(NamedTuple):
    name: str
    look: str  # CSS classes: the run it belongs to, colour, dashes
    points: list[tuple[int, float]]


def series(metrics: list[dict], key: str) -> list[tuple[int, float]]:
    """[(step, value)] of the rows that have a finite number there.

    >>> series([{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}, {"step": 2}], "reward")
    [(1, 0.5)]
    """
    found = [(row["step"], row.get(key)) for row in metrics]
    return [(s, v) for s, v in found if isinstance(v, (int, float)) and math.isfinite(v)]


def thin(points: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` points: means of equally many neighbours, each at its last step.

    >>> thin([(1, 0.0), (2, 1.0), (3, 1.0), (4, 0.0), (5, 7.0)], most=3)
    [(2, 0.5), (4, 0.5), (5, 7.0)]
    """
    size = max(1, math.ceil(len(points) / most))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def axis(low: float, high: float) -> list[float]:
    """Round numbers around the values; 0 is on the axis unless they lie far from it.

    >>> axis(0.02, 0.97), axis(0.93, 0.99), axis(0.001, 0.037)
    ([0.0, 0.5, 1.0], [0.92, 0.94, 0.96, 0.98, 1.0], [0.0, 0.02, 0.04])
    >>> axis(0, 0), axis(-3, 1)
    ([0.0, 1.0], [-4.0, -2.0, 0.0, 2.0])
    """
    if 0 <= low < 0.6 * high or low == high:
        low = min(0.0, low)
    if low == high:
        return [0.0, 1.0]
    least = (high - low) / 3.5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.6g}") for n in range(first, last + 1)]


def show_number(value: float, unit: str = "") -> str:
    """A value as a reader wants it: three digits, shares in percent.

    >>> show_number(0.9609375, "%"), show_number(18.96, "tokens"), show_number(3285.4)
    ('96.1 %', '19 tokens', '3,285')
    """
    if unit == "%":
        return f"{100 * value:.3g} %"
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def ends(points: list[tuple[int, float]], unit: str) -> str:
    """The first value and the last: "12 → 93 %"; a dash where nothing was measured."""
    values = [show_number(value, unit) for _, value in points]
    if len(values) < 2:
        return "".join(values) or "–"
    return f"{values[0].removesuffix(' ' + unit)} → {values[-1]}"


def looks(run: int, colour: int, dash: int) -> str:
    return f"run{run} c{colour % 6} d{dash % 4}"


def swatch(look: str) -> str:
    """A short piece of a line, to stand before its name."""
    line = '<line x1="0" y1="4" x2="26" y2="4"/>'
    return f'<svg class="swatch {look}" aria-hidden="true">{line}</svg>'


def placing(width: int, height: int, end: int, ticks: list[float]) -> Callable:
    """(step, value) -> where it is drawn. SVG counts y downwards.

    >>> place = placing(320, 150, 30, [0.0, 1.0])
    >>> place(0, 0), place(30, 1)
    ((46.0, 130.0), (312.0, 8.0))
    """
    low, high = ticks[0], ticks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (width - LEFT - RIGHT) * step / max(1, end)
        y = height - BOTTOM - (height - TOP - BOTTOM) * (value - low) / (high - low)
        return round(x, 1), round(y, 1)

    return place


def grid(width: int, height: int, end: int, ticks: list[float], unit: str, place) -> str:
    """A line and its value per tick, and the steps below."""
    parts = []
    for value in ticks:
        _, y = place(0, value)
        label = show_number(value, "%" if unit == "%" else "")
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>')
    for step, anchor in ((0, "start"), (end, "end")):
        label = f"step {step:,}" if step else "0"
        x = place(step, ticks[0])[0]
        parts.append(f'<text x="{x}" y="{height - 5}" text-anchor="{anchor}">{label}</text>')
    return "".join(parts)


def lines_of(chart: Chart, names: list[str], metrics: list[list[dict]]) -> list[Line]:
    """One line per run and key. Colours tell runs apart, or keys where there is one run."""
    alone = len(metrics) == 1 or chart.kind != "lines"
    lines = []
    for i, rows in enumerate(metrics[:1] if alone else metrics):
        for j, (key, label) in enumerate(chart.keys.items()):
            colour, dash = (i, j if len(chart.keys) > 1 else i)
            if alone:
                colour, dash = (chart.colours[j % len(chart.colours)], 0 if chart.kind == "stack" else j)
            name = ", ".join(part for part in ("" if alone else names[i], label) if part)
            if points := thin(series(rows, key)):
                lines.append(Line(name, looks(i, colour, dash), points))
    return lines


def stack(lines: list[Line], place) -> str:
    """The lines' values on top of each other, as areas."""
    steps = [step for step, _ in lines[0].points]
    below, parts = [0.0] * len(steps), []
    for line in lines:
        values = dict(line.points)
        above = [base + values.get(step, 0.0) for step, base in zip(steps, below)]
        outline = [place(*point) for point in zip(steps, above)]
        outline += [place(*point) for point in reversed(list(zip(steps, below)))]
        path = " ".join(f"{x},{y}" for x, y in outline)
        parts.append(f'<polygon class="{line.look}" points="{path}"/>')
        below = above
    return "".join(parts)


def curve(line: Line, unit: str, place, heights: dict[int, float]) -> str:
    """A line with its values; dots as well where points are few enough to be told apart."""
    where = [place(step, heights.get(step, value)) for step, value in line.points]
    steps = "|".join(f"{step:,}" for step, _ in line.points)
    values = "|".join(show_number(value, unit) for _, value in line.points)
    path = " ".join(f"{x},{y}" for x, y in where)
    dots = [f'<circle class="{line.look}" cx="{x}" cy="{y}" r="3"/>' for x, y in where]
    return (
        f'<polyline class="{line.look}" points="{path}" data-name="{escape(line.name)}" '
        f'data-steps="{steps}" data-values="{values}"/>' + "".join(dots if len(dots) <= 16 else [])
    )


def draw(chart: Chart, names: list[str], metrics: list[list[dict]], end: int) -> str:
    """A chart's card, over `end` steps; nothing where no run has a number to show."""
    lines = lines_of(chart, names, metrics)
    if not lines:
        return ""
    width, height = (460, 190) if chart.wide else (320, 150)
    stacked = chart.kind == "stack"
    values = [value for line in lines for _, value in line.points]
    ticks = [0.0, 0.5, 1.0] if stacked else axis(min(values), max(values))
    place = placing(width, height, end, ticks)
    drawn, heights = stack(lines, place) if stacked else "", {}
    for line in lines:
        if stacked:
            heights = {step: heights.get(step, 0.0) + value for step, value in line.points}
        drawn += curve(line, chart.unit, place, heights)
    spans = "".join(
        f'<span class="{line.look}">{swatch(line.look) if len(lines) > 1 else ""}'
        f"{escape(line.name)} <b>{ends(line.points, chart.unit)}</b></span>"
        for line in lines
    )
    told = "; ".join(f"{line.name} {ends(line.points, chart.unit)}" for line in lines)
    label = escape(f"{chart.title}: {told}")
    return (
        f'<article class="card chart"><h3>{escape(chart.title)}</h3>'
        f'<div class="note">{escape(chart.note)}</div><div class="ends">{spans}</div>'
        f'<svg viewBox="0 0 {width} {height}" role="img" tabindex="0" '
        f'aria-label="{label}. Arrow keys read the values.">'
        f"{grid(width, height, end, ticks, chart.unit, place)}"
        f'<line class="cursor" y1="{TOP}" y2="{height - BOTTOM}"/>{drawn}</svg></article>'
    )
