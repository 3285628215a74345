"""MEGA-Bench's metrics, under their published names: (our answer, the gold answer) -> score.

MEGA-Bench (arXiv 2410.10563, Appendix) scores each field of an answer by one of some fifty metrics.
Those that need only the two texts and serve more than a task or two are in `METRICS`: several kinds of
equality, sets, sequences, dicts, numbers, similar strings and boxes. Answers are texts or parsed JSON.

What we do differently: the official scorer eval()s numbers that the model wrote, and takes the
first letter of any text ("Apple") as a choice; here numbers go through rules.value, letters through
grading/choices.py and LaTeX through reward.is_correct. Metrics that run code, ask a judge or a
network, or need a language model, a planner or a pronouncing dictionary do not run here, nor do the
rarest (points, chess moves, angles): their tasks are left out and counted.
"""

import json
import re
import unicodedata
from contextlib import suppress
from fractions import Fraction

from benchmarks.rules import extract, literal, value
from grading.choices import named
from grading.spelling import tidy
from reward import is_correct


def parsed(text: str):
    """JSON or a printed Python value, or None."""
    for read in (json.loads, literal):
        with suppress(ValueError, RecursionError):
            return read(text)
    return None


def unquoted(text):
    """'"a"' -> 'a': answers are often printed with quotes of their own."""
    if isinstance(text, str) and text[:1] in "'\"" and len(text) > 1:
        found = parsed(text)
        return found if isinstance(found, str) else text
    return text


def as_list(thing) -> list:
    """A list from a list or from its text; without brackets, a text is split at commas.

    >>> as_list("[1, 'b']"), as_list("a, b"), as_list("(x, y)")
    ([1, 'b'], ['a', 'b'], ['x', 'y'])
    """
    if isinstance(thing, (list, tuple, set, frozenset)):
        return list(thing)
    if not isinstance(thing, str):
        return [] if thing is None else [thing]
    text = thing.strip()
    if not text:
        return []
    found = parsed(text)
    if isinstance(found, (list, tuple, set, dict)):
        return list(found)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return [found]
    closing = {"(": ")", "[": "]", "{": "}"}.get(text[0])
    if closing:
        if not text.endswith(closing):
            return []
        text = text[1:-1]
    return [part.strip() for part in text.split(",")]


def frozen(thing):
    if isinstance(thing, dict):
        return frozenset((key, frozen(item)) for key, item in thing.items())
    return tuple(map(frozen, thing)) if isinstance(thing, (list, tuple)) else thing


def as_set(thing) -> set:
    return {frozen(item) for item in as_list(thing)}


def as_dict(thing) -> dict:
    found = parsed(thing) if isinstance(thing, str) else thing
    return found if isinstance(found, dict) else {}


def lower(thing):
    if isinstance(thing, (list, tuple)):
        return type(thing)(map(lower, thing))
    return thing.lower() if isinstance(thing, str) else thing


def as_boxes(thing) -> list:
    found = list((parsed(thing) if isinstance(thing, str) else thing) or [])
    boxes = found if found and isinstance(found[0], (list, tuple)) else [found]
    return [tuple(map(float, box)) for box in boxes if len(box) == 4]


def exact(ours, gold) -> bool:
    ours, gold = str(ours), str(gold)
    if re.fullmatch("[A-Za-z]", gold) and len(ours) > 1:  # a choice: "(B)" or "B. red" will do
        return named(ours, [], strict=False) == {gold.upper()}
    return ours == gold


def simple(ours, gold) -> bool:
    strip = str.maketrans("", "", " -\n\t.")
    return str(ours).translate(strip).lower() == str(gold).translate(strip).lower()


def precision(ours: set, gold: set) -> float:
    """0 for an empty or unreadable answer, unless the gold set is empty too."""
    return len(ours & gold) / len(ours) if ours else float(not gold)


def jaccard(ours: set, gold: set) -> float:
    return len(ours & gold) / len(ours | gold) if ours | gold else 1.0


def over_keys(ours, gold, metric) -> float:
    """The mean of a metric over the keys of either dict."""
    ours, gold = as_dict(ours), as_dict(gold)
    keys = set(ours) | set(gold)
    return sum(metric(ours.get(key, []), gold.get(key, [])) for key in keys) / len(keys)


def matching_keys(ours, gold) -> int:
    """How many items of `gold` the other dict has."""
    ours, gold = as_dict(ours), as_dict(gold)
    return sum(key in ours and exact(ours[key], wanted) for key, wanted in gold.items())


