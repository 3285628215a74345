"""What study.py's runs say: raw numbers as CSV, a table and a figure per question.

    results/episodes.csv    a line per run and episode: what was sampled in training
    results/heldout.csv     a line per run and measurement on held-out questions
    results/runs.csv        a line per run: its numbers at the tokens at which arms are compared
    results/NAME.md, .svg   per experiment; the figure of all map_... is map.svg

The first two are read from the runs (lines of other runs stay), and all else is made from them. Arms are compared at equal sampled
tokens, forced second looks included: each run is read at the most tokens that all runs of its experiment
have reached, between two measurements by a line (without `equal_tokens`, at its end). Accuracy is that of
greedy answers to held-out questions; how fast an arm learns is seen in the training reward, which is there
for every episode. Intervals are 95 % over seeds (Student's t), differences are paired by seed: the same
seed means the same questions.
"""

import csv
import io
import json
import math
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import study_figures
from study import EXPERIMENTS, PLAIN, UPDATES, is_done

from record import write_atomically
from rethink import OUTCOMES

# Two-sided 95 % quantile of Student's t by number of seeds.
T_95 = {
    2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262,
    11: 2.228, 12: 2.201, 13: 2.179, 14: 2.160, 15: 2.145, 16: 2.131, 17: 2.120, 18: 2.110, 19: 2.101,
    20: 2.093, 25: 2.064,
}  # fmt: skip
LONG = ("5 steps", "7 steps")  # chains longer than those of the warm start
FIXED = 0.86  # the training reward that "steps to" asks for
SECOND_LOOKS = ("attempted", "kept", *OUTCOMES)
HELDOUT = {  # column of heldout.csv -> what metrics.jsonl calls it
    "accuracy": "heldout_accuracy", "sampled": "heldout_sampled", "rethinks": "heldout_rethinks",
    "helped": "heldout_rethinks_helped", "overthinking": "heldout_overthinking", "length": "heldout_tokens",
}  # fmt: skip


# ---------------------------------------------------------------------------- read


def read_run(folder: Path) -> tuple[list[dict], list[dict]]:
    """A run's lines of episodes.csv and of heldout.csv."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    c = json.loads((folder / "config.json").read_text())
    arm, _, seed = folder.name.rpartition("-")
    episodes, heldout, tokens = [], [], 0.0
    for row in rows:
        at = {"arm": arm, "seed": int(seed), "step": row["step"]}
        if "heldout_accuracy" in row:
            found = {name: row[key] for name, key in HELDOUT.items()}
            by_length = [row["heldout_categories"].get(length, math.nan) for length in LONG]
            heldout.append(at | {"tokens": tokens, "long": np.mean(by_length)} | found)
        elif row["episode"] > len(episodes):  # its first step
            responses = c["episode_queries"] * c["group_size"]
            tokens += row["response_length"] * responses + row["rethink_tokens"]
            found = {name: row[name] for name in ("reward", "rethinks", "overthinking")}
            found |= {"effective": row["effective_queries"], "length": row["response_length"]}
            episodes.append(at | {"tokens": tokens} | found | {k: row[f"rethink_{k}"] for k in SECOND_LOOKS})
    return episodes, heldout


def write_csv(path: Path, rows: list[dict], columns: tuple = ()) -> None:
    """Replace the file, whole or not at all: some of its lines may exist nowhere else."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or rows[0], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomically(path, text.getvalue())


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def add_lines(path: Path, rows: list[dict]) -> None:
    """Write the lines of these runs, and keep those of others: a run may be on another machine, or gone."""
    new, kept = {(row["arm"], str(row["seed"])) for row in rows}, []
    if path.exists():
        with open(path, newline="") as file:
            kept = [row for row in csv.DictReader(file) if (row["arm"], row["seed"]) not in new]
    write_csv(path, kept + rows)


def read_csv(path: Path) -> dict[str, dict[int, dict]]:
    """{arm: {seed: {column: its values, in order}}}"""
    found: dict = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            columns = found.setdefault(row.pop("arm"), {}).setdefault(int(row.pop("seed")), {})
            for name, text in row.items():
                columns.setdefault(name, []).append(float(text))
    return found


# ---------------------------------------------------------------------------- compare


