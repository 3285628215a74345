r"""One toy question, followed through the whole method with its real numbers.

    python train.py --explain                 a lesson on stdout, in Markdown
    python train.py --explain --out docs      and its two pictures, docs/toy.png and docs/tree.svg

Nothing of the method is computed here: the walk shows arguments and results of the functions that
train (`steps` is the module train.py). It searches for a question with right and wrong responses
where a forced second look turns a wrong one right, and for one whose responses all earn the same,
to show what Selective Sample Replay does about it. The words are in walk.md, with places for the numbers.
"""

import datetime
import os
import platform
from dataclasses import replace
from pathlib import Path
from textwrap import fill, indent, wrap

import torch
from PIL import Image
from tqdm import tqdm

import parallel
import toy
from checkpoint import explain_os_error
from config import Config
from data import MARKER, UserError
from model import IMAGE_PAD, Policy, Prompt, Sample, encode
from pages.transcripts import OUTCOMES
from prepare import Run
from record import write_atomically
from ssr import ReplayBuffer, is_effective
from tree import Trees, build_trees, tree_mask

WORDS = Path(__file__).with_name("walk.md")
EPISODES = 20  # searched for the two questions
WIDTH = 96
SURE = -0.01  # log-probability of a token that was hardly a choice
# Of the prompt and of the responses; they read on light and dark pages.
COLOURS = ("#8b929a", "#2459d6", "#c2510a", "#157a3e", "#b0179a", "#0e7490", "#a07d10", "#b3261e", "#6b45c9")


def explain(c: Config, steps) -> None:
    """Print the lesson; with --out, draw its pictures too."""
    if (c.model, c.data) != ("toy", "toy"):
        raise UserError("--explain follows a question of the toy world: leave out --model and --data")
    run = new_run(c, toy.load_toy(replace(toy.level(c.toy_level), family=c.toy_family)))
    group, idle = find_questions(run, steps)
    lesson, trees = follow(run, steps, group, idle)
    if c.out:
        write_pictures(Path(c.out), group[0].prompt.question.images[0], trees)
    print(lesson)


def new_run(c: Config, policy) -> Run:
    """A run of one step without warm-up, whose batch is the responses to two questions."""
    c = replace(c, warmup=0.0, batch_size=2 * c.group_size, ssr="replay")
    optimizer = parallel.optimizer(policy, c.lr, c.weight_decay)
    buffer = ReplayBuffer(c.ssr_alpha, c.seed)
    return Run(c, Path(c.out), policy, optimizer, None, [], 1, buffer)


def find_questions(run: Run, steps) -> tuple[list[Sample], list[Sample]]:
    """The groups of two questions: the one to follow, and one whose responses are all alike."""
    c, followed, idle = run.config, None, None
    for run.episode in tqdm(range(EPISODES), desc="searching for a question that shows it all", leave=False):
        questions = steps.episode_questions(run)
        prompts = [encode(run.policy, question, c.template) for question in questions]
        keys = steps.question_keys(questions, c.seed, run.step)
        for group in steps.sample_groups(run, prompts, keys):
            right = sum(sample.right for sample in group)
            # With half of them right all |A| are equal, and replay has no preference to show.
            tells = 1 < right < len(group) - 1 and 2 * right != len(group)
            kept = steps.keep_second_looks(c, [group])[0][0]
            if not followed and tells and helped(group, kept) and all(map(is_effective, kept)):
                followed = group
            # Where the baseline is taken after replacement, the siblings' advantages have changed.
            steps.compare([group], c.advantage)
            if not idle and not any(map(is_effective, group)):
                idle = group
            if followed and idle:
                return followed, idle
    raise UserError(
        f"--explain: none of {EPISODES * c.episode_queries} questions shows it all; try another "
        "--seed, or a --rethink_fraction between 0.1 and 0.5"
    )


def helped(group: list[Sample], merged: list[Sample]) -> list[int]:
    """Which members were wrong and are replaced by a second look."""
    pairs = enumerate(zip(group, merged))
    return [i for i, (first, kept) in pairs if kept is not first and not first.right]


