"""Charts of the study as SVG, drawn from means and half-widths of intervals; no other library is needed.

A chart is a white card, so that it reads alike on light and on dark pages. A panel has two axes and marks on
them: lines, areas and dots in the units of the axes. An axis is its labels, [(value, text), ...], of
which the first and the last are its ends.
"""

import math

COLOURS = ("#555555", "#c77700", "#1f6fd0", "#b0307a", "#2a8f4a", "#0e7490", "#b3261e", "#6b45c9", "#a07d10")
TOP, HEIGHT = 44, 190
# An axis of shares, logarithmic.
SHARES = [(math.log2(share), f"{share:.0%}") for share in (0.03, 0.06, 0.12, 0.25, 0.5, 1)]


def axis(low: float, high: float, most: int = 4) -> list[tuple[float, str]]:
    """Round numbers from at or below `low` to at or above `high`, at most `most` steps apart.

    >>> axis(-0.013, 0.034)
    [(-0.02, '-0.02'), (0.0, '0'), (0.02, '0.02'), (0.04, '0.04')]
    """
    high = max(high, low + 0.01)
    rough = (high - low) / most
    size = 10 ** math.floor(math.log10(rough))
    for step in (1, 2, 5, 10, 20):
        first, last = math.floor(low / (step * size)), math.ceil(high / (step * size))
        if last - first <= most:
            break
    values = [round(i * step * size, 10) for i in range(first, last + 1)]
    return [(value, f"{value:.6g}") for value in values]


def panel(left: float, width: float, title: str, xs: list, ys: list, marks: list, ends=None) -> str:
    """marks: (kind, colour, [(x, y), ...]) with kind line, area or dots. ends: those of y, if not its labels'."""
    (x0, x1), (y0, y1) = (xs[0][0], xs[-1][0]), ends or (ys[0][0], ys[-1][0])

    def at(x: float, y: float) -> str:
        x, y = (min(max((v - a) / (b - a), 0), 1) for v, a, b in ((x, x0, x1), (y, y0, y1)))
        return f"{left + width * x:.1f},{TOP + HEIGHT * (1 - y):.1f}"

    parts = [f'<text x="{left}" y="26" font-weight="bold" fill="#1d2126">{title}</text>']
    for x, label in xs:
        place = at(x, y0).split(",")
        parts.append(f'<polyline points="{at(x, y0)} {at(x, y1)}" stroke="#e3e1da"/>')
        parts.append(f'<text x="{place[0]}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{label}</text>')
    for y, label, *colour in ys:
        place = float(at(x0, y).split(",")[1])
        fill = f' fill="{colour[0]}"' if colour else ""
        parts.append(f'<polyline points="{at(x0, y)} {at(x1, y)}" stroke="#e3e1da"/>')
        parts.append(f'<text x="{left - 8}" y="{place + 4:.1f}" text-anchor="end"{fill}>{label}</text>')
    for kind, colour, points in marks:
        places = [at(x, y) for x, y in points]
        if kind == "area":
            parts.append(f'<polygon points="{" ".join(places)}" fill="{colour}" opacity="0.13"/>')
        elif kind == "line":
            line = f'points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="2"'
            parts.append(f"<polyline {line}/>")
        else:
            for x, y in (place.split(",") for place in places):
                parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
    return "".join(parts)


def curves(left: float, title: str, found: dict, ends: tuple[float, float]) -> str:
    """found: {arm: (x, mean, half-width), three lists}; bands are intervals."""
    marks = []
    for (x, mean, half), colour in zip(found.values(), COLOURS):
        band = [(a, m + h) for a, m, h in zip(x, mean, half)]
        band += [(a, m - h) for a, m, h in zip(x, mean, half)][::-1]
        marks += [("area", colour, band), ("line", colour, list(zip(x, mean)))]
    marks.sort(key=lambda mark: mark[0])  # lines over areas
    last = max(x[-1] for x, _, _ in found.values())
    xs = [(0, "0"), (last / 2, f"{last / 2:.0f}"), (last, f"{last:.0f}")]
    return panel(left, 260, title, xs, axis(*ends), marks)


def forest(left: float, width: float, title: str, found: dict, named: bool) -> str:
    """found: {arm: (mean, half-width)} of differences, one row each; `named` writes the arms at the left."""
    bounds = [mean + side * half for mean, half in found.values() for side in (-1, 1)]
    xs = axis(min(0, *bounds), max(0, *bounds), most=3)
    rows = {arm: (-i, colour) for i, (arm, colour) in enumerate(zip(found, COLOURS[1:]))}
    ys = [(y, arm if named else "", colour) for arm, (y, colour) in rows.items()][::-1]
    marks = [("line", "#9a968c", [(0, 1), (0, -len(found))])]
    for arm, (mean, half) in found.items():
        y, colour = rows[arm]
        marks += [("line", colour, [(mean - half, y), (mean + half, y)]), ("dots", colour, [(mean, y)])]
    return panel(left, width, title, xs, ys, marks, (-len(found) + 0.5, 0.5))


def over_share(left: float, title: str, found: dict, ends: tuple[float, float]) -> str:
    """found: {arm: [(share, mean, half-width), ...]}; the share on a logarithmic axis."""
    marks = [("line", "#9a968c", [(-9, 0), (9, 0)])]
    for i, (rows, colour) in enumerate(zip(found.values(), COLOURS[1:])):
        moved = [(math.log2(share) + 0.06 * i, mean, half) for share, mean, half in sorted(rows)]
        marks.append(("line", colour, [(x, mean) for x, mean, _ in moved]))
        for x, mean, half in moved:
            marks += [("line", colour, [(x, mean - half), (x, mean + half)]), ("dots", colour, [(x, mean)])]
    return panel(left, 190, title, SHARES, axis(*ends), marks)


def card(panels: str, arms: dict[str, str], note: str) -> str:
    """The figure. arms: {name: colour} of the legend; the note stands at its right."""
    legend, left = "", 44
    for arm, colour in arms.items():
        legend += f'<rect x="{left}" y="280" width="18" height="4" fill="{colour}"/>'
        legend += f'<text x="{left + 24}" y="286">{arm}</text>'
        left += 44 + 7 * len(arm)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 300" font-family="sans-serif" '
        'font-size="12" fill="#4a515a"><rect width="1000" height="300" rx="10" fill="#fff"/>'
        f'{panels}{legend}<text x="986" y="286" text-anchor="end">{note}</text></svg>\n'
    )
