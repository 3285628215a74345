"""From marked responses to numbers one can compare: intervals, pass@k, paired tests, tables.

A benchmark's headline is the mean over its strata (readers.py) of the mean in each, with a 95 %
interval, because most differences reported on these benchmarks are smaller than that interval.
Questions that are not independent (five versions of one problem in MathVerse, the samples of a task
in MEGA-Bench) form a cluster: the interval is computed as if clusters, not questions, were sampled.

What we do differently from the common kits: unanswered, truncated and missing responses are wrong
and are reported beside the score; two models are compared question by question; and published
numbers (paper, Tables 1 and 2) are printed beside ours.
"""

import math
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.readers import BENCHMARKS, Item
from benchmarks.rules import extract
from data import NUMBER, UserError, printable, read_jsonl
from grading.choices import named
from grading.spelling import compact, tidy
from rethink import before_rethinking, outcome, rethinks, share_rethinking

MODELS = [f"{name}-{size}" for size in ("7B", "32B", "72B") for name in ("Qwen2.5-VL", "VL-Rethinker")]
PUBLISHED = {  # the paper's greedy accuracy in %, one column per model
    "mathvista": (68.2, 74.9, 74.7, 78.8, 74.8, 80.4),
    "mathverse": (46.3, 54.2, 48.5, 56.9, 57.2, 63.5),
    "mathvision": (25.1, 32.3, 38.4, 40.5, 38.1, 44.9),
    "mmmu": (54.3, 56.7, 59.4, 65.6, 67.0, 68.8),
    "mmmu_pro": (36.9, 41.7, 49.5, 50.6, 51.6, 55.9),
    "emma": (21.5, 29.7, 31.1, 37.9, 34.1, 38.5),
    "megabench": (35.0, 37.2, 13.3, 19.9, 49.0, 51.3),
}

# ---------------------------------------------------------------------------- one response


def mark(item: Item, answer: dict) -> dict:
    """One line of OUT/NAME.jsonl, from "response" and, where known, "finish" and "tokens"."""
    response, extracted = answer["response"], None
    if response is not None:
        found = item.extract or (lambda text: extract(text, item.question.choices or ()))
        extracted = found(response)
    score = 0.0 if extracted is None else float(item.rule(extracted))
    line = {
        "id": item.question.id,
        "response": response,
        "extracted": extracted,
        "gold": item.question.answer,
        "correct": score > 1 - 1e-9,
        "finish": answer.get("finish"),
        "tokens": answer.get("tokens"),
        "category": item.question.category,
    }
    if 0 < score < 1:  # some MEGA-Bench tasks give partial credit
        line["score"] = score
    if item.cluster:
        line["cluster"] = item.cluster
    if forced := answer.get("again"):  # what it said when forced to look again
        # A second look must answer: what y1 said is no answer of y2.
        again = mark(item, forced | {"response": forced["response"].removeprefix(response)})
        kept = ("extracted", "correct", "score", "finish", "tokens")
        line["again"] = {key: again[key] for key in kept if key in again}
        line["again"] |= {"response": forced["response"], "trigger": forced["trigger"]}
    return line


def mark_all(item: Item, answers: list[dict], samples: int) -> list[dict]:
    """The lines of all samples of a question; missing ones are wrong."""
    padded = answers + [{"response": None, "finish": "missing"}] * (samples - len(answers))
    return [mark(item, answer) | ({"sample": k} if k else {}) for k, answer in enumerate(padded)]


def why_unanswered(line: dict) -> str | None:
    """Why no answer was found in a response; None if one was, or if the response is missing."""
    if line["response"] is None or line["extracted"] is not None:
        return None
    reasons = {"length": "cut at the limit", "overlong": "prompt too long"}
    return reasons.get(line["finish"], "no box or phrase")