def numbers(episodes: dict, heldout: dict, budget: float) -> dict:
    """What is told of one run, read at `budget` tokens."""
    at = {name: float(np.interp(budget, heldout["tokens"], heldout[name])) for name in ("long", *HELDOUT)}
    ends = np.minimum(episodes["tokens"], budget)
    spent = np.diff(ends, prepend=0.0)  # tokens of each episode, up to the budget
    last = int(np.sum(ends < budget)) + 1  # episodes that were begun
    reached = [step - 1 for step, reward in zip(episodes["step"], episodes["reward"]) if reward >= FIXED]
    return {
        "accuracy": at["accuracy"], "long": at["long"], "sampled": at["sampled"],
        "final": heldout["accuracy"][-1], "thousands": heldout["tokens"][-1] / 1e3,
        "area": float(np.average(episodes["reward"], weights=spent)),
        "steps_to": min(reached, default=math.inf),
        "effective": float(np.mean(episodes["effective"][last // 2 : last])),
        "rethinks": at["rethinks"], "helped": at["helped"],
        "overthinking": at["overthinking"], "length": at["length"],
    } | {name: sum(episodes[name]) for name in SECOND_LOOKS}  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval.

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.nan
    quantile = T_95[max(k for k in T_95 if k <= n)]  # between the lines of the table, the wider one
    return float(np.mean(values)), float(quantile * np.std(values, ddof=1) / math.sqrt(n))


def differences(runs: dict, arm: str, against: str, name: str) -> list[float]:
    """arm - against, seed by seed."""
    a, b = runs[arm], runs.get(against, {})
    return [a[seed][name] - b[seed][name] for seed in sorted(a.keys() & b.keys())]


def compare(experiment, episodes: dict, heldout: dict) -> tuple[float, dict]:
    """The tokens at which an experiment's runs are compared, and {arm: {seed: its numbers}}."""
    arms = [arm for arm in dict.fromkeys([experiment.against, *experiment.arms]) if arm in heldout]
    runs = {(arm, seed): run for arm in arms for seed, run in heldout[arm].items() if seed < experiment.seeds}
    end = min if experiment.equal_tokens else max  # beyond its end a run is read at its end
    budget = end((run["tokens"][-1] for run in runs.values()), default=0.0)
    found: dict = {arm: {} for arm in arms}
    for (arm, seed), run in runs.items():
        found[arm][seed] = numbers(episodes[arm][seed], run, budget)
    return budget, found


# ---------------------------------------------------------------------------- tables

COLUMNS = {  # of a run's numbers -> title, digits, whether the difference is shown
    "accuracy": ("held-out accuracy", 3, True), "long": ("5 and 7 steps", 3, True),
    "area": ("mean training reward", 3, True), "sampled": ("held out, sampled", 3, False),
    "final": ("held-out accuracy at the end", 3, True), "thousands": ("thousand tokens by then", 0, False),
    "steps_to": (f"steps to {FIXED}", 0, False), "effective": ("effective, later half", 2, False),
    "rethinks": ("rethinks unforced", 2, False), "overthinking": ("overthinking tokens", 2, False),
    "length": ("tokens per response", 1, False),
}  # fmt: skip


def show(values: list[float], digits: int) -> str:
    """Mean and interval; the median where some are infinite (never reached); a dash for nothing."""
    if not values or any(map(math.isnan, values)):
        return "–"
    if math.isinf(max(values)):
        reached = [value for value in values if math.isfinite(value)]
        median = f"median {np.median(values):.0f}, " if 2 * len(reached) > len(values) else ""
        return f"{median}{len(reached)} of {len(values)} seeds"
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(experiment, budget: float, runs: dict) -> str:
    against = experiment.against
    heads = ["arm", "seeds"]
    for title, _, compared in COLUMNS.values():
        heads += [title, f"minus {against}"] if compared else [title]
    lines = []
    for arm, seeds in runs.items():
        cells = [arm, str(len(seeds))]
        for name, (_, digits, compared) in COLUMNS.items():
            cells.append(show([run[name] for run in seeds.values()], digits))
            if compared:
                cells.append(show(differences(runs, arm, against, name), digits) if arm != against else "–")
        lines.append(cells)
    text, looks = markdown(heads, lines), []
    for arm, seeds in runs.items():
        totals = [sum(run[name] for run in seeds.values()) for name in SECOND_LOOKS]
        if totals[0]:
            looks.append([arm, f"{totals[0]:.0f}", *(f"{n / totals[0]:.1%}" for n in totals[1:])])
    if looks:
        ends = [name.replace("_", " → ") for name in OUTCOMES[:4]]
        text += "\n\n" + markdown(["arm", "forced looks", "kept", *ends, "no answer"], looks)
    where = "At" if experiment.equal_tokens else "After equal steps, at most"
    return f"{experiment.asks} {where} {budget:,.0f} sampled tokens per run.\n\n{text}\n"


# ---------------------------------------------------------------------------- figures


def mean_curves(runs: dict, episodes: dict, budget: float) -> dict:
    """{arm: (thousand tokens, mean, half-width)} of the training reward, to where its first run ends."""
    found = {}
    for arm, seeds in runs.items():
        grid = np.linspace(0, min(budget, *(episodes[arm][seed]["tokens"][-1] for seed in seeds)), 33)
        lines = [np.interp(grid, *(episodes[arm][seed][k] for k in ("tokens", "reward"))) for seed in seeds]
        mean, half = np.transpose([interval(list(column)) for column in np.transpose(lines)])
        found[arm] = (list(grid / 1e3), list(mean), list(np.nan_to_num(half)))
    return found


def compared(runs: dict, against: str, name: str) -> dict:
    """{arm: (mean, half-width)} of the paired differences, for the arms that have some."""
    found = {arm: differences(runs, arm, against, name) for arm in runs if arm != against}
    return {
        arm: tuple(np.nan_to_num(interval(values)))
        for arm, values in found.items()
        if values and not any(map(math.isnan, values))
    }


def figure(experiment, budget: float, runs: dict, episodes: dict) -> str:
    """Learning curves, and differences to the arm that the others are compared with."""

    def short(found: dict) -> dict:
        return {arm.removeprefix("guess_"): value for arm, value in found.items()}

    lines = short(mean_curves(runs, episodes, budget))
    highest, lowest = (end(y for _, mean, _ in lines.values() for y in mean) for end in (max, min))
    panels = study_figures.curves(40, "training reward", lines, (lowest, highest))
    left = 420
    for title, name in (
        ("held-out accuracy", "accuracy"),
        ("5 and 7 steps", "long"),
        ("mean reward", "area"),
    ):
        if found := compared(runs, experiment.against, name):
            panels += study_figures.forest(left, 160, title, short(found), named=left == 420)
            left += 190
    note = f"thousand tokens; differences to {experiment.against}; 95 % intervals"
    return study_figures.card(panels, dict(zip(lines, study_figures.COLOURS)), note)


def map_figure(cells: dict) -> str:
    """When replay helps: cells[share, updates] = the runs of a world."""
    panels, left = "", 44
    for name, title in (("accuracy", "held-out accuracy"), ("area", "mean reward")):
        found: dict = {updates: {arm: [] for arm in list(PLAIN)[1:]} for updates in UPDATES}
        for (_, updates), runs in cells.items():
            plain = next(iter(runs))
            share = float(np.mean([run["effective"] for run in runs[plain].values()]))
            for arm, difference in compared(runs, plain, name).items():
                found[updates][arm.split("_")[0]].append((share, *difference))
        points = chain(*(row for rows in found.values() for row in rows.values()))
        bounds = [mean + side * half for _, mean, half in points for side in (-1, 1)]
        for updates, rows in found.items():
            if any(rows.values()):
                head = f"{title}, {updates} updates"
                panels += study_figures.over_share(left, head, rows, (min(0, *bounds), max(0, *bounds)))
                left += 245
    colours = dict(zip(list(PLAIN)[1:], study_figures.COLOURS[1:]))
    note = "minus plain, over the share of effective questions of plain in the later half; 95 % intervals"
    return study_figures.card(panels, colours, note)


# ---------------------------------------------------------------------------- all of it


def write(folders: list[Path], results: Path) -> None:
    """Add the finished runs of these folders to the CSV files, and make what follows from them."""
    results.mkdir(parents=True, exist_ok=True)
    arms = {arm for experiment in EXPERIMENTS.values() for arm in experiment.arms}
    runs = [run for folder in folders for run in sorted(folder.iterdir())]
    read = [read_run(run) for run in runs if run.name.rpartition("-")[0] in arms and is_done(run)]
    if not read and not (results / "episodes.csv").exists():
        sys.exit(f"error: no finished run in {', '.join(map(str, folders)) or results}")
    for name, found in zip(("episodes", "heldout"), zip(*read)):
        add_lines(results / f"{name}.csv", list(chain(*found)))
    episodes, heldout = (read_csv(results / f"{name}.csv") for name in ("episodes", "heldout"))
    lines, cells = [], {}
    for name, experiment in EXPERIMENTS.items():
        budget, runs = compare(experiment, episodes, heldout)
        if experiment.against not in runs or len(runs) < 2:
            continue
        text = table(experiment, budget, runs)
        (results / f"{name}.md").write_text(text)
        print(text)
        lines += [
            {"experiment": name, "arm": arm, "seed": seed, "tokens": budget} | run
            for arm, seeds in runs.items()
            for seed, run in seeds.items()
        ]
        if name.startswith("map_"):
            _, share, updates = name.split("_")
            cells[int(share), int(updates)] = runs
        else:
            (results / f"{name}.svg").write_text(figure(experiment, budget, runs, episodes))
        if name == "main" and PLAIN.keys() <= runs.keys():
            cells[15, 16] = {arm: runs[arm] for arm in PLAIN}
    if len(cells) > 1:
        (results / "map.svg").write_text(map_figure(cells))
    write_csv(results / "runs.csv", lines)
