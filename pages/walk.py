r"""One toy question, followed through the whole method with its real numbers.

    python train.py --explain                 a lesson on stdout, in Markdown
    python train.py --explain --out docs      and its two pictures, docs/toy.png and docs/tree.svg

Nothing of the method stands here a second time: what is shown are arguments and results of the
functions that train. The question is looked for when this runs: some of its responses are right,
some are wrong, and a forced second look turns a wrong one right. Beside it stands a question that
teaches nothing, to show what Selective Sample Replay does about such. lesson.py puts it in words.
"""

import random
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence

from pages import lesson
import toy
from config import Config
from data import UserError
from grpo import is_clipped, policy_loss, token_weights
from model import Policy, Sample, encode
from rethink import extender, imitated, merge_rethought
from rollout import generate
from prepare import grade, rethinking, score
from ssr import ReplayBuffer, is_effective, replay_batch
from tree import Trees, build_trees, pad_rows

EPISODES = 20  # searched for the two questions


def explain(c: Config) -> None:
    """Print the lesson; with --out, draw its pictures too."""
    if c.model != "toy":
        raise UserError(
            "--explain follows a question of the toy world: leave out --model and --data"
        )
    policy = toy.load_toy(toy.LEVELS[c.toy_level])
    group, idle = find_questions(policy, c)
    told, trees = follow(policy, c, group, idle)
    if c.out:
        picture = group[0].prompt.question.images[0]
        lesson.write_pictures(Path(c.out), picture, trees)
    print(lesson.heading(c), told, sep="\n\n")


# ---------------------------------------------------------------------------- the question


def find_questions(policy: Policy, c: Config) -> tuple[list[Sample], list[Sample]]:
    """The groups of two questions: the one to follow, and one whose responses are all alike."""
    followed = idle = None
    for episode in range(EPISODES):
        for group in sample_episode(policy, c, episode):
            right = sum(sample.reward for sample in group)
            if not followed and 1 < right < len(group) - 1 and helped(group, merge(c, group)[0]):
                followed = group
            if not idle and not any(s.extension or is_effective(s) for s in group):
                idle = group
            if followed and idle:
                return followed, idle
    raise UserError(
        f"--explain: none of {EPISODES * c.episode_queries} questions shows it all; try another "
        "--seed, or a --rethink_fraction between 0.1 and 0.5"
    )


def sample_episode(policy: Policy, c: Config, episode: int) -> list[list[Sample]]:
    key = f"{c.seed}-{episode}"
    questions = toy.toy_questions(toy.LEVELS[c.toy_level], c.episode_queries, key)
    prompts = [encode(policy, question, c.template) for question in questions]
    extend = extender(rethinking(c), policy.tokenizer, grade, c.max_new_tokens, (key,))
    luck = torch.Generator().manual_seed(random.Random(key).getrandbits(32))
    groups = generate(policy, prompts, c.group_size, c.max_new_tokens, c.temperature, luck, extend)
    for sample in (sample for group in groups for sample in group):
        for look in filter(None, (sample, sample.extension)):
            look.reward = grade(look)
    score(groups, c.advantage)
    return groups


def merge(c: Config, group: list[Sample]):
    groups, counts = merge_rethought(rethinking(c), [group], c.advantage, c.rethink_baseline)
    return groups[0], counts


def helped(group: list[Sample], merged: list[Sample]) -> list[int]:
    """Which members were wrong and are replaced by a second look."""
    pairs = enumerate(zip(group, merged))
    return [i for i, (first, kept) in pairs if kept is not first and first.reward == 0]


# ---------------------------------------------------------------------------- what becomes of it


def follow(policy: Policy, c: Config, group: list[Sample], idle: list[Sample]) -> tuple[str, Trees]:
    """The lesson about `group`, and the tree that training makes of it. The policy takes a step."""
    merged, counts = merge(c, group)
    i = helped(group, merged)[0]
    parts = [lesson.tell_prompt(policy, group[0].prompt), lesson.tell_responses(c, group)]
    if c.rethink_baseline == "after":
        score([merged], c.advantage)
    parts.append(lesson.tell_rethinking(policy, c, group[i], merged[i], i, counts))

    buffer = ReplayBuffer(c.ssr_alpha, c.seed, c.ssr_replacement)
    batch = replay_batch(merged + idle, buffer, len(merged + idle))
    draws = [sum(sample is drawn for drawn in batch) for sample in merged]
    parts.append(lesson.tell_replay(merged, idle, buffer, draws))

    trees = build_trees([(merged[0].prompt, [sample.tokens for sample in merged])])
    parts.append(lesson.tell_tree(trees))
    before = losses(policy, c, merged, draws, trees)
    (before.policy + c.rethink_sft_coef * before.sft).backward()
    torch.optim.AdamW(policy.parameters(), lr=c.lr, weight_decay=c.weight_decay).step()
    with torch.no_grad():
        after = losses(policy, c, merged, draws, trees)
    parts.append(lesson.tell_loss(policy, c, merged[i], i, before, after))
    parts.append(lesson.tell_step(c, merged, draws, before, after))
    return "\n\n".join(parts), trees


def losses(policy: Policy, c: Config, merged: list[Sample], draws: list[int], trees: Trees):
    """What train.micro_batch_loss makes of one group: by token [G, R], and the two losses."""
    logprobs = pad_rows(policy(trees, c.temperature)[0], trees.lengths)
    mask, old = (
        pad_sequence([getattr(s, name) for s in merged], True) for name in ("mask", "logprobs")
    )
    advantages = torch.tensor([sample.advantage for sample in merged])
    copies = torch.tensor(draws)[:, None]
    against = (logprobs, old, advantages, mask, c.clip_low, c.clip_high)
    by_token = policy_loss(*against)
    weights = token_weights(mask, c.average, int((mask * copies).sum()), sum(draws)) * copies
    second = pad_sequence([imitated(s, c.rethink_sft_on) & bool(s.rethought) for s in merged], True)
    return SimpleNamespace(
        logprobs=logprobs, ratio=(logprobs - old).exp(), mask=mask,
        by_token=by_token, weights=weights, clipped=is_clipped(*against),
        policy=(by_token * weights).sum(),
        sft=-(logprobs * second).sum() / second.sum(),
    )  # fmt: skip
