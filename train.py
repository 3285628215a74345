"""Teach a Qwen vision-language model to think slowly, by reinforcement learning.

    python train.py                                   the toy world, on whatever machine this is
    torchrun --nproc_per_node 8 train.py --preset 7b --data 39Krelease.parquet --out runs/7b

One *episode* (paper, Section 4): sample G responses to each of Q questions with frozen weights,
then take Q G / B optimiser steps on them.

    sample    rollout.py         G responses a question from one prefill; some are forced to look again
    reward    reward.py          1 if the last \\boxed{} holds the answer, else 0
    compare   grpo.py            advantage = reward - mean of the group
    replay    ssr.py             samples without advantage make room for some that have one
    update    tree.py, grpo.py   clipped loss on trees of responses, AdamW

Every rank holds all samples of an episode (token ids and numbers; pictures are read again where
they are needed) and computes the same plan from them, so no rank has to ask another what to train on.
What a run is made of is in prepare.py, its flags in config.py.
"""

import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import checkpoint
import parallel
import toy
from config import Config, parse
from data import Question, UserError
from pages.walk import explain
from grpo import is_clipped, policy_loss, token_weights
from measure import measure
from model import Sample, encode, response_logprobs, with_pixels
from record import Recorder
from rethink import before_rethinking, extender, imitated, merge_rethought, rethinks
from rollout import generate, most
from prepare import (
    Run,
    add_counts,
    agree,
    generator,
    gentle_stop,
    grade,
    prepare,
    resume,
    rethinking,
    save,
    score,
)
from ssr import effective_sample_size, is_effective, replay_batch
from tree import build_trees, pad_rows, plan_micro_batches

STOP_AFTER = 5  # non-finite steps in a row


# ---------------------------------------------------------------------------- sample


def episode_questions(run: Run, episode: int) -> list[Question]:
    """The questions of an episode: a slice of one shuffle a pass, the same on every rank."""
    c = run.config
    if run.questions is None:
        return toy.toy_questions(toy.LEVELS[c.toy_level], c.episode_queries, f"{c.seed}-{episode}")
    n, chosen, orders = len(run.questions), [], {}
    for place in range(episode * c.episode_queries, (episode + 1) * c.episode_queries):
        number = place // n
        if number not in orders:
            orders[number] = random.Random(f"order {c.seed} {number}").sample(range(n), n)
        chosen.append(run.questions[orders[number][place % n]])
    return chosen


def sample_episode(run: Run) -> tuple[list[list[Sample]], Counter]:
    """Sample, grade and compare: the groups of an episode, in the order of its questions, on every rank.

    Also counts what became of forced rethinking, and the sampled tokens.
    """
    c = run.config
    everything = episode_questions(run, run.episode)
    numbers = range(parallel.rank(), len(everything), parallel.world())
    mine = [everything[i] for i in numbers]
    prompts = agree(lambda: [encode(run.policy, question, c.template) for question in mine])
    extend = extender(
        rethinking(c), run.policy.tokenizer, grade, c.max_new_tokens, (c.seed, run.step)
    )
    bar = tqdm(total=len(mine) * c.group_size, desc=f"sampling episode {run.episode + 1}",
               unit="response", leave=False, disable=parallel.rank() > 0)  # fmt: skip
    with parallel.whole_weights(run.policy, c.rollout_weights == "layer"), bar:
        groups = generate(
            run.policy, prompts, c.group_size, c.max_new_tokens, c.temperature,
            generator(run, "rollout"), extend, c.rollout_rows, bar.update,
        )  # fmt: skip
        for sample in (s for group in groups for s in group):
            sample.reward, sample.step = grade(sample), run.step
            if sample.extension:
                sample.extension.reward, sample.extension.step = grade(sample.extension), run.step
        score(groups, c.advantage)
        sampled = describe_groups(groups)
        groups, counts = merge_rethought(rethinking(c), groups, c.advantage, c.rethink_baseline)
        if c.rethink_baseline == "after":
            score(groups, c.advantage)
        if c.recompute_logprobs:
            recompute_logprobs(run, groups)
    counts.update(sampled)
    if parallel.world() > 1:  # pictures do not travel; `with_pixels` reads them again
        for sample in (s for group in groups for s in group):
            sample.prompt = replace(sample.prompt, pixel_values=None)
            if sample.extension:
                sample.extension.prompt = sample.prompt
    parts = parallel.gather([(list(zip(numbers, groups)), counts)])
    ordered = sorted((pair for pairs, _ in parts for pair in pairs), key=lambda pair: pair[0])
    return [group for _, group in ordered], add_counts(part for _, part in parts)


