"""One page to look at a run: what the numbers did, and what the model said.

    python report.py RUN [RUN ...]          writes RUN/report.html of the first; the others' curves
                                            are laid over its own

The page needs nothing but itself: no network, no library. Curves answer "does it learn?", rollouts
"what does it do?", and only the two together tell a policy that thinks from one that found a way
around the reward. It may be made while a run is going.

Whatever a model wrote is escaped. Should that ever be forgotten, the page's security policy still
names its one script by hash, lets no other run, and fetches nothing.

How it looks is in pages/report.html, how curves are drawn in pages/curves.py.
"""

import argparse
import base64
import hashlib
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from pages.curves import Chart, draw, ends, series, show_number, swatch
from data import NUMBER, UserError, read_json, read_jsonl, write_atomically
from pages.transcripts import rollouts

PAGE = Path(__file__).parent / "pages/report.html"
CHARTS = (
    Chart("heldout_accuracy", "Held-out accuracy", "greedy answers to questions never trained on",
          "%", 1.0),
    Chart("reward", "Reward", "share of sampled responses that are right", "%", 1.0),
    Chart("effective_queries", "Effective questions",
          "share whose responses differ in reward: the others teach nothing", "%", 1.0),
    Chart("replayed", "Replayed", "share of a batch drawn from the replay buffer", "%", 1.0),
    Chart("rethought", "Forced second looks kept", "share of responses", "%", 1.0),
    Chart("rethinks", "Rethinking unasked",
          "share of responses that look again by themselves", "%", 1.0),
    Chart("response_length", "Response length", "mean, in tokens", "tokens"),
    Chart("truncated", "Cut off", "share of responses that met the length limit", "%"),
    Chart("entropy", "Entropy", "of the next token; near 0 nothing is explored any more", "nats"),
    Chart("clip_fraction", "Clipped", "share of tokens beyond the trust region", "%"),
    Chart("grad_norm", "Gradient norm", "before clipping", ""),
    Chart("speed", "Speed", "response tokens a second, sampling and update together", "tokens/s"),
)  # fmt: skip


# What the page counts on in a line of samples.jsonl and of metrics.jsonl.
RESPONSE = {
    "text": str, "pieces": [[str, bool]], "reward": NUMBER, "advantage": NUMBER, "tokens": int,
    "finish": str, "not_kept?": dict,
}  # fmt: skip
RESPONSE["not_kept?"] = RESPONSE
GROUP = {
    "step": int,
    "question": {"text": str, "answer": str, "images": [str], "category?": str},
    "responses": [RESPONSE],
}
COUNTS = ("attempted", "wrong_right", "right_right", "right_wrong", "wrong_wrong")
METRICS = {"step": int, "episode?": int} | {f"rethink_{name}?": NUMBER for name in COUNTS}


@dataclass
class Record:
    """What a run wrote down."""

    name: str
    config: dict
    metrics: list[dict]
    samples: list[dict]


# ---------------------------------------------------------------------------- read


