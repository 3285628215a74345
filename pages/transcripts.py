"""What a policy said, as HTML: held-out questions with an answer per measurement, and rollouts.

A model's words are text, never markup: all of them pass through `escape`. What stands out is what
the method is about: answers, whether they are right, what was forced, where the policy looks again.

The page stays small whatever a run wrote: texts are cut in their middle, pictures are thumbnails, and of
many questions, measurements and steps a few are shown.
"""

import re
from collections import Counter
from collections.abc import Callable
from html import escape

import rethink
from data import MARKER, parse_choices
from rethink import TRIGGERS, before_rethinking, outcome, rethinks
from reward import extract_answer, reward

STEPS_SHOWN = 12  # whose groups of rollouts are in the page, spread evenly over the run
ANSWERS_SHOWN = 5  # measurements whose held-out answers are in the page in full
QUESTIONS_SHOWN = 128
LONGEST = 1500  # characters of a text; its middle is left out
OUTCOMES = {key: key.replace("_", " " if key == "no_answer" else " → ") for key in rethink.OUTCOMES}

MARKED = re.compile(
    rf"(?P<end><\|(?:im_end|endoftext)\|>)|(?P<small><\|\w+\|>)"
    rf"|(?P<strong>\\boxed\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})"
    rf"|(?P<mark>{'|'.join(re.escape(trigger.strip()) for trigger in TRIGGERS.values())})"
)


