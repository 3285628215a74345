"""What a policy said, as HTML: held-out questions with an answer per measurement, and rollouts.

A model's words are text, never markup: all of them pass through `escape`. What stands out is what
the method is about: answers, whether they are right, what was forced, where the policy looks again.

The page stays small whatever a run wrote: texts are cut in their middle, pictures are left out once
they are too many, and of many steps a few are shown.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from html import escape

import rethink
from data import MARKER, parse_choices
from rethink import TRIGGERS, before_rethinking, outcome, rethinks
from reward import extract_answer, reward

STEPS_SHOWN = 12  # whose groups of rollouts are in the page, spread evenly over the run
ANSWERS_SHOWN = 5  # measurements whose held-out answers are in the page in full
QUESTIONS_SHOWN = 256
LONGEST = 1500  # characters of a text; its middle is left out
PICTURES = 3_000_000  # characters of all pictures of a section
OUTCOMES = {key: key.replace("_", " " if key == "no_answer" else " → ") for key in rethink.OUTCOMES}

MARKED = re.compile(
    rf"(?P<end><\|(?:im_end|endoftext)\|>)|(?P<special><\|\w+\|>)"
    rf"|(?P<answer>\\boxed\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})"
    rf"|(?P<unasked>{'|'.join(re.escape(trigger.strip()) for trigger in TRIGGERS.values())})"
)


# ---------------------------------------------------------------------------- texts


def spread(items: list, n: int) -> list:
    """At most n of the items, evenly spread; the first and the last are among them.

    >>> spread(list(range(10)), 4), spread([1], 4)
    ([0, 3, 6, 9], [1])
    """
    if len(items) <= n:
        return list(items)
    return [items[i * (len(items) - 1) // (n - 1)] for i in range(n)]


def clip(text: str, longest: int = LONGEST) -> str:
    """A long text without its middle: what is asked stands first, what is answered last."""
    if len(text) <= longest:
        return text
    head = longest // 3
    gone = len(text) - longest
    return f"{text[:head]} […{gone:,} characters left out…] {text[head + gone :]}"


def mark_up(text: str) -> str:
    """Escaped text of the policy: answers and rethinking stand out, the end of a turn is hidden.

    >>> mark_up("3 < 4. Wait, let's double check: \\\\boxed{5}<|im_end|>")
    '3 &lt; 4. <mark>Wait, let&#x27;s double check</mark>: <strong>\\\\boxed{5}</strong>'
    """
    tags = {"special": "small", "answer": "strong", "unasked": "mark"}
    parts, at = [], 0
    for match in MARKED.finditer(text):
        parts.append(escape(text[at : match.start()]))
        if tag := tags.get(match.lastgroup):
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
        mark = f'<mark class="forced" title="forced">{escape(clip(body))}</mark>'
        parts.append(space + mark if forced else mark_up(clip(text)))
    return "".join(parts)


def verdict(value: float) -> str:
    """Right or wrong; partial credit is a number.

    >>> verdict(1.0), verdict(0.5)
    ('<b class="right">✓</b>', '<b>0.5</b>')
    """
    if value in (0, 1):
        return '<b class="right">✓</b>' if value else '<b class="wrong">✗</b>'
    return f"<b>{value:.3g}</b>"


def fitting(questions: Iterable[dict], room: int = PICTURES) -> Iterator[tuple[dict, str]]:
    """(question, how it is asked as HTML). Only pictures that are in the page: others would be fetched."""
    for question in questions:
        pictures, missing = "", 0
        for n, source in enumerate(question["images"], 1):
            if not source.startswith("data:image/") or len(source) > room:
                missing += 1
                continue
            room -= len(source)
            pictures += f'<img src="{escape(source)}" alt="picture {n}">'
        if missing:
            pictures += f'<p class="note">Not in this page: {missing} of its pictures.</p>'
        text, answer = escape(clip(wording(question))), escape(clip(question["answer"]))
        yield (
            question,
            (
                f'<div class="asked">{pictures}<div class="text">{text}</div><p class="soft">Answer: '
                f"<strong>{answer}</strong></p>"
                f'<p class="note">{escape(question.get("category") or "")}</p></div>'
            ),
        )


def wording(question: dict) -> str:
    """One picture stands above its question; of several the places matter."""
    marker = "[picture] " if len(question["images"]) > 1 else ""
    return question["text"].replace(MARKER, marker).strip()


def card(question: dict, asked: str, facts: str, shown: str, kinds: str = "", is_open: bool = False) -> str:
    """A question to be unfolded: its facts in one line; then how it was asked, and what was said."""
    text = wording(question)
    title = text if len(text) <= 90 else text[:89] + "…"
    name = escape(question.get("id", ""))
    return (
        f'<details class="card group" data-is="{kinds}"{" open" if is_open else ""}><summary>'
        f'<span class="ask">{escape(title)}</span>{facts}<span class="note id">{name}</span>'
        f'</summary><div class="body">{asked}<ol class="responses">{shown}</ol></div></details>'
    )


def tools(name: str, kinds: dict[str, str], more: str = "") -> str:
    """The controls above a list of cards: which to show, what to search for."""
    radios = "".join(
        f'<label><input type="radio" name="{name}" value="{kind}"{"" if kind else " checked"}>'
        f"{escape(label)}</label>"
        for kind, label in kinds.items()
    )
    return (
        f'<div class="tools"><div class="kinds" role="radiogroup" aria-label="Show">{radios}</div>'
        f'{more}<input type="search" placeholder="Search" aria-label="Search">'
        '<button type="button" data-open="true">Open all</button>'
        '<button type="button" data-open="">Close all</button><output class="note"></output></div>'
    )


# ---------------------------------------------------------------------------- held-out answers


def kinds_of(answers: list[dict | None]) -> set[str]:
    """What became of a held-out question from its first answer to its last.

    >>> sorted(kinds_of([{"right": False, "text": ""}, {"right": True, "text": TRIGGERS["self_correction"]}]))
    ['again', 'fixed']
    """
    known = [answer for answer in answers if answer]
    if not known:
        return set()
    first, last = known[0]["right"], known[-1]["right"]
    kinds = {"fixed"} if last > first else {"broken"} if last < first else set()
    kinds |= set() if any(answer["right"] > 0 for answer in known) else {"never"}
    return kinds | ({"again"} if rethinks(known[-1]["text"]) else set())


def heldout(
    questions: list[dict], columns: list[tuple[str, dict[str, dict]]], finish: Callable = dict
) -> str:
    """Questions with what was answered to each: a line per question, unfolded a column per measurement.

    columns  (title, {question's id: {"text", "found", "right", "tokens"}}) in order
    finish   makes a question that is shown ready for the page, where reading all pictures takes long
    """
    told = {q["id"]: [answers.get(q["id"]) for _, answers in columns] for q in questions}
    kinds = {id_: kinds_of(answers) for id_, answers in told.items()}
    labels = {"fixed": "fixed", "broken": "broken", "never": "never right", "again": "looks again"}
    counts = {kind: sum(kind in of for of in kinds.values()) for kind in labels}
    chosen = sorted(questions, key=lambda q: not kinds[q["id"]] & {"fixed", "broken"})
    chosen = chosen[:QUESTIONS_SHOWN]
    picked = spread(range(len(columns)), ANSWERS_SHOWN)
    cards = []
    for question, asked in fitting(map(finish, chosen)):
        answers = told[question["id"]]
        strip = "".join(verdict(a["right"]) if a else "<b>–</b>" for a in spread(answers, 24))
        ends = [escape(clip(str(a["found"] or "no answer"), 40)) for a in answers if a]
        facts = " → ".join(dict.fromkeys([ends[0], ends[-1]])) if ends else ""
        facts = f'<span class="found">{facts}</span><span class="strip">{strip}</span>'
        shown = "".join(answered(columns[i][0], answers[i]) for i in picked if answers[i])
        of = " ".join(sorted(kinds[question["id"]]))
        cards.append(card(question, asked, facts, shown, of, not cards))
    shown = {"": f"all {len(questions):,}"} | {k: f"{labels[k]} {counts[k]:,}" for k in labels}
    less = f" {len(chosen):,} of them are in this page." if len(chosen) < len(questions) else ""
    note = (
        f"From {columns[0][0]} to {columns[-1][0]}: fixed questions turned right, broken ones turned "
        f"wrong; looks again: the last answer has a trigger phrase, unforced.{less}"
    )
    return f'<p class="note">{escape(note)}</p>{tools("heldout", shown)}{"".join(cards)}'


def answered(title: str, answer: dict) -> str:
    """One answer to a held-out question as a list item."""
    kind = "is-right" if answer["right"] > 0 else "is-wrong"
    length = f"<span>{answer['tokens']:,} tokens</span>" if answer.get("tokens") else ""
    said = f'<div class="said" tabindex="0">{mark_up(clip(answer["text"]))}</div>'
    head = f"{verdict(answer['right'])}<span>{escape(title)}</span>{length}"
    return f'<li class="{kind}"><div class="head">{head}</div>{said}</li>'


# ---------------------------------------------------------------------------- rollouts


def second_look(response: dict, question: dict) -> str:
    """What looking again did: "wrong → right"; "" where the response did not look again.

    A forced look counts by an answer of its own; an unforced one by the last answer.

    >>> second_look({"pieces": [["5.", False], ["Wait, so?", True], ["7", False]], "text": "",
    ...              "right": False}, {"text": "?", "answer": "7"})
    'no answer'
    """
    texts = [text for text, _ in response["pieces"]]
    forced = [i for i, (_, is_forced) in enumerate(response["pieces"]) if is_forced]
    if not forced and not rethinks(response["text"]):
        return ""
    before, answered = before_rethinking(response["text"]), True
    if forced:
        before = "".join(texts[: forced[0]])
        answered = extract_answer("".join(texts[forced[-1] + 1 :])) is not None
    first = reward(before, question["answer"], parse_choices(question["text"])) > 0
    return OUTCOMES[outcome(first, answered, response["right"])]


def advantage(value: float) -> str:
    """The number, and a bar to the left (made less likely) or to the right (more likely)."""
    side, size = "wrong" if value < 0 else "", min(1.0, abs(value))
    return f'advantage {value:+.2f}<i class="{side}" style="--size: {size:.2f}"></i>'


def respond(response: dict, question: dict) -> str:
    """One response as a list item."""
    kind = "right" if response["right"] else "wrong"
    is_cut, second = response["finish"] == "length", response.get("not_kept")
    kinds = [kind, *["forced"] * bool(second or response.get("rethought")), *["cut"] * is_cut]
    looked = second_look(response, question)
    facts = {
        f'class="verdict">{verdict(response["right"])} {kind}': True,
        f">reward {response['reward']:.3g}": response["reward"] != response["right"],  # the user's own
        f'class="advantage">{advantage(response["advantage"])}': True,
        f">{response['tokens']:,} tokens": True,
        ">cut off": is_cut,
        f">looked again: {looked}": looked,
    }
    head = "".join(f"<span {fact}</span>" for fact, is_told in facts.items() if is_told)
    said = f'<div class="said" tabindex="0">{spoken(response["pieces"])}</div>'
    if second:  # worth reading too: what did it come to?
        said += '<details><summary class="note">forced to look again, not kept</summary>'
        said += f'<ol class="responses">{respond(second, question)}</ol></details>'
    return (
        f'<li class="is-{kind}" data-is="{" ".join(kinds)}" data-advantage="{response["advantage"]}">'
        f'<div class="head">{head}</div>{said}</li>'
    )


def forced_badge(row: dict) -> str:
    """How many of a group were forced to look again, and what came of it."""
    looks = [r.get("not_kept") or r for r in row["responses"]]
    forced = [second_look(look, row["question"]) for look in looks if look.get("rethought")]
    names = {"fixed": "wrong → right", "broken": "right → wrong", "no answer": "no answer"}
    parts = [f"{n} {name}" for name, outcome in names.items() if (n := forced.count(outcome))]
    told = f"{len(forced)} forced" + (f": {', '.join(parts)}" if parts else "")
    return f'<span class="badge">{told}</span>' if forced else ""


def rollouts(samples: list[dict]) -> str:
    """Groups of STEPS_SHOWN steps, the first and the last among them, with a key to the marks.

    samples  the lines of a run's samples.jsonl
    """
    steps = sorted({row["step"] for row in samples})
    if not steps:
        return '<p class="soft">None were written.</p>'
    shown = spread(steps, STEPS_SHOWN)
    rows = [row for row in samples if row["step"] in shown]
    badges = [forced_badge(row) for row in rows]
    opened = next((i for i, badge in enumerate(badges) if badge), 0)
    cards = []
    for i, (row, (question, asked)) in enumerate(zip(rows, fitting([r["question"] for r in rows]))):
        responses = row["responses"]
        right = sum(response["right"] for response in responses)
        facts = (
            f'{badges[i]}<span class="strip" aria-hidden="true">'
            f"{''.join(verdict(response['right']) for response in responses)}</span>"
            f'<span class="soft">{right} of {len(responses)} right</span>'
            f'<span class="soft step" data-step="{row["step"]}">step {row["step"]:,}</span>'
        )
        said = "".join(respond(response, question) for response in responses)
        cards.append(card(question, asked, facts, said, is_open=i == opened))
    options = "".join(f'<option value="{step}">step {step:,}</option>' for step in shown)
    more = (
        f'<select class="steps" aria-label="Step"><option value="">every step</option>{options}'
        '</select><select class="order" aria-label="Order"><option value="">as sampled</option>'
        '<option value="1">by advantage</option></select>'
    )
    kinds = {"": "all", "right": "right", "wrong": "wrong", "forced": "forced", "cut": "cut off"}
    return (
        f'<p class="note">{len(rows)} of the {len(samples)} groups that were written. '
        '<mark class="forced">Dashed</mark> was forced, to make the policy look again; '
        "<mark>underlined</mark> is where it does so unforced. The advantage says how much likelier "
        "training makes a response; at 0 the policy gradient learns nothing from it.</p>"
        + tools("rollouts", kinds, more)
        + "".join(cards)
    )