def describe_groups(groups: list[list[Sample]]) -> Counter:
    """Counts over an episode's responses as they were sampled, before any second look is put in."""
    counts = Counter(effective=sum(any(map(is_effective, group)) for group in groups))
    for sample in (s for group in groups for s in group):
        counts.update(rewards=sample.reward, truncated=sample.finish == "length",
                      response_tokens=len(sample.tokens))  # fmt: skip
        if rethinks(sample.text):
            helped = sample.reward - grade(sample, before_rethinking(sample.text))
            counts.update(rethinks=1, rethinks_helped=helped)
    return counts


@torch.no_grad()
def recompute_logprobs(run: Run, groups: list[list[Sample]]) -> None:
    """Behaviour log-probabilities by the training forward pass, in place of those met in sampling."""
    # Where layers are gathered as they run, all ranks must take equally many: some do one twice.
    spare = groups[:1] * (most(len(groups), run.policy) - len(groups))
    for group in groups + spare:
        branches = [(group[0].prompt, [sample.tokens for sample in group])]
        logprobs, _ = response_logprobs(run.policy, branches, run.config.temperature)
        for sample, row in zip(group, logprobs.cpu()):
            sample.logprobs = row[: len(sample.tokens)]


# ---------------------------------------------------------------------------- update


@dataclass
class Branch:
    """A sample in an optimiser batch."""

    sample: Sample
    draws: int = 0  # times it counts in the policy-gradient loss; 0: in the SFT loss, or nowhere
    fresh: bool = False  # one of this batch's own samples; any further draws come from the buffer
    imitate: bool = False  # a second look kept in this batch: counts in the SFT loss

    @property
    def replays(self) -> int:
        """Draws from the replay buffer: all but a fresh sample's own place."""
        return self.draws - (self.fresh and self.draws > 0)


def choose_batch(run: Run) -> tuple[list[Sample], list[Branch]]:
    """The next B responses of the episode, and what is trained on in their stead."""
    c = run.config
    fresh, run.fresh = run.fresh[: c.batch_size], run.fresh[c.batch_size :]
    if c.ssr == "replay":
        batch = replay_batch(fresh, run.buffer, c.batch_size)
    else:
        batch = [s for s in fresh if c.ssr == "off" or is_effective(s)]
    branches: dict[int, Branch] = {}
    for sample in batch:
        branches.setdefault(id(sample), Branch(sample)).draws += 1
    for sample in fresh:
        imitate = bool(sample.rethought) and c.rethink_sft_coef > 0
        if imitate or id(sample) in branches:
            branch = branches.setdefault(id(sample), Branch(sample))
            branch.fresh, branch.imitate = True, imitate
    return fresh, list(branches.values())


def stack(rows: list[torch.Tensor], device) -> torch.Tensor:
    """Ragged [R] tensors -> [B, R], padded with 0."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


def micro_batch_loss(run: Run, branches: list[Branch], trees, totals: Counter):
    """Forward one micro-batch: its share of the optimiser batch's loss, and sums for the metrics.

    branches  in the order of the trees' branches;  totals  of the whole optimiser batch
    """
    c, device = run.config, run.policy.device
    logprobs, entropy = (
        pad_rows(x, trees.lengths) for x in run.policy(trees, c.temperature)
    )  # [B, R]
    mask = stack([b.sample.mask for b in branches], device)  # [B, R]
    old = stack([b.sample.logprobs for b in branches], device)  # [B, R]
    advantages = torch.tensor([b.sample.advantage for b in branches], device=device)  # [B]
    draws = torch.tensor([float(b.draws) for b in branches], device=device)[:, None]  # [B, 1]
    replays = torch.tensor([float(b.replays) for b in branches], device=device)[:, None]
    on_policy = torch.tensor([b.sample.step == run.step for b in branches], device=device)[:, None]
    sft_mask = stack([imitated(b.sample, c.rethink_sft_on) & b.imitate for b in branches], device)

    weights = token_weights(mask, c.average, max(1, totals["tokens"]), max(1, totals["responses"]))
    losses = policy_loss(logprobs, old, advantages, mask, c.clip_low, c.clip_high)  # [B, R]
    loss = (losses * weights * draws).sum()
    sft_loss = -(logprobs * sft_mask).sum() / max(1, totals["sft_tokens"])
    with torch.no_grad():
        clipped = is_clipped(logprobs, old, advantages, mask, c.clip_low, c.clip_high)
        drift = (logprobs - old).abs().masked_fill(~(mask & on_policy), 0.0)
        sums = {
            "loss": loss.detach(), "sft_loss": sft_loss.detach(),
            "entropy": (entropy * mask * draws).sum(),
            "clipped": (clipped * draws).sum(),
            "clipped_replayed": (clipped * replays).sum(),
            "replayed_tokens": (mask * replays).sum(),
            "mismatch": drift.max(),
        }  # fmt: skip
    return loss + c.rethink_sft_coef * sft_loss, sums


def update(run: Run, branches: list[Branch]) -> dict:
    """One optimiser step on the batch; its sums and totals. The step is skipped where the gradient is
    not finite: its norm is that of all ranks' gradients, so all skip."""
    c = run.config
    totals = Counter(
        tokens=sum(int(b.sample.mask.sum()) * b.draws for b in branches),
        responses=sum(b.draws for b in branches),
        sft_tokens=sum(
            int(imitated(b.sample, c.rethink_sft_on).sum()) for b in branches if b.imitate
        ),
    )
    sums = Counter()
    mismatch = 0.0
    for rows, trees in micro_batches(run, branches):
        loss, numbers = micro_batch_loss(run, rows, trees, totals)
        # FSDP averages gradients over ranks; the loss is already divided by all ranks' tokens.
        (loss * parallel.world()).backward()
        mismatch = max(mismatch, float(numbers.pop("mismatch")))
        sums.update({name: float(value) for name, value in numbers.items()})
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), c.max_grad_norm or math.inf)
    norm = float(parallel.whole(norm))
    learning_rate = c.lr * lr_factor(run.step, run.total_steps, c)
    if math.isfinite(norm):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate
        run.optimizer.step()
    run.optimizer.zero_grad()
    sums = add_counts(parallel.gather([sums]))
    mismatch = max(parallel.gather([mismatch]))
    return {**sums, **totals, "mismatch": mismatch, "grad_norm": norm, "lr": learning_rate}


