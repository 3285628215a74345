"""What a GPU of a large run must hold and send: the arithmetic of README, checked on real shards.

    python recipes/plan.py                      72B on 4 nodes x 8 GPUs; a minute on a CPU, no GPU

The model is built on the meta device and split by `parallel.shard` itself over a fake process group
of that many ranks, so weights and optimiser state are counted on the shards that a rank would hold.
The rest is arithmetic from the shapes, printed with its formula.
"""

import argparse
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
from model import CHUNK, Policy
from toy import toy_tokenizer

# As published: hidden, layers, heads, key-value heads, intermediate, vocabulary.
SHAPES = {"7b": (3584, 28, 28, 4, 18944, 152064), "72b": (8192, 80, 64, 8, 29568, 152064)}


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
        vision_config={"hidden_size": 1280, "intermediate_size": 3456 if size == "72b" else 3420,
                       "out_hidden_size": hidden},
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return Policy(model, toy_tokenizer(), Qwen2VLImageProcessorPil())


def plan(
    size: str, gpus: int, prompt: int, response: int, rows: int, tree_tokens: int
) -> list[tuple]:
    """(what, bytes or number, formula) of one GPU; `prompt` and `response` in tokens."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SHAPES[size]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    policy = parallel.shard(build(size), torch.device("cpu"))
    total = sum(p.numel() for p in policy.parameters())
    mine = sum(parallel.local(p).numel() for p in policy.parameters())
    layer = sum(p.numel() for p in policy.text_model.layers[0].parameters())
    root = policy.text_model.embed_tokens.weight.numel() + policy.model.lm_head.weight.numel()
    dist.destroy_process_group()
    head = hidden // heads
    kv_token = 2 * 2 * layers * kv_heads * head
    groups = rows // 8
    return [
        ("parameters", total, ""),
        ("fp32 weights, rank 0", 4 * mine, "4 bytes x its shard"),
        ("fp32 gradients", 4 * mine, "4 x its shard"),
        ("Adam moments", 8 * mine, "2 x 4 x its shard"),
        ("embedding and head, gathered", 2 * root, "2 x 2 x V x D, bf16, kept"),
        ("two layers, gathered", 2 * 2 * layer, "2 x bf16: one runs, one is on its way"),
        ("KV cache of a rollout", kv_token * (groups * prompt + rows * response),
         f"{kv_token >> 10} KiB x ({groups} prompts x {prompt} + {rows} rows x {response})"),
        ("saved activations", 2 * layers * tree_tokens * hidden,
         f"2 x layers x {tree_tokens} tokens x D: a layer's input, checkpointed"),
        ("one layer's activations", 2 * tree_tokens * (4 * intermediate + 8 * hidden),
         "2 x tokens x (4 I + 8 D), while it is computed again"),
        ("vocabulary chunk", 3 * 4 * CHUNK * vocabulary, f"3 x 4 x {CHUNK} x V"),
        ("sent and received, a micro-batch", 2 * total * 2 + 4 * total,
         "gathered in bf16 twice, gradients reduced in fp32"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SHAPES), default="72b")
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=1300)
    a = parser.parse_args()
    c = Config(**PRESETS[a.size])
    rows = plan(a.size, a.gpus, a.prompt, c.max_new_tokens, c.rollout_rows, c.micro_batch_tokens)
    print(f"{a.size} on {a.gpus} GPUs\n\n| what | | formula |\n|---|---|---|")
    for name, number, formula in rows:
        shown = f"{number / 1e9:.1f} B" if name == "parameters" else f"{number / 2**30:.1f} GiB"
        print(f"| {name} | {shown} | {formula} |")
    size = {name: number for name, number, _ in rows}
    state = size["fp32 weights, rank 0"] + size["Adam moments"]
    gathered = size["embedding and head, gathered"] + size["two layers, gathered"]
    whole = 2 * size["parameters"] if c.rollout_weights == "whole" else gathered
    update = gathered + size["fp32 gradients"] + size["saved activations"]
    update += size["one layer's activations"] + size["vocabulary chunk"]
    sampling = whole + size["KV cache of a rollout"]
    held = "the whole model in bf16" if c.rollout_weights == "whole" else "what is gathered"
    print(
        f"| **while sampling** | **{(state + sampling) / 2**30:.1f} GiB** | weights, moments, {held}, KV cache |"
    )
    print(
        f"| **while updating** | **{(state + update) / 2**30:.1f} GiB** | weights, moments, what is gathered, gradients, activations |"
    )


if __name__ == "__main__":
    main()
