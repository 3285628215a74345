"""MEGA-Bench: a response to one of 440 tasks -> a score from 0 to 1.

In MEGA-Bench (arXiv 2410.10563) every task has its own form of answer: a letter, a number, a set, a
JSON object with several fields. A row's `metric_info` names a metric for each field, how the
fields' scores are aggregated (weighted mean or minimum) and how the response is parsed. This file parses
and aggregates; the metrics are in mega_metrics.py.

What we do differently: answers are found as in the other benchmarks, and a response without one is
counted, where the official parser falls back to the whole response. A task with a metric that does
not run here is left out entirely and reported (`unsupported`); a zero would blame the model.
"""

import re

from benchmarks.mega_metrics import METRICS, parsed, unquoted
from benchmarks.rules import FENCE
from benchmarks.rules import extract as extract_short


def last_object(text: str) -> tuple[dict, str] | None:
    """The last JSON object (or printed dict) in a text, and the text it was read from.

    >>> last_object('Maybe {"a": 1}. Finally {"a": {"b": 2}} for x_{1}.')[0]
    {'a': {'b': 2}}
    """
    opened, spans = [], []
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            spans.append((opened.pop(), brace.end()))
    # The latest end first, so an object comes before those inside it. Formulas have many braces.
    for start, end in reversed(spans[-1000:]):
        found = parsed(text[start:end]) if end - start < 20_000 else None
        if isinstance(found, dict):
            return found, text[start:end]
    return None


def extract(response: str, info: dict) -> str | None:
    """The answer in a response: the last object for JSON tasks, else as in rules.extract.

    Answers of several lines are common here, so everything after the last 'Answer:' belongs to it.
    """
    final = response.rpartition("</think>")[2]
    parser = info.get("response_parse_function")
    if parser == "json" and (found := last_object(final)):
        return found[1]
    tail = re.split(r"\b[Aa]nswer\**:\**", final)
    if len(tail) > 1 and "\\boxed" not in final and "</answer>" not in final:
        spaced = parser in ("verbatim_answer_string", "ascii_answer_string")
        return tail[-1].strip("\n").rstrip() if spaced else tail[-1].strip(" \t\r\n*") or None
    fenced = [found.strip() for found in FENCE.findall(final)]
    short = extract_short(final)
    return short if short is not None else (fenced[-1] or None if fenced else None)


def parse(found: str, answer: dict, info: dict) -> dict:
    """The extracted text by field; every field gets the whole text if it is not valid JSON."""
    if info.get("response_parse_function") == "json":
        fields, _ = last_object(found) or ({}, "")
        return fields or dict.fromkeys(answer, found)
    if fenced := FENCE.search(found):
        found = fenced[1]
    elif all("\n" not in str(gold) for gold in answer.values()):
        # A one-line answer ends with its line (a list with its bracket); the rest is explanation.
        lines = found.split("\n")
        whole = (k for k in range(1, len(lines)) if balanced("\n".join(lines[:k])))
        found = re.sub(r"(?<=[\])}])\.$", "", "\n".join(lines[: next(whole, None)]).rstrip())
    return dict.fromkeys(answer, found)


def balanced(text: str) -> bool:
    return all(text.count(a) <= text.count(b) for a, b in ("[]", "{}", "()"))


def metrics_of(info: dict, answer: dict) -> dict[str, str]:
    """{field: metric name}. A field without a metric does not count, as in the official scorer."""
    named = dict(info.get("field_score_function") or {})
    metrics = {field: named[field] for field in answer if named.get(field)}
    return metrics | dict(info.get("global_aux_metrics") or {})


def unsupported(info: dict, answer: dict) -> set[str]:
    """The names of metrics and aggregations that this sample needs and that do not run here."""
    names = {str(name).lower() for name in metrics_of(info, answer).values()} - set(METRICS)
    function = (info.get("aggregation") or {}).get("function", "mean")
    return names | ({f"aggregation {function}"} if function not in ("mean", "min") else set())


def score(found: str, answer: dict, info: dict) -> float:
    """The score of an extracted answer: its fields' scores, aggregated."""
    fields = parse(found, answer, info)
    scores = {}
    for field, name in metrics_of(info, answer).items():
        whole = field in (info.get("global_aux_metrics") or {})
        ours, gold = (fields, answer) if whole else (fields.get(field), answer[field])
        metric = METRICS[name.lower()]
        try:
            mark = 0.0 if ours is None else float(metric(unquoted(ours), unquoted(gold)))
        # An answer of the wrong form is a wrong answer, whatever error it causes.
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError):
            mark = 0.0
        if mark >= 0:
            scores[field] = mark
    aggregation = info.get("aggregation") or {}
    if not scores:
        return 0.0
    if aggregation.get("function") == "min":
        return min(scores.values())
    weights = aggregation.get("field_weights") or {}
    weighted = sum(mark * weights.get(field, 1) for field, mark in scores.items())
    return weighted / (sum(weights.get(field, 1) for field in scores) or 1)
