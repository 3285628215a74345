"""Which model trains on which card: peak memory of one GPU, counted on the shards of the real code.

    python recipes/memory.py        {3B, 7B, 32B, 72B} x {1, 8, 32 GPUs} x {all, frozen tower, LoRA}

The model is built without memory and split by `parallel.shard` itself over a fake process group, so weights,
gradients and Adam's moments are counted, not computed. Activations, gathered layers and caches are
arithmetic from the shapes, and an upper bound: rows as long as they may be, half of all tokens pictures.
What CUDA, NCCL and fragmentation take is not in it: leave a tenth of the card free.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import plan

import lora
import parallel
from config import Config
from grpo import CHUNK

CARDS = (24, 48, 80, 141)  # GB
PROMPT = 1300  # tokens, most of them a picture's
KINDS = {"all weights": {}, "frozen tower": {"train_vision": False}, "LoRA, rank 16": {"lora_rank": 16}}


def peaks(size: str, gpus: int, c: Config) -> dict[str, float]:
    """Bytes of one GPU at the worst moment of sampling and of updating."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = plan.SHAPES[size]
    policy = plan.build(size)
    policy.model.model.visual.requires_grad_(c.train_vision)
    if c.lora_rank:
        lora.adapt(policy, c.lora_rank, c.lora_alpha)
    layer = sum(p.numel() for p in policy.text_model.layers[0].parameters())
    root = sum(p.numel() for p in {policy.head_weight(), policy.text_model.embed_tokens.weight})
    tower = sum(p.numel() for p in policy.model.model.visual.parameters())
    slices = plan.slice_of_layers(policy, c.tensor)
    policy.to_empty = lambda **_: None  # its shapes are all that is counted
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    parallel.shard(policy, torch.device("cpu"), precision="bf16")
    dist.destroy_process_group()
    mine = [(parallel.local(p).numel(), p.requires_grad) for p in policy.parameters()]
    trained = sum(n for n, trains in mine if trains)
    state = 12 * trained + 2 * sum(n for n, trains in mine if not trains)

    tokens = c.micro_batch_tokens
    patches = 4 * tokens // 2
    activations = 2 * layers * tokens * hidden
    one_layer = 2 * tokens * (4 * intermediate + 8 * hidden)
    if c.train_vision and not c.lora_rank:
        activations += 2 * 32 * patches * 1280  # the tower's blocks keep their inputs
    activations += 2 * patches * (4 * 3456 + 8 * 1280) + 3 * 4 * CHUNK * vocabulary
    gathered = 2 * root + 2 * 2 * layer
    gradients = 4 * trained
    if not c.lora_rank:  # of the head, at first in fp32 as well; of a layer, before they are reduced
        head = vocabulary * hidden
        one_layer = max(4 * head, one_layer + 6 * layer)
        gradients += 2 * head
    token = 2 * 2 * layers * max(1, kv_heads // c.tensor) * hidden // heads
    cache = token * c.rollout_rows * (PROMPT + c.max_new_tokens)  # measuring: a prompt per row
    return {
        "sampling": state + 2 * (slices + root + tower) + cache + 16 * c.rollout_rows * vocabulary,
        "updating": state + gathered + gradients + activations + one_layer,
    }


def main() -> None:
    print(
        "| model | trained | GPUs | sampling, GB | updating, GB | smallest card |\n|---|---|---|---|---|---|"
    )
    for size in plan.SHAPES:
        for kind, changes in KINDS.items():
            for gpus in (1, 8, 32):
                c = Config(
                    micro_batch_tokens=8192, rollout_rows=32, max_new_tokens=1024,
                    tensor=min(gpus, 8), **changes,
                )  # fmt: skip
                found = peaks(size, gpus, c)
                fits = [card for card in CARDS if max(found.values()) < 0.9e9 * card]
                numbers = " | ".join(f"{n / 1e9:.1f}" for n in found.values())
                print(f"| {size} | {kind} | {gpus} | {numbers} | {fits[0] if fits else 'none'} |", flush=True)


if __name__ == "__main__":
    main()
