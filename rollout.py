"""Sampling G responses a question: prefill once, decode many, forced tokens.

A group shares its prompt, so the prompt runs through the model once a question and its keys and
values serve all G rows. While decoding, a row's attention has two halves, softmax over both:

    prefix  [N, H, P, d]   one a question: the G rows that share it attend as G queries of one matrix
    suffix  [B, H, S, d]   one a row: what the row itself has said, written in place

so that the prompt is stored once and read once a step, however many responses it has. Rows that
have finished leave the batch. A step looks at no value and writes in place, so that a GPU can replay
it as a whole (`record`). What the policy said is recorded as it is said: its token ids, their
log-probabilities (the behaviour policy's, which PPO's ratio needs), and a mask that is False where
a token was forced.

Forced tokens are how Forced Rethinking (paper, Section 4.3; rethink.py) is sampled: when a row
ends, `extend` may set it back behind some token and queue others; the row goes on from its own
cache, in the same batch, and nothing is computed twice.

What we do differently from the released code: temperature alone, no top-p or top-k, because these
change the distribution whose log-probability is taken; nothing is read from generation_config.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

from data import UserError
from model import NEVER, Policy, Prompt, Sample, decode, masked_logits
from rethink import Extension
from tree import join_pictures

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
    length: torch.Tensor  # [B]
    done: torch.Tensor  # [B] bool
    tokens: torch.Tensor  # [B, S]
    logprobs: torch.Tensor  # [B, S]
    sampled: torch.Tensor  # [B, S] bool, False where forced
    forced: torch.Tensor  # [B, S] ids to force at a place, or -1

    def select(self, index: torch.Tensor) -> "Rows":
        return Rows(*(tensor[index] for tensor in vars(self).values()))


def replace_each(tensors: list[torch.Tensor], change: Callable) -> None:
    """Change a list's tensors one after the other: only one exists twice at a time."""
    for i, tensor in enumerate(tensors):
        tensors[i] = change(tensor)


@dataclass
class Cache:
    """Keys and values of N prompts and B rows, a tensor a layer."""

    prefix_k: list[torch.Tensor]  # [N, H, P, d]
    prefix_v: list[torch.Tensor]
    prefix_bias: torch.Tensor  # [N, P]: 0, or NEVER at padding
    suffix_k: list[torch.Tensor]  # [B, H, S, d]
    suffix_v: list[torch.Tensor]
    slot: torch.Tensor  # [B] n * G + g, with n counting the prompts still here
    group_size: int

    def select(self, index: torch.Tensor) -> None:
        """Keep these rows; drop the prompts that have none left."""
        replace_each(self.suffix_k, lambda k: k[index])
        replace_each(self.suffix_v, lambda v: v[index])
        prompt, member = self.slot[index] // self.group_size, self.slot[index] % self.group_size
        kept, renumbered = prompt.unique(return_inverse=True)
        if len(kept) < len(self.prefix_bias):
            replace_each(self.prefix_k, lambda k: k[kept])
            replace_each(self.prefix_v, lambda v: v[kept])
            self.prefix_bias = self.prefix_bias[kept]
        self.slot = renumbered * self.group_size + member

    @property
    def size(self) -> int:
        """Tokens a row that there is room for."""
        return self.suffix_k[0].shape[2]

    def grow(self, size: int, limit: int) -> None:
        """Room for `size` tokens a row. Doubled when full, so that few steps copy anything."""
        if size > self.size:
            room = min(max(64, 2 * size), limit) - self.size
            replace_each(self.suffix_k, lambda k: F.pad(k, (0, 0, 0, room)))
            replace_each(self.suffix_v, lambda v: F.pad(v, (0, 0, 0, room)))


# ---------------------------------------------------------------------------- the model, token by token


def prefill(policy: Policy, prompts: list[Prompt], group_size: int) -> tuple[torch.Tensor, Cache]:
    """Run N prompts, right-padded, once. Returns the last token's hidden state [N, D] and the cache."""
    N, P = len(prompts), max(len(p.input_ids) for p in prompts)
    input_ids = torch.zeros(N, P, dtype=torch.long)
    position_ids = torch.zeros(3, N, P, dtype=torch.long)
    bias = torch.full((N, P), NEVER)
    for n, prompt in enumerate(prompts):
        length = len(prompt.input_ids)
        input_ids[n, :length] = prompt.input_ids
        position_ids[:, n, :length] = prompt.position_ids
        bias[n, :length] = 0.0
    last = torch.tensor([len(p.input_ids) - 1 for p in prompts])
    pixels, grids = join_pictures(prompts)

    device = policy.device
    hidden, keys, values = policy.prefill(
        input_ids.to(device),
        position_ids.to(device),
        None if pixels is None else pixels.to(device),
        None if grids is None else grids.to(device),
    )
    B = N * group_size
    empty = [k.new_zeros(B, k.shape[1], 0, k.shape[3]) for k in keys]
    cache = Cache(
        keys,
        values,
        bias.to(device),
        empty,
        list(empty),
        torch.arange(B, device=device),
        group_size,
    )
    return hidden[torch.arange(N, device=device), last.to(device)], cache


