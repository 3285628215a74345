"""Sampling G responses per question: prefill once, decode many, forced tokens.

A group shares its prompt, so the prompt runs through the model once per question and its keys and
values serve all G rows (decoding.py). Lengths are long-tailed, so rows that have ended are refilled: a
question enters as soon as G rows are free. With 4 rows, G = 2 and the questions a to d:

    row 0   a a a a a c c c c c c c c c c       when a's last row ends its pages are free, and so are
    row 1   a a a . . c c c c                   two rows: c enters
    row 2   b b b b b b b b d d d d d           the same with b and d
    row 3   b b b b b . . . d d d d d d d       nobody waits any more: rows that end are dropped
            ------------ steps ---------->

A response's randomness is its own: a hash of its question's key, its member and the token's place. So the
same responses come out beside whatever else is sampled, in any order, on any number of rows and ranks.

When a row ends, `extend` may set it back behind some token and queue forced ones (rethink.py): it goes on
from its own cache, in the same batch.

What we do differently from the released code: temperature alone, no top-p or top-k, because these
change the distribution whose log-probability is taken; nothing is read from generation_config.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from data import Question
from decoding import Cache, Group, Seat, as_cuda_graph, decode_step, recordable, sample_token
from model import Policy, Prompt, Sample, decode
from rethink import Continuation

# Once no question waits and at most this share of rows is still decoding, rows that have ended are dropped. A
# GPU then records its step anew.
PACK_BELOW = {"cpu": 0.75, "cuda": 0.5}
# Looking at `done` makes the host wait for a GPU; a row that has ended decodes on until then.
CHECK_EVERY = {"cpu": 2, "cuda": 16}
PREFILL_TOKENS = 1 << 13  # run at once, padding included: a 7B takes up to 2.2 GB for them

# (index of the prompt, index in the group, the finished response) -> how it goes on, or None
Extend = Callable[[int, int, Sample], Continuation | None]


@dataclass
class Rows:
    """B rows on the device. `length[b]` counts tokens said; the last said is fed next.

    A row of length 3 has said three tokens and fed two: its next step feeds the third at place 2 and
    writes the fourth at place 3. A continuation that keeps 2 tokens sets the length back to 2: what the
    cache holds from place 1 on is written over.
    """

    first: torch.Tensor  # [B] M-RoPE position of the first response token
    seed: torch.Tensor  # [B] what its random numbers are drawn from
    limit: torch.Tensor  # [B] of its length
    length: torch.Tensor  # [B]
    done: torch.Tensor  # [B] bool
    tokens: torch.Tensor  # [B, R]
    logprobs: torch.Tensor  # [B, R]
    mask: torch.Tensor  # [B, R] bool, False where forced
    forced: torch.Tensor  # [B, R] ids to force at a place, or -1


def generate(
    policy: Policy,
    prompts: Iterable[Prompt],
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    keys: list[str] | None = None,
    extend: Extend | None = None,
    max_rows: int = 256,
    finished: Callable[[int, int, Sample], None] = lambda n, g, sample: None,
) -> list[list[Sample]]:
    """Sample `group_size` responses to each prompt: a list of Samples per prompt, in order.

    prompts      may be made as they are needed: each is taken when the one before it has entered
    temperature  0 decodes greedily; log-probabilities are then those at temperature 1
    keys         per prompt, what its randomness depends on; default: `question_keys`
    extend       asked once for each response that ends; see rethink.Continuation. Its second look comes back
                 as Sample.second_look of the response that it continues
    max_rows     responses decoded at once; their cache must fit in memory
    finished     called with (n, g, Sample) for each response that is complete, second look included
    """
    was_training = policy.training
    policy.eval()  # transformers keeps no cache while it checkpoints activations
    try:
        with torch.no_grad():
            return Sampler(
                policy, prompts, group_size, max_new_tokens, temperature, keys, extend, max_rows
            ).run(finished)
    finally:
        policy.train(was_training)


def question_key(id_: str, time: int, *of) -> str:
    """What a question's randomness depends on: `of` (seed, step, ...), its id, how often it was asked."""
    return f"{of} {id_!r} {time}"


def question_keys(questions: Iterable[Question], *of) -> list[str]:
    """The key of each of these questions.

    >>> question_keys([Question(id, "", [], "") for id in "aba"], 0, 16)
    ["(0, 16) 'a' 1", "(0, 16) 'b' 1", "(0, 16) 'a' 2"]
    """
    seen, keys = Counter(), []
    for question in questions:
        seen[question.id] += 1
        keys.append(question_key(question.id, seen[question.id], *of))
    return keys


