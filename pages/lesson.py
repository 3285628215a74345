"""What walk.py found, told as a lesson: Markdown that also reads well in a terminal.

One section per step of the method, in the order of training. Its heading names the functions that
were called; their arguments and results follow. Nothing of the method is computed here.
"""

import datetime
import os
import platform
from pathlib import Path
from textwrap import wrap

import torch
from PIL import Image

import toy
from checkpoint import explain_os_error
from config import Config
from data import MARKER, write_atomically
from model import IMAGE_PAD, Policy, Prompt, Sample
from pages.transcripts import OUTCOMES
from ssr import ReplayBuffer, is_effective
from tree import Trees, tree_mask

WIDTH = 96
SURE = -0.01  # log-probability of a token that was hardly a choice
# Of the prompt and of the responses; they read on light and dark pages.
COLOURS = ("#8b929a", "#2459d6", "#c2510a", "#157a3e", "#b0179a", "#0e7490", "#a07d10", "#b3261e", "#6b45c9")
GLOSSARY = """
A rollout is one sampled response. The G rollouts to one question are its group. An episode samples \
many groups with frozen weights, then takes optimiser steps on them.
A rollout is effective if its advantage A is not 0. It is replayed if a batch trains on it again, in \
place of one that is not effective.
Forced Rethinking makes a share q of the first answers, y1, go on after a trigger phrase; what follows \
the trigger is y2. Held-out questions are never trained on: they are answered greedily (the likeliest \
token each time) and once sampled (as in training).
"""
# (title, file, line, the line that replaces it, what the walk then shows)
EXERCISES = (
    (
        "Replay without preference",
        "ssr.py",
        "        return [(size / largest) ** self.alpha for size in sizes]",
        "        return [1.0 for size in sizes]",
        "In section 4, P(j) is now the same for every effective response. This is alpha = 0.",
    ),
    (
        "The baseline after replacement",
        "train.py",
        '    if c.rethink_baseline == "after":',
        "    if True:",
        (
            "In section 4, the advantages of the group now sum to 0: the second look raised the mean, so "
            "every sibling is worth less than in section 2, although nothing about it has changed."
        ),
    ),
    (
        "A trigger of your own",
        "rethink.py",
        "        forced = tokenizer(TRIGGERS[kind], add_special_tokens=False).input_ids",
        '        forced = tokenizer("\\n\\nOnce more, dot by dot:", add_special_tokens=False).input_ids',
        (
            "In section 3, your sentence is forced, with mask 0. The toy's base has never seen it; the walk "
            "finds a question where the policy goes on all the same, or says that there is none."
        ),
    ),
)


def heading(c: Config) -> str:
    out = f" --out {c.out}" if c.out else ""
    made = (
        f"Made by `python train.py --explain{out}` on {datetime.date.today()}: torch "
        f"{torch.__version__} on {os.cpu_count()} cores ({platform.machine()}). Each heading "
        "names the functions whose arguments and results follow. Three lines of terms first:"
    )
    terms = (wrap("- " + term, WIDTH, subsequent_indent="  ") for term in GLOSSARY.strip().split("\n"))
    pictures = ["", "![the picture](toy.png)", "![who sees whom](tree.svg)"] if c.out else []
    top = [
        "# One question through VL-Rethinker",
        "",
        *wrap(made, WIDTH),
        "",
        *(line for term in terms for line in term),
        *pictures,
    ]
    return "\n".join(top)


def exercises() -> str:
    parts: list[str | list[str]] = []
    for n, (title, file, old, new, see) in enumerate(EXERCISES, 1):
        parts += [f"{n}. {title}. In {file}, the second line replaces the first:"]
        parts += [[old.strip(), new.strip()], see]
    return section(
        "Three exercises",
        "Each changes one line. Undo the one before, and run `python train.py --explain` again.",
        *parts,
    )


def section(title: str, *parts: str | list[str]) -> str:
    """A title, then text that is wrapped, and lists of lines that are set apart."""
    told = [f"## {title}"]
    for part in parts:
        lines = [f"    {line}".rstrip() for line in part]
        told.append("\n".join(wrap(part, WIDTH) if isinstance(part, str) else lines))
    return "\n\n".join(told)


