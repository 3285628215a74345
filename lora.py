"""Low-rank adapters (LoRA, arXiv 2106.09685): train half a percent as many numbers as there are weights.

A weight matrix W [out, in] that is fine-tuned moves by some dW, and dW turns out to need few
directions. So W is frozen and its movement is written as a product of two thin matrices:

    y = W x + (alpha / r) B A x          A [r, in],  B [out, r],  r << in, out

Gradients and Adam's moments exist for A and B alone: for a 7B model at r = 16, 40 million numbers
instead of 8 billion, and W itself can stay in bf16, since no small update is ever added to it.

**Where.** On every projection of the decoder: q, k, v and o of attention, gate, up and down of the MLP.
The vision tower, embeddings, norms, the head and the experts of a mixture are frozen.

**Start.** B = 0, so that the first rollout is the base policy's; A is random, since with both at 0
neither would ever get a gradient: dL/dA = B^T (...) and dL/dB = (...) A^T.

**Why alpha / r.** Adam moves every entry of B by about the learning rate. B A x is a sum over r
directions, all pushed to lower the same loss, so it grows like r. Divided by r, one learning rate serves
every rank; it should be ten times that of full training, or more.

**Merging.** Sampling and training compute the equation as it stands (adding a small dW to a W in bf16
would round most of it away). Only a checkpoint's copy for other tools holds W + (alpha / r) B A;
`adapter/`, a folder of its own, holds the adapter alone in PEFT's layout (transformers adds one that it
finds beside a model).

The paper trains all weights; this is for GPUs that cannot hold the optimiser's state.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import parallel
from model import Policy

NAMES = ("lora_A", "lora_B")


def adapt(policy: Policy, rank: int, alpha: float) -> None:
    """Freeze every weight and put an adapter, in fp32, on each projection of the decoder; before sharding,
    so that A and B are split like all weights. `initialise` gives them values."""
    policy.requires_grad_(False)
    for name, module in policy.text_model.layers.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            new = {"device": module.weight.device, "dtype": torch.float32}
            module.lora_A = nn.Parameter(torch.empty(rank, module.in_features, **new))
            module.lora_B = nn.Parameter(torch.empty(module.out_features, rank, **new))
            module.lora_scale = alpha / rank
            # A hook, and not a module in the projection's place: weights keep the names they have in
            # checkpoints, and whatever calls the projection gets the adapted one.
            module.register_forward_hook(add_update)


def add_update(projection: nn.Linear, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """W x -> W x + (alpha / r) B A x. x [..., in], output [..., out]"""
    down = F.linear(inputs[0], projection.lora_A)  # [..., r]
    return output + projection.lora_scale * F.linear(down, projection.lora_B)


def adapted(policy: Policy) -> dict[str, nn.Linear]:
    """The projections that have an adapter, by their names in the model."""
    return {n: m for n, m in policy.model.named_modules() if hasattr(m, "lora_A")}


def initialise(policy: Policy, seed: int) -> None:
    """A uniform in +-1 / sqrt(in), B = 0: the same numbers however many ranks hold them."""
    generator = torch.Generator().manual_seed(seed)
    for module in adapted(policy).values():
        A = 2 * torch.rand(module.lora_A.shape, generator=generator) - 1
        start, stop = parallel.rows_of(module.lora_A)
        with torch.no_grad():
            parallel.local(module.lora_A).copy_(A[start:stop] / module.in_features**0.5)
            parallel.local(module.lora_B).zero_()


def merged(projection: nn.Linear) -> torch.Tensor:
    """W + (alpha / r) B A [out, in], added up in fp32. Every rank must ask."""
    parts = (projection.lora_A, projection.lora_B, projection.weight)
    A, B, W = (parallel.whole(x.detach()).float() for x in parts)
    return W + projection.lora_scale * (B @ A)


def save_adapter(policy: Policy, base: str, directory: Path) -> None:
    """The adapters, if there are any, as PEFT's `from_pretrained` loads them onto `base`. All ranks must ask;
    rank 0 writes."""
    modules, weights = adapted(policy), {}
    for name, module in modules.items():
        for part in NAMES:
            whole = parallel.whole(getattr(module, part).detach()).cpu().contiguous()
            weights[f"base_model.model.{name}.{part}.weight"] = whole
    if not modules or parallel.rank() > 0:
        return
    rank = module.lora_A.shape[0]
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "task_type": None, "bias": "none"}
    config |= {"r": rank, "lora_alpha": rank * module.lora_scale, "lora_dropout": 0.0}
    config["target_modules"] = sorted(modules)  # whole names: the vision tower has the same short ones
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, directory / "adapter_model.safetensors", {"format": "pt"})
