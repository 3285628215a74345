"""Teach a Qwen vision-language model to think slowly, by reinforcement learning.

    python train.py                                   the toy world, on whatever machine this is
    torchrun --nproc_per_node 8 train.py --preset 7b --data 39Krelease.parquet --out runs/7b

One *episode* (paper, Section 4): sample G responses to each of Q questions with frozen weights,
then take Q G / B optimiser steps on them.

    sample    rollout.py         G responses per question from one prefill; some must look again
    grade     reward.py          1 if the last \\boxed{} holds the answer, else 0
    compare   grpo.py            advantage = reward - mean of the group
    rethink   rethink.py         a forced second look that ends right replaces its first look
    replay    ssr.py             samples without advantage are replaced by earlier ones that have one
    update    tree.py, grpo.py   clipped loss on trees of responses, AdamW
    measure                      accuracy on held-out questions

Every rank holds all samples of an episode (token ids and numbers; with several ranks, pictures stay
behind and are read again) and computes the same plan from them, so no rank has to ask another what to
train on.
prepare.py puts a run together; config.py has its flags.
"""

import os

# Before torch loads: waiting threads sleep instead of spinning (the default), which is several times
# slower when another program uses the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import contextlib
import math
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

import torch
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import checkpoint
import parallel
import toy
from config import Config, parse
from data import Question, UserError, printable
from grpo import group_advantages, is_clipped, policy_loss, token_weights
from model import Prompt, Sample, decode, encode, response_logprobs, with_pixels
from pages.walk import explain
from prepare import Grade, Run, gentle_stop, prepare, say
from record import Recorder, heldout_metrics, step_metrics
from rethink import before_rethinking, extender, merge_rethought, rethinks, second_start, share_rethinking
from reward import extract_answer, reward
from rollout import generate, question_keys
from ssr import ReplayBuffer, is_effective, replay_batch
from tree import Trees, build_trees, plan_micro_batches

STOP_AFTER = 5  # non-finite steps in a row
# What the bar shows of a line of metrics.jsonl.
SHOWN = {
    "reward": "reward",
    "effective": "effective_queries",
    "replayed": "replayed",
    "length": "response_length",
}
MISMATCH_LIMIT = 0.02  # nats per token between sampling and training; above it, the user is warned


# ---------------------------------------------------------------------------- sample