def spread(items: list, n: int) -> list:
    """At most n of the items, evenly spread; the first and the last are among them.

    >>> spread(list(range(10)), 4), spread([1], 4)
    ([0, 3, 6, 9], [1])
    """
    return [items[i * (len(items) - 1) // (n - 1)] for i in range(n)] if len(items) > n else list(items)


def clip(text: str, longest: int = LONGEST) -> str:
    """A long text without its middle: what is asked stands first, what is answered last."""
    gone, head = len(text) - longest, longest // 3
    return text if gone <= 0 else f"{text[:head]} […{gone:,} characters left out…] {text[head + gone :]}"


def mark_up(text: str) -> str:
    """Escaped text of the policy: answers and rethinking stand out, the end of a turn is hidden.

    >>> mark_up("3 < 4. Wait, let's double check: \\\\boxed{5}<|im_end|>")
    '3 &lt; 4. <mark>Wait, let&#x27;s double check</mark>: <strong>\\\\boxed{5}</strong>'
    """
    parts, at = [], 0
    for match in MARKED.finditer(text):
        parts.append(escape(text[at : match.start()]))
        if (tag := match.lastgroup) != "end":  # the groups are named after their tags
            parts.append(f"<{tag}>{escape(match[0])}</{tag}>")
        at = match.end()
    return "".join(parts) + escape(text[at:])


def spoken(pieces: list) -> str:
    """A response's pieces [text, forced?] as HTML."""
    parts = []
    for text, forced in pieces:
        body = text.lstrip()  # a coloured line break would show as a sliver
        mark = f'<mark class="forced" title="forced">{escape(clip(body))}</mark>'
        parts.append(text[: len(text) - len(body)] + mark if forced else mark_up(clip(text)))
    return "".join(parts)


def verdict(value: float) -> str:
    """Right or wrong; partial credit is a number."""
    if value in (0, 1):
        return '<b class="right">✓</b>' if value else '<b class="wrong">✗</b>'
    return f"<b>{value:.3g}</b>"


def said(kind: str, facts: list[str], text: str, more: str = "") -> str:
    """One response as a list item, right or wrong; its facts and text are HTML."""
    head = "".join(f"<span>{fact}</span>" for fact in facts if fact)
    text = f'<div class="said" tabindex="0">{text}</div>'
    return f'<li class="is-{kind}"><div class="head">{head}</div>{text}{more}</li>'


def card(question: dict, facts: str, responses: str, kinds: set[str], is_open: bool) -> str:
    """A question to be unfolded: its facts in one line; then how it was asked, and what was said."""
    # One picture stands above its question; of several the places matter.
    marker = "[picture] " if len(question["images"]) > 1 else ""
    text = question["text"].replace(MARKER, marker).strip()
    title = text if len(text) <= 90 else text[:89] + "…"
    # Only pictures that are in the page: others would be fetched.
    pictures = [source for source in question["images"] if source.startswith("data:image/")]
    shown = "".join(f'<img src="{escape(x)}" alt="picture {n}">' for n, x in enumerate(pictures, 1))
    return (
        f'<details class="card group" data-is="{" ".join(sorted(kinds))}"{" open" if is_open else ""}>'
        f'<summary><span class="ask">{escape(title)}</span>{facts}'
        f'<span class="note id">{escape(question["id"])}</span></summary>'
        f'<div class="body"><div class="asked">{shown}<div class="text">{escape(clip(text))}</div>'
        f'<p class="soft">Answer: <strong>{escape(clip(question["answer"]))}</strong></p>'
        f'<p class="note">{escape(question.get("category") or "")}</p></div>'
        f'<ol class="responses">{responses}</ol></div></details>'
    )


def tools(name: str, kinds: dict[str, str], steps: list[int]) -> str:
    """The controls above a list of cards: which to show, what to search for. `kinds` has their labels."""
    radios = "".join(
        f'<label><input type="radio" name="{name}" value="{kind}"{"" if kind else " checked"}>'
        f"{escape(label)}</label>"
        for kind, label in kinds.items()
    )
    options = "".join(f'<option value="step{step}">step {step:,}</option>' for step in steps)
    select = f'<select aria-label="Step"><option value="">every step</option>{options}</select>'
    return (
        f'<div class="tools"><div class="kinds" role="radiogroup" aria-label="Show">{radios}</div>'
        f'{select if steps else ""}<input type="search" placeholder="Search" aria-label="Search">'
        '<button type="button">Open all</button></div>'
    )


# ---------------------------------------------------------------------------- held-out answers


def kinds_of(answers: list[dict | None]) -> set[str]:
    """What became of a held-out question from its first answer to its last."""
    known = [answer for answer in answers if answer]
    if not known:
        return set()
    first, last = known[0]["right"], known[-1]["right"]
    kinds = {"fixed": last > first, "broken": last < first, "again": rethinks(known[-1]["text"])}
    kinds["never"] = not any(answer["right"] > 0 for answer in known)
    return {kind for kind, is_so in kinds.items() if is_so}


def heldout(
    questions: list[dict], columns: list[tuple[str, dict[str, dict]]], finish: Callable = dict
) -> str:
    """Questions with what was answered to each: a line per question, unfolded a column per measurement.

    columns  (title, {question's id: {"text", "found", "right", "tokens"}}) in order
    finish   makes a question that is shown ready for the page, where reading all pictures takes long
    """
    told = {q["id"]: [answers.get(q["id"]) for _, answers in columns] for q in questions}
    kinds = {id_: kinds_of(answers) for id_, answers in told.items()}
    counts = Counter(kind for of in kinds.values() for kind in of)
    labels = {"fixed": "fixed", "broken": "broken", "never": "never right", "again": "looks again"}
    chosen = sorted(questions, key=lambda q: not kinds[q["id"]] & {"fixed", "broken"})[:QUESTIONS_SHOWN]
    picked = spread(range(len(columns)), ANSWERS_SHOWN)
    cards = []
    for question in map(finish, chosen):
        answers = told[question["id"]]
        strip = "".join(verdict(a["right"]) if a else "<b>–</b>" for a in spread(answers, 24))
        found = [escape(clip(str(a["found"] or "no answer"), 40)) for a in answers if a]
        facts = " → ".join(dict.fromkeys([*found[:1], *found[-1:]]))
        facts = f'<span class="found">{facts}</span><span class="strip">{strip}</span>'
        shown = ""
        for title, answer in ((columns[i][0], answers[i]) for i in picked if answers[i]):
            length = f"{answer['tokens']:,} tokens" if answer["tokens"] else ""
            about = [verdict(answer["right"]), escape(title), length]
            shown += said("right" if answer["right"] > 0 else "wrong", about, mark_up(clip(answer["text"])))
        cards.append(card(question, facts, shown, kinds[question["id"]], not cards))
    shown = {"": f"all {len(questions):,}"} | {k: f"{labels[k]} {counts[k]:,}" for k in labels}
    less = f" {len(chosen):,} of them are in this page." if len(chosen) < len(questions) else ""
    note = (
        f"From {columns[0][0]} to {columns[-1][0]}: fixed questions turned right, broken ones turned "
        f"wrong; looks again: the last answer has a trigger phrase, unforced.{less}"
    )
    return f'<p class="note">{escape(note)}</p>{tools("heldout", shown, [])}{"".join(cards)}'


# ---------------------------------------------------------------------------- rollouts


def second_look(response: dict, question: dict) -> str:
    """What looking again did: "wrong → right"; "" where the response did not look again.

    A forced look counts by an answer of its own; an unforced one by the last answer.

    >>> second_look({"pieces": [["5.", False], ["Wait, so?", True], ["7", False]], "text": "",
    ...              "right": False, "first_right": False}, {"text": "?", "answer": "7"})
    'no answer'
    """
    forced = [i for i, (_, is_forced) in enumerate(response["pieces"]) if is_forced]
    if not forced and not rethinks(response["text"]):
        return ""
    if forced:
        first, y2 = response["first_right"], response["pieces"][forced[-1] + 1 :]
        answered = extract_answer("".join(text for text, _ in y2)) is not None
    else:
        before, choices = before_rethinking(response["text"]), parse_choices(question["text"])
        first, answered = reward(before, question["answer"], choices) > 0, True
    return OUTCOMES[outcome(first, answered, response["right"])]


def respond(response: dict, question: dict) -> str:
    """One response as a list item."""
    kind, looked = "right" if response["right"] else "wrong", second_look(response, question)
    facts = [
        f"{verdict(response['right'])} {kind}",
        f"reward {response['reward']:.3g}" if response["reward"] != response["right"] else "",  # one's own
        f"advantage {response['advantage']:+.2f}",
        f"{response['tokens']:,} tokens",
        "cut off" if response["finish"] == "length" else "",
        f"looked again: {looked}" if looked else "",
    ]
    more = ""
    if second := response.get("not_kept"):  # worth reading too: what did it come to?
        more = '<details><summary class="note">forced to look again, not kept</summary>'
        more += f'<ol class="responses">{respond(second, question)}</ol></details>'
    return said(kind, facts, spoken(response["pieces"]), more)


def rollouts(samples: list[dict]) -> str:
    """Groups of STEPS_SHOWN steps, the first and the last among them; in each, the best response first.

    samples  the lines of a run's samples.jsonl
    """
    steps = spread(sorted({row["step"] for row in samples}), STEPS_SHOWN)
    if not steps:
        return '<p class="soft">None were written.</p>'
    cards, opened = [], False
    for row in (row for row in samples if row["step"] in steps):
        question, responses = row["question"], row["responses"]
        looks = [response.get("not_kept") or response for response in responses]
        forced = Counter(second_look(look, question) for look in looks if look.get("rethought"))
        outcomes = ", ".join(f"{name} {n}" for name, n in forced.items())
        facts = f'<span class="badge">{forced.total()} forced: {outcomes}</span>' if forced else ""
        responses = sorted(responses, key=lambda response: -response["advantage"])
        strip = "".join(verdict(response["right"]) for response in responses)
        facts += (
            f'<span class="strip" aria-hidden="true">{strip}</span><span class="soft">'
            f"{sum(response['right'] for response in responses)} of {len(responses)} right</span>"
            f'<span class="soft step">step {row["step"]:,}</span>'
        )
        kinds = {"right" if response["right"] else "wrong" for response in responses}
        kinds |= {"cut" for response in responses if response["finish"] == "length"}
        kinds |= {f"step{row['step']}", *(["forced"] if forced else [])}
        shown = "".join(respond(response, question) for response in responses)
        cards.append(card(question, facts, shown, kinds, bool(forced) and not opened))
        opened = opened or bool(forced)
    labels = {"": "all", "right": "right", "wrong": "wrong", "forced": "forced", "cut": "cut off"}
    return (
        f'<p class="note">{len(cards)} of the {len(samples)} groups that were written. '
        '<mark class="forced">Dashed</mark> was forced, to make the policy look again; '
        "<mark>underlined</mark> is where it does so unforced. The advantage says how much likelier "
        "training makes a response; at 0 the policy gradient learns nothing from it.</p>"
        + tools("rollouts", labels, steps)
        + "".join(cards)
    )
