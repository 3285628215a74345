"""What walk.py has found out, told as a lesson: Markdown that reads well in a terminal.

A section a step of the method, in the order in which training takes them. Its heading names the
functions that were called; what they were given and what they gave stands below. Nothing of the
method is computed here.
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
from ssr import ReplayBuffer, is_effective
from tree import Trees, tree_mask

WIDTH = 96
SURE = -0.01  # log-probability of a token that the policy hardly chose
# Of the prompt and of the branches, light and dark backgrounds alike.
COLOURS = (
    "#8b929a", "#2459d6", "#c2510a", "#157a3e", "#b0179a",
    "#0e7490", "#a07d10", "#b3261e", "#6b45c9",
)  # fmt: skip


def heading(c: Config) -> str:
    out = f" --out {c.out}" if c.out else ""
    made = (
        f"Made by `python train.py --explain{out}` on {datetime.date.today()}: torch "
        f"{torch.__version__} on {os.cpu_count()} cores ({platform.machine()}). Each heading "
        "names the functions whose arguments and results stand below it."
    )
    pictures = ["", "![the picture](toy.png)", "![who sees whom](tree.svg)"] if c.out else []
    return "\n".join(["# One question through VL-Rethinker", "", *wrap(made, WIDTH), *pictures])


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


def ask(prompt: Prompt) -> str:
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
        f"The policy is asked {ask(prompt)} about a picture (toy.py). Every cell has a colour "
        "and a dot, whose colour says which cell comes next. Here it is, cell (dot):",
        picture_rows(prompt.question.images[0]),
        f"Only the reward sees the answer, {prompt.question.answer}. The chat template makes P = "
        f"{len(prompt.input_ids)} tokens of it, {n} of them visual, one for 28 x 28 pixels:",
        wrap(shown, WIDTH - 4),
        "M-RoPE counts the picture's rows and columns: its tokens stand at (time, row, column) "
        f"= {', '.join(str(tuple(place)) for place in places)}. Text counts on from the "
        f"largest, and every response starts at {prompt.next_position}.",
    )


def tell_responses(c: Config, group: list[Sample]) -> str:
    rows = ["     reward  advantage"]
    for i, sample in enumerate(group, 1):
        said = wrap(one_line(sample), WIDTH - 30)
        rows.append(f"y{i}   {sample.reward:4g}    {sample.advantage:+.3f}    {said[0]}")
        rows += [" " * 24 + line for line in said[1:]]
    mean = sum(sample.reward for sample in group) / len(group)
    over = ", over its deviation" if c.advantage == "std" else ""
    return section(
        f"2. {len(group)} responses: rollout.py, generate; reward.py; grpo.py, group_advantages",
        "The prompt runs once, and its keys and values serve all of them. The reward is 1 "
        "where the last \\boxed{} holds the answer. The advantage compares with the siblings: "
        f"reward minus the group's mean, {mean:.3f}{over}. "
        "There is no critic, and how an answer was found is never judged.",
        rows,
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
    outcomes = ", ".join(f"{k.replace('_', ' -> ')} {n}" for k, n in counts.items() if "_" in k)
    return section(
        "3. Forced Rethinking: rethink.py, extender, merge_rethought",
        f"A share q = {c.rethink_fraction:g} of the responses has to look again: here "
        f"{counts['attempted']}, and y{i + 1} is among them. Its end, "
        f"{' '.join(pieces(policy, first.tokens[keep:]))}, is removed, a trigger is forced, and "
        "the policy goes on from its own keys and values:",
        lines,
        f"The reward was {first.reward:g} and is {y.reward:g}, so the whole of it takes "
        f"y{i + 1}'s place, its advantage {y.advantage:+.3f}. Forced tokens (mask 0) are "
        f"context: the policy did not choose them. What became of all second looks: {outcomes}; "
        f"{counts['kept']} kept, at most {c.rethink_quota} a question.",
    )


def tell_replay(
    merged: list[Sample], idle: list[Sample], buffer: ReplayBuffer, draws: list[int]
) -> str:
    total = sum(buffer.weights())
    chance = {
        id(sample): weight / total for sample, weight in zip(buffer.samples, buffer.weights())
    }
    rows = [
        ["", *(f"y{i}" for i in range(1, len(merged) + 1))],
        ["A", *(f"{sample.advantage:+.3f}" for sample in merged)],
        ["P(j)", *(f"{chance.get(id(sample), 0):.3f}" for sample in merged)],
        ["drawn", *(str(n - is_effective(sample)) for n, sample in zip(draws, merged))],
    ]
    size, kept = len(merged + idle), len(buffer)
    return section(
        "4. Selective Sample Replay: ssr.py, replay_batch (Algorithm 1), ReplayBuffer.weights",
        f"Let a batch hold these {len(merged)} and as many responses to {ask(idle[0].prompt)}, "
        f"all with reward {idle[0].reward:g}. Those are their own mean: A = 0, no gradient. "
        f"That is a vanishing advantage. Of {size} responses the {kept} effective ones stay and "
        f"enter the buffer; the other {size - kept} places are drawn from it, with P(j) = "
        f"|A_j|^{buffer.alpha:g} / sum over k of |A_k|^{buffer.alpha:g}:",
        ["".join(f"{cell:>8}" for cell in row) for row in rows],
    )


def tell_tree(trees: Trees) -> str:
    branch, mask = trees.branch[0].tolist(), tree_mask(trees.branch)[0]
    T, P, G = len(branch), branch.count(0), len(trees.lengths)
    across, down = -(-T // 68), -(-T // 16)
    rows = []

    def label(b: int) -> str:
        return str(b % 10) if b else "P"

    for query in range((T - 1) % down, T, down):
        keys = range(0, query + 1, across)
        rows.append("".join(label(branch[k]) if mask[query, k] else "." for k in keys))
    return section(
        "5. The tree: tree.py, build_trees, tree_mask",
        f"All {G} stand on one row behind one prompt: {T} tokens, where {G} rows would be "
        f"{G * P + T - P}. Who sees whom (a line is a token that looks, a column one that is "
        f"seen; one line in {down} and one column in {across} are drawn): the prompt and "
        "oneself, never a sibling.",
        rows,
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
    rows.append(f"and {len(y.tokens) - len(unsure)} more of which it is sure: log pi above {SURE}")
    total = before.policy_loss + c.rethink_sft_coef * before.sft_loss
    return section(
        "6. The loss: grpo.py, policy_loss, token_weights; train.py, token_terms",
        "One forward pass over the tree gives the log-probability of every token. With A = "
        f"{y.advantage:+.3f}, and rho the ratio to the policy that sampled it, a token of "
        f"y{i + 1} costs -min(rho A, clip(rho, {1 - c.clip_low:g}, {1 + c.clip_high:g}) A), and "
        "nothing where it was forced:",
        rows,
        "L_GRPO is the sum over all tokens of loss times weight. L_SFT is the mean of -log pi "
        "over the second look that was kept, forced tokens too: so it learns to look again by "
        "itself.",
        [f"L_GRPO          {before.policy_loss:+.5f}", f"L_SFT           {before.sft_loss:+.5f}",
         f"L               {total:+.5f}    = L_GRPO + {c.rethink_sft_coef:g} L_SFT"],
        "While every rho is 1 a token costs -A, so L_GRPO is minus the mean advantage of the "
        "tokens, whatever the policy can do: its value says nothing. What teaches is its "
        "gradient.",
    )  # fmt: skip


def tell_step(c: Config, merged: list[Sample], draws: list[int], before, after) -> str:
    rows = ["        A      counts    log pi(y) before    after    change"]
    for i, (sample, n) in enumerate(zip(merged, draws)):
        old, new = ((x.logprobs * x.mask)[i].sum() for x in (before, after))
        numbers = f"{n} x    {old:15.3f}   {new:9.3f}  {new - old:+8.3f}"
        rows.append(f"y{i + 1}   {sample.advantage:+.3f}    {numbers}")
    return section(
        "7. One step of AdamW: train.py, update",
        f"One step on L alone, at a learning rate of {c.lr:g}. This is what it does to the sum "
        "of log pi over the tokens that the policy chose:",
        rows,
        "A right response that becomes less likely shares its words with wrong ones: a guess "
        "that was lucky. Credit goes to tokens, and only many questions tell which of them "
        "deserved it.",
        f"L_GRPO is now {after.policy_loss:+.5f}. {int(after.clipped.sum())} of "
        f"{int(after.mask.sum())} tokens have left the clip's range: those would give no "
        "gradient in a second step on the same samples. A run takes its steps on batches of "
        "many questions, then samples again with the new weights.",
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
    """The mask of one tree as SVG: a row is a token that looks, its runs are what it sees."""
    branch, mask = trees.branch[0].tolist(), tree_mask(trees.branch)[0].tolist()
    T, parts = len(branch), []
    for b in range(max(branch) + 1):
        runs = ""
        for query, row in enumerate(mask):
            seen = [k for k in range(T) if row[k] and branch[k] == b]
            runs += f"M{seen[0]} {query}h{len(seen)}v1h-{len(seen)}z" if seen else ""
        middle, name = branch.index(b) + branch.count(b) / 2, f"y{b}" if b else "prompt"
        parts += [
            f'<path fill="{COLOURS[b % len(COLOURS)]}" d="{runs}"/>',
            f'<text x="{middle}" y="-4" text-anchor="middle">{name}</text>',
            f'<text x="-4" y="{middle + 2}" text-anchor="end">{name}</text>',
        ]
    box = f'x="-28" y="-14" width="{T + 32}" height="{T + 18}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-28 -14 {T + 32} {T + 18}" '
        f'width="{3 * T}" font-family="sans-serif" font-size="6">'
        "<title>Who sees whom in a tree: a row looks, a column is seen</title>"
        f'<rect {box} fill="#fff"/>{"".join(parts)}</svg>\n'
    )