def rms_norm(norm, x: torch.Tensor) -> torch.Tensor:
    """A norm of the model in one kernel where there is one, instead of eight."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [B, H, d] at one position a row; cos, sin [B, 1, d]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def decode_step(policy: Policy, cache: Cache, tokens, positions, at, span: int) -> torch.Tensor:
    """Feed one token a row and return its hidden state [B, D].

    tokens     [B] ids; positions [B] their M-RoPE position (one number: for text all three agree)
    at         [B] where in the suffix the token stands
    span       at least 1 + the largest `at`, known to the host: attention reads no further
    """
    model = policy.text_model
    angles = positions[:, None].float() * model.rotary_emb.inv_freq  # [B, d / 2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, d]
    x = model.embed_tokens(tokens)  # [B, D]
    scale = model.rotary_emb.attention_scaling
    cos, sin = (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
    row = torch.arange(len(tokens), device=x.device)
    unseen = torch.arange(span, device=x.device) > at[:, None]  # [B, S]
    bias = torch.cat((cache.prefix_bias[cache.slot // cache.group_size], unseen * NEVER), dim=-1)
    bias = bias[:, None, None].to(x.dtype)  # [B, 1, 1, P + S]
    for i, layer in enumerate(layers_in_turn(policy)):
        attention = layer.self_attn
        h = rms_norm(layer.input_layernorm, x)
        q, k, v = (
            project(h).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotate(torch.cat((q, k), 1), cos, sin).split((q.shape[1], k.shape[1]), 1)
        cache.suffix_k[i][row, :, at] = k
        cache.suffix_v[i][row, :, at] = v
        mixed = shared_prefix_attention(
            q.unflatten(1, (k.shape[1], -1)) * attention.scaling,
            (cache.prefix_k[i], cache.prefix_v[i]),
            (cache.suffix_k[i][:, :, :span], cache.suffix_v[i][:, :, :span]),
            bias,
            cache.slot,
            cache.group_size,
        )
        x = x + attention.o_proj(mixed.flatten(1))
        x = x + layer.mlp(rms_norm(layer.post_attention_layernorm, x))
    return rms_norm(model.norm, x)


def layers_in_turn(policy: Policy):
    """The decoder layers. In lockstep each is gathered while the one before computes, then let go."""
    layers = policy.text_model.layers
    if not policy.lockstep:
        yield from layers
        return
    layers[0].unshard(async_op=True)
    for layer, following in zip(layers, [*layers[1:], None]):
        layer.unshard()
        if following is not None:
            following.unshard(async_op=True)
        yield layer
        layer.reshard()


def most(count: int, policy: Policy) -> int:
    """The largest `count` of all ranks where they decode in lockstep; else one's own."""
    if not policy.lockstep:
        return count
    counts = torch.tensor([count], device=policy.device)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return int(counts)


def shared_prefix_attention(q, prefix, suffix, bias, slot, group_size: int) -> torch.Tensor:
    """Attention of B rows over their prompt and over themselves, as one softmax. [B, H, g, d]

    q       [B, H, g, d] scaled queries: H key-value heads, each read by g query heads
    prefix  k, v [N, H, P, d];  suffix  k, v [B, H, S, d]
    bias    [B, 1, 1, P + S]: 0, or NEVER at what a row must not see
    slot    [B] n * group_size + member, ascending
    """
    N, P = len(prefix[0]), prefix[0].shape[2]
    shared = by_prompt(q, slot, N, group_size)  # [N, H, G g, d]
    over_prompt = by_row(shared @ prefix[0].transpose(-1, -2), slot, group_size)  # [B, H, g, P]
    scores = torch.cat((over_prompt, q @ suffix[0].transpose(-1, -2)), dim=-1) + bias
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    shared = by_prompt(weights[..., :P], slot, N, group_size)  # [N, H, G g, P]
    return by_row(shared @ prefix[1], slot, group_size) + weights[..., P:] @ suffix[1]