def seed_of(*key) -> int:
    """63 bits of a hash: what `decoding.uniform` counts on from."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


# ---------------------------------------------------------------------------- the loop


class Sampler:
    """One call of `generate`: B rows on the device, and what the host knows of them."""

    def __init__(self, policy, prompts, group_size, size, temperature, keys, extend, max_rows):
        self.policy, self.group_size, self.size = policy, group_size, size
        self.temperature, self.keys, self.extend = temperature, keys, extend
        self.eos = torch.tensor(policy.eos_ids, device=policy.device)
        B = max(1, max_rows // group_size) * group_size
        self.rows = new_rows([0] * B, [0] * B, size, policy.device)
        self.rows.done[:], self.rows.length[:] = True, 1
        self.seats: list[Seat | None] = [None] * B
        self.cache: Cache | None = None
        self.groups: list[list[Sample]] = []
        self.prompts, self.seen = iter(prompts), Counter()
        self.waiting = self.next_group()

    def next_group(self) -> Group | None:
        """The next question, as soon as the one before it has entered: it is encoded ahead of its time."""
        prompt = next(self.prompts, None)
        if prompt is None:
            return None
        n, id_ = len(self.groups), prompt.question.id
        self.groups.append([None] * self.group_size)
        self.seen[id_] += 1
        return Group(n, prompt, self.keys[n] if self.keys else question_key(id_, self.seen[id_]))

    def run(self, finished) -> list[list[Sample]]:
        check_every = CHECK_EVERY[self.policy.device.type]
        step, recorded = self.next_token, None
        while True:
            self.collect(finished)
            self.enter()
            if not any(self.seats):
                return self.groups
            left = max(seat.limit - seat.length for seat in self.seats if seat)
            steps = min(check_every, left)
            self.arrange(steps)
            if steps and recordable(self.policy) and recorded != self.cache.shapes:
                step = self.next_token  # lets go of the last recording's memory
                step()  # libraries set themselves up when they are first used: not while recording
                step, recorded, steps = as_cuda_graph(step), self.cache.shapes, steps - 1
            for _ in range(steps):
                step()

    def next_token(self) -> None:
        """Feed every row its last token and write its next one. Waits for nothing; all in place."""
        rows, at = self.rows, self.rows.length - 1
        token = rows.tokens.gather(1, at[:, None])[:, 0]
        hidden = decode_step(self.policy, self.cache, token, rows.first + at, at)
        said = sample_token(self.policy, hidden, self.temperature, rows.seed, rows.length)
        advance(rows, *said, self.eos, self.extend is not None)

    def enter(self) -> None:
        """Let questions in where G rows are free and the cache has room."""
        free = [row for row, seat in enumerate(self.seats) if seat is None]
        coming: list[Group] = []
        while self.waiting and len(free) >= (len(coming) + 1) * self.group_size:
            if not self.has_room([*coming, self.waiting]):
                break
            coming.append(self.waiting)
            self.waiting = self.next_group()
        batches: list[list[Group]] = []
        for group in sorted(coming, key=lambda group: len(group.prompt.input_ids)):
            if not batches or len(group.prompt.input_ids) * (len(batches[-1]) + 1) > PREFILL_TOKENS:
                batches.append([])
            batches[-1].append(group)
        for batch in batches:
            self.admit(batch, [free.pop(0) for _ in range(len(batch) * self.group_size)])

    def has_room(self, coming: list[Group]) -> bool:
        """Whether the cache, with these questions, stays within what is usually enough."""
        if self.cache is None or not any(self.seats):
            return True
        prompts, responses = self.cache.prompts, self.cache.responses
        tokens = sum(len(x.prompt.input_ids) + self.group_size * responses.size for x in coming)
        groups = len(self.seats) // self.group_size
        most = groups * self.cache.longest * prompts.size + responses.enough * responses.size
        return self.cache.tokens + tokens <= most

    def admit(self, groups: list[Group], free: list[int]) -> None:
        """Run prompts and put the first token of their responses into free rows."""
        hidden, keys, values = self.policy.prefill([group.prompt for group in groups])
        if self.cache is None:
            self.cache = Cache(keys, self.group_size, len(self.seats), self.size)
        self.cache.store(groups, keys, values)
        seats = [Seat(group, g, self.size) for group in groups for g in range(self.group_size)]
        first = [seat.group.prompt.next_position for seat in seats]
        seed = [seed_of(seat.group.key, seat.member) for seat in seats]
        rows = new_rows(first, seed, self.size, self.policy.device)
        hidden = hidden.repeat_interleave(self.group_size, 0)  # [B, D]
        said = sample_token(self.policy, hidden, self.temperature, rows.seed, rows.length)
        advance(rows, *said, self.eos, False)
        for tensor, new in zip(vars(self.rows).values(), vars(rows).values()):
            tensor[free] = new
        for row, seat in zip(free, seats):
            self.seats[row] = seat

    def arrange(self, steps: int) -> None:
        """Pages for the next steps; where nobody waits, without the rows that have ended."""
        live = [row for row, seat in enumerate(self.seats) if seat]
        if self.waiting is None and len(live) <= PACK_BELOW[self.policy.device.type] * len(self.seats):
            self.rows = Rows(*(tensor[live] for tensor in vars(self.rows).values()))
            self.seats = [self.seats[row] for row in live]
            self.cache.pack(self.seats)
        self.cache.reserve([seat for seat in self.seats if seat], steps)
        self.cache.lay_out(self.seats)

    def collect(self, finished) -> None:
        """Take responses that have ended out of their rows, or send them on to a second look."""
        rows, ended = self.rows, []
        lengths, done = torch.stack((rows.length, rows.done.long())).tolist()
        for row, seat in enumerate(self.seats):
            if seat:
                seat.length = lengths[row]
                ended += [row] if done[row] else []
        if not ended:
            return
        longest = max(lengths[row] for row in ended)
        tokens, logprobs, mask = (x[ended, :longest].cpu() for x in (rows.tokens, rows.logprobs, rows.mask))
        for i, row in enumerate(ended):
            seat, R = self.seats[row], lengths[row]
            y, n, g = tokens[i, :R].clone(), seat.group.n, seat.member
            sample = Sample(
                seat.group.prompt,
                y,
                logprobs[i, :R].clone(),
                mask[i, :R].clone(),
                decode(self.policy, y),
                "stop" if int(y[-1]) in self.policy.eos_ids else "length",
            )
            if seat.trigger:
                sample.rethought, self.groups[n][g].second_look = seat.trigger, sample
            else:
                self.groups[n][g] = sample
                continuation = self.extend(n, g, sample) if self.extend else None
                if continuation:
                    self.look_again(row, continuation)
                    continue
            self.seats[row] = None
            self.cache.leave(seat, self.seats)
            finished(n, g, self.groups[n][g])

    def look_again(self, row: int, how: Continuation) -> None:
        """Set a row that has ended back behind the token that it keeps, and queue the forced ones."""
        rows, seat = self.rows, self.seats[row]
        forced = torch.tensor(how.forced, device=rows.forced.device)
        rows.forced[row, how.keep : how.keep + len(forced)] = forced
        rows.seed[row] = seed_of(seat.group.key, seat.member, "second look")
        seat.trigger, seat.length = how.kind, how.keep
        seat.limit = min(self.size, how.limit)
        rows.length[row], rows.limit[row], rows.done[row] = how.keep, seat.limit, False


def new_rows(first: list[int], seed: list[int], size: int, device) -> Rows:
    B = len(first)
    return Rows(
        first=torch.tensor(first, device=device),
        seed=torch.tensor(seed, device=device),
        limit=torch.full((B,), size, device=device),
        length=torch.zeros(B, dtype=torch.long, device=device),
        done=torch.zeros(B, dtype=torch.bool, device=device),
        tokens=torch.zeros(B, size, dtype=torch.long, device=device),
        logprobs=torch.zeros(B, size, device=device),
        mask=torch.ones(B, size, dtype=torch.bool, device=device),
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
        sampled = torch.where(keep, rows.mask.gather(1, at), ~is_forced[:, None])
        rows.mask.scatter_(1, at, sampled)
    rows.tokens.scatter_(1, at, torch.where(keep, rows.tokens.gather(1, at), token[:, None]))
    rows.logprobs.scatter_(1, at, torch.where(keep, rows.logprobs.gather(1, at), logprob[:, None]))
    rows.length += ~rows.done
    rows.done |= ends | (rows.length >= rows.limit)
