"""What a GPU of a large run must hold and send: the arithmetic of docs/memory.md, checked on real shards.

    python recipes/plan.py                      72B on 4 nodes x 8 GPUs; a minute on a CPU, no GPU
    python recipes/plan.py --gpus 8 --link 3e11

The model is built on the meta device and split by `parallel.shard` itself over a fake process group
of that many ranks, so weights and optimiser state are counted on the shards that a rank would hold,
and the slices that it samples with (`--tensor`) are those of `parallel.cut`. The rest is arithmetic
from the shapes, printed with its formula.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import parallel
from config import PRESETS, Config
from grpo import CHUNK
from model import Policy
from toy import toy_tokenizer

# As published: hidden, layers, heads, key-value heads, intermediate, vocabulary.
SHAPES = {
    "3b": (2048, 36, 16, 2, 11008, 151936), "7b": (3584, 28, 28, 4, 18944, 152064),
    "32b": (5120, 64, 40, 8, 27648, 152064), "72b": (8192, 80, 64, 8, 29568, 152064),
}  # fmt: skip


def build(size: str) -> Policy:
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[size]
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": intermediate,
            "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24],
                                "rope_theta": 1000000.0},
        },
        vision_config={"hidden_size": 1280, "intermediate_size": 3456 if size in ("32b", "72b") else 3420,
                       "out_hidden_size": hidden},
        tie_word_embeddings=size == "3b",
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return Policy(model, toy_tokenizer(), Qwen2VLImageProcessorPil())


def slice_of_layers(policy: Policy, parts: int) -> int:
    """Numbers of the decoder layers that a rank holds of `parts` that sample together."""
    kv_heads = policy.text_model.config.num_key_value_heads
    return sum(
        parallel.cut(name, parameter, 0, parts, kv_heads).numel()
        for layer in policy.text_model.layers
        for name, parameter in layer.named_parameters()
    )


def training(size: str, gpus: int, tree_tokens: int) -> list[tuple]:
    """(what, bytes or number, formula) of one GPU."""
    hidden, layers, _, _, intermediate, vocabulary = SHAPES[size]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    policy = parallel.shard(build(size), torch.device("cpu"))
    total = sum(p.numel() for p in policy.parameters())
    mine = sum(parallel.local(p).numel() for p in policy.parameters())
    layer = sum(p.numel() for p in policy.text_model.layers[0].parameters())
    dist.destroy_process_group()
    return [
        ("parameters", total, ""),
        ("fp32 weights, rank 0", 4 * mine, "4 bytes x its shard"),
        ("fp32 gradients", 4 * mine, "4 x its shard"),
        ("Adam moments", 8 * mine, "2 x 4 x its shard"),
        ("embedding and head, gathered", 4 * vocabulary * hidden, "2 x 2 x V x D, bf16, kept"),
        ("two layers, gathered", 2 * 2 * layer, "2 x bf16: one runs, one is on its way"),
        ("saved activations", 2 * layers * tree_tokens * hidden,
         f"2 x layers x {tree_tokens} tokens x D: a layer's input, checkpointed"),
        ("one layer's activations", 2 * tree_tokens * (4 * intermediate + 8 * hidden),
         "2 x tokens x (4 I + 8 D), while it is computed again"),
        ("vocabulary chunk", 3 * 4 * CHUNK * vocabulary, f"3 x 4 x {CHUNK} x V"),
        ("sent and received, a micro-batch", 2 * total * 2 + 4 * total,
         "gathered in bf16 twice, gradients reduced in fp32"),
    ]  # fmt: skip


def sampling(a, c: Config) -> tuple[list[tuple], list[tuple]]:
    """(what, bytes, formula) of one GPU, and (what, seconds, formula); `a` are this script's flags."""
    hidden, layers, heads, kv_heads, _, vocabulary = SHAPES[a.size]
    parts, rows, G = a.tensor, c.rollout_rows, c.group_size
    policy = build(a.size)
    everything = 2 * sum(p.numel() for p in policy.parameters())
    tower = 2 * sum(p.numel() for p in policy.model.model.visual.parameters())
    mine, root = 2 * slice_of_layers(policy, parts), 4 * vocabulary * hidden
    token = 2 * 2 * layers * max(1, kv_heads // parts) * hidden // heads  # keys and values
    prompts = rows // G
    memory = [
        ("layers, sliced" if parts > 1 else "layers, whole", mine, f"2 x what 1 rank of {parts} holds"),
        ("embedding, head and vision tower", root + tower, "2 x, whole on every rank"),
        ("KV cache of a rollout", token * (prompts * a.prompt + rows * c.max_new_tokens),
         f"{token >> 10} KiB x ({prompts} prompts x {a.prompt} + {rows} rows x {c.max_new_tokens})"),
    ]  # fmt: skip
    read = mine + root // 2 + token * (prompts * a.prompt + rows * a.response)
    sums = 2 * layers * rows * hidden * 2 if parts > 1 else 0
    steps = math.ceil(c.episode_queries * G / (a.gpus // parts) * a.response / rows)
    compute = mine * rows  # 2 operations per weight and row, of weights of 2 bytes
    step = max(read / a.hbm, compute / a.flops)
    step += sums * 2 * (parts - 1) / parts / a.link + (sums > 0) * 2 * layers * a.latency
    of_old = math.ceil(c.episode_queries * G / a.gpus * a.response / 48)
    link = a.link if a.gpus <= 8 else a.network
    time = [
        ("read per step, GB", read / 1e9, "the slices, the head, the cache: for one token of every row"),
        ("added up per step, GB", sums / 1e9, "2 x layers x rows x D x 2 bytes"),
        ("one step, ms", 1e3 * step, f"max(read / {a.hbm:.3g}, {compute / 1e12:.1f}e12 operations / {a.flops:.3g}) + 2 x {parts - 1}/{parts} x added up / {a.link:.3g} + 2 x layers x {a.latency:.0e} s"),
        ("an episode, minutes", steps * step / 60,
         f"{steps} steps: {c.episode_queries} x {G} responses of {a.response} tokens, {rows} rows per {parts} GPUs"),
        ("the same, a layer gathered at a time", of_old * everything / link / 60,
         f"{of_old} steps of 48 rows per GPU, each moving {everything / 1e9:.0f} GB / {link:.3g}"),
    ]  # fmt: skip
    return memory, time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SHAPES), default="72b")
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--tensor", type=int, help="GPUs that sample together; default: the preset's")
    parser.add_argument("--prompt", type=int, default=1300, help="tokens")
    parser.add_argument("--response", type=int, default=500, help="tokens, on average")
    parser.add_argument("--hbm", type=float, default=3.35e12, help="bytes/s of a GPU's memory")
    parser.add_argument("--flops", type=float, default=7e14, help="operations/s of a GPU in bf16")
    parser.add_argument("--link", type=float, default=450e9, help="bytes/s between GPUs of a node")
    parser.add_argument("--network", type=float, default=50e9, help="bytes/s per GPU between nodes")
    parser.add_argument("--latency", type=float, default=2e-5, help="seconds of one sum over ranks")
    a = parser.parse_args()
    c = Config(**PRESETS["72b" if a.size in ("32b", "72b") else "7b"])
    a.tensor = a.tensor or min(c.tensor, a.gpus)
    rows = training(a.size, a.gpus, c.micro_batch_tokens)
    memory, time = sampling(a, c)
    size = {name: number for name, number, _ in rows}
    print(f"{a.size} on {a.gpus} GPUs, {a.tensor} sampling together\n\n| what | | formula |\n|---|---|---|")
    for name, number, formula in rows + memory:
        shown = f"{number / 1e9:.1f} B" if name == "parameters" else f"{number / 2**30:.1f} GiB"
        print(f"| {name} | {shown} | {formula} |")
    state = size["fp32 weights, rank 0"] + size["Adam moments"]
    parts = ("embedding and head, gathered", "two layers, gathered", "fp32 gradients",
             "saved activations", "one layer's activations", "vocabulary chunk")  # fmt: skip
    update, rollout = sum(size[name] for name in parts), sum(number for _, number, _ in memory)
    for when, more, of in (("sampling", rollout, "layers, embedding, head, tower, KV cache"),
                           ("updating", update, "what is gathered, gradients, activations")):  # fmt: skip
        print(f"| **while {when}** | **{(state + more) / 2**30:.1f} GiB** | weights, moments, {of} |")
    print("\n| sampling | | formula |\n|---|---|---|")
    for name, number, formula in time:
        print(f"| {name} | {number:.1f} | {formula} |")


if __name__ == "__main__":
    main()
