"""What a policy said, as HTML: held-out questions with an answer per measurement, and rollouts.

A model's words are text, never markup: all of them pass through `escape`. What stands out is what
the method is about: answers, whether they are right, what was forced, where the policy looks again.

The page stays small whatever a run wrote: texts are cut in their middle, pictures are thumbnails, and of
many questions, measurements and steps a few are shown.
"""

import re
from collections import Counter
from html import escape

import rethink
from data import MARKER
from rethink import TRIGGERS

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


def verdict(right: bool) -> str:
    return '<b class="right">✓</b>' if right else '<b class="wrong">✗</b>'


def said(right: bool, facts: list[str], text: str, more: str = "") -> str:
    """One response as a list item; its facts and text are HTML."""
    head = "".join(f"<span>{fact}</span>" for fact in [verdict(right), *facts] if fact)
    text = f'<div class="said" tabindex="0">{text}</div>'
    return f'<li class="is-{"right" if right else "wrong"}"><div class="head">{head}</div>{text}{more}</li>'


def card(question: dict, facts: str, responses: str, is_open: bool) -> str:
    """A question to be unfolded: its facts in one line; then how it was asked, and what was said."""
    # One picture stands above its question; of several the places matter.
    marker = "[picture] " if len(question["images"]) > 1 else ""
    text = question["text"].replace(MARKER, marker).strip()
    title = text if len(text) <= 90 else text[:89] + "…"
    # Only pictures that are in the page: others would be fetched.
    pictures = [source for source in question["images"] if source.startswith("data:image/")]
    shown = "".join(f'<img src="{escape(x)}" alt="picture {n}">' for n, x in enumerate(pictures, 1))
    return (
        f'<details class="card group"{" open" if is_open else ""}>'
        f'<summary><span class="ask">{escape(title)}</span>{facts}'
        f'<span class="note id">{escape(question["id"])}</span></summary>'
        f'<div class="body"><div class="asked">{shown}<div class="text">{escape(clip(text))}</div>'
        f'<p class="soft">Answer: <strong>{escape(clip(question["answer"]))}</strong></p>'
        f'<p class="note">{escape(question.get("category") or "")}</p></div>'
        f'<ol class="responses">{responses}</ol></div></details>'
    )


def heldout(questions: list[dict], answers: dict[int, dict[str, dict]]) -> str:
    """A line for each question, those that changed first; unfolded, what was answered at several steps.

    answers  {step: {question's id: {"text", "found", "right", "tokens"}}}
    """
    answered = {}
    for step in sorted(answers):
        for id_, answer in answers[step].items():
            answered.setdefault(id_, []).append((step, answer))
    changes = {id_: known[-1][1]["right"] - known[0][1]["right"] for id_, known in answered.items()}
    asked = [question for question in questions if question["id"] in answered]
    chosen = sorted(asked, key=lambda question: not changes[question["id"]])[:QUESTIONS_SHOWN]
    cards = []
    for question in chosen:
        known = answered[question["id"]]
        marks = "".join(verdict(answer["right"]) for _, answer in spread(known, 24))
        found = [escape(clip(str(answer["found"] or "no answer"), 40)) for _, answer in (known[0], known[-1])]
        facts = f'<span>{" → ".join(dict.fromkeys(found))}</span><span class="marks">{marks}</span>'
        shown = ""
        for step, answer in spread(known, ANSWERS_SHOWN):
            about = [f"step {step:,}", f"{answer['tokens']:,} tokens"]
            shown += said(answer["right"], about, mark_up(clip(answer["text"])))
        cards.append(card(question, facts, shown, not cards))
    counts = Counter(changes.values())
    less = f"; {len(chosen):,} of them are in this page" if len(chosen) < len(asked) else ""
    note = (
        f"{len(asked):,} questions, from step {min(answers):,} to step {max(answers):,}: {counts[1]:,} fixed "
        f"(turned right), {counts[-1]:,} broken (turned wrong){less}."
    )
    return f'<p class="note">{note}</p>{"".join(cards)}'


def respond(response: dict) -> str:
    """One response as a list item."""
    looked = OUTCOMES.get(response.get("outcome"))
    facts = [
        f"reward {response['reward']:.3g}" if response["reward"] != response["right"] else "",  # one's own
        f"advantage {response['advantage']:+.2f}",
        f"{response['tokens']:,} tokens",
        "cut off" if response["finish"] == "length" else "",
        f"looked again: {looked}" if looked else "",
    ]
    more = ""
    if second := response.get("not_kept"):  # worth reading too: what did it come to?
        more = '<details><summary class="note">forced to look again, not kept</summary>'
        more += f'<ol class="responses">{respond(second)}</ol></details>'
    return said(response["right"], facts, spoken(response["pieces"]), more)


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
        forced = Counter(look["outcome"] for look in looks if look.get("outcome") in OUTCOMES)
        outcomes = ", ".join(f"{OUTCOMES[key]} {n}" for key, n in forced.items())
        facts = f'<span class="badge">{forced.total()} forced: {outcomes}</span>' if forced else ""
        responses = sorted(responses, key=lambda response: -response["advantage"])
        strip = "".join(verdict(response["right"]) for response in responses)
        facts += (
            f'<span class="marks" aria-hidden="true">{strip}</span><span class="soft">'
            f"{sum(response['right'] for response in responses)} of {len(responses)} right</span>"
            f'<span class="soft step">step {row["step"]:,}</span>'
        )
        shown = "".join(map(respond, responses))
        cards.append(card(question, facts, shown, bool(forced) and not opened))
        opened = opened or bool(forced)
    return (
        f'<p class="note">{len(cards)} of the {len(samples)} groups that were written. '
        '<mark class="forced">Dashed</mark> was forced, to make the policy look again; '
        "<mark>underlined</mark> is where it does so unforced. The advantage says how much likelier "
        "training makes a response; at 0 the policy gradient learns nothing from it.</p>" + "".join(cards)
    )
