"""A group is a tree: one prompt, G branches, one row.

    [ prompt | y_1 | y_2 | ... | y_G ]        T = P + R_1 + ... + R_G tokens instead of G (P + R)

G responses to one question share a prompt that is mostly image tokens. On one row it runs once,
forward and backward. Three things make the row equal to G separate ones: who sees whom (each
response its prompt and itself: `tree_mask` says it, for tests and `--explain`; `tree_attention`
does it without a mask over the row), positions (every response starts right after the prompt), and
the first token of every response being predicted by the last token of the prompt.

A sample that replay has drawn k times is one branch whose loss counts k times: the same gradient
for a k-th of the work. `plan_micro_batches` cuts an optimiser batch into micro-batches for all
ranks: a pure function of the lengths, so every rank computes the whole plan.

Pictures are packed in the same spirit: the patches of all of them on one row, on which each window or
picture attends to itself alone (`packed_attention`), those of one size in one call.

Letters: N trees, B branches of all trees, G of one, P prompt tokens, R response tokens, T tokens of a row,
K response tokens of all rows, D features.
"""

from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

# Responses of at most so many tokens are padded to one length, longer ones to at most twice their own.
SHORT = 64


@dataclass
class Responses:
    """B responses of like length, as `tree_attention` takes them: rows of their own, padded to R."""

    own: torch.Tensor  # [B, R]: flat index (row * T + column) of each response's tokens, or -1
    source: torch.Tensor  # [B * R]: the same, with any token at padding
    row: torch.Tensor  # [B]: which tree each response is on
    mask: torch.Tensor  # [B, 1, R, P + R]: what a response's token sees of its prompt and of itself

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[N, heads, T, d] -> [B, heads, R, d]: what belongs to their tokens."""
        x = x.transpose(1, 2).flatten(0, 1).index_select(0, self.source)
        return x.unflatten(0, self.own.shape).transpose(1, 2)

    def take_with_prompt(self, x: torch.Tensor, P: int) -> torch.Tensor:
        """[N, heads, T, d] -> [B, heads, P + R, d]: the same after what belongs to their prompts."""
        return torch.cat((x[:, :, :P].index_select(0, self.row), self.take(x)), dim=2)


@dataclass
class Trees:
    """N groups as N padded rows, ready for the model. Built by `build_trees`."""

    input_ids: torch.Tensor  # [N, T]
    position_ids: torch.Tensor  # [3, N, T]
    branch: torch.Tensor  # [N, T]: 0 = prompt, g = g-th response, -1 = padding
    pixel_values: torch.Tensor | None  # [patches of all N, D]
    image_grid_thw: torch.Tensor | None  # [images of all N, 3]
    predictor: torch.Tensor  # [K]: flat index (row * T + column) of the token that predicts
    targets: torch.Tensor  # [K]: the response token predicted there
    lengths: list[int]  # response lengths, over trees and branches in order; they sum to K
    responses: list[Responses]  # all of them, the longest first

    def to(self, device) -> "Trees":
        def move(x):
            # The sizes of pictures stay with the host, which lays out the vision tower's work by them.
            tensors = {k: v for k, v in vars(x).items() if isinstance(v, torch.Tensor)}
            tensors.pop("image_grid_thw", None)
            return replace(x, **{k: v.to(device) for k, v in tensors.items()})

        return replace(move(self), responses=[move(some) for some in self.responses])


def tree_mask(branch: torch.Tensor) -> torch.Tensor:
    """Who attends to whom, [N, T, T]: earlier tokens of the prompt and of one's own response.

    For tests and --explain; training never builds it: see `tree_attention`.

    >>> tree_mask(torch.tensor([[0, 0, 1, 1, 2]]))[0].int()
    tensor([[1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [1, 1, 1, 1, 0],
            [1, 1, 0, 0, 1]], dtype=torch.int32)
    """
    query, key = branch[:, :, None], branch[:, None, :]
    t = torch.arange(branch.shape[1], device=branch.device)
    # Padding has branch -1 and sees the padding before it: a row that sees nothing gives nan.
    return (t[:, None] >= t[None, :]) & ((key == query) | ((key == 0) & (query >= 0)))


def build_trees(groups: list[tuple[object, list[torch.Tensor]]]) -> Trees:
    """Lay each (Prompt, [response tokens [R], ...]) on one row; pad the rows to the longest.

    >>> from types import SimpleNamespace as S
    >>> ids = lambda *a: torch.tensor(a)
    >>> prompt = S(input_ids=ids(7, 8), position_ids=ids(0, 1).expand(3, 2), next_position=2,
    ...            image_grid_thw=torch.zeros(0, 3))
    >>> trees = build_trees([(prompt, [ids(11, 12), ids(21)])])
    >>> trees.input_ids, trees.branch
    (tensor([[ 7,  8, 11, 12, 21]]), tensor([[0, 0, 1, 1, 2]]))
    >>> trees.position_ids[0], trees.predictor, trees.targets, trees.lengths
    (tensor([[0, 1, 2, 3, 2]]), tensor([1, 2, 1]), tensor([11, 12, 21]), [2, 1])
    """
    T = max(len(p.input_ids) + sum(map(len, ys)) for p, ys in groups)
    N = len(groups)
    input_ids = torch.zeros(N, T, dtype=torch.long)
    branch = torch.full((N, T), -1)
    position_ids = torch.zeros(3, N, T, dtype=torch.long)
    predictor, targets, own, row = [], [], [], []
    for n, (prompt, responses) in enumerate(groups):
        P = len(prompt.input_ids)
        input_ids[n, :P] = prompt.input_ids
        branch[n, :P] = 0
        position_ids[:, n, :P] = prompt.position_ids
        start, first = P, prompt.next_position
        for g, y in enumerate(responses, 1):
            R = len(y)
            input_ids[n, start : start + R] = y
            branch[n, start : start + R] = g
            position_ids[:, n, start : start + R] = torch.arange(first, first + R)
            at = torch.arange(start - 1, start + R - 1)
            at[0] = P - 1  # the first token of a response is predicted by the last of the prompt
            predictor.append(n * T + at)
            targets.append(y)
            own.append(n * T + torch.arange(start, start + R))
            row.append(n)
            start += R
    prompt_lengths, lengths = (branch == 0).sum(-1), [len(y) for y in targets]  # [N]; over all branches

    def pad(chosen: list[int]) -> Responses:
        tokens = pad_sequence([own[i] for i in chosen], batch_first=True, padding_value=-1)  # [B, R]
        # Padding points at many tokens: at one, a GPU would add up its gradients one after the other.
        other = torch.arange(tokens.numel()).view_as(tokens) % (N * T)
        source = torch.where(tokens >= 0, tokens, other).flatten()
        rows = torch.tensor([row[i] for i in chosen])
        # All of the prompt, and causally the response itself.
        of_prompt = torch.arange(prompt_lengths.max()) < prompt_lengths[rows, None, None, None]
        B, R = tokens.shape
        of_itself = torch.ones(R, R, dtype=torch.bool).tril()
        mask = torch.cat((of_prompt.expand(B, 1, R, -1), of_itself.expand(B, 1, R, R)), dim=-1)
        return Responses(tokens, source, rows, mask)

    pictures = join_pictures([prompt for prompt, _ in groups])
    responses = [pad(chosen) for chosen in of_like_length(lengths)]
    predictor, targets = torch.cat(predictor), torch.cat(targets)
    return Trees(input_ids, position_ids, branch, *pictures, predictor, targets, lengths, responses)


def of_like_length(lengths: list[int]) -> list[list[int]]:
    """Indices by length, the longest first, cut where half of a row of more than SHORT would be padding.

    >>> of_like_length([100, 300, 10, 200, 140, 90])
    [[1, 3], [4, 0, 5], [2]]
    """
    groups, longest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (2 * lengths[i] < longest and longest > SHORT):
            groups.append([])
            longest = lengths[i]
        groups[-1].append(i)
    return groups


def join_pictures(prompts: list) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(pixel_values, image_grid_thw) of all the prompts' pictures in order; None where there are none."""
    pictures = [(p.pixel_values, p.image_grid_thw) for p in prompts if len(p.image_grid_thw)]
    return tuple(map(torch.cat, zip(*pictures))) or (None, None)


def carried_attention(module, query, key, value, attention_mask, attend=None, **options):
    """transformers' attention interface: whoever calls the layers passes how they attend.

    query [N, h, T, d]; key, value [N, H, T, d], rotated -> [N, T, h, d]. `attend` is `tree_attention` of a
    batch of trees, or comes from `Policy.prefill` or `decoding.decode_step`; without one, attention is plain.
    """
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return attend(module, query, key, value, **options), None


AttentionInterface.register("carried", carried_attention)
AttentionMaskInterface.register("carried", sdpa_mask)


def tree_attention(trees: Trees, module, query, key, value, **options) -> torch.Tensor:
    """Attention on trees without a [T, T] mask: [N, h, T, d] -> [N, T, h, d].

    First the prompts among themselves, causally (no mask, so the fastest kernel serves); then every
    response, as a row of its own, over its prompt and itself (one call for each range of lengths, so that
    one long response does not pad all others). A mask over whole rows would compute what each response
    sees of its siblings and throw it away: at G = 8 it takes two to four times as long.
    """
    N, _, T, _ = query.shape
    P = trees.responses[0].mask.shape[-1] - trees.responses[0].mask.shape[-2]
    # Where a prompt is shorter than P, columns up to P hold response tokens: their output is replaced below.
    causal, _ = sdpa_attention_forward(
        module, query[:, :, :P], key[:, :, :P], value[:, :, :P], None, is_causal=True, **options
    )  # [N, P, h, d]

    out = F.pad(causal, (0, 0, 0, 0, 0, T - P)).flatten(0, 1)  # [N T, h, d]
    # One more row, for index -1: choosing what is no padding would make the host wait for a GPU.
    out = F.pad(out, (0, 0, 0, 0, 0, 1))
    for some in trees.responses:
        q, k, v = some.take(query), some.take_with_prompt(key, P), some.take_with_prompt(value, P)
        attended, _ = sdpa_attention_forward(module, q, k, v, some.mask, is_causal=False, **options)
        out = out.index_put_((some.own,), attended)  # [B, R, h, d]
    return out[:-1].unflatten(0, (N, T))


@dataclass
class Segments:
    """Pieces of one row of T patches, each of which attends to itself alone: windows or pictures."""

    batches: list[tuple[int, int]]  # (B segments, of L patches each), which sum to T
    index: torch.Tensor  # [T]: which patches these are
    back: torch.Tensor  # [T]: where each patch stands among them


def pack_segments(lengths: list[int], device: torch.device) -> Segments:
    """Those of one length are one batch, without mask or padding. Made on the host, once for all layers.

    >>> segments = pack_segments([1, 2, 1], torch.device("cpu"))
    >>> segments.batches, segments.index, segments.back
    ([(2, 1), (1, 2)], tensor([0, 3, 1, 2]), tensor([0, 2, 3, 1]))
    """
    starts: dict[int, list[int]] = {}
    for start, length in zip(accumulate(lengths, initial=0), lengths):
        starts.setdefault(length, []).append(start)
    index = torch.cat([(torch.tensor(s)[:, None] + torch.arange(L)).flatten() for L, s in starts.items()])
    batches = [(len(s), L) for L, s in starts.items()]
    return Segments(batches, *(x.to(device, non_blocking=True) for x in (index, index.argsort())))


class Rearrange(torch.autograd.Function):
    """x[index], whose gradient is gathered too (by `back`): autograd would add it up, row by row."""

    @staticmethod
    def forward(ctx, x, index, back):
        ctx.save_for_backward(back)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


def packed_attention(module, query, key, value, attention_mask, cu_seq_lens_q, **options):
    """Attention within the segments of a row, as transformers' attention interface calls it.

    query, key, value [1, h, T, d] -> [1, T, h, d]. In place of `cu_seq_lens_q`, where segments begin,
    `vision_layout` passes Segments; without it, the tensor is read, and the host waits for a GPU.
    """
    segments = cu_seq_lens_q
    if isinstance(segments, torch.Tensor):
        segments = pack_segments(segments.diff().tolist(), query.device)
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, h, d]
    if len(segments.batches) > 1:
        rows = [Rearrange.apply(x, segments.index, segments.back) for x in rows]
    parts = zip(*(x.split([B * L for B, L in segments.batches]) for x in rows))
    out = []
    for (B, L), part in zip(segments.batches, parts):
        q, k, v = (x.unflatten(0, (B, L)).transpose(1, 2) for x in part)
        out.append(sdpa_attention_forward(module, q, k, v, None, **options)[0].flatten(0, 1))
    if len(out) == 1:
        return out[0][None], None
    return Rearrange.apply(torch.cat(out), segments.back, segments.index)[None], None


