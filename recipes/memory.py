"""Which model trains on which card: peak memory of one GPU, counted on the shards of the real code.

    python recipes/memory.py     the training lines of recipes/*.sh, each on its card; then
                                 {3B, 7B, 32B, 72B} x {1, 8, 32 GPUs} x {all, frozen tower, LoRA}

The model is built without memory and split by `parallel.shard` itself over a fake process group, so weights,
gradients and Adam's moments are counted. The rest is arithmetic from the shapes, and an upper bound:

    cache       as many prompts as `Sampler.has_room` lets in, while all rows speak to their limit at once;
                usually a quarter of that is enough (`decoding.Cache`)
    prefill     `PREFILL_TOKENS` at once, all of them pictures
    a step      of decoding: its scores and logits, twice, as a CUDA graph keeps memory of its own
    updating    the worst of four moments of a micro-batch as long as it may be, with gradient checkpointing

Two things are assumed: a prompt is one picture of the most visual tokens and 256 tokens of text, and half of a
micro-batch is pictures. What CUDA, NCCL and fragmentation take is not in it: leave a tenth of the card free.
"""

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import plan
from launches import FOLDER, training

import lora
import parallel
from config import PRESETS, Config
from decoding import Cache
from grpo import CHUNK
from model import Policy
from rollout import PREFILL_TOKENS

CARDS = (24, 48, 80, 141)  # GB
TEXT = 256  # tokens of a prompt beside its picture
KINDS = {"all weights": {}, "frozen tower": {"train_vision": False}, "LoRA, rank 16": {"lora_rank": 16}}


def peaks(policy: Policy, gpus: int, c: Config) -> dict[str, float]:
    """Bytes of one GPU at the worst moment of each phase; the policy is on the meta device."""
    policy.model.model.visual.requires_grad_(c.train_vision)
    if c.lora_rank:
        lora.adapt(policy, c.lora_rank, c.lora_alpha)
    gathered, update = to_sample(policy, c.tensor), updating(policy, c)
    policy.to_empty = lambda **_: None  # its shapes are all that is counted
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    parallel.shard(policy, torch.device("cpu"), precision="bf16")
    dist.destroy_process_group()
    state, gradients = (0, 0) if c.offload else held(policy)
    heldout = 128 if c.heldout is None else c.heldout
    return {
        "sampling": state + gathered + sampling(policy, c, c.group_size, c.rollout_rows),
        "measuring": state + gathered + sampling(policy, c, 1, math.ceil(heldout * c.tensor / gpus)),
        "updating": state + gradients + max(update.values()),
    }


def held(policy: Policy) -> tuple[int, int]:
    """Bytes that this rank keeps of a sharded policy: (weights and Adam's moments, gradients)."""
    mine = [(parallel.local(p).nbytes, p.requires_grad) for p in policy.parameters()]
    gradients = sum(size for size, trains in mine if trains)
    return sum(size for size, _ in mine) + 2 * gradients, gradients


def count(parameters) -> tuple[int, int]:
    """(of these parameters, of those among them that train)."""
    parameters = list(parameters)
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def root_of(policy: Policy) -> set:
    return {policy.head_weight(), policy.text_model.embed_tokens.weight}


def to_sample(policy: Policy, parts: int) -> int:
    """Bytes of weights gathered to sample with: layers whole or in slices, the rest whole."""
    whole = count(root_of(policy))[0] + count(policy.model.model.visual.parameters())[0]
    return 2 * (plan.slice_of_layers(policy, parts) + whole)


