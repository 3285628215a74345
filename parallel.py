"""One policy on many ranks: processes, sharding (FSDP2), and weights for sampling.

torchrun starts one process per GPU (gloo on CPUs). `shard` splits every parameter over them; a layer
is gathered just before it runs and freed after. Sampling would gather all layers once per token, so
for a rollout `weights_to_sample` gathers each once. A model that fits is kept whole, and decoding then
uses no collective: ranks may decode different lengths without waiting for each other. If it does not
fit, `--tensor N` ranks of a node keep a *slice* of every layer each:

    attention  o_proj(mix(x)) = sum over ranks of  O[:, mine] mix of my heads
    MLP        down(act(gate x) * up x) = sum over ranks of  down[:, mine] (act(gate[mine] x) * up[mine] x)

so heads and MLP columns never leave their rank, and a token costs two sums over the ranks per layer
(Megatron-LM, arXiv 1909.08053) instead of moving all weights. These ranks sample the same responses.

All ranks must call the same collectives, or the run hangs: samples are exchanged (`gather`), every rank
computes the same plan from them, and what one rank alone can find wrong is shared (`agree`).
"""

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import DeviceMesh, fsdp
from torch.distributed.tensor import DTensor

from data import UserError
from model import Policy

# One rank may be busy while all others wait: bringing up the toy's base, writing a checkpoint.
PATIENCE = timedelta(hours=3)
PULSE = 2.0  # seconds between two signs of life
SILENT = 90  # pulses missed, three minutes, and a rank is lost; what holds Python may take one
GO_ON = "go on with --resume and the same flags as before"  # which begins anew where there is no checkpoint

ended = threading.Event()  # set where this process leaves the others


def start(precision: str = "auto") -> torch.device:
    """Join the other processes of torchrun, if any, and return this one's device."""
    ended.clear()
    device, backend = own_device(), "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        end_with_parent()
        dist.init_process_group(backend, timeout=PATIENCE)
        threading.Thread(target=watch, daemon=True).start()
    elif device.type == "cuda" or precision == "bf16":
        # One rank shards over itself: fp32 weights with bf16 compute come by the same path.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def own_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def stop() -> None:
    ended.set()
    if dist.is_initialized():
        dist.destroy_process_group()


def end_with_parent() -> None:
    """From now on end where torchrun has gone: a rank that outlives it would write beside the next run."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(PULSE)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def leave(code: int) -> None:
    """End the process. With other ranks, skip C++'s clean-up: gloo's threads outlive their group, and would
    call std::terminate after all work is done."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_broken(error: RuntimeError) -> bool:
    """Whether an error says that another rank has gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def watch() -> None:
    """End this process where another rank is lost, until `stop`: a collective with a rank that is stopped, or
    on a lost node, would wait for three hours and then not say for whom. Runs in a thread of its own."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    me, ranks, missed, seen = rank(), range(world()), Counter(), {}
    while not ended.wait(PULSE):
        try:
            store.add(f"alive {me}", 1)
            now = {r: store.add(f"alive {r}", 0) for r in ranks if r != me}
        except RuntimeError:  # its host is gone, or done: then every rank misses it
            now = seen
        for r in now:
            missed[r] = missed[r] + 1 if seen.get(r) == now[r] else 0
        seen = now
        lost = [r for r in ranks if missed[r] >= SILENT]
        if lost and me == min(set(ranks) - set(lost)):
            names, seconds = f"rank {', '.join(map(str, lost))} of {len(ranks)}", round(PULSE * SILENT)
            print(f"error: {names} did not answer for {seconds} s; {GO_ON}", file=sys.stderr, flush=True)
        if lost:
            os._exit(1)