def unanswered(lines: list[dict]) -> str:
    """The ends of ten responses without an answer, for reading."""
    shown = [line for line in lines if why_unanswered(line)][:10]
    ends = [printable(" ".join(line["response"][-300:].split())) for line in shown]
    rows = zip(shown, ends, strict=True)
    return "\n".join(f"{printable(line['id'])} ({why_unanswered(line)}): ...{end}" for line, end in rows)


def credit(line: dict) -> float:
    return float(line.get("score", line["correct"]))


# ---------------------------------------------------------------------------- estimates


def headline(items: list[Item], values: list[float]) -> float:
    """The mean over strata of the mean in each."""
    return math.fsum(weight * value for weight, value in zip(_weights(items), values, strict=True))


def _weights(items: list[Item]) -> list[float]:
    sizes = Counter(item.stratum for item in items)
    return [1 / (len(sizes) * sizes[item.stratum]) for item in items]


def interval(items: list[Item], values: list[float]) -> tuple[float, float]:
    """95 % interval of the headline: Wilson's, at the effective sample size of the clusters.

    Without clusters that number is n, and this is Wilson's interval, which behaves at 0 and 1.
    """
    mean = headline(items, values)
    spread: dict[str, float] = defaultdict(float)
    for item, weight, value in zip(items, _weights(items), values, strict=True):
        spread[item.cluster or item.question.id] += weight * (value - mean)
    variance = sum(part * part for part in spread.values())
    worth = mean * (1 - mean) / variance if variance > 1e-12 else len(spread)
    z = 1.959964
    centre = (mean + z * z / (2 * worth)) / (1 + z * z / worth)
    half = z / (1 + z * z / worth) * math.sqrt(mean * (1 - mean) / worth + (z / (2 * worth)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at(k: int, samples: int, correct: int) -> float:
    """The chance that one of k is right, k drawn without replacement from `samples` (unbiased).

    >>> pass_at(1, 4, 1), pass_at(4, 4, 1)
    (0.25, 1.0)
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(item: Item, lines: list[dict]) -> float:
    """Credit of the answer given most often, the earliest of equals; no answer is no vote."""
    votes, credits = Counter(), {}
    for line in (line for line in lines if line["extracted"] is not None):
        found, choices = line["extracted"], item.question.choices
        vote = (choices and named(found, choices, strict=False)) or compact(tidy(found))
        votes[vote] += 1
        credits.setdefault(vote, credit(line))
    return credits[votes.most_common(1)[0][0]] if votes else 0.0


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p that wins and losses are equally likely; with right and wrong, McNemar's."""
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)


# ---------------------------------------------------------------------------- a benchmark


def summarise(
    name: str, items: list[Item], left_out: list[Item], marked: dict[str, list[dict]], samples: int
) -> dict:
    """The entry of a benchmark in summary.json, from its lines by question id."""
    by_item = [marked[item.question.id] for item in items]
    values = [sum(map(credit, lines)) / len(lines) for lines in by_item]
    lines = [line for lines in by_item for line in lines]
    reasons = Counter(filter(None, map(why_unanswered, lines)))
    groups: dict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        for group in dict.fromkeys(filter(None, item.groups)):
            groups[group].append(i)

    def mean(values: list[float]) -> float:
        return round(headline(items, values), 6)

    def part(chosen: list[int]) -> dict:
        accuracy = headline([items[i] for i in chosen], [values[i] for i in chosen])
        return {"accuracy": round(accuracy, 6), "n": len(chosen)}

    summary = {
        "accuracy": mean(values),
        "n": len(items),
        "ci95": [round(bound, 6) for bound in interval(items, values)],
        "no_answer": reasons.total(),
        "no_answer_by": {why: round(count / len(lines), 6) for why, count in reasons.most_common()},
        "truncated": sum(line["finish"] == "length" for line in lines),
        "missing": sum(line["response"] is None for line in lines),
        "overlong": sum(line["finish"] == "overlong" for line in lines),
        "label": label(name, items, left_out),
        "groups": {group: part(chosen) for group, chosen in groups.items()},
        **rethinking(items, by_item),
    }
    if samples > 1:
        summary[f"mean@{samples}"] = summary["accuracy"]
        right = [sum(line["correct"] for line in lines) for lines in by_item]
        for k in sorted({samples} | {2**i for i in range(samples.bit_length())}):
            summary[f"pass@{k}"] = mean([pass_at(k, samples, correct) for correct in right])
        summary[f"maj@{samples}"] = mean([majority(*pair) for pair in zip(items, by_item, strict=True)])
    if name == "megabench":
        tasks = {item.stratum for item in items}
        # One sample's reason leaves out its whole task.
        why = {x.stratum: x.unaskable for x in left_out if x.unaskable}
        why |= {x.stratum: x.unsupported for x in left_out if x.unsupported}
        summary |= {
            "tasks_scored": len(tasks),
            "tasks_total": len(tasks | {item.stratum for item in left_out}),
            "samples_scored": len(items),
            "unsupported_metrics": dict(Counter(why[x.stratum] for x in left_out)),
        }
    if name in PUBLISHED:
        summary["published"] = dict(zip(MODELS, PUBLISHED[name], strict=True))
    return summary


def rethinking(items: list[Item], by_item: list[list[dict]]) -> dict:
    """How often responses rethink by themselves, what that changed, and the tokens per response that it
    took where the first answer was right already; and, where it was forced, accuracy before, after,
    and the bound when only wrong answers are looked at again (Fig. 7)."""
    pairs = [(x, line) for x, lines in zip(items, by_item, strict=True) for line in lines]
    own = [(x, line) for x, line in pairs if line["response"] and rethinks(line["response"])]
    before = [mark(x, line | {"response": before_rethinking(line["response"])}) for x, line in own]
    helped, spent = 0.0, 0.0
    for (_, line), first in zip(own, before, strict=True):
        helped += credit(line) - credit(first)
        spent += first["correct"] * share_rethinking(line["response"]) * (line["tokens"] or 0)
    totals = {"rethinks": len(own), "rethinks_helped": helped, "overthinking": spent}
    summary = {key: round(value / len(pairs), 6) for key, value in totals.items()}
    forced = [(line, line["again"]) for _, line in pairs if "again" in line]
    if forced:

        def mean(value) -> float:
            return round(headline(items, [sum(map(value, x)) / len(x) for x in by_item]), 6)

        summary["force_rethink"] = {
            "before": mean(credit),
            "after": mean(lambda line: credit(line.get("again", line))),
            "only_wrong": mean(lambda line: max(credit(line), credit(line.get("again", line)))),
            "forced": len(forced),
            **Counter(
                outcome(line["correct"], again["extracted"] is not None, again["correct"])
                for line, again in forced
            ),
        }
    return summary


def label(name: str, items: list[Item], left_out: list[Item]) -> str:
    """What the number is a number of: never "core" where it is a part of core."""
    if name not in BENCHMARKS:
        return "held-out toy questions" if name == "toy" else name
    n, size = len(items) + len(left_out), BENCHMARKS[name].size
    tasks, out = ({item.stratum for item in part} for part in (items, left_out))
    what = {
        "megabench": f"core ({len(tasks)}/{len(tasks | out)} tasks, {len(items)}/{n} samples)",
        "mmmu_pro": " + ".join(sorted(tasks)),
        "mathverse": "rule-based",
    }
    words = [what.get(name), BENCHMARKS[name].split, f"partial: {n} of {size}" if n != size else ""]
    return ", ".join(filter(None, words))


# ---------------------------------------------------------------------------- tables


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table(summaries: dict[str, dict]) -> str:
    """A table to paste: one line per benchmark, the published numbers, then every group."""
    counts = ("n", "no_answer", "truncated", "missing")
    rows = [("benchmark", "accuracy", "95 %", "n", "no answer", "truncated", "missing")]
    for name, s in summaries.items():
        bounds = "-".join(map(percent, s["ci95"]))
        rows.append((name, percent(s["accuracy"]), bounds, *(str(s[key]) for key in counts)))
    published = [(k, *map(str, s["published"].values())) for k, s in summaries.items() if "published" in s]
    blocks = [_aligned(rows), *([_aligned([("published, %", *MODELS), *published])] if published else [])]
    for name, s in summaries.items():
        notes = [f"{name}: {s['label']}"]
        if reasons := [f"{percent(share)} % {why}" for why, share in s["no_answer_by"].items()]:
            notes += [f"no answer: {', '.join(reasons)}"]
        notes += [f"{key} {percent(s[key])}" for key in s if key.startswith(("pass@", "maj@"))]
        if forced := s.get("force_rethink"):
            numbers = ", ".join(f"{k} {v}" for k, v in forced.items() if isinstance(v, int))
            notes.append(
                f"forced to look again: before {percent(forced['before'])}, after "
                f"{percent(forced['after'])}, if only when wrong {percent(forced['only_wrong'])} ({numbers})"
            )
        rows = [(g, percent(v["accuracy"]), str(v["n"])) for g, v in sorted(s["groups"].items())]
        blocks.append("\n".join([*notes, _aligned([(name, "accuracy", "n"), *rows])]))
    return "\n\n".join(blocks)


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Words to the left, numbers to the right, under each other."""
    rows = [tuple(map(printable, row)) for row in rows]  # groups are named by the data
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    cells = [[row[0].ljust(first), *map(str.rjust, row[1:], widths)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


# ---------------------------------------------------------------------------- two results


def read_result(path: str) -> dict[str, tuple[float, str]]:
    """OUT/NAME.jsonl -> {id: (mean credit over samples, cluster)}."""
    credits, clusters = defaultdict(list), {}
    shape = {"id": str, "correct": bool, "score?": NUMBER, "cluster?": str}
    for _, line in read_jsonl(Path(path), shape):
        credits[line["id"]].append(credit(line))
        clusters[line["id"]] = line.get("cluster", line["id"])
    return {id_: (sum(c) / len(c), clusters[id_]) for id_, c in credits.items()}


def paired(differences: list[float], clusters: list[str] | None = None) -> tuple[float, float]:
    """Mean difference per question, and half of its 95 % interval.

    >>> paired([1.0, 0.0, 1.0, 0.0])
    (0.5, 0.49)
    """
    n, spread = len(differences), defaultdict(float)
    mean = sum(differences) / n
    for cluster, difference in zip(clusters or range(n), differences, strict=True):
        spread[cluster] += difference - mean
    return mean, 1.96 * math.sqrt(sum(part * part for part in spread.values())) / n


def compare(path_a: str, path_b: str) -> str:
    """A paired comparison of two result files on the questions that both have."""
    a, b = read_result(path_a), read_result(path_b)
    shared = [id_ for id_ in a if id_ in b]
    if not shared:
        raise UserError(f"{path_a} and {path_b} have no id in common; compare one benchmark's files")
    n = len(shared)
    differences = [b[id_][0] - a[id_][0] for id_ in shared]
    mean, half = paired(differences, [a[id_][1] for id_ in shared])
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    rows = [("", "mean over shared questions", "n")]
    for name, path, result in (("A", path_a, a), ("B", path_b, b)):
        rows.append((f"{name}  {path}", percent(sum(result[id_][0] for id_ in shared) / n), str(n)))
    text = (
        f"{_aligned(rows)}\n"
        f"B - A = {100 * mean:+.1f} +- {100 * half:.1f} points (95 %)\n"
        f"B better on {wins}, A on {losses}, equal on {n - wins - losses}; "
        f"McNemar p = {sign_test(wins, losses):.3g}"
    )
    alone = len(a) + len(b) - 2 * n
    return text + (f"\n{alone} questions are in one file only and left out" if alone else "")
