"""One policy on many ranks: processes, sharding (FSDP2), and whole weights for sampling.

torchrun starts one process a GPU (gloo on CPUs). `shard` splits every parameter over them; a layer is
gathered just before it runs and let go after. Sampling would gather all layers once a token, so for a
rollout `whole_weights` gathers everything once, and decoding then uses no collective at all: ranks may
decode different lengths without waiting for each other.

Collectives must be called by all ranks alike, or the run hangs. So nothing here decides by what
one rank alone knows: samples are exchanged (`gather`), and every rank then computes the same plan.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from model import Policy


def start() -> torch.device:
    """Join the other processes of torchrun, if any, and return this one's device."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(backend)
    elif cuda:
        # One GPU shards over itself: fp32 weights with bf16 compute come by the same path.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list) -> list:
    """All ranks' lists as one, in rank order, on every rank."""
    if world() == 1:
        return items
    lists = [None] * world()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def from_first(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def add_up(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(numbers)
    return numbers


# ---------------------------------------------------------------------------- sharding


def shard(policy: Policy, device: torch.device) -> Policy:
    """Move to the device; where there is a process group, split over it. Compute is bf16 on GPUs.

    Units: the vision tower (one gather beats one a block for a small tower), each decoder layer, and the
    rest: embedding, last norm and head, which the first and the last operation need.
    """
    if not dist.is_initialized():
        return policy.to(device)
    half = torch.bfloat16 if device.type == "cuda" else None
    precision = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    options = {"mp_policy": precision, "mesh": dist.init_device_mesh(device.type, (world(),))}
    policy.to(device)
    fully_shard(policy.model.model.visual, **options)
    for layer in policy.text_model.layers:
        fully_shard(layer, **options)
    # The root stays whole after its forward: its head is used in chunks, again in the backward pass.
    fully_shard(policy, reshard_after_forward=False, **options)
    register_fsdp_forward_method(policy, "prefill")
    return policy


@contextlib.contextmanager
def whole_weights(policy: Policy):
    """Inside, every rank holds every parameter, gathered once; forward passes use no collective."""
    units = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not policy, recurse=False)
            unit.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
