"""Read the runs of toy_ablation.sh and write results/: two CSV files, a figure and a table.

    python recipes/toy_ablation.py runs/ablation results
    python recipes/toy_ablation.py results                     draws the figure again, from curves.csv

Arms are compared at equal sampled tokens, tokens of forced second looks included: every run is read
at the largest number of tokens that all have reached. Intervals are 95 % over seeds (Student's t);
a difference to plain GRPO is paired by seed, since the same seed means the same questions.
"""

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rethink import OUTCOMES

# Two-sided 95 % quantile of Student's t by number of seeds.
T_95 = {
    2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262,
    11: 2.228, 12: 2.201, 13: 2.179, 14: 2.160, 15: 2.145, 16: 2.131, 17: 2.120, 18: 2.110, 19: 2.101,
    20: 2.093,
}  # fmt: skip
LONG = ("5 steps", "7 steps")  # chains the base has not seen
FIXED = 0.86  # the accuracy that "steps to" asks for
MAIN = ("plain", "filter", "ssr", "ssr_rethink", "rethink")
COLOURS = ("#555555", "#c77700", "#1f6fd0", "#b0307a", "#2a8f4a")
PANELS = {  # column of curves.csv -> title and ends of the axis
    "accuracy": ("held-out accuracy", 0.6, 1.0),
    "long": ("accuracy on 5 and 7 steps", 0.0, 0.6),
    "twice": ("share that looks again unforced", 0.0, 0.8),
}


def read_run(folder: Path) -> dict:
    """One run's curves: tokens and step at each held-out measurement, and what was measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())
    share = config["batch_size"] / (config["episode_queries"] * config["group_size"])
    tokens, spent = 0.0, {0: 0.0}
    steps = [row for row in rows if "reward" in row]
    for row in steps:
        tokens += row["response_tokens"] + row["rethink_tokens"] * share
        spent[row["step"]] = tokens
    held = [row for row in rows if "heldout_accuracy" in row]
    episodes = {row["episode"]: row for row in steps}
    arm, _, seed = folder.name.rpartition("-")
    return {
        "arm": arm, "seed": int(seed), "steps": steps, "held": held,
        "step": np.array([row["step"] for row in held]),
        "tokens": np.array([spent[row["step"]] for row in held]),
        "accuracy": np.array([row["heldout_accuracy"] for row in held]),
        "sampled": np.array([row["heldout_sampled"] for row in held]),
        "long": np.array([np.mean([row["heldout_categories"][k] for k in LONG]) for row in held]),
        "twice": np.array([row["heldout_rethinks"] for row in held]),
        "outcomes": {k: sum(row[f"rethink_{k}"] for row in episodes.values()) for k in
                     ("attempted", "kept", *OUTCOMES)},
    }  # fmt: skip


def at_tokens(run: dict, name: str, budget: float) -> float:
    """A curve's value when `budget` tokens had been sampled, between measurements by a line."""
    return float(np.interp(budget, run["tokens"], run[name]))


