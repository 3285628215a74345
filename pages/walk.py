r"""One toy question, followed through the whole method with its real numbers.

    python train.py --explain                 a lesson on stdout, in Markdown
    python train.py --explain --out docs      and its two pictures, docs/toy.png and docs/tree.svg

Nothing of the method is computed here: the walk shows arguments and results of the functions that
train (`steps` is the module train.py). It searches for a question with right and wrong responses
where a forced second look turns a wrong one right, and for one whose responses all earn the same,
to show what Selective Sample Replay does about it. lesson.py puts it in words (lesson.md).
"""

from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import toy
from config import Config
from data import UserError
from model import Sample, encode
from pages import lesson
from prepare import Run
from ssr import ReplayBuffer, is_effective
from tree import Trees, build_trees

EPISODES = 20  # searched for the two questions


def explain(c: Config, steps) -> None:
    """Print the lesson; with --out, draw its pictures too."""
    if c.model != "toy":
        raise UserError("--explain follows a question of the toy world: leave out --model and --data")
    run = new_run(c, toy.load_toy(replace(toy.LEVELS[c.toy_level], family=c.toy_family)))
    group, idle = find_questions(run, steps)
    told, trees = follow(run, steps, group, idle)
    if c.out:
        lesson.write_pictures(Path(c.out), group[0].prompt.question.images[0], trees)
    print(told)


def new_run(c: Config, policy) -> Run:
    """A run of one step without warm-up, whose batch is the responses to two questions."""
    c = replace(c, warmup=0.0, batch_size=2 * c.group_size, ssr="replay")
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=c.weight_decay)
    buffer = ReplayBuffer(c.ssr_alpha, c.seed, c.ssr_replacement)
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
    responses = lesson.response_rows(group)  # as sampled: what follows may change advantages
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
    told = lesson.tell(run, group, responses, merged, i, counts, idle, draws, trees, before, after)
    return told, trees