def rank() -> int:
    # Before the processes have met, torchrun's word: so that only one of them reports a wrong flag.
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(items: list, sampled_by: Policy | None = None) -> list:
    """All ranks' lists as one, in rank order, on every rank. What ranks sampled together counts once."""
    if world() == 1:
        return items
    if sampled_by and sampled_by.slices and sampled_by.slices.get_local_rank() > 0:
        items = []
    lists = [None] * world()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def total(counts: Counter, sampled_by: Policy | None = None) -> Counter:
    """All ranks' counts added up, on every rank."""
    added = Counter()
    for part in gather([counts], sampled_by):
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
    return gather([value])[0]


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def shard(
    policy: Policy, device: torch.device, over: str = "world", offload: bool = False, precision: str = "auto"
) -> Policy:
    """Move to the device; where there is a process group, split over it, as config.py's flags say.

    Within a node (hybrid sharding) gathers stay on the fast links, and gradients are averaged across nodes.
    In bf16 layers are gathered and computed; weights that train, their reduced gradients and Adam's moments
    are fp32, since an update of 1e-6 vanishes in bf16. Frozen weights are bf16.

    Units: the vision tower (one gather, as it is small), each decoder layer, and the rest: embedding, last
    norm and head, which the first and the last operation need. A policy on the meta device gets memory for
    its own part only, to be filled by `checkpoint.load_weights`.
    """
    policy.compute_device = device
    if not dist.is_initialized():
        return policy.to(device)
    half = torch.bfloat16 if precision == "bf16" or (precision, device.type) == ("auto", "cuda") else None
    if half:
        policy.compute_dtype = half
        for parameter in policy.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(half)
    mixed = fsdp.MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None)
    options = {"mp_policy": mixed, "mesh": mesh_over(device.type, over)}
    if offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    fsdp.fully_shard(policy.model.model.visual, **options)
    for layer in policy.text_model.layers:
        fsdp.fully_shard(layer, **options)
    # The root stays whole after its forward: its head is used in chunks, again in the backward pass.
    fsdp.fully_shard(policy, reshard_after_forward=False, **options)
    fsdp.register_fsdp_forward_method(policy, "prefill")
    if any(p.is_meta for p in policy.parameters()):
        policy.to_empty(device="cpu" if offload else device)
        fill_buffers(policy, device)
    return policy


def fill_buffers(policy: Policy, device: torch.device) -> None:
    """Rotary frequencies, which are in no checkpoint; and a head that is tied, of which there are two now."""
    policy.model.tie_weights()
    for module in policy.modules():
        if module._non_persistent_buffers_set:
            module.to_empty(device=device)
            policy.model._init_weights(module)
            module.to(device)


