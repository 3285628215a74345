"""Forced Rethinking (paper, Section 4 and appendix): the policy is made to look again.

    y = y1 + trigger + y2

When a response y1 has ended, a trigger such as "Wait, does it seem right?" is appended to a share q
of the responses and the policy continues. Where the new answer is correct, y replaces y1 in its group
(at most twice per question), and an additional loss teaches the policy to look again by itself:

    L = L_GRPO + c * mean of -log pi(y_t)  over all tokens of the kept ones

The EOS of y1 is removed. Trigger tokens are *forced* (by `rollout.advance`, which notes it in
`Sample.mask`): context for y2, never in the policy-gradient loss (the policy did not choose them), always
in the second one (there it learns to choose them).

What we do differently from the released code: the trigger is drawn without looking at the label; a kept
response is compared with the group's mean *before* replacement (replacing first raises the mean and so
pushes down siblings that had no second chance); a second look must answer: without a box in y2 it is never
kept. The flags rethink_* of config.py have the numbers, beside those of the released code.

Next: data.py, what a question is; then train.py, where all parts meet.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from config import Config

# Exact to the character (paper, appendix).
TRIGGERS = {
    "self_questioning": "\n\nWait, does it seem right?",
    "self_correction": "\n\nWait, there might be a mistake",
    "self_verification": "\n\nWait, let's double check",
}

# Of a second look: y1's answer, then y2's. "No answer": y2 has no box of its own.
OUTCOMES = ("wrong_right", "right_right", "right_wrong", "wrong_wrong", "no_answer")


@dataclass
class Continuation:
    """How a finished response goes on: its first `keep` tokens stay, `forced` ids follow."""

    keep: int  # at least 1
    forced: list[int]
    kind: str  # of the trigger, recorded as Sample.rethought
    limit: int  # of the whole response's length


def extender(c: Config, tokenizer, is_right, keys: list[str]):
    """What `rollout.generate` asks when a response ends: shall it look again, and how?

    is_right  sample -> bool, asked only where the trigger depends on it
    keys      per prompt, what its draws depend on, as `rollout.generate` takes them

    None where no look is ever forced.
    """

    def extend(n: int, g: int, sample) -> Continuation | None:
        rng = random.Random(f"rethink {keys[n]} {g}")
        chosen, cut_back = rng.random() < c.rethink_fraction, rng.random() < c.rethink_cutback
        kind = rng.choice(list(TRIGGERS))
        if not chosen or sample.finish != "stop":
            return None
        if c.rethink_trigger == "wrong" and is_right(sample):
            return None
        if c.rethink_trigger == "oracle":
            kind = "self_verification" if is_right(sample) else "self_correction"
        keep = len(sample.tokens) - 1  # without its EOS
        if cut_back:
            keep = tokens_before_answer(sample.tokens.tolist(), tokenizer.decode)
        forced = tokenizer(TRIGGERS[kind], add_special_tokens=False).input_ids
        if keep < 1 or keep + len(forced) + c.rethink_min_tokens > c.max_new_tokens:
            return None
        # A longer one would never be kept, so sampling stops there.
        return Continuation(keep, forced, kind, keep + len(forced) + c.rethink_max_tokens)

    return extend if c.rethink_fraction > 0 else None


def tokens_before_answer(tokens: list[int], decode: Callable[[list[int]], str]) -> int:
    """How many tokens stand before the last `\\boxed`; all but the EOS where there is no box.

    >>> words = ["", "So ", "\\\\boxed{", "5}"]
    >>> tokens_before_answer([1, 2, 3, 0], lambda ids: "".join(words[i] for i in ids))
    1
    """
    keep, at = len(tokens) - 1, decode(tokens).rfind("\\boxed")
    while at >= 0 and len(decode(tokens[:keep])) > at:
        keep -= 1
    return keep


def second_start(sample) -> int:
    """Where y2 begins: after the last forced token."""
    return int((~sample.mask).nonzero()[-1]) + 1


def second_length(sample) -> int:
    """Tokens of y2."""
    return len(sample.tokens) - second_start(sample)


def is_kept(c: Config, sample) -> bool:
    """A second look is kept if it ended by itself, is right, and is neither too short nor too long."""
    in_window = c.rethink_min_tokens <= second_length(sample) <= c.rethink_max_tokens
    return sample.finish == "stop" and sample.right and in_window


def outcome(first_right: bool, answered: bool, second_right: bool) -> str:
    """What became of a second look, one of OUTCOMES."""
    names = {True: "right", False: "wrong"}
    return f"{names[first_right]}_{names[second_right]}" if answered else "no_answer"


def merge_rethought(c: Config, groups: list[list]) -> tuple[list[list], Counter]:
    """Replace y1 by its second look where that is kept, the first `rethink_quota` of a group; and the counts:
    attempted, kept, tokens, and each of OUTCOMES. All samples have been graded and compared.

    A group of two wrong answers, the second right after a second look:

    >>> from types import SimpleNamespace as S; import torch
    >>> again = S(tokens=[5, 9, 6], mask=torch.tensor([True, False, True]), finish="stop",
    ...           answered=True, right=True)
    >>> group = [S(right=False, second_look=None), S(right=False, second_look=again)]
    >>> merged, counts = merge_rethought(Config(), [group])
    >>> merged[0][1] is again, counts["wrong_right"], counts["kept"]
    (True, 1, 1)
    """
    counts, merged = Counter(), [list(group) for group in groups]
    for group in merged:
        room = c.rethink_quota
        for g, first in enumerate(group):
            if again := first.second_look:
                again.first_right = first.right
                counts[outcome(first.right, again.answered, again.right)] += 1
                counts.update(attempted=1, tokens=second_length(again))
                if room and is_kept(c, again):
                    group[g], room = again, room - 1
                    counts["kept"] += 1
    return merged, counts


def rethinks(text: str) -> bool:
    """Does an unforced response contain a trigger phrase?"""
    return any(trigger.strip() in text for trigger in TRIGGERS.values())


def before_rethinking(text: str) -> str:
    """What a response said before its first trigger phrase.

    >>> before_rethinking("It is 5.\\n\\nWait, let's double check: 6.")
    'It is 5.\\n\\n'
    """
    starts = [text.find(trigger.strip()) for trigger in TRIGGERS.values()]
    return text[: min((start for start in starts if start >= 0), default=len(text))]


def share_rethinking(text: str) -> float:
    """The share of a response's characters, and so roughly of its tokens, after its first trigger phrase."""
    return 1 - len(before_rethinking(text)) / len(text)