def number_of(text):
    """A number as the numeric matchers read it: a percentage is a hundredth."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return Fraction(text)
    return value(str(text), percent=Fraction(1, 100))


def numerical(ours, gold) -> bool:
    """Within 1 % of the answer; lists of numbers in any order; else as text."""
    several, wanted = parsed(str(ours)), parsed(str(gold))
    if isinstance(several, (list, tuple)) and isinstance(wanted, (list, tuple)):
        same_size = len(several) == len(wanted)
        return same_size and all(map(numerical, sorted(several), sorted(wanted)))
    a, b = number_of(ours), number_of(gold)
    if a is None or b is None:
        return simple(tidy(str(ours)), tidy(str(gold)))
    return abs(a - b) <= abs(b) / 100


def boxed_numerical(ours, gold) -> bool:
    ours, gold = (extract(str(x)) if "\\boxed" in str(x) else x for x in (ours, gold))
    return numerical(ours, gold)


def relative_difference(ours, gold) -> float:
    a, b = number_of(ours), number_of(gold)
    if a is None or b is None:
        return 0.0
    return max(0.0, float(1 - abs(a - b) / abs(b))) if b else float(a == b)


def positive_int(ours, gold) -> float:
    """-1, dropped from the mean, where neither is positive: only amounts present count."""
    ours, gold = int(str(ours)), int(str(gold))
    return -1.0 if gold <= 0 and ours <= 0 else float(ours == gold)


def common_prefix(ours, gold) -> float:
    ours, gold = as_list(ours), as_list(gold)
    same = [a == b for a, b in zip(ours, gold, strict=False)]
    return (same.index(False) if False in same else len(same)) / len(gold)


def accuracy_by_place(ours, gold) -> float:
    ours, gold = lower(as_list(ours)), lower(as_list(gold))
    same = sum(a == b for a, b in zip(ours, gold, strict=False))
    return same / len(gold) if len(ours) == len(gold) else 0.0


def similarity(ours, gold) -> float:
    """1 - Damerau-Levenshtein distance / length of the longer."""
    a, b = str(ours)[:2000], str(gold)[:2000]
    width = len(a) + len(b)
    last_row: dict[str, int] = {}
    table = [[width] * (len(b) + 2), [width, *range(len(b) + 1)]]
    for i, x in enumerate(a, 1):
        row, last_column = [width, i], 0
        for j, y in enumerate(b, 1):
            before = last_row.get(y, 0)
            swap = table[before][last_column] + (i - before - 1) + 1 + (j - last_column - 1)
            row.append(min(table[i][j] + (x != y), row[j] + 1, table[i][j + 1] + 1, swap))
            last_column = j if x == y else last_column
        last_row[x] = i
        table.append(row)
    return 1 - table[-1][-1] / max(len(a), len(b)) if a or b else 1.0


def near(ours, gold) -> float:
    """Similarity of texts without accents and articles, 0 below 0.9."""

    def plain(text):
        text = unicodedata.normalize("NFKD", str(text)).encode("ascii", "ignore").decode().lower()
        return re.sub(r"\b(?:the|an?)\s+", "", text)

    ours, gold = plain(ours), plain(gold)
    if abs(len(ours) - len(gold)) > 0.1 * max(len(ours), len(gold)):
        return 0.0
    found = similarity(ours, gold)
    return found if found >= 0.9 else 0.0


def overlap(box, other) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    union = sum(areas) - common
    return common / union if union > 0 else 0.0


def best_overlap(ours: list, gold: list) -> float:
    """The mean over predicted boxes of the best overlap with a true one."""
    best = [max((overlap(box, other) for other in gold), default=0.0) for box in ours]
    return sum(best) / len(best) if best else 0.0


def line_set(text) -> set:
    return set(str(text).replace("\\n", "\n").lower().split("\n"))


def lower_set(thing) -> set:
    return as_set(lower(as_list(thing)))


METRICS = {
    "exact_str_match": exact,
    "exact_str_match_case_insensitive": lambda a, b: exact(str(a).upper(), str(b).upper()),
    "simple_str_match": simple,
    "multi_ref_phrase": lambda a, b: any(simple(a, c) for c in as_list(str(b).replace("，", ","))),
    "near_str_match": near,
    "normalized_similarity_damerau_levenshtein": similarity,
    "set_equality": lambda a, b: as_set(a) == as_set(b),
    "set_equality_case_insensitive": lambda a, b: lower_set(a) == lower_set(b),
    "str_set_equality_line_break": lambda a, b: line_set(a) == line_set(b),
    "str_set_equality_comma": lambda a, b: lower_set(a) == lower_set(b),
    "set_precision": lambda a, b: precision(as_set(a), as_set(b)),
    "jaccard_index": lambda a, b: jaccard(as_set(a), as_set(b)),
    "jaccard_index_case_insensitive": lambda a, b: jaccard(lower_set(a), lower_set(b)),
    "sequence_equality": lambda a, b: as_list(a) == as_list(b),
    "sequence_equality_case_insensitive": lambda a, b: lower(as_list(a)) == lower(as_list(b)),
    "sequence_accuracy_case_insensitive": accuracy_by_place,
    "longest_common_list_prefix_ratio": common_prefix,
    "dict_equality": lambda a, b: as_dict(a) == as_dict(b),
    "dict_precision": lambda a, b: matching_keys(b, a) / len(as_dict(a)),
    "dict_exact_str_match_agg_recall": lambda a, b: matching_keys(a, b) / len(as_dict(b)),
    "dict_set_equality_agg_jaccard": lambda a, b: over_keys(a, b, METRICS["set_equality"]),
    "dict_jaccard_agg_jaccard": lambda a, b: over_keys(a, b, METRICS["jaccard_index"]),
    "positive_int_match": positive_int,
    "number_rel_diff_ratio": relative_difference,
    "general_single_numerical_match": numerical,
    "boxed_single_numerical_match": boxed_numerical,
    "latex_expr_equality": lambda a, b: is_correct(str(a), str(b)),
    "nbbox_iou_tuple": lambda a, b: best_overlap(as_boxes(a), as_boxes(b)),
    "nbbox_iou_single": lambda a, b: best_overlap(as_boxes(a)[:1], as_boxes(b)[:1]),
}
