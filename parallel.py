"""One policy on many ranks: processes, sharding (FSDP2), and whole weights for sampling.

torchrun starts one process per GPU (gloo on CPUs). `shard` splits every parameter over them; a layer
is gathered just before it runs and freed afterwards. Sampling would gather all layers for every token, so
for a rollout `whole_weights` gathers everything once, and decoding then uses no collective at all:
ranks may decode different lengths without waiting for each other.

Collectives must be called by all ranks alike, or the run hangs. So nothing here decides by what
one rank alone knows: samples are exchanged (`gather`), and every rank then computes the same plan.
"""

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from data import UserError
from model import Policy


def start() -> torch.device:
    """Join the other processes of torchrun, if any, and return this one's device."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend)
    elif cuda:
        # One GPU shards over itself: fp32 weights with bf16 compute come by the same path.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End the process. Beside other ranks without C++'s clean-up at exit: gloo's threads outlive their group,
    and one that is met there ends the process by std::terminate, after all work was done."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_broken(error: RuntimeError) -> bool:
    """Whether an error says that another rank has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


PULSE = 2.0  # seconds between two signs of life
SILENT = 90  # pulses missed, three minutes, and a rank is lost; what holds Python may take one


@contextlib.contextmanager
def watch(advice: Callable[[], str]):
    """Inside, a thread ends this process where torchrun is gone, or another rank: a collective with a rank
    that is stopped, or on a lost node, would wait for half an hour and then not say for whom.

    advice  what to do then; said by the first rank that is left
    """
    if world() == 1:
        yield
        return
    over, parent = threading.Event(), os.getppid()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    others = [r for r in range(world()) if r != rank()]

    def pulse() -> None:
        store, me, missed = dist.TCPStore(*address, is_master=False), f"alive {rank()}", Counter()
        seen: dict[int, int] = {}
        while not over.wait(PULSE):
            if os.getppid() != parent:
                os._exit(1)
            try:
                store.add(me, 1)
                now = {r: store.add(f"alive {r}", 0) for r in others}
            except RuntimeError:  # its host is gone, or done: then each misses it
                now = seen
            for r in others:
                missed[r] = missed[r] + 1 if seen.get(r) == now.get(r) else 0
            seen = now
            lost = [r for r in others if missed[r] >= SILENT]
            if lost and rank() == min({*others, rank()} - {*lost}):
                names = f"rank {', '.join(map(str, lost))} of {world()}"
                seconds = round(PULSE * SILENT)
                print(f"error: {names} did not answer for {seconds} s; {advice()}", file=sys.stderr)
            if lost:
                sys.stderr.flush()
                os._exit(1)

    thread = threading.Thread(target=pulse, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def rank() -> int:
    # Before the processes have met, torchrun's word: so that one of them speaks of a wrong flag.
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list) -> list:
    """All ranks' lists as one, in rank order, on every rank."""
    if world() == 1:
        return items
    lists = [None] * world()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def total(counts: Counter) -> Counter:
    """All ranks' counts added up, on every rank."""
    added = Counter()
    for part in gather([counts]):
        added.update(part)  # Counter's own + forgets what is not positive
    return added


def agree(action):
    """Do it on every rank; where it fails on one, fail on all, with the first one's message."""
    try:
        result, problem = action(), None
    except UserError as error:
        result, problem = None, str(error)
    problems = [p for p in gather([problem]) if p]
    if problems:
        raise UserError(problems[0])
    return result


def from_first(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if world() > 1:
        dist.barrier()


# ---------------------------------------------------------------------------- sharding


def shard(
    policy: Policy, device: torch.device, over: str = "world", offload: bool = False
) -> Policy:
    """Move to the device; where there is a process group, split over it. Compute is bf16 on GPUs.

    over     "world" splits over all ranks; "node" splits within a node and keeps a copy on each
             (hybrid sharding: gathers stay on the fast links, gradients are averaged across nodes)
    offload  keep weights, gradients and optimiser state in the host's memory between uses

    Units: the vision tower (one gather beats one a block for a small tower), each decoder layer, and the
    rest: embedding, last norm and head, which the first and the last operation need. A policy on the
    meta device gets memory for its own part only, to be filled by `checkpoint.load_weights`.
    """
    policy.compute_device = device
    if not dist.is_initialized():
        return policy.to(device)
    half = torch.bfloat16 if device.type == "cuda" else None
    options = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32 if half else None
        ),
        "mesh": mesh_over(device.type, over),
    }
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    fully_shard(policy.model.model.visual, **options)
    for layer in policy.text_model.layers:
        fully_shard(layer, **options)
    # The root stays whole after its forward: its head is used in chunks, again in the backward pass.
    fully_shard(policy, reshard_after_forward=False, **options)
    register_fsdp_forward_method(policy, "prefill")
    if any(p.is_meta for p in policy.parameters()):
        policy.to_empty(device="cpu" if offload else device)
        policy.model.tie_weights()  # to_empty makes two tensors of one
        for module in policy.modules():
            if module._non_persistent_buffers_set:  # rotary frequencies: in no checkpoint
                policy.model._init_weights(module)
                module.to(device)
    return policy


def mesh_over(device_type: str, over: str):
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if over == "node" and world() > local_ranks:
        shape, names = (world() // local_ranks, local_ranks), ("copies", "shards")
        return dist.init_device_mesh(device_type, shape, mesh_dim_names=names)
    return dist.init_device_mesh(device_type, (world(),), mesh_dim_names=("shards",))


def shard_place(tensor: torch.Tensor) -> tuple[int, int]:
    """(which part of a sharded tensor this rank holds, how many parts there are)."""
    if not isinstance(tensor, DTensor):
        return 0, 1
    mesh = tensor.device_mesh["shards"]
    return mesh.get_local_rank(), mesh.size()


def shard_place_of(policy: Policy) -> tuple[int, int, int]:
    """(part, parts, which copy of it) of this rank's share of a policy."""
    parameter = next(policy.parameters())
    index, count = shard_place(parameter)
    return index, count, rank() // count


@contextlib.contextmanager
def whole_weights(policy: Policy, by_layer: bool = False):
    """Inside, forward passes need no gradient and weights are there to be used directly.

    Every rank holds every parameter, gathered once: nothing that follows uses a collective. With
    `by_layer`, for a model that does not fit on one GPU, only the embedding and the head stay, and layers
    are gathered as they run (`rollout.layers_in_turn`): then all ranks must take equally many steps.
    """
    by_layer = by_layer and world() > 1  # a single rank holds every layer anyway
    units = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    gathered = [u for u in units if u is policy] if by_layer else units
    for unit in gathered:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    policy.lockstep = by_layer
    try:
        yield
    finally:
        policy.lockstep = False
        for unit in gathered:
            unit.set_reshard_after_forward(unit is not policy, recurse=False)
            unit.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