def episode_questions(run: Run) -> list[Question]:
    """The questions of the next episode, the same on every rank: a slice of one shuffle per pass."""
    c, Q = run.config, run.config.episode_queries
    if run.questions is None:
        return toy.toy_questions(toy.level(c.toy_level), Q, f"{c.seed}-{run.episode}")
    n, places = len(run.questions), range(run.episode * Q, (run.episode + 1) * Q)
    passes = {place // n for place in places}
    orders = {p: random.Random(f"order {c.seed} {p}").sample(range(n), n) for p in passes}
    return [run.questions[orders[place // n][place % n]] for place in places]


def sample_episode(run: Run) -> tuple[list[list[Sample]], Counter]:
    """All groups of the next episode, in the order of its questions, on every rank; and its counts."""
    c, questions = run.config, episode_questions(run)
    first, stride = parallel.sampling_place(run.policy)
    keys = question_keys(questions, c.seed, run.step)[first::stride]
    numbers = range(first, len(questions), stride)
    prompts = parallel.agree(lambda: [encode(run.policy, questions[i], c.template) for i in numbers])
    where, size = f"sampling episode {run.episode + 1}", len(prompts) * c.group_size
    bar = tqdm(desc=where, total=size, unit="response", leave=False, disable=parallel.rank() > 0)
    with parallel.weights_to_sample(run.policy), bar:
        groups = sample_groups(run, prompts, keys, lambda *_: bar.update())
        counts = count_responses(groups)
        groups, outcomes = keep_second_looks(c, groups)
        if c.recompute_logprobs:
            differences = compare_logprobs(run, groups)
    if not c.recompute_logprobs:  # one micro-batch does not need the weights that were gathered to sample
        differences = compare_logprobs(run, groups)
    counts.update(outcomes)
    counts.update(mismatch_tokens=len(differences), mismatch=float(differences.abs().sum()))
    counts.update(mismatch_kl=float((differences.expm1() - differences).sum()))
    if parallel.world() > 1:  # pictures do not travel; `with_pixels` reads them again
        for sample in chain(*groups):
            sample.prompt = replace(sample.prompt, question=None, pixel_values=None)
            if sample.second_look:
                sample.second_look.prompt = sample.prompt
    numbered = sorted(parallel.gather(list(zip(numbers, groups)), run.policy), key=lambda pair: pair[0])
    for n, group in numbered:
        for sample in group:
            sample.prompt.question = questions[n]  # every rank has it, and its pictures
    counts = parallel.total(counts, run.policy)
    counts["mismatch_max"] = max(parallel.gather([float(differences.abs().max())]))
    check_mismatch(run, counts["mismatch"] / counts["mismatch_tokens"])
    return [group for _, group in numbered], counts


def sample_groups(run: Run, prompts: list[Prompt], keys: list[str], finished=lambda n, g, sample: None):
    """G responses to each prompt, graded and compared. Some carry a second look, graded as well."""
    c = run.config
    extend = extender(c, run.policy.tokenizer, is_right, keys)
    sizes = (c.group_size, c.max_new_tokens, c.temperature)
    groups = generate(run.policy, prompts, *sizes, keys, extend, c.rollout_rows, finished)
    looks = [look for sample in chain(*groups) for look in (sample, sample.second_look) if look]
    parallel.agree(lambda: [grade(run, look) for look in looks])
    compare(groups, c.advantage)
    return groups


# ---------------------------------------------------------------------------- grade and compare


def is_right(sample: Sample, text: str | None = None) -> bool:
    """The rule: does the last box of a response, or of another text in its place, hold the answer?"""
    question = sample.prompt.question
    return reward(sample.text if text is None else text, question.answer, question.choices) == 1.0


def grade(run: Run, sample: Sample) -> None:
    """Set what a response has earned. The reward is the rule's verdict, unless the run has its own."""
    said = sample.text
    if sample.rethought:  # a second look must answer in y2
        said = decode(run.policy, sample.tokens[second_start(sample) :])
    sample.step = run.step
    sample.answered, sample.right = extract_answer(said) is not None, is_right(sample, said)
    sample.reward = run.grade(said, sample.prompt.question) if run.grade else float(sample.right)


def compare(groups: list[list[Sample]], scale: str) -> None:
    """Set every sample's advantage from the rewards of its group; a second look's against the same."""
    for group in groups:
        looks = [*group, *(sample.second_look for sample in group if sample.second_look)]
        rewards = torch.tensor([[look.reward for look in looks]])  # [1, G and more]
        advantages = group_advantages(rewards, scale, rewards[:, : len(group)])[0].tolist()
        for look, advantage in zip(looks, advantages):
            look.advantage = advantage


def keep_second_looks(c: Config, groups: list[list[Sample]]) -> tuple[list[list[Sample]], Counter]:
    """The groups with kept second looks in place of their first ones, and how the second looks ended."""
    groups, outcomes = merge_rethought(c, groups)
    if c.rethink_baseline == "after":
        compare(groups, c.advantage)
    return groups, outcomes


def count_responses(groups: list[list[Sample]]) -> Counter:
    """Counts over an episode's first looks, as they were sampled."""
    counts = Counter(questions=len(groups), effective=sum(any(map(is_effective, group)) for group in groups))
    for sample in chain(*groups):
        counts.update(responses=1, rewards=sample.reward, truncated=sample.finish == "length")
        counts.update(response_tokens=len(sample.tokens), **unforced_look(sample, sample.right))
    return counts


def unforced_look(sample: Sample, right: bool) -> dict:
    """Counts of a response that looks again on its own: that it does, what its answer gained by it, and
    the tokens it took where the first answer was right already."""
    if not rethinks(sample.text):
        return {}
    first = is_right(sample, before_rethinking(sample.text))
    spent = first * share_rethinking(sample.text) * len(sample.tokens)
    return {"rethinks": 1, "rethinks_helped": right - first, "overthinking": spent}


@torch.no_grad()
def compare_logprobs(run: Run, groups: list[list[Sample]]) -> torch.Tensor:
    """Log-probability in the training forward pass minus that met in sampling, of sampled tokens: float64.

    One micro-batch tells; every rank runs one. With --recompute_logprobs all are run, and the samples
    keep what the training forward pass says.
    """
    c, samples, differences = run.config, list(chain(*groups)), []
    [plan] = plan_micro_batches(lengths_of(samples), 1, c.micro_batch_tokens)
    for micro in plan if c.recompute_logprobs else plan[:1]:
        trees = [[samples[i] for i in tree] for tree in micro]
        branches = [(tree[0].prompt, [sample.tokens for sample in tree]) for tree in trees]
        logprobs, _ = response_logprobs(run.policy, branches, c.temperature)
        for sample, row in zip(chain(*trees), logprobs.cpu()):
            row = row[: len(sample.tokens)]
            differences.append((row - sample.logprobs)[sample.mask])
            if c.recompute_logprobs:
                sample.logprobs = row.clone()  # a view would be pickled with its whole storage
    return torch.cat(differences).double()


def check_mismatch(run: Run, mismatch: float) -> None:
    """Warn where the policy that samples is not the one that learns; stop where it is ruined."""
    episode = f"episode {run.episode + 1}"
    if not math.isfinite(mismatch):
        raise UserError(f"{episode}: log-probabilities are not finite; {checkpoint.RUINED}")
    if mismatch > MISMATCH_LIMIT:
        differ = f"differ by {mismatch:.3f} nats per token (above {MISMATCH_LIMIT})"
        say(f"warning: {episode}: sampling and training {differ}; see logp_mismatch in docs/metrics.md")


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


@dataclass
class Terms:
    """The loss of a micro-batch, token by token. All are [B, R], responses as padded rows, but `sft_loss`."""

    mask: torch.Tensor  # True where the policy sampled the token
    logprobs: torch.Tensor  # under the policy being trained
    old_logprobs: torch.Tensor  # under the policy that sampled
    entropy: torch.Tensor  # of the next token, in nats
    losses: torch.Tensor  # the clipped surrogate
    clipped: torch.Tensor  # True where the clip stopped the gradient
    weights: torch.Tensor  # of a token in the mean over the optimiser batch, times its draws
    sft_loss: torch.Tensor  # a number: this micro-batch's part of the mean -log pi of kept second looks

    @property
    def loss(self) -> torch.Tensor:
        return (self.losses * self.weights).sum()


def choose_batch(run: Run) -> list[Branch]:
    """What is trained on in place of the next B responses of the episode."""
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
    return list(branches.values())


def batch_totals(c: Config, branches: list[Branch]) -> Counter:
    """What the losses of an optimiser batch are divided by."""
    return Counter(
        tokens=sum(int(b.sample.mask.sum()) * b.draws for b in branches),
        responses=sum(b.draws for b in branches),
        sft_tokens=sum(len(b.sample.tokens) for b in branches if b.imitate),
    )


def lengths_of(samples: list[Sample]) -> list[tuple[str, int, int]]:
    """(question id, prompt tokens, response tokens) of each, by which micro-batches are planned."""
    return [(s.prompt.question.id, len(s.prompt.input_ids), len(s.tokens)) for s in samples]


def micro_batches(run: Run, branches: list[Branch]):
    """This rank's share of these branches, micro-batch by micro-batch: (its branches, their trees).

    A rank that runs out repeats a branch that counts for nothing: its gradients are 0, but all ranks
    must gather and reduce equally often.
    """
    lengths = lengths_of([b.sample for b in branches])
    plan = plan_micro_batches(lengths, parallel.world(), run.config.micro_batch_tokens)
    mine = [[[branches[i] for i in tree] for tree in micro] for micro in plan[parallel.rank()]]
    spare = [[Branch(branches[0].sample)]]
    mine += [spare] * (max(map(len, plan)) - len(mine))

    def lay_out(micro: list[list[Branch]]) -> Trees:
        prompts = [with_pixels(run.policy, tree[0].sample.prompt) for tree in micro]
        return build_trees([(p, [b.sample.tokens for b in tree]) for p, tree in zip(prompts, micro)])

    with ThreadPoolExecutor(1) as background:
        # The next one's pictures are read and patched while this one is trained on.
        trees = background.submit(lay_out, mine[0])
        for micro, following in zip_longest(mine, mine[1:]):
            now = parallel.agree(trees.result)
            trees = following and background.submit(lay_out, following)
            yield list(chain(*micro)), now.to(run.policy.device)


def token_terms(run: Run, branches: list[Branch], trees: Trees, totals: Counter) -> Terms:
    """Forward one micro-batch: everything that its loss and its metrics are made of.

    branches  in the order of the trees' branches
    totals    `batch_totals` of the whole optimiser batch, over all ranks
    """
    c, device = run.config, run.policy.device

    def stack(rows) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True).to(device)  # [B, R]

    logprobs, entropy = (stack(x.split(trees.lengths)) for x in run.policy(trees, c.temperature))
    mask = stack([b.sample.mask for b in branches])
    old = stack([b.sample.logprobs for b in branches])
    advantages = torch.tensor([b.sample.advantage for b in branches], device=device)  # [B]
    surrogate = (logprobs, old, advantages, mask, c.clip_low, c.clip_high)
    weights = token_weights(mask, c.average, max(1, totals["tokens"]), max(1, totals["responses"]))
    weights = weights * column([b.draws for b in branches], device)
    sft_mask = stack([torch.full_like(b.sample.mask, b.imitate) for b in branches])
    sft_loss = -(logprobs * sft_mask).sum() / max(1, totals["sft_tokens"])
    clipped = is_clipped(*surrogate)
    return Terms(mask, logprobs, old, entropy, policy_loss(*surrogate), clipped, weights, sft_loss)


def column(numbers: list[int], device: torch.device) -> torch.Tensor:
    """[B, 1]: a number per response, to multiply its tokens by."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)[:, None]


@torch.no_grad()
def token_sums(branches: list[Branch], trees: Trees, t: Terms) -> dict[str, float]:
    """A micro-batch's sums for the metrics."""
    draws = t.mask * column([b.draws for b in branches], t.mask.device)  # [B, R]
    replays = t.mask * column([b.replays for b in branches], t.mask.device)
    sums = {
        "loss": t.loss, "sft_loss": t.sft_loss,
        "entropy": (t.entropy * draws).sum(), "trained_tokens": draws.sum(),
        "clipped": (t.clipped * draws).sum(), "clipped_replayed": (t.clipped * replays).sum(),
        "replayed_tokens": replays.sum(),
        "prompt_tokens": (trees.branch == 0).sum(), "row_tokens": (trees.branch >= 0).sum(),
    }  # fmt: skip
    return {name: float(value) for name, value in sums.items()}


def update(run: Run, branches: list[Branch]) -> Counter:
    """One optimiser step on the batch: its sums and totals, all 0 where nothing has a gradient.

    Samples without advantage (--ssr off keeps them) give no gradient: they count in the mean and are not run.
    The step is skipped where the gradient is not finite: its norm is that of all ranks' gradients, so
    all skip.
    """
    c = run.config
    trained = [b for b in branches if b.imitate or is_effective(b.sample)]
    if not trained:
        return Counter()
    totals, sums = batch_totals(c, branches), Counter()
    for rows, trees in micro_batches(run, trained):
        terms = token_terms(run, rows, trees, totals)
        loss = terms.loss + c.rethink_sft_coef * terms.sft_loss
        # FSDP averages gradients over ranks; the loss is already divided by all ranks' tokens.
        (loss * parallel.world()).backward()
        sums.update(token_sums(rows, trees, terms))
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), c.max_grad_norm or math.inf)
    norm = float(parallel.whole(norm))
    lr = c.lr * lr_factor(run.step, run.total_steps, c)
    if math.isfinite(norm):
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    run.optimizer.zero_grad()
    sums = parallel.total(sums)
    sums.update(totals, grad_norm=norm, lr=lr)
    return sums


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


# ---------------------------------------------------------------------------- measure


def measure(run: Run) -> tuple[dict, list[dict]]:
    """Held-out questions: a row of metrics, and the greedy answer to each of them."""
    c = run.config
    first, stride = parallel.sampling_place(run.policy)
    questions = run.heldout[first::stride]
    keys = question_keys(questions, c.seed, run.step, "held out")
    prompts = parallel.agree(lambda: [encode(run.policy, q, c.template) for q in questions])
    counts, answers, rows = Counter(), [], c.rollout_rows
    with parallel.weights_to_sample(run.policy):
        greedy, sampled = (
            chain(*generate(run.policy, prompts, 1, c.max_new_tokens, temperature, keys, max_rows=rows))
            for temperature in (0.0, c.temperature)
        )
    for sample in greedy:
        question, right = sample.prompt.question, is_right(sample)
        counts.update({"accuracy": right, ("n", question.category): 1, ("right", question.category): right})
        found = extract_answer(sample.text)
        answer = {"step": run.step, "id": question.id, "text": sample.text, "found": found}
        answers.append(answer | {"right": right, "tokens": len(sample.tokens)})
    for sample in sampled:
        right = is_right(sample)
        counts.update(sampled=right, tokens=len(sample.tokens), **unforced_look(sample, right))
        if c.data == "toy":
            counts[toy.way(sample.text)] += 1
    run.measured = run.step
    row = heldout_metrics(run, parallel.total(counts, run.policy))
    return row, parallel.gather(answers, run.policy)


def measurement_due(run: Run) -> bool:
    """Whether accuracy on held-out questions is due: first, last and every `eval_every` steps."""
    every = run.config.eval_every
    due = run.step in (0, run.total_steps) or (every and run.step % every == 0)
    return bool(run.heldout and due and run.measured < run.step)


def checkpoint_due(run: Run) -> bool:
    """Whether a step ends with a checkpoint: every `save_every` steps, unless its gradient was not finite."""
    return run.not_finite == 0 and run.step % run.config.save_every == 0


# ---------------------------------------------------------------------------- the loop


def train_step(run: Run, sampling_seconds: float) -> dict:
    """Choose a batch, update, and report: a line of metrics.jsonl."""
    start = time.perf_counter()
    branches = choose_batch(run)
    numbers = update(run, branches)
    if numbers:  # ruined weights make all rewards equal: an empty batch does not show that weights are sound
        run.not_finite = 0 if math.isfinite(numbers["grad_norm"]) else run.not_finite + 1
    row = step_metrics(run, branches, numbers)
    run.step += 1
    step_seconds = sampling_seconds + time.perf_counter() - start
    return row | {"rollout_seconds": sampling_seconds, "step_seconds": step_seconds}


def begin_episode(run: Run, record: Recorder) -> None:
    """Sample the responses that the next steps train on."""
    groups, run.counts = sample_episode(run)
    run.fresh = list(chain(*groups))
    run.buffer.begin(run.fresh)
    run.episode += 1
    # Under the first step that trains on them: a run resumed before it writes them again.
    record.samples(run.step + 1, groups[:2], run.policy.tokenizer)
    for sample in run.fresh:
        sample.second_look = None  # a second look that was not kept has been shown


def train(run: Run, record: Recorder) -> None:
    """Episodes until the last step, measuring and saving on the way."""
    c, sampling_seconds = run.config, 0.0
    sizes = {"total": run.total_steps, "initial": run.step}
    with tqdm(desc="training", unit="step", disable=parallel.rank() > 0, **sizes) as bar:
        if measurement_due(run):  # before the first step; or where an interruption came between
            record.heldout(run.heldout, *measure(run))
        while run.step < run.total_steps:
            if not run.fresh:
                start = time.perf_counter()
                try:
                    begin_episode(run, record)
                except UserError:  # met by all ranks: a reward that fails, a picture that is gone
                    if not checkpoint_due(run):  # else it is there already, or nothing is done yet
                        with contextlib.suppress(UserError):  # ruined weights are not saved
                            checkpoint.save_run(run)
                    raise
                steps = len(run.fresh) // c.batch_size
                sampling_seconds = (time.perf_counter() - start) / steps
            row = train_step(run, sampling_seconds)
            record.metrics(row)
            bar.set_postfix({label: f"{row[name]:.3g}" for label, name in SHOWN.items()}, refresh=False)
            bar.update()
            ruined = run.not_finite >= STOP_AFTER
            stop = ruined or any(parallel.gather([run.interrupted]))
            # Before measuring: should that fail, nothing computed is lost.
            if stop or run.step == run.total_steps or checkpoint_due(run):
                checkpoint.save_run(run)
            if ruined:
                what = f"step {run.step}: {STOP_AFTER} gradients in a row were not finite"
                raise UserError(f"{what}; {checkpoint.RUINED}")
            if stop:
                return
            if measurement_due(run):
                record.heldout(run.heldout, *measure(run))


def main(argv: list[str], grade: Grade | None = None, buffer: ReplayBuffer | None = None) -> int:
    """The command line: 0 when all went well, 2 for something the user can put right, 1 when another rank
    was lost, 130 when stopped at once.

    grade   your own reward, in place of --reward: (text of the response, Question) -> a number
    buffer  what to replay from in place of a ReplayBuffer: see ssr.py
    """
    run = None
    try:
        config = parse(argv)
        if config.explain:
            explain(config, sys.modules[__name__])
            return 0
        run = prepare(config, grade, buffer)
        step = run.step if config.resume and checkpoint.resume_run(run) else None
        record = parallel.agree(lambda: Recorder(run.out, parallel.rank() == 0, step))
        record.start(run.step, argv, parallel.world())
        run.measured = parallel.from_first(record.measured)
        with gentle_stop(run):
            train(run, record)
        parallel.barrier()
        if parallel.rank() == 0:
            saved = checkpoint.list_checkpoints(run.out)
            print(printable(record.summary(run.step, run.total_steps, saved)))
        return 0
    except UserError as error:  # all ranks have met it: see `parallel.agree`
        if parallel.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:
        print(f"error: {checkpoint.explain_os_error(error, run.out if run else config.out)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not parallel.is_broken(error):
            raise
        print(f"error: rank {parallel.rank()} lost another rank; {parallel.GO_ON}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the second one, or one before training
        if parallel.rank() == 0:
            print(f"stopped at once; {parallel.GO_ON}", file=sys.stderr)
        return 130
    finally:
        parallel.stop()
        if run and run.lock:
            run.lock.close()


if __name__ == "__main__":
    parallel.leave(main(sys.argv[1:]))