def follow(run: Run, steps, group: list[Sample], idle: list[Sample]) -> tuple[str, Trees]:
    """The lesson about `group`, and the tree that training makes of it. The policy takes a step."""
    c = run.config
    responses = response_rows(group)  # as sampled: what follows may change advantages
    [merged], counts = steps.keep_second_looks(c, [group])
    run.fresh = merged + idle
    branches = steps.choose_batch(run)
    totals = steps.batch_totals(c, branches)
    # In the order of the members; micro-batches have one of their own.
    trees = build_trees([(merged[0].prompt, [b.sample.tokens for b in branches])])
    before = steps.token_terms(run, branches, trees, totals)
    steps.update(run, branches)
    with torch.no_grad():
        after = steps.token_terms(run, branches, trees, totals)
    i, draws = helped(group, merged)[0], [b.draws for b in branches]
    lesson = tell(run, group, responses, merged, i, counts, idle, draws, trees, before, after)
    return lesson, trees


def tell(run: Run, group: list, responses: str, merged: list, i: int, counts, idle: list, draws: list,
         trees: Trees, before, after) -> str:  # fmt: skip
    """The lesson about what `follow` found, where member i is replaced by its second look."""
    c, policy, prompt, first, y = run.config, run.policy, group[0].prompt, group[i], merged[i]
    P, T, G = len(prompt.input_ids), trees.branch.shape[1], len(group)
    size, effective, keep = len(merged + idle), len(run.buffer.samples), y.mask.tolist().index(False)
    words = WORDS.read_text(encoding="utf-8").format(
        c=c, counts=counts, first=first, y=y, prompt=prompt, before=before, after=after, i=i + 1, P=P, T=T,
        G=G, flags=f" --out {c.out}" if c.out else "", today=datetime.date.today(), torch=torch.__version__,
        cores=os.cpu_count(), machine=platform.machine(),
        pictures="![the picture](toy.png)\n![who sees whom](tree.svg)" if c.out else "",
        question=prompt.question, asked=quoted(prompt), **prompt_rows(policy, prompt),
        mean=sum(sample.reward for sample in group) / G, responses=responses,
        over=", divided by their standard deviation" if c.advantage == "std" else "",
        end=" ".join(pieces(policy, first.tokens[keep:])), looks=look_rows(policy, first, y, keep),
        outcomes=", ".join(f"{name} {counts[key]}" for key, name in OUTCOMES.items() if counts[key]),
        replaced=" and ".join(f"#{k}" for k, (a, b) in enumerate(zip(group, merged), 1) if a is not b),
        idle=quoted(idle[0].prompt), idle_reward=idle[0].reward, size=size, effective=effective,
        places_left=size - effective, replay=replay_rows(merged, run.buffer, draws), separate=G * P + T - P,
        clip=(1 - c.clip_low, 1 + c.clip_high), loss=loss_rows(policy, y, i, before, after),
        total=before.loss + c.rethink_sft_coef * before.sft_loss,
        step=step_rows(merged, draws, before, after), clipped=int(after.clipped.sum()),
        chosen=int(after.mask.sum()),
    )  # fmt: skip
    parts = []
    for part in filter(None, words.strip().split("\n\n")):
        as_it_is = part.startswith(("#", "!", "    "))
        parts.append(
            part if as_it_is else fill(part, WIDTH, subsequent_indent="  " if part[0] == "-" else "")
        )
    return "\n\n".join(parts)


def pieces(policy: Policy, tokens: torch.Tensor) -> list[str]:
    """Each token's text, in one line."""
    return [policy.tokenizer.decode([i]).replace("\n", "\\n") for i in tokens.tolist()]


def quoted(prompt: Prompt) -> str:
    return f'"{prompt.question.text.replace(MARKER, "")}"'


def apart(lines: list[str]) -> str:
    """Lines that are set apart from the text."""
    return indent("\n".join(map(str.rstrip, lines)), "    ")


