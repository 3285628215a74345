"""One page to look at a run: what the numbers did, and what the policy said.

    python report.py RUN [RUN ...]          writes RUN/report.html of the first; the others' curves
                                            are laid over its own

The page needs nothing but itself: no network, no library. Curves show whether the policy learns;
held-out answers and rollouts show what it learns. Only together do they tell a policy that thinks
from one that exploits the reward. The page can be written while the run is going.

Whatever a model wrote is escaped. Should that fail, the page's content security policy still allows
only its own script, named by hash, and nothing is fetched.

How the page looks is in pages/report.html; pages/curves.py draws charts, pages/transcripts.py
shows answers and rollouts.
"""

import argparse
import base64
import hashlib
import re
import sys
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path
from string import Template

from benchmarks.scores import paired
from data import NUMBER, UserError, check_shape, printable, read_json, read_jsonl, write_atomically
from pages.curves import Chart, draw, ends, looks, series, show_number, swatch
from pages.transcripts import OUTCOMES, heldout, rollouts

PAGE = Path(__file__).parent / "pages/report.html"
HELDOUT = {"heldout_accuracy": "greedy", "heldout_sampled": "sampled"}
WAYS = {"heldout_fast": "guesses", "heldout_slow": "reads", "heldout_twice": "guesses, then reads"}


LINES = (  # of metrics.jsonl: key, title, note, unit
    (
        "effective_queries",
        "Effective questions",
        ("share with responses that differ in reward: only these have a gradient"),
        "%",
    ),
    ("replayed", "Replayed", "share of a batch drawn from the replay buffer", "%"),
    ("rethought", "Forced second looks kept", "share of responses", "%"),
    ("rethinks", "Unforced rethinking", "share of responses with a trigger phrase of their own", "%"),
    ("response_length", "Response length", "mean, in tokens", "tokens"),
    ("truncated", "Cut off", "share of responses that reached the length limit", "%"),
    ("entropy", "Entropy", "of the next token; near 0 nothing is explored any more", "nats"),
    ("clip_fraction", "Clipped", "share of tokens outside the clip range", "%"),
    ("sft_loss", "SFT loss", "on the second looks that were kept", "nats"),
    ("grad_norm", "Gradient norm", "before clipping", ""),
    ("lr", "Learning rate", "with warm-up and decay", ""),
    (
        "logp_mismatch",
        "Mismatch",
        ("mean difference of a token's log-probability, sampling against training"),
        "nats",
    ),
    ("speed", "Speed", "response tokens per second, sampling and update together", "tokens/s"),
)


def charts(first: "Record") -> list[Chart]:
    """All charts, most important first. Those without numbers are not drawn."""
    categories = dict.fromkeys(key for row in first.metrics for key in row if key[:3] == "in ")
    outcomes = {f"look_{name}": label for name, label in OUTCOMES.items()}
    by_category = {key: key[3:] for key in categories if len(categories) > 1}
    return [
        Chart(
            "Held-out accuracy",
            "greedy answers, and one sampled answer per question",
            "%",
            HELDOUT,
            wide=True,
        ),
        Chart(
            "What forced second looks did",
            "share of an episode's forced looks",
            "%",
            outcomes,
            "stack",
            True,
            (2, 4, 1, 5, 3),
        ),
        Chart("Held-out by category", "greedy", "%", by_category, "first", wide=True),
        Chart("Ways of answering", "share of sampled held-out answers", "%", WAYS, "stack", wide=True),
        Chart("Reward", "mean over an episode's responses", first.reward_unit, {"reward": ""}),
        *(Chart(title, note, unit, {key: ""}) for key, title, note, unit in LINES),
    ]