def by_prompt(x: torch.Tensor, slot, N: int, group_size: int) -> torch.Tensor:
    """[B, H, g, e] -> [N, H, G g, e]: the rows of a group side by side, so that their prompt is read once.

    Members that have left are rows of zeros, which cost nothing: reading is what takes the time.

    >>> x = torch.tensor([5.0, 7.0]).view(2, 1, 1, 1)  # the first of one group, the last of another
    >>> by_prompt(x, torch.tensor([0, 3]), N=2, group_size=2).flatten(1)
    tensor([[5., 0.],
            [0., 7.]])
    """
    _, H, g, e = x.shape
    if len(x) < N * group_size:
        x = x.new_zeros(N * group_size, H, g, e).index_copy_(0, slot, x)
    return x.view(N, group_size, H, g, e).transpose(1, 2).reshape(N, H, group_size * g, e)


def by_row(x: torch.Tensor, slot, group_size: int) -> torch.Tensor:
    """[N, H, G g, e] -> [B, H, g, e]: the way back."""
    N, H, _, e = x.shape
    x = x.view(N, H, group_size, -1, e).transpose(1, 2).reshape(N * group_size, H, -1, e)
    return x[slot] if len(slot) < len(x) else x


# ---------------------------------------------------------------------------- the loop


def generate(
    policy: Policy,
    prompts: list[Prompt],
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    extend: Extend | None = None,
    max_rows: int = 256,
    progress: Callable[[int], None] = lambda finished: None,
) -> list[list[Sample]]:
    """Sample `group_size` responses to each prompt: a list of Samples a prompt, in order.

    temperature  0 decodes greedily; log-probabilities are then those at temperature 1
    generator    on the policy's device; all randomness comes from it
    extend       asked once for each response that ends; see rethink.Extension. What it extends comes back
                 as Sample.extension of the response that it extends
    max_rows     responses decoded at once: their cache is what bounds it
    progress     called with the number of responses that have just finished

    Prompts of like length are decoded together, so that little is padded.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    per_batch = max(1, max_rows // group_size)
    batches = [order[i : i + per_batch] for i in range(0, len(order), per_batch)]
    # In lockstep a rank with fewer batches decodes its first prompt again, for nobody.
    spare = [[0]] * (most(len(batches), policy) - len(batches))
    groups: list[list[Sample]] = [[] for _ in prompts]
    was_training = policy.training
    policy.eval()  # transformers keeps no cache while it checkpoints activations
    with torch.no_grad():
        for chosen in batches + spare:
            batch = generate_batch(
                policy, [prompts[i] for i in chosen], group_size, max_new_tokens, temperature,
                generator, extend and renumber(extend, chosen), progress,
            )  # fmt: skip
            for i, group in zip(chosen, batch):
                groups[i] = groups[i] or group
    policy.train(was_training)
    return groups


def renumber(extend: Extend, chosen: list[int]) -> Extend:
    return lambda n, g, sample: extend(chosen[n], g, sample)


def generate_batch(
    policy, prompts, group_size, max_new_tokens, temperature, generator, extend, progress
) -> list[list[Sample]]:
    """`generate` for prompts that fit in one batch."""
    device = policy.device
    eos = torch.tensor(policy.eos_ids, device=device)
    hidden, cache = prefill(policy, prompts, group_size)
    hidden = hidden.repeat_interleave(group_size, 0)  # [B, D]
    rows = new_rows(prompts, group_size, max_new_tokens, device)
    samples: list[list[Sample]] = [[None] * group_size for _ in prompts]
    may_force = extend is not None
    advance(rows, *sample_token(policy, hidden, temperature, generator), eos, may_force)
    as_graph = recordable(policy)
    # Looking at `done` makes the host wait for the GPU; a row that has ended decodes on until then.
    check_every = 16 if device.type == "cuda" else 2
    # What attention reads of the suffix is rounded up to it: a recorded step has fixed shapes.
    block = 256 if as_graph else 1

    def step():
        next_token(policy, cache, rows, span, temperature, generator, eos, may_force)

    run_step, recorded = step, None
    while True:
        finish(policy, rows, prompts, samples, extend, progress)
        live = (~rows.done).nonzero()[:, 0]
        longest = int(rows.length[live].max()) if len(live) else max_new_tokens
        # To the next multiple of `check_every`: then cuts in `block`s fall on checks too.
        steps = min(check_every - longest % check_every, max_new_tokens - longest)
        steps = most(steps, policy)
        if steps == 0:
            return samples
        # In lockstep a rank that has finished goes on with one row, for the sake of the others.
        kept = live if len(live) else live.new_zeros(1)
        if len(kept) <= COMPACT_BELOW * len(rows.done):
            rows = rows.select(kept)
            cache.select(kept)
        span = min(-(-(longest + steps) // block) * block, max_new_tokens)
        cache.grow(span, max_new_tokens)
        shapes = (len(rows.done), span, cache.size)
        if as_graph and shapes != recorded:
            step()  # libraries set themselves up when they are first used: not while recording
            run_step = step  # lets go of the last recording's memory
            run_step, recorded, steps = record(step, generator), shapes, steps - 1
        for _ in range(steps):
            run_step()


def next_token(policy, cache, rows, span, temperature, generator, eos, may_force) -> None:
    """Feed every row its last token and write its next one. Waits for nothing; all in place."""
    at = rows.length - 1
    token = rows.tokens.gather(1, at[:, None])[:, 0]
    hidden = decode_step(policy, cache, token, rows.first + at, at, span)
    advance(rows, *sample_token(policy, hidden, temperature, generator), eos, may_force)


def recordable(policy: Policy) -> bool:
    """Whether decoding steps can be CUDA graphs: in lockstep, layers come and go in memory."""
    return policy.device.type == "cuda" and policy.cuda_graphs and not policy.lockstep


def record(step: Callable, generator: torch.Generator | None) -> Callable:
    """`step` as a CUDA graph: run by one launch, on the memory that it uses now. It is not run here.

    A decoding step is a thousand small kernels, and the host takes longer to launch them one by one
    than the GPU to run them.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    try:
        # "thread_local": meanwhile NCCL's watchdog looks at its events, from a thread of its own.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or isinstance(
            error.__context__, torch.OutOfMemoryError
        ):
            raise torch.OutOfMemoryError(str(error)) from error
        reason = str(error).splitlines()[0]
        raise UserError(
            f"a decoding step cannot be recorded ({reason}); --cuda_graphs false does without"
        ) from error
    return graph.replay