def prompt_rows(policy: Policy, prompt: Prompt) -> dict:
    """The picture's cells and dots, from its pixels; the prompt's tokens; where the visual ones are."""
    image, names = prompt.question.images[0], {rgb: name for name, rgb in toy.COLOURS.items()}

    def cell(x: int, y: int) -> str:
        dot = (x + toy.CELL // 2, y + toy.CELL // 2)
        return f"{names[image.getpixel((x, y))]} ({names[image.getpixel(dot)]})".ljust(18)

    columns, rows = range(0, image.width, toy.CELL), range(0, image.height, toy.CELL)
    places = prompt.position_ids.T[prompt.input_ids == policy.model.config.image_token_id].tolist()
    shown, n = " | ".join(pieces(policy, prompt.input_ids)), len(places)
    shown = shown.replace(" | ".join([IMAGE_PAD] * n), f"{IMAGE_PAD} x {n}")
    return {
        "cells": apart(["".join(cell(x, y) for x in columns) for y in rows]),
        "tokens": apart(wrap(shown, WIDTH - 4)),
        "visual": n,
        "places": ", ".join(str(tuple(place)) for place in places),
    }


def response_rows(group: list[Sample]) -> str:
    rows = ["     reward  advantage"]
    for i, sample in enumerate(group, 1):
        said = wrap(" ".join(sample.text.split()), WIDTH - 30)
        rows.append(f"#{i}   {sample.reward:4g}    {sample.advantage:+.3f}    {said[0]}")
        rows += [" " * 24 + line for line in said[1:]]
    return apart(rows)


def look_rows(policy: Policy, first: Sample, y: Sample, keep: int) -> str:
    """y1, the forced tokens and y2, each with its mask."""
    end, rows = keep + int((~y.mask).sum()), []
    for name, tokens, mask in (
        ("y1", first.tokens, "1" * keep + "-" * (len(first.tokens) - keep)),
        ("forced", y.tokens[keep:end], "0" * (end - keep)),
        ("y2", y.tokens[end:], "1" * (len(y.tokens) - end)),
    ):
        said = [*wrap(" | ".join(pieces(policy, tokens)), WIDTH - 14), f"mask {mask}"]
        rows += [f"{name:8}{said[0]}", *(" " * 8 + line for line in said[1:])]
    return apart(rows)


def replay_rows(merged: list[Sample], buffer: ReplayBuffer, draws: list[int]) -> str:
    total = sum(buffer.weights())
    chance = {id(sample): weight / total for sample, weight in zip(buffer.samples, buffer.weights())}
    rows = [
        ["", *(f"#{i}" for i in range(1, len(merged) + 1))],
        ["A", *(f"{sample.advantage:+.3f}" for sample in merged)],
        ["P(j)", *(f"{chance.get(id(sample), 0):.3f}" for sample in merged)],
        ["drawn", *(str(n - is_effective(sample)) for n, sample in zip(draws, merged))],
    ]
    return apart(["".join(f"{cell:>8}" for cell in row) for row in rows])


def loss_rows(policy: Policy, y: Sample, i: int, before, after) -> str:
    """The terms of member i, token by token, before the step and after it."""
    names = f"{'log pi':>10}{'rho':>8}{'loss':>9}{'weight':>9}{'rho':>13}{'loss':>9}"
    rows = [f"{'after one step':>79}", " " * 21 + names]
    unsure = [t for t in range(len(y.tokens)) if before.logprobs[i, t] < SURE]
    said = pieces(policy, y.tokens)
    for t in unsure:
        ratios = [(x.logprobs - x.old_logprobs)[i, t].exp() for x in (before, after)]
        rho = [f"{ratio:.3f}" if y.mask[t] else "" for ratio in ratios]
        row = f"{before.logprobs[i, t]:10.3f}{rho[0]:>8}{before.losses[i, t]:9.3f}"
        row += f"{before.weights[i, t]:9.4f}{rho[1]:>13}{after.losses[i, t]:9.3f}"
        rows.append(f"{said[t]:13}{'' if y.mask[t] else 'forced':8}{row}")
    rows.append(f"and {len(y.tokens) - len(unsure)} more that were hardly a choice: log pi above {SURE}")
    return apart(rows)


def step_rows(merged: list[Sample], draws: list[int], before, after) -> str:
    rows = ["        A      counts    log pi(y) before    after    change"]
    for i, (sample, n) in enumerate(zip(merged, draws)):
        old, new = ((x.logprobs * x.mask)[i].sum() for x in (before, after))
        numbers = f"{n} x    {old:15.3f}   {new:9.3f}  {new - old:+8.3f}"
        rows.append(f"#{i + 1}   {sample.advantage:+.3f}    {numbers}")
    return apart(rows)


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