# What the page counts on in a line of samples.jsonl, heldout.jsonl and metrics.jsonl.
RESPONSE = {
    "text": str, "pieces": [[str, bool]], "right": bool, "reward": NUMBER, "advantage": NUMBER, "tokens": int,
    "finish": str, "not_kept?": dict,
}  # fmt: skip
RESPONSE["not_kept?"] = RESPONSE
QUESTION = {"id": str, "text": str, "answer": str, "images": [str], "category?": str}
GROUP = {"step": int, "question": QUESTION, "responses": [RESPONSE]}
ANSWER = {
    "step": int, "id": str, "text": str, "found": (str, type(None)), "right": bool, "tokens": int,
}  # fmt: skip
COUNTS = ("attempted", *OUTCOMES)
MEASURED = (*NUMBER, type(None))  # null where it was not finite
METRICS = {"step": int, "episode?": int, "heldout_categories?": dict} | {
    f"{key}?": MEASURED
    for key in ("response_tokens", "step_seconds", *(f"rethink_{name}" for name in COUNTS))
}


@dataclass
class Record:
    """What a run wrote."""

    name: str
    config: dict
    starts: list[dict]
    metrics: list[dict]
    samples: list[dict]
    questions: list[dict]  # held out
    answers: dict[int, dict[str, dict]]  # step -> question's id -> its greedy answer

    @property
    def reward_unit(self) -> str:
        """A share where the reward is right or wrong; a plain number where it is the user's own."""
        return "" if self.config.get("reward") else "%"


# ---------------------------------------------------------------------------- read