def new_rows(prompts: list[Prompt], group_size: int, size: int, device) -> Rows:
    B = len(prompts) * group_size
    first = torch.tensor([p.next_position for p in prompts]).repeat_interleave(group_size)
    return Rows(
        origin=torch.arange(B, device=device),
        first=first.to(device),
        length=torch.zeros(B, dtype=torch.long, device=device),
        done=torch.zeros(B, dtype=torch.bool, device=device),
        tokens=torch.zeros(B, size, dtype=torch.long, device=device),
        logprobs=torch.zeros(B, size, device=device),
        sampled=torch.ones(B, size, dtype=torch.bool, device=device),
        forced=torch.full((B, size), -1, device=device),
    )


def sample_token(policy: Policy, hidden, temperature: float, generator):
    """hidden [B, D] -> a token [B] and its log-probability [B], with no host synchronisation.

    A uniform number u in [0, 1) is looked up in the cumulative distribution: one random number a row
    instead of one a row and vocabulary entry, which on a CPU would take most of a small model's step.
    """
    logits = masked_logits(hidden, policy.head_weight(), policy.banned_ids)  # [B, V]
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = logits.argmax(-1, keepdim=True)
    else:
        logprobs = (logits / temperature).log_softmax(-1)
        cumulative = logprobs.exp().cumsum(-1)
        # Below the last entry, not 1: rounding must lead neither past the end nor to a chance of 0.
        total = cumulative[:, -1:]
        u = total * torch.rand(len(total), 1, device=total.device, generator=generator)
        u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, u, right=True)
        # Among nan nothing is found: the update, which sees that it is not finite, deals with it.
        token = token.clamp_max(logprobs.shape[-1] - 1)
        # A GPU sums in parallel, so rounding may open a gap where an id of chance 0 stands.
        possible = logprobs.gather(-1, token).exp() > 0
        token = torch.where(possible, token, logprobs.argmax(-1, keepdim=True))
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


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


def finish(policy: Policy, rows: Rows, prompts, samples, extend, progress) -> None:
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
            rows.length[row] = extension.keep
            rows.done[row] = False
            rows.origin[row] = origin[i]
    progress(finished)