def read_run(folder: Path, name: str) -> Record:
    """What is in a run's folder. Only metrics.jsonl has to be there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run; give the folder that train.py wrote (--out)")
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder}: no metrics.jsonl; is it a run of train.py, and has it begun?")
    samples = []
    if (folder / "samples.jsonl").exists():
        rows = read_jsonl(folder / "samples.jsonl", GROUP, growing=True)
        samples = [row for _, row in rows]
    rows = read_jsonl(folder / "metrics.jsonl", METRICS, growing=True)
    metrics = [row for _, row in rows]
    path = folder / "config.json"
    config = read_json(path, {"steps?": int}) if path.exists() else {}
    return Record(name, config, metrics, samples)


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


def duration(seconds: float) -> str:
    """
    >>> duration(17.4), duration(400), duration(9000)
    ('17 s', '6 min 40 s', '2 h 30 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


# ---------------------------------------------------------------------------- tables


def table(runs: list[Record], caption: str, rows: list[tuple[str, list[str]]]) -> str:
    """Facts down, runs across. Cells are escaped here."""
    heads = "".join(
        f'<th scope="col" class="run{i}">{swatch(i)}{escape(run.name)}</th>'
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
    '3 forced: wrong → right 3, right → right 0, right → wrong 0, wrong → wrong 0'
    """
    episodes = {row["episode"]: row for row in metrics if "episode" in row}
    total = {
        name: sum(row.get(f"rethink_{name}") or 0 for row in episodes.values())
        for name in COUNTS
    }
    if not total["attempted"]:
        return "none forced"
    told = (f"{name.replace('_', ' → ')} {total[name]:,}" for name in list(total)[1:])
    # Non-breaking spaces: an outcome torn at its arrow would be read with its neighbour.
    outcomes = [outcome.replace(" ", "\xa0") for outcome in told]
    return f"{total['attempted']:,} forced: {', '.join(outcomes)}"


def summary_rows(runs: list[Record]) -> list[tuple[str, list[str]]]:
    """What became of each run, from its first number to its last."""

    def both_ends(key: str, unit: str) -> list[str]:
        return [ends(run.metrics, key, unit) for run in runs]

    def totals(key: str) -> list[float]:
        return [sum(value for _, value in series(run.metrics, key)) for run in runs]

    return [
        ("Held-out accuracy", both_ends("heldout_accuracy", "%")),
        ("Reward", both_ends("reward", "%")),
        ("Effective questions", both_ends("effective_queries", "%")),
        ("Rethinking unasked", both_ends("rethinks", "%")),
        ("Forced second looks", [second_looks(run.metrics) for run in runs]),
        ("Response length", both_ends("response_length", "tokens")),
        ("Steps", [steps_of(run) for run in runs]),
        ("Response tokens", [show_number(total) for total in totals("response_tokens")]),
        ("Time", [duration(total) for total in totals("step_seconds")]),
    ]


def steps_of(run: Record) -> str:
    """Steps done, and of how many where the run says so."""
    done, planned = last_step([run]), run.config.get("steps")
    return f"{done:,} of {planned:,}" if planned and planned != done else f"{done:,}"


def last_step(runs: list[Record]) -> int:
    return max((row["step"] for run in runs for row in run.metrics), default=0)


def differing(runs: list[Record]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs. Every run has an `out` of its own."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    cells = {name: [str(run.config.get(name, "–")) for run in runs] for name in names}
    return [
        (name, values)
        for name, values in cells.items()
        if name not in ("out", "resume") and len(set(values)) > 1
    ]


# ---------------------------------------------------------------------------- page


def legend(runs: list[Record]) -> str:
    """Which line is whose; each can be switched off. A single run needs none."""
    if len(runs) < 2:
        return ""
    labels = (
        f'<label><input type="checkbox" id="show{i}" checked>{swatch(i)}{escape(run.name)}</label>'
        for i, run in enumerate(runs)
    )
    return f'<nav class="legend" aria-label="Runs shown">{"".join(labels)}</nav>'


def page(runs: list[Record]) -> str:
    """The whole page, about the first run. The same files give the same page."""
    first, names, end = runs[0], [run.name for run in runs], last_step(runs)
    template = PAGE.read_text(encoding="utf-8")
    script = re.search("<script>(.*)</script>", template, re.DOTALL)[1]
    differences = ""
    if rows := differing(runs):
        differences = "<h3>Where the settings differ</h3>" + table(runs, "Settings", rows)
    settings = "".join(
        f"<li>{escape(name)} <strong>{escape(str(value))}</strong></li>"
        for name, value in first.config.items()
    )
    beside = f", beside {' and '.join(names[1:])}" if len(runs) > 1 else ""
    return Template(template).substitute(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=escape(first.name),
        subtitle=escape(f"{steps_of(first)} steps{beside}"),
        hide_runs="".join(
            f"body:has(#show{i}:not(:checked)) .run{i} {{ display: none; }}\n"
            for i in range(len(runs))
        ),
        legend=legend(runs),
        summary=table(runs, "Summary", summary_rows(runs)),
        differences=differences,
        charts="".join(draw(chart, names, [run.metrics for run in runs], end) for chart in CHARTS),
        rollouts=rollouts(first.samples),
        settings=settings,
    )


def write_report(folders: list[Path]) -> Path:
    """Write the page into the first folder; returns where."""
    runs = [read_run(folder, name) for folder, name in zip(folders, run_names(folders))]
    path = folders[0] / "report.html"
    try:
        write_atomically(path, page(runs))
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
        print(write_report(folders))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