def micro_batches(run: Run, branches: list[Branch]):
    """This rank's share of the batch: (its branches, their trees), a micro-batch at a time.

    A rank that runs out repeats a branch that counts for nothing: its gradients are 0, but all ranks
    must gather and reduce equally often.
    """
    lengths = [
        (b.sample.prompt.question.id, len(b.sample.prompt.input_ids), len(b.sample.tokens))
        for b in branches
    ]
    plan = plan_micro_batches(lengths, parallel.world(), run.config.micro_batch_tokens)
    mine = [[[branches[i] for i in tree] for tree in micro] for micro in plan[parallel.rank()]]
    spare = [[Branch(branches[0].sample)]]
    for micro in mine + [spare] * (max(map(len, plan)) - len(mine)):
        groups = [
            (with_pixels(run.policy, tree[0].sample.prompt), [b.sample.tokens for b in tree])
            for tree in micro
        ]
        yield [b for tree in micro for b in tree], build_trees(groups).to(run.policy.device)


def lr_factor(step: int, total: int, c: Config) -> float:
    """Linear warm-up, then a cosine from 1 to final_lr.

    >>> [round(lr_factor(s, 100, Config(warmup=0.1, final_lr=0.5)), 3) for s in (0, 9, 55, 100)]
    [0.1, 1.0, 0.75, 0.5]
    """
    rising = max(1, round(c.warmup * total))
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, total - rising))
    return c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------- the loop


def train_step(run: Run, sampling_seconds: float) -> dict:
    """Choose a batch, update, and say what happened: a line of metrics.jsonl."""
    c, start = run.config, time.perf_counter()
    fresh, branches = choose_batch(run)
    numbers = update(run, branches) if branches else {}
    # The first batch of an episode is trained by the weights that sampled it; the others have drifted.
    if numbers and fresh[0].step == run.step:
        run.logp_mismatch = numbers["mismatch"]
    finite = math.isfinite(numbers.get("grad_norm", 0.0))
    if branches:  # ruined weights make all rewards equal: an empty batch is no sign of health
        run.not_finite = 0 if finite else run.not_finite + 1
    draws, tokens = sum(b.draws for b in branches), max(1, numbers.get("tokens", 0))
    replayed = sum(b.replays for b in branches)
    age = sum((run.step - b.sample.step) * b.replays for b in branches)
    replayed_tokens = numbers.get("replayed_tokens", 0)
    own_tokens = max(1, tokens - replayed_tokens)
    clipped, clipped_replayed = numbers.get("clipped", 0), numbers.get("clipped_replayed", 0)
    counts = Counter(run.counts)
    responses = c.episode_queries * c.group_size
    run.step += 1
    return {
        "step": run.step, "episode": run.episode,
        "reward": counts["rewards"] / responses,
        "effective_queries": counts["effective"] / c.episode_queries,
        "replayed": replayed / max(1, draws), "replay_age": age / max(1, replayed),
        "replay_ess": effective_sample_size(run.buffer.weights()) if len(run.buffer) else 0.0,
        "batch_responses": draws,
        "loss": numbers.get("loss", 0.0), "sft_loss": numbers.get("sft_loss", 0.0),
        "grad_norm": numbers.get("grad_norm", 0.0) if finite else None,
        "clip_fraction": clipped / tokens,
        "clip_fraction_fresh": (clipped - clipped_replayed) / own_tokens,
        "clip_fraction_replayed": clipped_replayed / max(1, replayed_tokens),
        "entropy": numbers.get("entropy", 0.0) / tokens,
        "logp_mismatch": run.logp_mismatch,
        "response_length": counts["response_tokens"] / responses,
        "response_tokens": counts["response_tokens"] * c.batch_size / responses,
        "truncated": counts["truncated"] / responses,
        "rethinks": counts["rethinks"] / responses, "rethinks_helped": counts["rethinks_helped"] / responses,
        "rethought": counts["kept"] / responses,
        **{f"rethink_{name}": counts[name] for name in
           ("attempted", "kept", "tokens", "wrong_right", "right_right", "right_wrong", "wrong_wrong")},
        "lr": numbers.get("lr", 0.0),
        "skipped": not branches or not finite,
        "rollout_seconds": sampling_seconds,
        "step_seconds": sampling_seconds + time.perf_counter() - start,
    }  # fmt: skip


