"""Sampling G responses per question: prefill once, decode many, forced tokens.

A group shares its prompt, so the prompt runs through the model once per question and its keys and
values serve all G rows (decoding.py). Rows that have finished leave the batch. What the policy said is
recorded as it is said: its token ids, their log-probabilities (the behaviour policy's, which PPO's
ratio needs), and a mask that is False where a token was forced.

Forced tokens are how Forced Rethinking (paper, Section 4.3; rethink.py) is sampled: when a row
ends, `extend` may set it back behind some token and queue others; the row goes on from its own
cache, in the same batch, and nothing is computed twice.

What we do differently from the released code: temperature alone, no top-p or top-k, because these
change the distribution whose log-probability is taken; nothing is read from generation_config.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from data import Question
from decoding import decode_step, prefill, record, recordable, sample_token
from model import Policy, Prompt, Sample, decode
from rethink import Extension

COMPACT_BELOW = 0.75  # finished rows leave when at most this share of the batch still decodes


# (index of the prompt, index in the group, the finished response) -> how it goes on, or None
Extend = Callable[[int, int, Sample], Extension | None]


@dataclass
class Rows:
    """B responses under way. `length[b]` counts tokens said; the last said is fed next.

    A row of length 3 has said three tokens and fed two: its next step feeds the third at place 2 and
    writes the fourth at place 3. An extension that keeps 2 tokens sets the length back to 2: what the
    cache holds from place 1 on is written over.
    """

    origin: torch.Tensor  # [B] n * G + g: which response of which prompt; -1 once collected
    first: torch.Tensor  # [B] M-RoPE position of the first response token
    luck: torch.Tensor  # [B] what its random numbers are drawn from
    length: torch.Tensor  # [B]
    done: torch.Tensor  # [B] bool
    tokens: torch.Tensor  # [B, S]
    logprobs: torch.Tensor  # [B, S]
    sampled: torch.Tensor  # [B, S] bool, False where forced
    forced: torch.Tensor  # [B, S] ids to force at a place, or -1

    def select(self, index: torch.Tensor) -> "Rows":
        return Rows(*(tensor[index] for tensor in vars(self).values()))


# ---------------------------------------------------------------------------- the loop


def generate(
    policy: Policy,
    prompts: list[Prompt],
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    keys: list[str] | None = None,
    extend: Extend | None = None,
    max_rows: int = 256,
    progress: Callable[[int], None] = lambda finished: None,
) -> list[list[Sample]]:
    """Sample `group_size` responses to each prompt: a list of Samples a prompt, in order.

    temperature  0 decodes greedily; log-probabilities are then those at temperature 1
    keys         per prompt, what its randomness depends on; default: `question_keys`
    extend       asked once for each response that ends; see rethink.Extension. What it extends comes back
                 as Sample.extension of the response that it extends
    max_rows     responses decoded at once: their cache is what bounds it
    progress     called with the number of responses that have just finished

    Prompts of like length are decoded together, so that little is padded.
    """
    keys = keys or question_keys([prompt.question for prompt in prompts])
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    per_batch = max(1, max_rows // group_size)
    batches = [order[i : i + per_batch] for i in range(0, len(order), per_batch)]
    groups: list[list[Sample]] = [[] for _ in prompts]
    was_training = policy.training
    policy.eval()  # transformers keeps no cache while it checkpoints activations
    with torch.no_grad():
        for chosen in batches:
            batch = generate_batch(
                policy, [prompts[i] for i in chosen], group_size, max_new_tokens, temperature,
                [keys[i] for i in chosen], extend and renumber(extend, chosen), progress,
            )  # fmt: skip
            for i, group in zip(chosen, batch):
                groups[i] = group
    policy.train(was_training)
    return groups


def question_keys(questions: list[Question], *of) -> list[str]:
    """What a question's randomness depends on: `of` (seed, step, ...), its id, and how often it came before.

    >>> question_keys([Question(id, "", [], "") for id in "aba"], 0, 16)
    ["(0, 16) 'a' 0", "(0, 16) 'b' 0", "(0, 16) 'a' 1"]
    """
    seen: Counter = Counter()
    keys = []
    for question in questions:
        keys.append(f"{of} {question.id!r} {seen[question.id]}")
        seen[question.id] += 1
    return keys


def luck_of(*key) -> int:
    """63 bits of a hash: what `decoding.uniform` counts on from."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def renumber(extend: Extend, chosen: list[int]) -> Extend:
    return lambda n, g, sample: extend(chosen[n], g, sample)