def read_run(folder: Path, name: str) -> Record:
    """What is in a run's folder. Only metrics.jsonl has to be there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; give the folder that train.py wrote (--out)")
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: no metrics.jsonl; is it a run of train.py, and has it begun?")

    def rows(file: str, shape: dict) -> list[dict]:
        path = folder / file
        found = read_jsonl(path, shape, growing=True) if path.exists() else []
        return [row for _, row in found]

    questions, answers = [], {}
    for number, row in enumerate(rows("heldout.jsonl", {"step": int, "question?": QUESTION}), 1):
        if "question" in row:
            questions.append(row["question"])
        else:
            check_shape(row, ANSWER, f"{folder / 'heldout.jsonl'}:{number}")
            answers.setdefault(row["step"], {})[row["id"]] = row
    path = folder / "config.json"
    config = read_json(path, {"steps?": int}) if path.exists() else {}
    metrics = [derive(row) for row in rows("metrics.jsonl", METRICS)]
    starts = rows("starts.jsonl", {"step": int, "date": str, "command": str})
    return Record(name, config, starts, metrics, rows("samples.jsonl", GROUP), questions, answers)


def derive(row: dict) -> dict:
    """A row of metrics.jsonl with what is drawn of it.

    >>> derive({"step": 1, "response_tokens": 300, "step_seconds": 1.5})["speed"]
    200.0
    >>> derive({"step": 1, "rethink_attempted": 4, "rethink_wrong_right": 3})["look_wrong_right"]
    0.75
    """
    more = {f"in {name}": value for name, value in row.get("heldout_categories", {}).items()}
    if row.get("step_seconds") and row.get("response_tokens"):
        more["speed"] = row["response_tokens"] / row["step_seconds"]
    if attempted := row.get("rethink_attempted"):
        more |= {f"look_{name}": (row.get(f"rethink_{name}") or 0) / attempted for name in OUTCOMES}
    return row | more


def run_names(folders: list[Path]) -> list[str]:
    """What runs are called: their folder, or the whole path where two folders are called alike.

    >>> run_names([Path("runs/a"), Path("runs/b")])
    ['a', 'b']
    >>> run_names([Path("x/toy"), Path("y/toy")])
    ['x/toy', 'y/toy']
    """
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


# ---------------------------------------------------------------------------- tables


def table(runs: list[Record], caption: str, rows: list[tuple[str, list[str]]]) -> str:
    """Facts down, runs across. Cells are escaped here."""
    heads = "".join(
        f'<th scope="col" class="run{i}">{swatch(looks(i, i, i))}{escape(run.name)}</th>'
        for i, run in enumerate(runs)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="run{i}">{escape(cell)}</td>' for i, cell in enumerate(cells))
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def second_looks(metrics: list[dict]) -> str:
    r"""What became of forced second looks over the whole run.

    The counts are an episode's and stand in each of its steps; only one of those is added.

    >>> row = {"episode": 1, "rethink_attempted": 3, "rethink_wrong_right": 3}
    >>> second_looks([row, row]).replace("\xa0", " ")
    '3 forced: wrong → right 3, right → right 0, right → wrong 0, wrong → wrong 0, no answer 0'
    """
    episodes = {row["episode"]: row for row in metrics if "episode" in row}
    total = {name: sum(row.get(f"rethink_{name}") or 0 for row in episodes.values()) for name in COUNTS}
    if not total["attempted"]:
        return "none forced"
    told = (f"{label} {total[name]:,}" for name, label in OUTCOMES.items())
    # Non-breaking spaces: an outcome torn at its arrow would be read with its neighbour.
    outcomes = [outcome.replace(" ", "\xa0") for outcome in told]
    return f"{total['attempted']:,} forced: {', '.join(outcomes)}"


def learnt(run: Record) -> list[str]:
    """Held out: the base, the end, and their difference, paired by question where answers are kept."""
    points = series(run.metrics, "heldout_accuracy")
    values = [show_number(value, "%") for _, value in points]
    if len(values) < 2:
        return [*values, *["–"] * 3][:3]
    first, final = (run.answers.get(step, {}) for step, _ in (points[0], points[-1]))
    differences = [final[id_]["right"] - first[id_]["right"] for id_ in first if id_ in final]
    difference = f"{100 * (points[-1][1] - points[0][1]):+.1f} points"
    if differences:
        mean, half = paired(differences)
        fixed, broken = differences.count(1), differences.count(-1)
        difference = (
            f"{100 * mean:+.1f} ± {100 * half:.1f} points (95 %, paired over {len(differences)} "
            f"questions: {fixed} fixed, {broken} broken)"
        )
    return [values[0], f"{values[-1]} (step {points[-1][0]:,})", difference]


def summary_rows(runs: list[Record]) -> list[tuple[str, list[str]]]:
    """What became of each run, and what it was."""

    def total(run: Record, key: str) -> float:
        return sum(value for _, value in series(run.metrics, key))

    def column(run: Record) -> dict[str, str]:
        base, final, difference = learnt(run)
        dates, commands = ([start[key] for start in run.starts] for key in ("date", "command"))
        lines = {title: (key, unit) for key, title, _, unit in LINES[:1] + LINES[3:5]}
        lines = {"Reward": ("reward", run.reward_unit)} | lines
        return {
            "Held out, base": base,
            "Held out, final": final,
            "Difference": difference,
            **{title: ends(series(run.metrics, key), unit) for title, (key, unit) in lines.items()},
            "Forced second looks": second_looks(run.metrics),
            "Steps": steps_of(run),
            "Response tokens": f"{total(run, 'response_tokens'):,.0f}",
            "Time": str(timedelta(seconds=round(total(run, "step_seconds")))),
            "Model": str(run.config.get("model", "–")),
            "Data": str(run.config.get("data", "–")),
            "Started": "; resumed: ".join(dates) or "–",
            "Command": "; then: ".join(commands) or "–",
        }

    columns = [column(run) for run in runs]
    return [(name, [cells[name] for cells in columns]) for name in columns[0]]


def steps_of(run: Record) -> str:
    """Steps done, and of how many where the run says so."""
    done, planned = last_step([run]), run.config.get("steps")
    return f"{done:,} of {planned:,}" if planned and planned != done else f"{done:,}"


def last_step(runs: list[Record]) -> int:
    return max((row["step"] for run in runs for row in run.metrics), default=0)


def differing(runs: list[Record]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs. Every run has an `out` of its own."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in ("out", "resume"))
    cells = {name: [str(run.config.get(name, "–")) for run in runs] for name in names}
    return [(name, values) for name, values in cells.items() if len(set(values)) > 1]


# ---------------------------------------------------------------------------- page


def legend(runs: list[Record]) -> str:
    """Which line is whose; each can be switched off. A single run needs none."""
    if len(runs) < 2:
        return ""
    labels = (
        f'<label><input type="checkbox" id="show{i}" checked>'
        f"{swatch(looks(i, i, i))}{escape(run.name)}</label>"
        for i, run in enumerate(runs)
    )
    return f'<nav class="legend" aria-label="Runs shown">{"".join(labels)}</nav>'


def section(name: str, title: str, body: str, extra: str = "") -> str:
    return (
        f'<section class="{extra}" aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>'
        f"{body}</section>"
    )


def shell(title: str, subtitle: str, sections: list[str], runs: list[Record] = ()) -> str:
    """A whole page. The same arguments give the same page."""
    template = PAGE.read_text(encoding="utf-8")
    script = re.search("<script>(.*)</script>", template, re.DOTALL)[1]
    return Template(template).substitute(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=escape(title),
        subtitle=escape(subtitle),
        hide_runs="".join(
            f"body:has(#show{i}:not(:checked)) .run{i} {{ display: none; }}\n" for i in range(len(runs))
        ),
        legend=legend(runs),
        sections="\n".join(sections),
    )


def page(runs: list[Record]) -> str:
    """The page about the first run."""
    first, names, end = runs[0], [run.name for run in runs], last_step(runs)
    summary = table(runs, "Summary", summary_rows(runs))
    if rows := differing(runs):
        summary += "<h3>Where the settings differ</h3>" + table(runs, "Settings", rows)
    metrics = [run.metrics for run in runs]
    drawn = {True: "", False: ""}
    for chart in charts(first):
        drawn[chart.wide] += draw(chart, names, metrics, end)
    curves = (
        '<p class="note">Point, touch or use the arrow keys to read a value. Below a title: the first '
        "value and the last. Where a run has more than 200 points, each drawn is a mean of neighbours."
        f'</p><div class="charts wide">{drawn[True]}</div><div class="charts">{drawn[False]}</div>'
    )
    settings = "".join(
        f"<li>{escape(name)} <strong>{escape(str(value))}</strong></li>"
        for name, value in first.config.items()
    )
    answers = '<p class="soft">None were written.</p>'
    if first.questions and first.answers:
        columns = [(f"step {step:,}", first.answers[step]) for step in sorted(first.answers)]
        answers = heldout(first.questions, columns)
    beside = f", beside {' and '.join(names[1:])}" if len(runs) > 1 else ""
    sections = [
        section("summary", "Summary", summary),
        section("curves", "Curves", curves),
        section("heldout", f"Held-out answers of {first.name}", answers, "filtered"),
        section("rollouts", f"Rollouts of {first.name}", rollouts(first.samples), "filtered"),
        section("settings", f"Settings of {first.name}", f'<ul class="settings">{settings}</ul>'),
    ]
    return shell(first.name, f"{steps_of(first)} steps{beside}", sections, runs)


def write_page(path: Path, html: str) -> Path:
    try:
        write_atomically(path, html)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def write_report(folders: list[Path]) -> Path:
    """Write the page into the first folder; returns where."""
    runs = [read_run(folder, name) for folder, name in zip(folders, run_names(folders))]
    return write_page(folders[0] / "report.html", page(runs))


def main(argv: list[str]) -> int:
    """The command line: 0 when the page is written, 2 for something the user can put right."""
    parser = argparse.ArgumentParser("report.py", description="One page to look at a run.")
    about = "a run's folder; the page is about the first, the others' curves are laid over its own"
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help=about)
    folders = parser.parse_args(argv).runs
    try:
        print(printable(str(write_report(folders))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
