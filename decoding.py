"""One decoding step: a cache of keys and values, and the next token of every row.

While decoding, a row's attention has two halves, under one softmax:

    prefix  [N, H, P, d]   one per question: the G rows that share it attend as G queries of one matrix
    suffix  [B, H, S, d]   one per row: what the row itself has said, written in place

so the prompt is stored once and read once per step, however many responses it has. A step looks
at no value and writes in place, so that a GPU can replay it as a whole (`record`). rollout.py decides
which rows are decoded, and when they end.

Letters: N prompts, B rows, H key-value heads, g query heads per key-value head, P prompt tokens,
S tokens of a response so far, d features per head, D features, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from data import UserError
from model import NEVER, Policy, Prompt, masked_logits, product
from tree import join_pictures


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
        grids,
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


def decode_step(policy: Policy, cache: Cache, tokens, positions, at, span: int) -> torch.Tensor:
    """Feed one token a row and return its hidden state [B, D].

    tokens     [B] ids; positions [B] their M-RoPE position (one number: for text all three agree)
    at         [B] where in the suffix the token stands
    span       at least 1 + the largest `at`, known to the host: attention reads no further
    """
    x = policy.text_model.embed_tokens(tokens)[:, None]  # [B, 1, D]
    row = torch.arange(len(tokens), device=x.device)
    unseen = torch.arange(span, device=x.device) > at[:, None]  # [B, S]
    bias = torch.cat((cache.prefix_bias[cache.slot // cache.group_size], unseen * NEVER), dim=-1)
    bias = bias[:, None, None]  # [B, 1, 1, P + S]

    def attend(attention, q, k, v, scaling, **_):
        """q [B, h, 1, d]; k, v [B, H, 1, d] -> [B, 1, h, d], as `tree.carried_attention` has it."""
        i = attention.layer_idx
        cache.suffix_k[i][row, :, at] = k[:, :, 0]
        cache.suffix_v[i][row, :, at] = v[:, :, 0]
        mixed = shared_prefix_attention(
            q.view(len(k), k.shape[1], -1, q.shape[-1]) * scaling,
            (cache.prefix_k[i], cache.prefix_v[i]),
            (cache.suffix_k[i][:, :, :span], cache.suffix_v[i][:, :, :span]),
            bias,
            cache.slot,
            cache.group_size,
        )
        return mixed.flatten(1, 2)[:, None]

    return policy.decoder(x, positions.expand(3, 1, -1).mT, attend)[:, 0]


def shared_prefix_attention(q, prefix, suffix, bias, slot, group_size: int) -> torch.Tensor:
    """Attention of B rows over their prompt and over themselves, as one softmax. [B, H, g, d]

    q       [B, H, g, d] scaled queries: H key-value heads, each read by g query heads
    prefix  k, v [N, H, P, d];  suffix  k, v [B, H, S, d]
    bias    [B, 1, 1, P + S]: 0, or NEVER at what a row must not see
    slot    [B] n * group_size + member, ascending
    """
    N, P = len(prefix[0]), prefix[0].shape[2]
    shared = by_prompt(q, slot, N, group_size)  # [N, H, G g, d]
    over_prompt = by_row(product(shared, prefix[0].mT), slot, group_size)  # [B, H, g, P]
    scores = torch.cat((over_prompt, product(q, suffix[0].mT)), dim=-1) + bias
    weights = scores.softmax(-1).to(q.dtype)
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


def recordable(policy: Policy) -> bool:
    """Whether decoding steps are to be CUDA graphs."""
    return policy.device.type == "cuda" and policy.cuda_graphs


def record(step: Callable) -> Callable:
    """`step` as a CUDA graph: run by one launch, on the memory that it uses now. It is not run here.

    A decoding step is a thousand small kernels, and the host takes longer to launch them one by one
    than the GPU to run them.
    """
    graph = torch.cuda.CUDAGraph()
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


def sample_token(policy: Policy, hidden, temperature: float, luck, place):
    """hidden [B, D] -> a token [B] and its log-probability [B], with no host synchronisation.

    A uniform number u in [0, 1) per row, of `luck` and `place` alone ([B] each), is looked up in the
    cumulative distribution.
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
        u = (total * uniform(luck, place)[:, None]).to(total.dtype)
        u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, u, right=True)
        # Among nan nothing is found: the update, which sees that it is not finite, deals with it.
        token = token.clamp_max(logprobs.shape[-1] - 1)
        # A GPU sums in parallel, so rounding may open a gap where an id of chance 0 stands.
        possible = logprobs.gather(-1, token).exp() > 0
        token = torch.where(possible, token, logprobs.argmax(-1, keepdim=True))
    return token[:, 0], logprobs.gather(-1, token)[:, 0].float()


def uniform(luck: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float64, from int64 tensors: the `place`-th that splitmix64 draws from `luck`.

    A counter in place of a generator: no number depends on how many were drawn before it, by whom or
    on which device. int64 wraps around as the unsigned integers of splitmix64 do.
    """

    def mix(z, shift):
        return z ^ ((z >> shift) & ((1 << 64 - shift) - 1))  # a shift that brings in zeros

    z = luck + (place + 1) * -0x61C8864680B583EB
    z = mix(z, 30) * -0x40A7B892E31B1A47
    z = mix(mix(z, 27) * -0x6B2FB644ECCEEE15, 31)
    return ((z >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