AttentionInterface.register("flash_packed", packed_attention)


def pack_pictures(visual) -> None:
    """Let a vision tower attend by `packed_attention`."""
    # A copy: a model that is built from the tower's own config would look for a kernel on the hub.
    config = copy(visual.config)
    # "flash" in its name: only then does a tower hand over the whole row instead of cutting it.
    config._attn_implementation = "flash_packed"
    for block in visual.blocks:
        block.attn.config = config


def vision_layout(visual, grid_thw: torch.Tensor, device: torch.device) -> dict:
    """What a vision tower computes from the sizes of its pictures, as arguments of its forward pass.

    grid_thw  [images, 3], on the host: the tower itself would read it from a GPU in every layer
    """
    config, merge = visual.config, visual.config.spatial_merge_size
    frames = (grid_thw[:, 1] * grid_thw[:, 2]).repeat_interleave(grid_thw[:, 0])
    layout = {
        "position_ids": get_vision_position_ids(grid_thw, merge),
        "cu_seqlens": pack_segments(frames.tolist(), device),
        "max_seqlen": int(frames.max()),
    }
    if hasattr(config, "window_size"):  # Qwen2.5-VL: all but a few layers look at windows
        window_index, ends = get_vision_window_index(grid_thw, merge, config.window_size, config.patch_size)
        layout |= {
            "window_index": window_index,
            "cu_window_seqlens": pack_segments(ends.diff().tolist(), device),
            "max_window_seqlen": int(ends.diff().max()),
        }
    if hasattr(visual, "num_grid_per_side"):  # Qwen3-VL: learnt positions, interpolated
        how = (visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners, merge)
        indices, weights = get_vision_interpolation_indices_and_weights(grid_thw, *how)
        layout |= {"interp_indices": indices, "interp_weights": weights}
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in layout.items()
    }


