"""Rollouts to look at, as HTML: a question, its pictures, and what the policy said in its group.

A model's words are text, never markup: all of them pass through `escape`. What stands out is what
the method is about: answers, whether they are right, what was forced, where the policy looks again.
"""

import re
from html import escape

from data import MARKER, parse_choices
from rethink import TRIGGERS, before_rethinking, rethinks
from reward import reward

STEPS_SHOWN = 6  # whose groups are in the page, spread evenly over the run
TICK, CROSS = '<b class="right">✓</b>', '<b class="wrong">✗</b>'

MARKED = re.compile(
    rf"(?P<special><\|\w+\|>)|(?P<answer>\\boxed\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})"
    rf"|(?P<unasked>{'|'.join(re.escape(trigger.strip()) for trigger in TRIGGERS.values())})"
)


def mark_up(text: str) -> str:
    """Escaped text of the policy, with answers, special tokens and rethinking made visible.

    >>> mark_up("3 < 4. Wait, let's double check: \\\\boxed{5}")
    '3 &lt; 4. <mark>Wait, let&#x27;s double check</mark>: <strong>\\\\boxed{5}</strong>'
    """
    tags = {"special": "small", "answer": "strong", "unasked": "mark"}
    parts, at = [], 0
    for match in MARKED.finditer(text):
        tag = tags[match.lastgroup]
        parts.append(escape(text[at : match.start()]))
        parts.append(f"<{tag}>{escape(match[0])}</{tag}>")
        at = match.end()
    return "".join(parts) + escape(text[at:])


def spoken(pieces: list) -> str:
    """A response's pieces [text, forced?] as HTML.

    >>> spoken([["It is 5.", False], ["\\n\\nWait, really?", True]])
    'It is 5.\\n\\n<mark class="forced" title="forced">Wait, really?</mark>'
    """
    parts = []
    for text, forced in pieces:
        body = text.lstrip() if forced else text  # a coloured line break would show as a sliver
        space = text[: len(text) - len(body)]
        mark = f'<mark class="forced" title="forced">{escape(body)}</mark>'
        parts.append(space + mark if forced else mark_up(text))
    return "".join(parts)


def before_second_look(response: dict) -> str | None:
    """What stood before the response looked again: before what was forced, else before its first
    rethinking; None where it did neither.

    >>> before_second_look({"text": "5. Wait, let's double check", "pieces": [["", False]]})
    '5. '
    >>> before_second_look({"pieces": [["5.", False], ["Wait, so?", True], ["7", False]]})
    '5.'
    """
    texts = [text for text, _ in response["pieces"]]
    for i, (_, forced) in enumerate(response["pieces"]):
        if forced:
            return "".join(texts[:i])
    return before_rethinking(response["text"]) if rethinks(response["text"]) else None


def second_look_verdict(response: dict, question: dict) -> str:
    """ "wrong → right" where looking again helped; "" where the response did not look again."""
    before = before_second_look(response)
    if before is None:
        return ""
    names = {True: "right", False: "wrong"}
    first = reward(before, question["answer"], parse_choices(question["text"])) > 0
    return f"<span>looked again: {names[first]} → {names[response['reward'] > 0]}</span>"


def advantage(value: float) -> str:
    """The number, and a bar to the left (made less likely) or to the right (more likely)."""
    length = 21 * min(1.0, abs(value))
    start, kind = (22 - length, "wrong") if value < 0 else (22, "right")
    bar = (f'<svg viewBox="0 0 44 9" class="{kind}" aria-hidden="true">'
           f'<rect x="{start:.1f}" y="2" width="{length:.1f}" height="5"/>'
           '<line x1="22" x2="22" y1="0" y2="9"/></svg>')  # fmt: skip
    return f'<span class="advantage">advantage {value:+.2f}{bar}</span>'


def respond(response: dict, question: dict) -> str:
    """One response as a list item."""
    kind = "right" if response["reward"] > 0 else "wrong"
    facts = [
        f'<span class="verdict {kind}">{TICK if kind == "right" else CROSS} {kind}</span>',
        f"<span>reward {response['reward']:g}</span>",
        advantage(response["advantage"]),
        f"<span>{response['tokens']:,} tokens</span>",
        "<span>cut off</span>" if response["finish"] == "length" else "",
        second_look_verdict(response, question),
    ]
    said = f'<div class="said" tabindex="0">{spoken(response["pieces"])}</div>'
    if "not_kept" in response:  # forced too, and worth reading: what did the second look come to?
        other = respond(response["not_kept"], question)
        said += '<details><summary class="note">▸ forced to look again, not kept</summary>'
        said += f'<ol class="responses">{other}</ol></details>'
    return f'<li class="is-{kind}"><div class="head">{"".join(facts)}</div>{said}</li>'


def rollout(row: dict, is_open: bool) -> str:
    """A question and its group of responses, to be unfolded."""
    question, responses = row["question"], row["responses"]
    right = [response["reward"] > 0 for response in responses]
    strip = "".join(TICK if r else CROSS for r in right)
    # One picture stands above the question; of several the places matter.
    marker = "[picture] " if len(question["images"]) > 1 else ""
    text = question["text"].replace(MARKER, marker).strip()
    title = text if len(text) <= 90 else text[:89] + "…"
    # Only pictures that are in the page: another address would be fetched.
    pictures = "".join(
        f'<img src="{escape(source)}" alt="picture {n} of the question">'
        for n, source in enumerate(question["images"], 1) if source.startswith("data:image/")
    )  # fmt: skip
    return (
        f'<details class="card group"{" open" if is_open else ""}><summary>'
        f'<span class="soft">step {row["step"]:,}</span><span class="ask">{escape(title)}</span>'
        f'<span class="strip" aria-hidden="true">{strip}</span>'
        f'<span class="soft">{sum(right)} of {len(right)} right</span></summary>'
        f'<div class="body"><div class="asked">{pictures}<div class="text">{escape(text)}</div>'
        f'<p class="soft">Answer: <strong>{escape(question["answer"])}</strong></p>'
        f'<p class="note">{escape(question.get("category", ""))}</p></div>'
        f'<ol class="responses">{"".join(respond(r, question) for r in responses)}</ol>'
        "</div></details>"
    )


def rollouts(samples: list[dict]) -> str:
    """Groups of STEPS_SHOWN steps, the first and the last among them, with a key to the marks.

    samples  the lines of a run's samples.jsonl
    """
    steps = sorted({row["step"] for row in samples})
    if not steps:
        return '<p class="soft">None were written.</p>'
    spread = [i * (len(steps) - 1) // max(1, STEPS_SHOWN - 1) for i in range(STEPS_SHOWN)]
    shown = {steps[i] for i in spread}
    rows = [row for row in samples if row["step"] in shown]
    key = (
        f'<p class="note">{len(rows)} of the {len(samples)} groups that were written down. '
        '<mark class="forced">Dashed</mark> is what was forced, to make the policy look again; '
        "<mark>underlined</mark> is where it does so by itself. The advantage tells how much "
        "likelier training makes a response; at 0 the policy gradient learns nothing from it.</p>"
    )
    return key + "".join(rollout(row, i in (0, len(rows) - 1)) for i, row in enumerate(rows))
