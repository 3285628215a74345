"""One page to look at a run: what the numbers did, and what the policy said.

    python report.py RUN [RUN ...]          writes RUN/report.html of the first; the others' curves
                                            are laid over its own

The page needs nothing but itself: no network, no library. Curves show whether the policy learns;
held-out answers and rollouts show what it learns. Only together do they tell a policy that thinks
from one that exploits the reward. The page can be written while the run is going.

Whatever a model wrote is escaped. Should that fail, the page's content security policy still lets no
script run and nothing be fetched.

How the page looks is in pages/report.html; pages/curves.py draws charts, pages/transcripts.py
shows answers and rollouts.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from html import escape
from pathlib import Path
from string import Template

from benchmarks.scores import paired
from data import NUMBER, UserError, check_shape, printable, read_json, read_jsonl
from pages.curves import Chart, draw, look_of, series, show_number, swatch
from pages.transcripts import OUTCOMES, heldout, rollouts
from record import write_atomically

PAGE = Path(__file__).parent / "pages/report.html"
LINES = {  # of metrics.jsonl: key -> (title, note, unit)
    "effective_queries": ("Effective questions", "share whose rewards differ: others have no gradient", "%"),
    "replayed": ("Replayed", "share of a batch drawn from the replay buffer", "%"),
    "rethought": ("Forced second looks kept", "share of responses", "%"),
    "rethinks": ("Unforced rethinking", "share of responses with a trigger phrase of their own", "%"),
    "response_length": ("Response length", "mean, in tokens", "tokens"),
    "truncated": ("Cut off", "share of responses that reached the length limit", "%"),
    "entropy": ("Entropy", "of the next token; near 0 nothing is explored any more", "nats"),
    "clip_fraction": ("Clipped", "share of tokens whose gradient the clip has stopped", "%"),
    "sft_loss": ("SFT loss", "on the second looks that were kept", "nats"),
    "grad_norm": ("Gradient norm", "before clipping", ""),
    "lr": ("Learning rate", "with warm-up and decay", ""),
    "logp_mismatch": ("Mismatch", "of log-probabilities of tokens, sampling against training, mean", "nats"),
    "speed": ("Speed", "response tokens per second, sampling and update together", "tokens/s"),
}

# What the page counts on in a line of samples.jsonl, heldout.jsonl and metrics.jsonl.
RESPONSE = {"text": str, "pieces": [[str, bool]], "right": bool, "reward": NUMBER, "advantage": NUMBER}
RESPONSE |= {"tokens": int, "finish": str, "outcome?": str, "not_kept?": RESPONSE}
QUESTION = {"id": str, "text": str, "answer": str, "images": [str], "category?": str}
GROUP = {"step": int, "question": QUESTION, "responses": [RESPONSE]}
ANSWER = {"step": int, "id": str, "text": str, "found": (str, type(None)), "right": bool, "tokens": int}
COUNTS = [f"rethink_{name}" for name in ("attempted", *OUTCOMES)]
METRICS = {"step": int, "episode?": int, "heldout_categories?": dict} | {
    f"{key}?": (*NUMBER, type(None))  # null where it was not finite
    for key in ("response_tokens", "step_seconds", *COUNTS)
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


def read_run(folder: Path, name: str) -> Record:
    """What is in a run's folder. Only metrics.jsonl has to be there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; give the folder that train.py wrote (--out)")
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: no metrics.jsonl; is it a run of train.py, and has it begun?")

    def rows(file: str, shape: dict) -> list[tuple[str, dict]]:
        path = folder / file
        return list(read_jsonl(path, shape, growing=True)) if path.exists() else []

    questions, answers = [], {}
    for place, row in rows("heldout.jsonl", {"step": int, "question?": QUESTION}):
        if "question" in row:
            questions.append(row["question"])
        else:
            check_shape(row, ANSWER, place)
            answers.setdefault(row["step"], {})[row["id"]] = row
    path = folder / "config.json"
    config = read_json(path, {"steps?": int}) if path.exists() else {}
    metrics = [derive(row) for _, row in rows("metrics.jsonl", METRICS)]
    starts = [row for _, row in rows("starts.jsonl", {"step": int, "date": str, "command": str})]
    samples = [row for _, row in rows("samples.jsonl", GROUP)]
    return Record(name, config, starts, metrics, samples, questions, answers)


def derive(row: dict) -> dict:
    """A row of metrics.jsonl with what is drawn of it."""
    more = {f"in {name}": value for name, value in row.get("heldout_categories", {}).items()}
    if row.get("step_seconds") and row.get("response_tokens"):
        more["speed"] = row["response_tokens"] / row["step_seconds"]
    if attempted := row.get("rethink_attempted"):
        more |= {f"look_{name}": (row.get(f"rethink_{name}") or 0) / attempted for name in OUTCOMES}
    return row | more