def optimizer(policy: Policy, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what trains. Fused: the default form makes copies of all gradients, 14 GiB for 3B."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def ranks_per_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def mesh_over(device_type: str, over: str):
    if over == "world" or world() <= ranks_per_node():
        return dist.init_device_mesh(device_type, (world(),), mesh_dim_names=("shards",))
    shape = world() // ranks_per_node(), ranks_per_node()
    return dist.init_device_mesh(device_type, shape, mesh_dim_names=("copies", "shards"))


def shard_place(tensor: torch.Tensor) -> tuple[int, int]:
    """(which part of a sharded tensor this rank holds, how many parts there are)."""
    if not isinstance(tensor, DTensor):
        return 0, 1
    mesh = tensor.device_mesh["shards"]
    return mesh.get_local_rank(), mesh.size()


def rows_of(parameter: torch.Tensor) -> tuple[int, int]:
    """Which rows [start, stop) of a parameter this rank holds: FSDP2 splits as torch.chunk does."""
    (index, count), size = shard_place(parameter), parameter.shape[0]
    per_rank = -(-size // count)
    return min(per_rank * index, size), min(per_rank * (index + 1), size)


def slices(policy: Policy, parts: int) -> DeviceMesh | None:
    """The `parts` ranks of a node that sample together, each with a slice of every layer; None for 1.

    Raises UserError where the model cannot be cut so.
    """
    if ranks_per_node() % parts:
        raise UserError(f"--tensor {parts} does not divide the {ranks_per_node()} ranks of a node; lower it")
    if parts == 1:
        return None
    config = policy.text_model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    columns = getattr(config, "moe_intermediate_size", config.intermediate_size)
    if heads % parts or columns % parts or (kv_heads % parts and parts % kv_heads):
        sizes = f"{heads} heads on {kv_heads} of keys and values, and {columns} MLP columns"
        raise UserError(f"--tensor {parts}: {sizes} have no {parts} equal slices; give another number")
    device, shape = "cuda" if torch.cuda.is_available() else "cpu", (world() // parts, parts)
    return dist.init_device_mesh(device, shape, mesh_dim_names=("groups", "slices"))["slices"]


def sampling_place(policy: Policy) -> tuple[int, int]:
    """(first, stride): this rank samples items[first::stride]."""
    parts = policy.slices.size() if policy.slices else 1
    return rank() // parts, world() // parts


def cut(name: str, weight: torch.Tensor, part: int, parts: int, kv_heads: int) -> torch.Tensor:
    """A rank's slice of a decoder layer's parameter, by its name; a norm, say, is kept whole.

    With fewer key-value heads than ranks, ranks whose query heads read the same one each hold it.
    """
    *_, projection, kind = name.split(".")
    if kind == "gate_up_proj":  # of a mixture's experts, [E, 2 I, D]
        return torch.cat([half.chunk(parts, 1)[part] for half in weight.chunk(2, 1)], 1)
    if kind == "down_proj":  # [E, D, I]
        return weight.chunk(parts, 2)[part]
    if projection in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") and kind != "lora_A":
        if projection in ("k_proj", "v_proj") and kv_heads < parts:
            return weight.chunk(kv_heads)[part * kv_heads // parts]
        return weight.chunk(parts)[part]
    if projection in ("o_proj", "down_proj"):
        if kind == "bias":  # added once
            return weight if part == 0 else torch.zeros_like(weight)
        return weight if kind == "lora_B" else weight.chunk(parts, 1)[part]
    return weight


@contextlib.contextmanager
def in_slices(policy: Policy):
    """Inside, decoder layers hold this rank's slices, each gathered once to be cut, and sum over ranks."""
    config, mesh = policy.text_model.config, policy.slices
    part, parts, kv_heads = mesh.get_local_rank(), mesh.size(), config.num_key_value_heads
    groups = config.num_attention_heads // max(kv_heads, parts)
    with contextlib.ExitStack() as undo:

        def put(place: dict, key: str, value) -> None:
            undo.callback(place.__setitem__, key, place[key])
            place[key] = value

        def over_ranks(module, inputs, output):
            dist.all_reduce(output, group=mesh.get_group())
            return output

        for layer in policy.text_model.layers:
            layer.unshard()
            mine = {n: cut(n, p.detach(), part, parts, kv_heads).clone() for n, p in layer.named_parameters()}
            layer.reshard()
            for name, tensor in mine.items():
                module, _, kind = name.rpartition(".")
                put(layer.get_submodule(module)._parameters, kind, nn.Parameter(tensor, requires_grad=False))
            put(vars(layer.self_attn), "num_key_value_groups", groups)
            for module in (layer.self_attn.o_proj, layer.mlp):
                undo.callback(module.register_forward_hook(over_ranks).remove)
        yield


@contextlib.contextmanager
def weights_to_sample(policy: Policy):
    """Inside, forward passes need no gradient and weights are there to be used directly: gathered once,
    whole or in slices."""
    in_turn = set(policy.text_model.layers) if policy.slices else set()
    units = [m for m in policy.modules() if isinstance(m, fsdp.FSDPModule) and m not in in_turn]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    policy.sampling = True
    try:
        with in_slices(policy) if policy.slices else contextlib.nullcontext():
            yield
    finally:
        policy.sampling = False
        for unit in units:
            unit.set_reshard_after_forward(unit is not policy, recurse=False)
            unit.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