def is_measured(run: Run) -> bool:
    """Whether accuracy on held-out questions is due: first, last and every `eval_every` steps."""
    every = run.config.eval_every
    due = run.step in (0, run.total_steps) or (every and run.step % every == 0)
    return bool(run.heldout and due and run.measured < run.step)


def train(run: Run, record: Recorder) -> None:
    """Episodes until the last step, measuring and saving on the way."""
    c = run.config
    steps_per_episode = c.episode_queries * c.group_size // c.batch_size
    sampling_seconds = 0.0
    first = parallel.rank() == 0
    bar = tqdm(
        total=run.total_steps, initial=run.step, desc="training", unit="step", disable=not first
    )
    with bar:
        if is_measured(run):  # before the first step; or where an interruption came between
            record.metrics(measure(run))
        while run.step < run.total_steps:
            if not run.fresh:
                start = time.perf_counter()
                groups, run.counts = sample_episode(run)
                sampling_seconds = (time.perf_counter() - start) / steps_per_episode
                run.fresh = [sample for group in groups for sample in group]
                run.buffer.clear()
                run.episode += 1
                # Under the first step that trains on them: a run resumed before it writes them again.
                record.samples(run.step + 1, groups[:2], run.policy.tokenizer)
                for sample in run.fresh:
                    sample.extension = None  # a second look that was not kept has been shown
            row = train_step(run, sampling_seconds)
            record.metrics(row)
            bar.update()
            bar.set_postfix(reward=f"{row['reward']:.2f}", effective=f"{row['effective_queries']:.0%}",
                            replayed=f"{row['replayed']:.0%}", length=f"{row['response_length']:.0f}")  # fmt: skip
            stop = any(parallel.gather([run.interrupted])) or run.not_finite >= STOP_AFTER
            last = run.step == run.total_steps or stop
            if is_measured(run) and not stop:
                record.metrics(measure(run))
            # Not while gradients are not finite: what is kept must not be pushed out by what may be ruined.
            if run.not_finite == 0 and (last or run.step % c.save_every == 0):
                save(run)
            if run.not_finite >= STOP_AFTER:
                raise UserError(
                    f"step {run.step}: {STOP_AFTER} gradients in a row were not finite; lower --lr, and "
                    f"go on from an earlier checkpoint in {run.out}"
                )
            if stop:
                break


def main(argv: list[str]) -> int:
    """The command line: 0 when all went well, 2 for something the user can put right."""
    run = None
    try:
        config = parse(argv)
        if config.explain:
            explain(config)
            return 0
        run = prepare(config)
        resumed = run.config.resume and resume(run)
        record = Recorder(run.out, parallel.rank() == 0, run.step if resumed else None)
        run.measured = parallel.from_first(record.measured)
        with gentle_stop(run):
            train(run, record)
        parallel.barrier()
        if parallel.rank() == 0:
            saved = checkpoint.list_checkpoints(run.out)
            print(record.summary(run.step, run.total_steps, saved))
    except UserError as error:
        if (
            parallel.rank() == 0 or run is not None
        ):  # later than set-up, one rank may be alone with it
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        if run is None:
            raise
        print(f"error: {checkpoint.explain_os_error(error, run.out)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the second one, or one before training
        if parallel.rank() == 0:
            how = (
                f"go on with --resume --out {run.out} and the flags of before"
                if run
                else "nothing to resume: start it again"
            )
            print(f"stopped at once; {how}", file=sys.stderr)
        return 130
    finally:
        parallel.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
