"""One decoding step: keys and values in pages, and the next token of every row.

What a row has said and what its prompt holds lies in pages, each the keys and values of up to L tokens
that follow one another:

    prompt pages    [M, H, L, d]   read by the G rows of a group as G queries of one matrix: a prompt is
                                   stored once and read once per step, however many responses it has
    response pages  [M, H, L, d]   read by one row, written in place

A row takes a page when its last one is full and gives all back when it ends, so that memory follows what
has been said, not the longest response. Attention is one softmax, computed page by page:

    out_p = sum_j softmax_j(s_pj) v_pj       l_p = log sum_j exp(s_pj)       out = sum_p softmax_p(l_p) out_p

A page read by G rows has G *parts*; the `table` of `Cache.lay_out` says which parts a row adds up. A step
looks at no value and writes in place, so that a GPU can replay it as a whole (`as_cuda_graph`). rollout.py
decides which rows are decoded, and when they end.

Letters: N prompts, G responses per question, B rows, M pages, L tokens of a page, C parts of a row, H
key-value heads, g query heads per key-value head, h = H g, P prompt tokens, d features per head, D features,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch.nn import functional as F

from data import UserError
from grpo import NEVER, masked_logits, product
from model import Policy, Prompt

PROMPT_PAGE, RESPONSE_PAGE = 256, 32  # tokens, at most


class Pages:
    """Keys and values of M pages, a tensor per layer. Page 0 is nobody's: ended rows write there."""

    def __init__(self, like: list[torch.Tensor], size: int, enough: int):
        """size  tokens of a page;  enough  how many pages usually suffice"""
        self.k, self.v = ([x.new_zeros(1, x.shape[1], size, x.shape[3]) for x in like] for _ in "kv")
        self.size, self.enough = size, enough
        self.free: list[int] = []

    def __len__(self) -> int:
        return len(self.k[0])

    @property
    def used(self) -> int:
        return len(self) - 1 - len(self.free)

    def change(self, change: Callable) -> None:
        """Replace tensors one after the other: only one exists twice at a time."""
        for tensors in (self.k, self.v):
            for i, tensor in enumerate(tensors):
                tensors[i] = change(tensor)

    def take(self, count: int) -> list[int]:
        """Take `count` pages. If too few are free, a quarter more are made, and less beyond `enough`:
        a GPU has to record its step anew for every size."""
        if count > len(self.free):
            spare = min(len(self) // 4, self.enough - len(self))
            more = max(count - len(self.free), spare, len(self) // 16)
            self.free += range(len(self), len(self) + more)
            self.change(lambda x: torch.cat((x, x.new_zeros(more, *x.shape[1:]))))
        return [self.free.pop() for _ in range(count)]

    def pack(self, owned: list[list[int]]) -> None:
        """Move the pages in use, all of which are `owned`, to the front, and forget the others."""
        used = {page for pages in owned for page in pages}
        size = len(used) + 1
        gaps = [page for page in range(1, size) if page not in used]
        moved = dict(zip(sorted(page for page in used if page >= size), gaps))

        def moving(x):
            x[list(moved.values())] = x[list(moved)]
            return x[:size].clone()

        self.change(moving)
        self.free = []
        for pages in owned:
            pages[:] = [moved.get(page, page) for page in pages]


@dataclass
class Group:
    """A question under way."""

    n: int  # the index of its prompt
    prompt: Prompt
    key: str  # of its randomness
    pages: list[int] = field(default_factory=list)


@dataclass
class Seat:
    """What the host knows of a row."""

    group: Group
    member: int
    limit: int  # of its length
    length: int = 1
    trigger: str | None = None  # the kind that was forced, once it looks again
    pages: list[int] = field(default_factory=list)


class Cache:
    """The pages of all prompts and rows, and who reads which."""

    def __init__(self, keys: list[torch.Tensor], group_size: int, rows: int, limit: int):
        """keys  of the first prompts, [N, H, P, d] per layer;  limit  of the tokens of a response

        Few responses are long at the same time: a quarter of `rows` of the longest is usually enough.
        """
        P, L = keys[0].shape[2], min(RESPONSE_PAGE, limit)
        per_prompt = -(-P // PROMPT_PAGE)
        self.prompts = Pages(keys, -(-P // (8 * per_prompt)) * 8, rows * per_prompt)
        self.responses = Pages(keys, L, -(-rows * max(limit // 4, 4 * L) // L))
        self.group_size = group_size
        self.longest = 0  # pages of a prompt
        self.most_pages = -(-limit // self.responses.size)  # of a response
        self.layout: dict[str, torch.Tensor] = {}
        self.stale = True  # pages have changed hands since it was made

    @property
    def tokens(self) -> int:
        """How many tokens the pages in use can hold."""
        return sum(pages.used * pages.size for pages in (self.prompts, self.responses))

    def store(self, groups: list[Group], keys: list, values: list) -> None:
        """Put prompts into pages: keys and values [N, H, P, d] per layer, taken out of their lists."""
        L, self.stale = self.prompts.size, True
        for group in groups:
            group.pages = self.prompts.take(-(-len(group.prompt.input_ids) // L))
        self.longest = max(self.longest, *(len(group.pages) for group in groups))
        owner = [n for n, group in enumerate(groups) for _ in group.pages]
        place = [c for group in groups for c in range(len(group.pages))]
        pages = [page for group in groups for page in group.pages]
        for store, given in ((self.prompts.k, keys), (self.prompts.v, values)):
            for i, x in enumerate(given):
                x = F.pad(x, (0, 0, 0, -x.shape[2] % L)).unflatten(2, (-1, L))  # [N, H, C, L, d]
                store[i][pages] = x.transpose(1, 2)[owner, place]
                given[i] = None

    def reserve(self, seats: list[Seat], steps: int) -> None:
        """Take the pages that the next `steps` tokens of these rows need."""
        size = self.responses.size
        needed = [-(-min(seat.length + steps, seat.limit) // size) for seat in seats]
        missing = [max(0, count - len(seat.pages)) for count, seat in zip(needed, seats)]
        pages = iter(self.responses.take(sum(missing)))
        for seat, count in zip(seats, missing):
            seat.pages += islice(pages, count)
        self.stale |= any(missing)

    def leave(self, seat: Seat, others: list[Seat | None]) -> None:
        self.stale = True
        self.responses.free += seat.pages
        if not any(other and other.group is seat.group for other in others):
            self.prompts.free += seat.group.pages

    def pack(self, seats: list[Seat]) -> None:
        """Forget all pages but those of these rows."""
        self.stale = True
        self.prompts.pack(list({id(seat.group): seat.group.pages for seat in seats}.values()))
        self.responses.pack([seat.pages for seat in seats])

    def lay_out(self, seats: list[Seat | None]) -> None:
        """Say who reads which page, at the same place in memory as before where the sizes allow."""
        if not self.stale:
            return
        G, shared = self.group_size, len(self.prompts) * self.group_size  # parts of prompt pages
        owner = [0] * (shared + len(self.responses))
        start, seen = [0] * len(self.responses), [0] * len(self.prompts)
        table = []
        for row, seat in enumerate(seats):
            group, own = (seat.group.pages, seat.pages) if seat else ([], [])
            parts = [page * G + seat.member for page in group]
            parts += [0] * (self.longest - len(parts)) + [shared + page for page in own]
            table.append(parts + [0] * (self.longest + self.most_pages - len(parts)))
            for part in parts:
                owner[part] = row
            for i, page in enumerate(own):
                start[page] = i * self.responses.size
            for i, page in enumerate(group):
                seen[page] = len(seat.group.prompt.input_ids) - i * self.prompts.size
        hidden = torch.arange(self.prompts.size) >= torch.tensor(seen)[:, None]
        layout = {
            "table": torch.tensor(table),  # [B, C] a row's parts, its prompt's first; 0 at padding
            "owner": torch.tensor(owner),  # [parts] the row that adds it up
            "start": torch.tensor(start),  # [M] place of a response page's first token
            "bias": hidden * torch.tensor(NEVER),  # [M, L] of prompt pages: NEVER at padding
        }
        for name, tensor in layout.items():
            old = self.layout.get(name)
            if old is not None and old.shape == tensor.shape:
                old.copy_(tensor)
            else:
                self.layout[name] = tensor.to(self.prompts.k[0].device)
        self.stale = False

    @property
    def shapes(self) -> tuple:
        """What a recorded step is good for."""
        return len(self.prompts), *self.layout["table"].shape, len(self.responses)


# ---------------------------------------------------------------------------- the model, token by token


def decode_step(policy: Policy, cache: Cache, tokens, positions, at) -> torch.Tensor:
    """Feed one token per row and return its hidden state [B, D].

    tokens     [B] ids; positions [B] their M-RoPE position (one number: for text all three agree)
    at         [B] which token of its response it is
    """
    pages = cache.responses
    x = policy.text_model.embed_tokens(tokens)[:, None]  # [B, 1, D]
    table, owner, start, prompt_bias = (cache.layout[name] for name in ("table", "owner", "start", "bias"))
    shared = len(cache.prompts) * cache.group_size
    part = table.gather(1, cache.longest + at[:, None] // pages.size)[:, 0]
    page, slot = (part - shared).clamp(min=0), at % pages.size  # [B] where its keys and values go
    place = start[:, None] + torch.arange(pages.size, device=x.device)  # [M, L]
    bias = prompt_bias[:, None, None], ((place > at[owner[shared:], None]) * NEVER)[:, None, None]
    groups = policy.text_model.layers[0].self_attn.num_key_value_groups
    heads = torch.arange(pages.k[0].shape[1] * groups, device=x.device)  # those of this rank's slice
    parts = (table[:, None] * len(heads) + heads[:, None]).flatten(0, 1)  # [B h, C] of each query head

    def attend(attention, q, k, v, scaling, **_):
        """q [B, h, 1, d]; k, v [B, H, 1, d] -> [B, 1, h, d], as `tree.carried_attention` has it."""
        i = attention.layer_idx
        pages.k[i][page, :, slot] = k[:, :, 0]
        pages.v[i][page, :, slot] = v[:, :, 0]
        q = q.view(len(k), k.shape[1], -1, q.shape[-1]) * scaling  # [B, H, g, d]
        prompt_page = cache.prompts.k[i], cache.prompts.v[i], bias[0]
        response_page = pages.k[i], pages.v[i], bias[1]
        return paged_attention(q, prompt_page, response_page, parts, owner).flatten(1, 2)[:, None]

    return policy.decoder(x, positions.expand(3, 1, -1).mT, attend)[:, 0]


def paged_attention(q, prompts, responses, parts, owner) -> torch.Tensor:
    """Attention of B rows over their pages, as one softmax: see the top. [B, H, g, d]

    q          [B, H, g, d] scaled queries: H key-value heads, each read by g query heads
    prompts    (k, v [M, H, L, d], bias [M, 1, 1, L]: NEVER where a row must not look);  responses  alike
    parts      [B H g, C] what each query adds up;  owner  [parts] the row whose query a part answers
    """
    M, g = len(prompts[0]), q.shape[2]
    shared = len(owner) - len(responses[0])
    queries = q[owner[:shared].view(M, -1)]  # [M, G, H, g, d]
    of_prompts = attend_page(queries.transpose(1, 2).flatten(2, 3), *prompts)
    of_responses = attend_page(q[owner[shared:]], *responses)
    out, log_sum = (
        torch.cat((x.unflatten(2, (-1, g)).transpose(1, 2).flatten(0, 3), y.flatten(0, 2)))
        for x, y in zip(of_prompts, of_responses)
    )  # [parts H g, d], [parts H g]
    weights = log_sum[parts].softmax(-1)  # [B H g, C]
    mixed = F.embedding_bag(parts, out, mode="sum", per_sample_weights=weights)  # gathers and adds up at once
    return mixed.view(q.shape).to(q.dtype)


def attend_page(q, k, v, bias) -> tuple[torch.Tensor, torch.Tensor]:
    """(attention within a page [M, H, r, d], log sum exp of its scores [M, H, r]) of r queries, in fp32."""
    scores = product(q, k.mT).add_(bias)
    top = scores.amax(-1, keepdim=True)
    # exp(-80) is lost beside 1 even in float64; where exp underflows it is slow on a CPU.
    weights = scores.sub_(top).clamp_(min=-80).exp_()
    total = weights.sum(-1, keepdim=True)
    return product(weights.to(v.dtype), v).div_(total), (top + total.log())[..., 0]


def recordable(policy: Policy) -> bool:
    """Whether decoding steps are to be CUDA graphs."""
    return policy.device.type == "cuda" and policy.cuda_graphs


def as_cuda_graph(step: Callable) -> Callable:
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
        if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__context__, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from error
        reason = str(error).splitlines()[0]
        raise UserError(
            f"a decoding step cannot be recorded ({reason}); --cuda_graphs false does without"
        ) from error
    return graph.replay


def sample_token(policy: Policy, hidden, temperature: float, seed, place):
    """hidden [B, D] -> a token [B], drawn by `uniform(seed, place)`, and its log-probability [B]. The host
    waits for nothing."""
    logits = masked_logits(hidden, policy.head_weight(), policy.banned_ids)  # [B, V]
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = logits.argmax(-1, keepdim=True)
    else:
        logprobs = (logits / temperature).log_softmax(-1)
        cumulative = logprobs.exp().cumsum(-1)
        # u stays below the last entry, which rounding leaves beside 1: the search never runs past the end.
        total = cumulative[:, -1:]
        u = (total * uniform(seed, place)[:, None]).to(total.dtype)
        u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, u, right=True)
        # Among nan nothing is found: the update, which sees that it is not finite, deals with it.
        token = token.clamp_max(logprobs.shape[-1] - 1)
        # A GPU sums in parallel, so rounding may open a gap where an id of chance 0 stands.
        possible = logprobs.gather(-1, token).exp() > 0
        token = torch.where(possible, token, logprobs.argmax(-1, keepdim=True))
    return token[:, 0], logprobs.gather(-1, token)[:, 0].float()


def uniform(seed: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float64, from int64 tensors: the `place`-th that splitmix64 draws from `seed`.

    A counter in place of a generator: no number depends on how many were drawn before it, by whom or
    on which device. int64 wraps around as the unsigned integers of splitmix64 do.
    """

    def mix(z, shift):
        return z ^ ((z >> shift) & ((1 << 64 - shift) - 1))  # a shift that brings in zeros

    z = seed + (place + 1) * -0x61C8864680B583EB
    z = mix(z, 30) * -0x40A7B892E31B1A47
    z = mix(mix(z, 27) * -0x6B2FB644ECCEEE15, 31)
    return ((z >> 11) & ((1 << 53) - 1)).double() / (1 << 53)
