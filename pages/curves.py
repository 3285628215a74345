"""Charts as SVG: lines of one or several metrics, or shares stacked to a whole.

A chart is markup and nothing else. Its axis ends at round numbers around the values. A strip over each
step has its values as a tooltip, so the page needs no script.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from html import escape
from itertools import pairwise
from typing import NamedTuple

MOST_POINTS = 200  # of a line; a longer one shows means of neighbouring steps
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20  # margins within a chart


class Chart(NamedTuple):
    title: str
    note: str
    unit: str
    keys: dict[str, str]  # of a row of metrics.jsonl -> what its line is called
    stacked: bool = False  # shares on each other


class Line(NamedTuple):
    name: str
    look: str  # CSS classes: colour, dashes
    points: list[tuple[int, float]]


def series(metrics: list[dict], key: str) -> list[tuple[int, float]]:
    """[(step, value)] of the rows that have a finite number there."""
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
    >>> axis(0, 0), axis(-3, 1), axis(0.5, 0.5000001)
    ([0.0, 1.0], [-4.0, -2.0, 0.0, 2.0], [0.0, 0.2, 0.4, 0.6])
    """
    alike = high - low < 1e-3 * max(abs(low), abs(high))  # as labels of three digits are
    if alike or 0 <= low < 0.6 * high:
        low, high = min(0.0, low), max(0.0, high)
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
    """The first value and the last: "12 → 93 %"."""
    values = [show_number(value, unit) for _, value in points]
    return f"{values[0].removesuffix(' ' + unit)} → {values[-1]}" if len(values) > 1 else values[0]


def look_of(colour: int, dash: int) -> str:
    return f"c{colour % 6} d{dash % 4}"


def swatch(look: str) -> str:
    """A short piece of a line, to stand before its name."""
    line = '<line x1="0" y1="4" x2="26" y2="4"/>'
    return f'<svg class="swatch {look}" aria-hidden="true">{line}</svg>'


def lines_of(chart: Chart, names: list[str], metrics: list[list[dict]]) -> list[Line]:
    """One line per run and key; of a chart of many keys those of the first run alone."""
    alone = len(metrics) == 1 or len(chart.keys) > 2
    lines = []
    for i, rows in enumerate(metrics[:1] if alone else metrics):
        for j, (key, label) in enumerate(chart.keys.items()):
            # Colours tell keys, or else runs, apart; dashes do so for readers who cannot see colours.
            dash = 0 if chart.stacked else j if len(chart.keys) > 1 else i
            name = ", ".join(part for part in ("" if alone else names[i], label) if part)
            if points := thin(series(rows, key)):
                lines.append(Line(name, look_of(j if alone else i, dash), points))
    return lines


def curve(line: Line, chart: Chart, where: list[tuple[float, float]], bottom: float) -> str:
    """A line; dots where points are few; the area under it where it is stacked."""
    path = " ".join(f"{x},{y}" for x, y in where)
    dots = [f'<circle class="{line.look}" cx="{x}" cy="{y}" r="3"/>' for x, y in where]
    below = f"{path} {where[-1][0]},{bottom} {where[0][0]},{bottom}"
    area = f'<polygon class="{line.look}" points="{below}"/>' if chart.stacked else ""
    return f'{area}<polyline class="{line.look}" points="{path}"/>' + "".join(dots if len(dots) <= 16 else [])


def strips(lines: list[Line], unit: str, place: Callable, width: int, height: int) -> str:
    """What is shown where one points: a strip over each step, with the values of the lines there."""
    values = defaultdict(str)
    for line in lines:
        for step, value in line.points:
            values[step] += f"\n{show_number(value, unit)} {line.name}".rstrip()
    steps = sorted(values)
    middles = [(place(a, 0)[0] + place(b, 0)[0]) / 2 for a, b in pairwise(steps)]
    edges = pairwise([LEFT, *middles, width - RIGHT])
    return "".join(
        f'<rect class="strip" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" '
        f'height="{height - TOP - BOTTOM}"><title>step {step:,}{escape(values[step])}</title></rect>'
        for step, (left, right) in zip(steps, edges, strict=True)
    )


def draw(chart: Chart, names: list[str], metrics: list[list[dict]], end: int) -> str:
    """A chart's card, over `end` steps; nothing where no run has a number to show."""
    lines = lines_of(chart, names, metrics)
    if not lines:
        return ""
    width, height = (460, 190) if len(chart.keys) > 1 else (320, 150)
    values = [value for line in lines for _, value in line.points]
    ticks = [0.0, 0.5, 1.0] if chart.stacked else axis(min(values), max(values))

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (width - LEFT - RIGHT) * step / max(1, end)
        y = height - BOTTOM - (height - TOP - BOTTOM) * (value - ticks[0]) / (ticks[-1] - ticks[0])
        return round(x, 1), round(y, 1)  # SVG counts y downwards

    grid = f'<text x="{LEFT}" y="{height - 5}">0</text>'
    grid += f'<text x="{width - RIGHT}" y="{height - 5}" text-anchor="end">step {end:,}</text>'
    for value in ticks:
        y, label = place(0, value)[1], show_number(value, chart.unit if chart.unit == "%" else "")
        grid += f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y}" y2="{y}"/>'
        grid += f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{label}</text>'
    drawn, heights = "", Counter()
    for line in lines:
        heights = heights + Counter(dict(line.points)) if chart.stacked else dict(line.points)
        part = curve(line, chart, [place(step, heights[step]) for step, _ in line.points], height - BOTTOM)
        drawn = part + drawn if chart.stacked else drawn + part  # the areas below cover those above
    texts = [f"{line.name} {ends(line.points, chart.unit)}".strip() for line in lines]
    spans = "".join(
        f'<span class="{line.look}">{swatch(line.look) if len(lines) > 1 else ""}{escape(text)}</span>'
        for line, text in zip(lines, texts, strict=True)
    )
    label = escape(f"{chart.title}: {'; '.join(texts)}")
    return (
        f'<article class="card chart"><h3>{escape(chart.title)}</h3>'
        f'<div class="note">{escape(chart.note)}</div><div class="ends">{spans}</div>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{grid}'
        f"{drawn}{strips(lines, chart.unit, place, width, height)}</svg></article>"
    )