def most_pages(policy: Policy, c: Config, G: int, rows: int, prompt: int) -> tuple[Cache, int, int]:
    """An empty cache, and the most pages that prompts of so many tokens and the responses of `rows` may get."""
    seats, attention = max(1, c.rollout_rows // G) * G, policy.text_model.layers[0].self_attn
    rows = min(rows, seats)
    H = max(1, policy.text_model.config.num_key_value_heads // c.tensor)
    like = torch.empty(1, H, prompt, attention.head_dim, dtype=torch.bfloat16, device="meta")
    cache = Cache([like] * len(policy.text_model.layers), G, seats, c.max_new_tokens)
    prompts, responses = cache.prompts, cache.responses

    def grown(pages, used: float) -> int:  # `Pages.take`
        return 1 + math.ceil(max(used * 17 / 16, min(used * 5 / 4, pages.enough)))

    # `Sampler.has_room`: what responses do not need yet may hold prompts, of which no row has two.
    room = prompts.enough / G + responses.enough * responses.size / prompts.size
    stored = min(prompts.enough // seats * rows, room)
    return cache, grown(prompts, stored), grown(responses, rows * cache.most_pages)


def sampling(policy: Policy, c: Config, G: int, rows: int) -> int:
    """Bytes beside weights and moments: keys and values, and the larger of a prefill and a decoding step."""
    text = policy.text_model.config
    cache, *pages = most_pages(policy, c, G, rows, c.max_pixels // 28**2 + TEXT)
    stores = cache.prompts, cache.responses
    sizes = [sum(x.nbytes for x in (*store.k, *store.v)) for store in stores]  # of a page
    prefill = sizes[1] // cache.responses.size * PREFILL_TOKENS  # until they are in pages
    prefill += max(block(text, PREFILL_TOKENS, c.tensor), tower_block(policy, PREFILL_TOKENS))
    parts = [pages[0] * G, pages[1]]  # each page, for each row that reads it
    scores = sum(count * store.size for count, store in zip(parts, stores))
    width = policy.text_model.layers[0].self_attn.head_dim
    step = 10 * text.num_attention_heads // c.tensor * (scores + width * sum(parts))
    step += 16 * c.rollout_rows * text.vocab_size
    return sum(map(math.prod, zip(pages, sizes))) + max(prefill, step) + step


def block(config, tokens: int, parts: int = 1, trains: bool = False) -> int:
    """Bytes of the activations of one layer of I columns and D features; more in its backward pass."""
    columns, features = (6, 24) if trains else (3, 10)
    return 2 * tokens * (columns * config.intermediate_size // parts + features * config.hidden_size)


def tower_block(policy: Policy, tokens: int, trains: bool = False) -> int:
    """The same of the vision tower, of pictures of so many tokens; with their pixels, in fp32 and bf16."""
    config = policy.model.model.visual.config
    patches = tokens * config.spatial_merge_size**2
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return block(config, patches, trains=trains) + 6 * patches * pixels


def updating(policy: Policy, c: Config) -> dict[str, int]:
    """Bytes beside weights, moments and reduced gradients, while the head, layers, tower or root are run back."""
    text, tower, T = policy.text_model.config, policy.model.model.visual, c.micro_batch_tokens
    layer, layer_trains = count(policy.text_model.layers[0].parameters())
    root, root_trains = count(root_of(policy))
    seen, seen_trains = count(tower.parameters())
    _, head = count([policy.head_weight()])
    patches = T // 2 * tower.config.spatial_merge_size**2
    pictures = 2 * patches * tower.config.hidden_size * tower.config.depth * (seen_trains > 0)
    both = pictures + 2 * T * text.hidden_size * text.num_hidden_layers  # inputs of layers
    # A weight takes 2 bytes, and its gradient 2 more and then 4, in which it is reduced.
    moments = {
        "head": both + 6 * head + 3 * 4 * CHUNK * text.vocab_size,
        "layers": both + 2 * head + 2 * 2 * layer + 6 * layer_trains + block(text, T, trains=True),
        "tower": pictures
        + 2 * (head + seen)
        + 6 * seen_trains
        + tower_block(policy, T // 2, seen_trains > 0),
        "root": 6 * root_trains,
    }
    return {moment: 2 * root + size for moment, size in moments.items()}


# ---------------------------------------------------------------------------- the tables


def in_gb(found: dict[str, float]) -> list[str]:
    return [f"{n / 1e9:.1f}" for n in found.values()]


def print_row(*cells) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    phases = "sampling, GB | measuring, GB | updating, GB"
    print(f"| recipe | model | GPUs | {phases} | card, GB |\n|---|---|---|---|---|---|---|")
    for path in sorted(FOLDER.glob("*.sh")):
        stages = [] if "toy" in path.stem else training(path.stem)
        rows = [
            (size, gpus, *in_gb(peaks(plan.build(size), gpus, c)), card) for size, gpus, card, c in stages
        ]
        for row in dict.fromkeys(rows):  # stages that need the same are shown once
            print_row(path.stem, *row)
    print(f"\n| model | trained | GPUs | {phases} | smallest card |\n|---|---|---|---|---|---|---|")
    for size in plan.SHAPES:
        for kind, changes in KINDS.items():
            for gpus in (1, 8, 32):
                changes = changes | {"micro_batch_tokens": 8192, "rollout_rows": 32, "max_new_tokens": 1024}
                c = Config(**PRESETS["7b"] | changes | {"tensor": min(gpus, 8)})
                found = peaks(plan.build(size), gpus, c)
                fits = [card for card in CARDS if max(found.values()) < 0.9e9 * card]
                print_row(size, kind, gpus, *in_gb(found), fits[0] if fits else "none")


if __name__ == "__main__":
    main()