def plan_micro_batches(
    branches: list[tuple[str, int, int]], ranks: int, budget: int
) -> list[list[list[list[int]]]]:
    """Who trains what: for each rank its micro-batches, each a list of trees of branch indices.

    branches  (question id, prompt length, response length) of each branch
    ranks     how many share the work; each gets about the same number of tokens
    budget    tokens of a micro-batch's rows, padding included. The branches of a question are one tree
              where it allows; a longer group is cut into few trees, and a single branch that is longer
              gets a micro-batch of its own.

    >>> branches = [("a", 10, 4), ("b", 10, 5), ("a", 10, 6), ("c", 10, 40)]
    >>> plan_micro_batches(branches, ranks=2, budget=40)
    [[[[3]]], [[[2, 0], [1]]]]
    """
    by_question: dict[str, list[int]] = {}
    for i, (question, _, _) in enumerate(branches):
        by_question.setdefault(question, []).append(i)
    trees = []  # [tokens of the row, branch indices]
    for members in by_question.values():
        rows = []
        # The longest first, each where it fits first: few rows.
        for i in sorted(members, key=lambda i: -branches[i][2]):
            _, prompt, response = branches[i]
            row = next((row for row in rows if row[0] + response <= budget), None)
            if row is None:
                rows.append(row := [prompt, []])
            row[0] += response
            row[1].append(i)
        trees += rows
    trees.sort(key=lambda tree: -tree[0])
    shares, loads = [[] for _ in range(ranks)], [0] * ranks
    for tree in trees:
        lightest = loads.index(min(loads))
        shares[lightest].append(tree)
        loads[lightest] += tree[0]
    plan = []
    for share in shares:
        micro_batches, width = [], 0
        for length, row in share:  # longest first: the first row of a micro-batch is its width
            if not micro_batches or (len(micro_batches[-1]) + 1) * width > budget:
                micro_batches.append([])
                width = length
            micro_batches[-1].append(row)
        plan.append(micro_batches)
    return plan