def charts(first: Record) -> list[Chart]:
    """All charts, most important first. Those without numbers are not drawn."""
    found = dict.fromkeys(key for row in first.metrics for key in row if key[:3] == "in ")
    categories = {key: key[3:] for key in found} if len(found) > 1 else {}
    heldout = {"heldout_accuracy": "greedy", "heldout_sampled": "sampled"}
    ways = {"heldout_fast": "guesses", "heldout_slow": "reads", "heldout_twice": "guesses, then reads"}
    # In the order of their colours: wrong → right is green.
    order = ("right_right", "right_wrong", "wrong_right", "wrong_wrong", "no_answer")
    looks = {f"look_{name}": OUTCOMES[name] for name in order}
    unit = "" if first.config.get("reward") else "%"  # a share, unless the reward is the user's own
    return [
        Chart("Held-out accuracy", "greedy answers, and one sampled answer per question", "%", heldout),
        Chart("What forced second looks did", "share of an episode's forced looks", "%", looks, True),
        Chart("Held-out by category", "greedy", "%", categories),
        Chart("Ways of answering", "share of sampled held-out answers", "%", ways, True),
        Chart("Reward", "mean over an episode's responses", unit, {"reward": ""}),
        *(Chart(*about, {key: ""}) for key, about in LINES.items()),
    ]


def table(runs: list[Record], caption: str, rows: dict[str, list[str]]) -> str:
    """Facts down, runs across. Cells are escaped here."""
    heads = "".join(
        f'<th scope="col">{swatch(look_of(i, i))}{escape(run.name)}</th>' for i, run in enumerate(runs)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def learnt(run: Record) -> dict[str, str]:
    """Held out: the base, the end, and their difference, paired by question where answers are kept."""
    points = series(run.metrics, "heldout_accuracy")
    if not points:
        return dict.fromkeys(("Held out, base", "Held out, final", "Difference"), "–")
    base, last = (show_number(value, "%") for _, value in (points[0], points[-1]))
    first, final = (run.answers.get(step, {}) for step, _ in (points[0], points[-1]))
    differences = [final[id_]["right"] - first[id_]["right"] for id_ in first if id_ in final]
    difference = f"{100 * (points[-1][1] - points[0][1]):+.1f} points"
    if differences:
        mean, half = paired(differences)
        counts = Counter(differences)
        difference = (
            f"{100 * mean:+.1f} ± {100 * half:.1f} points (95 %, paired over {len(differences)} "
            f"questions: {counts[1]} fixed, {counts[-1]} broken)"
        )
    return {"Held out, base": base, "Held out, final": last, "Difference": difference}


def facts(run: Record) -> dict[str, str]:
    """What became of a run, and what it was."""
    tokens, seconds = (
        sum(value for _, value in series(run.metrics, key)) for key in ("response_tokens", "step_seconds")
    )
    dates, commands = ([start[key] for start in run.starts] for key in ("date", "command"))
    return learnt(run) | {
        "Steps": steps_of(run),
        "Response tokens": f"{tokens:,.0f}",
        "Time": str(timedelta(seconds=round(seconds))),
        "Model": str(run.config.get("model", "–")),
        "Data": str(run.config.get("data", "–")),
        "Started": "; resumed: ".join(dates) or "–",
        "Command": "; then: ".join(commands) or "–",
    }


def steps_of(run: Record) -> str:
    """Steps done, and of how many where the run says so."""
    done, planned = last_step([run]), run.config.get("steps")
    return f"{done:,} of {planned:,}" if planned and planned != done else f"{done:,}"


def last_step(runs: list[Record]) -> int:
    return max((row["step"] for run in runs for row in run.metrics), default=0)


def section(name: str, title: str, body: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{body}</section>'


def write_report(folders: list[Path]) -> Path:
    """Write the page about the first run into its folder; returns where."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = list(map(read_run, folders, names))
    first, columns = runs[0], [facts(run) for run in runs]
    summary = table(runs, "Summary", {name: [cells[name] for cells in columns] for name in columns[0]})
    known = dict.fromkeys(name for run in runs for name in run.config if name not in ("out", "resume"))
    settings = {name: [str(run.config.get(name, "–")) for run in runs] for name in known}
    if differing := {name: values for name, values in settings.items() if len(set(values)) > 1}:
        summary += "<h3>Where the settings differ</h3>" + table(runs, "Settings", differing)
    metrics, drawn = [run.metrics for run in runs], {True: "", False: ""}
    for chart in charts(first):
        drawn[len(chart.keys) > 1] += draw(chart, names, metrics, last_step(runs))
    curves = (
        '<p class="note">Point at a chart to read its values. Below a title: the first value and '
        "the last. Where a run has more than 200 points, each drawn is a mean of neighbours."
        f'</p><div class="charts wide">{drawn[True]}</div><div class="charts">{drawn[False]}</div>'
    )
    listed = "".join(
        f"<li>{escape(name)} <strong>{escape(str(value))}</strong></li>"
        for name, value in first.config.items()
    )
    answers = '<p class="soft">None were written.</p>'
    if first.questions and first.answers:
        answers = heldout(first.questions, first.answers)
    beside = f", beside {' and '.join(names[1:])}" if len(runs) > 1 else ""
    sections = [
        section("summary", "Summary", summary),
        section("curves", "Curves", curves),
        section("heldout", f"Held-out answers of {first.name}", answers),
        section("rollouts", f"Rollouts of {first.name}", rollouts(first.samples)),
        section("settings", f"Settings of {first.name}", f'<ul class="settings">{listed}</ul>'),
    ]
    title, subtitle = escape(first.name), escape(f"{steps_of(first)} steps{beside}")
    template, path = Template(PAGE.read_text(encoding="utf-8")), folders[0] / "report.html"
    page = template.substitute(title=title, subtitle=subtitle, sections="\n".join(sections))
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return path


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