def generate_batch(
    policy, prompts, group_size, max_new_tokens, temperature, keys, extend, progress
) -> list[list[Sample]]:
    """`generate` for prompts that fit in one batch."""
    device = policy.device
    eos = torch.tensor(policy.eos_ids, device=device)
    hidden, cache = prefill(policy, prompts, group_size)
    hidden = hidden.repeat_interleave(group_size, 0)  # [B, D]
    rows = new_rows(prompts, keys, group_size, max_new_tokens, device)
    samples: list[list[Sample]] = [[None] * group_size for _ in prompts]
    may_force = extend is not None
    sampled = sample_token(policy, hidden, temperature, rows.luck, rows.length)
    advance(rows, *sampled, eos, may_force)
    as_graph = recordable(policy)
    # Looking at `done` makes the host wait for the GPU; a row that has ended decodes on until then.
    check_every = 16 if device.type == "cuda" else 2
    # What attention reads of the suffix is rounded up to it: a recorded step has fixed shapes.
    block = 256 if as_graph else 1

    def step():
        next_token(policy, cache, rows, span, temperature, eos, may_force)

    run_step, recorded = step, None
    while True:
        finish(policy, rows, prompts, keys, samples, extend, progress)
        live = (~rows.done).nonzero()[:, 0]
        longest = int(rows.length[live].max()) if len(live) else max_new_tokens
        # To the next multiple of `check_every`: then cuts in `block`s fall on checks too.
        steps = min(check_every - longest % check_every, max_new_tokens - longest)
        if steps == 0:
            return samples
        if len(live) <= COMPACT_BELOW * len(rows.done):
            rows = rows.select(live)
            cache.select(live)
        span = min(-(-(longest + steps) // block) * block, max_new_tokens)
        cache.grow(span, max_new_tokens)
        shapes = (len(rows.done), span, cache.size)
        if as_graph and shapes != recorded:
            step()  # libraries set themselves up when they are first used: not while recording
            run_step = step  # lets go of the last recording's memory
            run_step, recorded, steps = record(step), shapes, steps - 1
        for _ in range(steps):
            run_step()


def next_token(policy, cache, rows, span, temperature, eos, may_force) -> None:
    """Feed every row its last token and write its next one. Waits for nothing; all in place."""
    at = rows.length - 1
    token = rows.tokens.gather(1, at[:, None])[:, 0]
    hidden = decode_step(policy, cache, token, rows.first + at, at, span)
    sampled = sample_token(policy, hidden, temperature, rows.luck, rows.length)
    advance(rows, *sampled, eos, may_force)


def new_rows(prompts: list[Prompt], keys: list[str], group_size: int, size: int, device) -> Rows:
    B = len(prompts) * group_size
    luck = [luck_of(key, g) for key in keys for g in range(group_size)]
    first = torch.tensor([p.next_position for p in prompts]).repeat_interleave(group_size)
    return Rows(
        origin=torch.arange(B, device=device),
        first=first.to(device),
        luck=torch.tensor(luck, device=device),
        length=torch.zeros(B, dtype=torch.long, device=device),
        done=torch.zeros(B, dtype=torch.bool, device=device),
        tokens=torch.zeros(B, size, dtype=torch.long, device=device),
        logprobs=torch.zeros(B, size, device=device),
        sampled=torch.ones(B, size, dtype=torch.bool, device=device),
        forced=torch.full((B, size), -1, device=device),
    )


def advance(rows: Rows, token, logprob, eos, may_force: bool) -> None:
    """Write the next token of every live row, in place. A forced id takes the sampled one's place."""
    size = rows.tokens.shape[1]
    at = rows.length.clamp(max=size - 1)[:, None]
    keep = rows.done[:, None]  # a finished row writes back what stands there
    ends = (token[:, None] == eos).any(-1)
    if may_force:
        forced = rows.forced.gather(1, at)[:, 0]
        is_forced = forced >= 0
        token = torch.where(is_forced, forced, token)
        ends = ends & ~is_forced
        sampled = torch.where(keep, rows.sampled.gather(1, at), ~is_forced[:, None])
        rows.sampled.scatter_(1, at, sampled)
    rows.tokens.scatter_(1, at, torch.where(keep, rows.tokens.gather(1, at), token[:, None]))
    rows.logprobs.scatter_(1, at, torch.where(keep, rows.logprobs.gather(1, at), logprob[:, None]))
    rows.length += ~rows.done
    rows.done |= ends | (rows.length >= size)


def finish(policy: Policy, rows: Rows, prompts, keys, samples, extend, progress) -> None:
    """Collect the responses that have ended; extend those that `extend` wants longer, in place."""
    ended = (rows.done & (rows.origin >= 0)).nonzero()[:, 0]
    if len(ended) == 0:
        return
    group_size = len(samples[0])
    longest = int(rows.length[ended].max())
    origin, length = rows.origin[ended].tolist(), rows.length[ended].tolist()
    tokens, logprobs, sampled = (
        x[ended, :longest].cpu() for x in (rows.tokens, rows.logprobs, rows.sampled)
    )
    finished = 0
    for i, row in enumerate(ended.tolist()):
        n, g = divmod(origin[i], group_size)
        y = tokens[i, : length[i]].clone()
        sample = Sample(
            prompts[n], y, logprobs[i, : length[i]].clone(), sampled[i, : length[i]].clone(),
            decode(policy, y), "stop" if int(y[-1]) in policy.eos_ids else "length",
        )  # fmt: skip
        rows.origin[row] = -1  # collected
        if samples[n][g] is not None:
            first = samples[n][g]
            sample.rethought, first.extension = first.rethought, sample
            first.rethought = None
            continue
        samples[n][g] = sample
        finished += 1
        extension = extend(n, g, sample) if extend else None
        if extension:
            sample.rethought = extension.kind  # moves to the extension when that is done
            end = extension.keep + len(extension.forced)
            rows.forced[row, extension.keep : end] = torch.tensor(
                extension.forced, device=rows.forced.device
            )
            rows.sampled[row, extension.keep :] = True
            rows.luck[row] = luck_of(keys[n], g, "second look")
            rows.length[row] = extension.keep
            rows.done[row] = False
            rows.origin[row] = origin[i]
    progress(finished)