def pieces(policy: Policy, tokens: torch.Tensor) -> list[str]:
    """Each token's text, in one line."""
    return [policy.tokenizer.decode([i]).replace("\n", "\\n") for i in tokens.tolist()]


def one_line(sample: Sample) -> str:
    return " ".join(sample.text.split())


def quoted(prompt: Prompt) -> str:
    return f'"{prompt.question.text.replace(MARKER, "")}"'


def picture_rows(image: Image.Image) -> list[str]:
    """The colours of the cells and of their dots, from the pixels."""
    names = {rgb: name for name, rgb in toy.COLOURS.items()}

    def cell(x: int, y: int) -> str:
        dot = (x + toy.CELL // 2, y + toy.CELL // 2)
        return f"{names[image.getpixel((x, y))]} ({names[image.getpixel(dot)]})".ljust(18)

    columns, rows = range(0, image.width, toy.CELL), range(0, image.height, toy.CELL)
    return ["".join(cell(x, y) for x in columns) for y in rows]


def tell_prompt(policy: Policy, prompt: Prompt) -> str:
    shown = " | ".join(pieces(policy, prompt.input_ids))
    at_picture = prompt.input_ids == policy.model.config.image_token_id
    places = prompt.position_ids.T[at_picture].tolist()
    n = len(places)
    shown = shown.replace(" | ".join([IMAGE_PAD] * n), f"{IMAGE_PAD} x {n}")
    return section(
        "1. The prompt: model.py, encode",
        f"The policy is asked {quoted(prompt)} about a picture (toy.py). Every cell has a colour "
        "and a dot; the dot's colour names the cell to step to. The picture, as cell (dot):",
        picture_rows(prompt.question.images[0]),
        f"Only the reward sees the answer, {prompt.question.answer}. The chat template turns the "
        f"question into P = {len(prompt.input_ids)} tokens, {n} of them visual, one per 28 x 28 pixels:",
        wrap(shown, WIDTH - 4),
        "Qwen's position embedding, M-RoPE, gives each token three positions (time, row, column), "
        "so that visual tokens keep their place in the picture: "
        f"{', '.join(str(tuple(place)) for place in places)}. For text the three are equal and count "
        f"on from the largest so far; every response starts at {prompt.next_position}.",
    )


def tell_responses(c: Config, group: list[Sample]) -> str:
    rows = ["     reward  advantage"]
    for i, sample in enumerate(group, 1):
        said = wrap(one_line(sample), WIDTH - 30)
        rows.append(f"#{i}   {sample.reward:4g}    {sample.advantage:+.3f}    {said[0]}")
        rows += [" " * 24 + line for line in said[1:]]
    mean = sum(sample.reward for sample in group) / len(group)
    over = ", divided by their standard deviation" if c.advantage == "std" else ""
    return section(
        f"2. A group of {len(group)}: rollout.py, generate; reward.py; grpo.py, group_advantages",
        "The prompt runs through the model once; its keys and values serve all responses. The reward "
        "is 1 if the last \\boxed{} holds the answer, else 0. The advantage is the reward minus the "
        f"group's mean, {mean:.3f}{over}.",
        rows,
        "There is no critic: where other methods train a second network to estimate what reward to "
        "expect, the group's mean is that estimate. How an answer was found is never judged: a lucky "
        "guess earns as much as a careful reading.",
    )


def tell_rethinking(policy: Policy, c: Config, first: Sample, y: Sample, i: int, counts) -> str:
    keep = y.mask.tolist().index(False)
    end = keep + int((~y.mask).sum())
    lines = []
    gone = len(first.tokens) - keep
    for name, tokens, mask in (
        ("y1", first.tokens, "1" * keep + "-" * gone),
        ("forced", y.tokens[keep:end], "0" * (end - keep)),
        ("y2", y.tokens[end:], "1" * (len(y.tokens) - end)),
    ):
        said = [*wrap(" | ".join(pieces(policy, tokens)), WIDTH - 14), f"mask {mask}"]
        lines += [f"{name:8}{said[0]}", *(" " * 8 + line for line in said[1:])]
    outcomes = ", ".join(f"{name} {counts[k]}" for k, name in OUTCOMES.items() if counts[k])
    return section(
        "3. Forced Rethinking: rethink.py, extender, merge_rethought",
        f"A share q = {c.rethink_fraction:g} of the responses must look again: here "
        f"{counts['attempted']}, response #{i + 1} among them. Its end token, "
        f"{' '.join(pieces(policy, first.tokens[keep:]))}, is removed, a trigger is forced, and the "
        "policy continues from its own cached keys and values:",
        lines,
        f"The reward was {first.reward:g} and is {y.reward:g}, so the whole of y1 + trigger + y2 "
        f"replaces response #{i + 1}, with advantage {y.advantage:+.3f}. Forced tokens (mask 0) are "
        f"context only: the policy did not choose them. All second looks: {outcomes}; "
        f"{counts['kept']} kept, at most {c.rethink_quota} per question.",
    )


def tell_replay(merged: list[Sample], idle: list[Sample], buffer: ReplayBuffer, draws: list[int]) -> str:
    total = sum(buffer.weights())
    chance = {id(sample): weight / total for sample, weight in zip(buffer.samples, buffer.weights())}
    rows = [
        ["", *(f"#{i}" for i in range(1, len(merged) + 1))],
        ["A", *(f"{sample.advantage:+.3f}" for sample in merged)],
        ["P(j)", *(f"{chance.get(id(sample), 0):.3f}" for sample in merged)],
        ["drawn", *(str(n - is_effective(sample)) for n, sample in zip(draws, merged))],
    ]
    size, kept = len(merged + idle), len(buffer)
    return section(
        "4. Selective Sample Replay: ssr.py, replay_batch (Algorithm 1), ReplayBuffer.weights",
        f"Suppose the batch holds these {len(merged)} responses and as many to "
        f"{quoted(idle[0].prompt)}, all with reward {idle[0].reward:g}. The latter equal their own mean, "
        "so A = 0 and they have no gradient: a vanishing advantage. Of "
        f"{size} responses the {kept} effective ones stay and enter the buffer; the other "
        f"{size - kept} places are filled from it, drawn with P(j) = |A_j|^{buffer.alpha:g} / sum over "
        f"k of |A_k|^{buffer.alpha:g}:",
        ["".join(f"{cell:>8}" for cell in row) for row in rows],
    )


def tell_tree(trees: Trees) -> str:
    T, G = trees.branch.shape[1], len(trees.lengths)
    P = int((trees.branch == 0).sum())
    return section(
        "5. The tree: tree.py, build_trees, tree_mask",
        f"All {G} responses lie on one row behind one prompt: {T} tokens, where {G} separate rows "
        f"would take {G * P + T - P}. Each token sees the prompt and the earlier tokens of its own "
        "response, never a sibling (tree.svg draws this mask). The positions of every response start "
        "right after the prompt, so the log-probabilities equal those of separate rows.",
    )


def tell_loss(policy: Policy, c: Config, y: Sample, i: int, before, after) -> str:
    names = f"{'log pi':>10}{'rho':>8}{'loss':>9}{'weight':>9}{'rho':>13}{'loss':>9}"
    rows = [f"{'after one step':>79}", " " * 21 + names]
    unsure = [t for t in range(len(y.tokens)) if before.logprobs[i, t] < SURE]
    said = pieces(policy, y.tokens)
    for t in unsure:
        rho = [f"{x.ratio[i, t]:.3f}" if y.mask[t] else "" for x in (before, after)]
        row = f"{before.logprobs[i, t]:10.3f}{rho[0]:>8}{before.losses[i, t]:9.3f}"
        row += f"{before.weights[i, t]:9.4f}{rho[1]:>13}{after.losses[i, t]:9.3f}"
        rows.append(f"{said[t]:13}{'' if y.mask[t] else 'forced':8}{row}")
    rows.append(f"and {len(y.tokens) - len(unsure)} more that were hardly a choice: log pi above {SURE}")
    total = before.policy_loss + c.rethink_sft_coef * before.sft_loss
    return section(
        "6. The loss: grpo.py, policy_loss, token_weights; train.py, token_terms",
        "One forward pass over the tree gives the log-probability of every token. rho is the ratio of "
        f"its probability now to its probability when it was sampled. With A = {y.advantage:+.3f}, a "
        f"token of response #{i + 1} costs -min(rho A, clip(rho, {1 - c.clip_low:g}, "
        f"{1 + c.clip_high:g}) A), or nothing if it was forced. The clip removes the reason to move "
        "further once a token's probability has changed enough, since the samples say little about a "
        "policy far from the one that drew them.",
        rows,
        "L_GRPO is the sum over all tokens of loss times weight. L_SFT is the mean of -log pi over the "
        "second look that was kept, forced tokens included: this is how the policy learns to look "
        "again by itself.",
        [
            f"L_GRPO          {before.policy_loss:+.5f}",
            f"L_SFT           {before.sft_loss:+.5f}",
            f"L               {total:+.5f}    = L_GRPO + {c.rethink_sft_coef:g} L_SFT",
        ],
        "While every rho is 1, a token costs -A, so L_GRPO is minus the mean advantage of the "
        "tokens whatever the policy can do. Its value carries no information; its gradient does.",
    )


def tell_step(c: Config, merged: list[Sample], draws: list[int], before, after) -> str:
    rows = ["        A      counts    log pi(y) before    after    change"]
    for i, (sample, n) in enumerate(zip(merged, draws)):
        old, new = ((x.logprobs * x.mask)[i].sum() for x in (before, after))
        numbers = f"{n} x    {old:15.3f}   {new:9.3f}  {new - old:+8.3f}"
        rows.append(f"#{i + 1}   {sample.advantage:+.3f}    {numbers}")
    return section(
        "7. One step of AdamW: train.py, update",
        f"One step on L, at a learning rate of {c.lr:g}, changes the sum of log pi over the tokens "
        "that the policy chose:",
        rows,
        "A right response can become less likely: it shares its words with wrong ones, as a lucky "
        "guess does. The reward does not say which token deserved it; only many questions do.",
        f"L_GRPO is now {after.policy_loss:+.5f}. {int(after.clipped.sum())} of "
        f"{int(after.mask.sum())} tokens have left the clip range; they would give no gradient in a "
        "second step on these samples. A run takes its steps on batches of many questions, then "
        "samples again with the new weights. Next: grpo.py, the first of the parts in full.",
    )


# ---------------------------------------------------------------------------- pictures


def write_pictures(out: Path, image: Image.Image, trees: Trees) -> None:
    """toy.png, four times as large, and tree.svg."""
    larger = image.resize((4 * image.width, 4 * image.height), Image.Resampling.NEAREST)
    try:
        out.mkdir(parents=True, exist_ok=True)
        larger.save(out / "toy.png")
        write_atomically(out / "tree.svg", draw_tree(trees))
    except OSError as error:
        raise explain_os_error(error, out) from None


def draw_tree(trees: Trees) -> str:
    """The mask of one tree as SVG, on a white card: each row is a token, coloured where it looks."""
    branch, mask = trees.branch[0].tolist(), tree_mask(trees.branch)[0].tolist()
    T, parts = len(branch), []
    for b in range(max(branch) + 1):
        runs = ""
        for query, row in enumerate(mask):
            seen = [k for k in range(T) if row[k] and branch[k] == b]
            runs += f"M{seen[0]} {query}h{len(seen)}v1h-{len(seen)}z" if seen else ""
        middle, name = branch.index(b) + branch.count(b) / 2, f"#{b}" if b else "prompt"
        parts += [
            f'<path fill="{COLOURS[b % len(COLOURS)]}" d="{runs}"/>',
            f'<text x="{middle}" y="-4" text-anchor="middle">{name}</text>',
            f'<text x="-4" y="{middle + 2}" text-anchor="end">{name}</text>',
        ]
    box = f'x="-32" y="-24" width="{T + 38}" height="{T + 30}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-32 -24 {T + 38} {T + 30}" '
        f'width="{3 * T}" font-family="sans-serif" font-size="5" fill="#1d2126">'
        "<title>Who sees whom in a tree: a row is a token that looks, a column one that is seen</title>"
        f'<rect {box} rx="3" fill="#fff"/>{"".join(parts)}'
        '<text x="-28" y="-16" font-style="italic">rows look at columns</text></svg>\n'
    )