def figures(run: dict, budget: float) -> dict:
    """The numbers of one run that the table averages."""
    reached = [int(s) for s, a in zip(run["step"], run["accuracy"]) if a >= FIXED]
    last = max(s for s, t in zip(run["step"], run["tokens"]) if t <= budget)
    half = [row for row in run["steps"] if last // 2 < row["step"] <= last]
    return {
        "accuracy": at_tokens(run, "accuracy", budget),
        "sampled": at_tokens(run, "sampled", budget),
        "long": at_tokens(run, "long", budget),
        "steps_to": float(reached[0]) if reached else math.inf,
        "effective": float(np.mean([row["effective_queries"] for row in half])),
        "twice": at_tokens(run, "twice", budget),
        "length": float(np.mean([row["response_length"] for row in half])),
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval.

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    spread = np.std(values, ddof=1) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(T_95.get(len(values), 1.96) * spread / math.sqrt(len(values)))


def show(values: list[float], digits: int = 3) -> str:
    if any(math.isinf(v) for v in values):
        return f"{sum(math.isfinite(v) for v in values)} of {len(values)} seeds"
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def tables(runs: list[dict], budget: float) -> str:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    by = {arm: {r["seed"]: figures(r, budget) for r in runs if r["arm"] == arm} for arm in arms}
    lines = [
        (
            "| arm | seeds | held-out accuracy | minus plain, paired | 5 and 7 steps | minus plain, paired | sampled | "
            f"steps to {FIXED} | effective, later half | rethinks unforced | tokens a response |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        rows = by[arm]
        both = sorted(set(rows) & set(by.get("plain", {})))
        gain = {k: [rows[s][k] - by["plain"][s][k] for s in both] for k in ("accuracy", "long")}
        gain = {k: show(v) if v and arm != "plain" else "–" for k, v in gain.items()}
        column = {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()))}
        lines.append(
            f"| {arm} | {len(rows)} | {show(column['accuracy'])} | "
            f"{gain['accuracy']} | {show(column['long'])} | {gain['long']} | "
            f"{show(column['sampled'])} | {show(column['steps_to'], 0)} | {show(column['effective'])} | "
            f"{show(column['twice'], 2)} | {show(column['length'], 1)} |"
        )
    lines += ["", "| arm | attempted | kept | wrong→right | right→right | right→wrong | wrong→wrong | no answer |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for arm in arms:
        totals = {k: sum(r["outcomes"][k] for r in runs if r["arm"] == arm) for k in runs[0]["outcomes"]}
        if n := totals["attempted"]:
            cells = [f"{totals[k] / n:.1%}" for k in list(totals)[1:]]
            lines.append(f"| {arm} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def panel(x0: int, title: str, curves: dict, x_end: float, low: float, high: float) -> str:
    """One chart of the figure. curves: arm -> (x [n], mean [n], half-width [n])."""
    left, top, width, height = x0 + 44, 44, 258, 200

    def at(x: float, y: float) -> tuple[float, float]:
        y = (min(max(y, low), high) - low) / (high - low)
        return round(left + width * x / x_end, 1), round(top + height * (1 - y), 1)

    def points(pairs) -> str:
        return " ".join("{},{}".format(*at(x, y)) for x, y in pairs)

    bottom = top + height
    parts = [f'<text x="{left}" y="26" font-weight="bold" fill="#1d2126">{title}</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        y = at(0, value)[1]
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#e3e1da"/>'
                     f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')  # fmt: skip
    for value, anchor in ((0, "start"), (x_end, "end")):
        x = at(value, low)[0]
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="{anchor}">{value:.0f}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{bottom + 18}" text-anchor="middle">'
                 "thousand sampled tokens</text>")  # fmt: skip
    for (arm, (x, mean, half)), colour in zip(curves.items(), COLOURS):
        band = [*zip(x, mean + half), *reversed(list(zip(x, mean - half)))]
        parts.append(f'<polygon points="{points(band)}" fill="{colour}" opacity="0.13"/>')
    for (arm, (x, mean, half)), colour in zip(curves.items(), COLOURS):
        parts.append(f'<polyline points="{points(zip(x, mean))}" fill="none" stroke="{colour}" '
                     f'stroke-width="2.2"><title>{arm}</title></polyline>')  # fmt: skip
    return "".join(parts)


def figure(rows: list[dict]) -> str:
    """The main arms over sampled tokens as SVG, from the rows of curves.csv.

    On a white card of its own, so that it reads alike on light and on dark pages. Where the first
    steps rise from far below, the axis begins where the arms differ.
    """
    runs: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        runs.setdefault((row["arm"], row["seed"]), []).append(row)
    budget = min(float(run[-1]["tokens"]) for run in runs.values())
    arms = [arm for arm in MAIN if any(arm == name for name, _ in runs)]
    grid = np.linspace(0, budget, 33)
    panels, seeds = "", 0
    for k, (key, (title, low, high)) in enumerate(PANELS.items()):
        curves = {}
        for arm in arms:
            mine = [run for (name, _), run in runs.items() if name == arm]
            seeds = len(mine)
            values = [
                np.interp(grid, *([float(row[x]) for row in run] for x in ("tokens", key))) for run in mine
            ]
            mean, half = np.array([interval(list(column)) for column in np.transpose(values)]).T
            curves[arm] = (grid / 1e3, mean, np.nan_to_num(half))
        panels += panel(330 * k, title, curves, budget / 1e3, low, high)
    legend = "".join(
        f'<rect x="{44 + 120 * i}" y="284" width="18" height="4" fill="{c}"/>'
        f'<text x="{68 + 120 * i}" y="290">{arm}</text>'
        for i, (arm, c) in enumerate(zip(arms, COLOURS))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 306" font-family="sans-serif" '
        'font-size="12.5" fill="#4a515a"><rect width="1000" height="306" rx="10" fill="#fff"/>'
        f"{panels}{legend}"
        f'<text x="986" y="290" text-anchor="end">bands: 95 % intervals of {seeds} seeds</text></svg>\n'
    )  # fmt: skip


def draw(results: Path) -> None:
    with open(results / "curves.csv", newline="") as file:
        (results / "ablation.svg").write_text(figure(list(csv.DictReader(file))))


def main(runs_folder: str, results_folder: str) -> None:
    folders = sorted(p for p in Path(runs_folder).glob("*-*") if list(p.glob("checkpoint-*")))
    runs = [read_run(folder) for folder in folders]
    order = {arm: i for i, arm in enumerate(MAIN)}
    runs.sort(key=lambda run: (order.get(run["arm"], len(MAIN)), run["arm"], run["seed"]))
    budget = min(run["tokens"][-1] for run in runs)
    out = Path(results_folder)
    out.mkdir(exist_ok=True)
    with open(out / "ablation.csv", "w", newline="") as file:
        rows = [{"arm": r["arm"], "seed": r["seed"], **figures(r, budget), **r["outcomes"]} for r in runs]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with open(out / "curves.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = ("step", "tokens", "accuracy", "long", "sampled", "twice")
        writer.writerow(["arm", "seed", *names])
        for run in runs:
            for values in zip(*(run[name] for name in names)):
                writer.writerow([run["arm"], run["seed"], *(round(float(v), 4) for v in values)])
    draw(out)
    table = f"At {budget:,.0f} sampled tokens a run.\n\n{tables(runs, budget)}\n"
    (out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 2 else draw(Path(sys.argv[1]))
