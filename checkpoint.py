"""Checkpoints that cannot be half written, and resuming exactly.

    OUT/checkpoint-STEP/
        config.json, *.safetensors, tokenizer ...   the policy in the hub's layout: any tool loads it
        adapter/                                    with --lora_rank: the adapter alone, as PEFT reads it
        trainer.json                                step, episode, settings: everything but tensors
        samples.json                                what is left of the episode, and the replay buffer
        state-PART-of-PARTS.safetensors             each part's fp32 weights that train, and Adam moments
        SHA256SUMS                                  of all these files, as sha256sum writes and checks it

A checkpoint is written under another name and renamed when it is whole, so one that can be seen is
complete. Nothing is pickled: reading a checkpoint from elsewhere can do no harm. What happens to it on
disk shows in the checksums: without them a flipped bit resumes, with other numbers.

Parameters are split over ranks along their first dimension, in order. A run with another number of
ranks therefore finds any row it needs by counting through the old files (`rows_from`).
"""

import hashlib
import json
import re
import shutil
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import lora
import parallel
import record
import toy
from data import UserError, read_json
from model import Policy, Prompt, Sample, encode, find_checkpoint, is_finite, save_settings, save_some_weights

RUINED = "lower --lr, and go on from an earlier checkpoint"  # what to do where weights are not finite
MOMENTS = ("exp_avg", "exp_avg_sq")
SUMS = "SHA256SUMS"
# A file of the hub's copy: what a rank holds in the host's memory while it writes.
FILE_BYTES = 5 * 10**9
# What a Run counts, beside its settings, weights and samples.
COUNTERS = {"step": int, "episode": int, "counts": dict, "not_finite": int}
TRAINER = COUNTERS | {"draws": int, "config": dict, "data_checksum": int}
SAMPLES = {"fresh": [dict], "buffer": [dict]}
# Flags that may change when a run is resumed without a note.
HARMLESS = ("out", "resume", "steps", "save_every", "keep_last", "eval_every")


# ---------------------------------------------------------------------------- samples


def pack_sample(sample: Sample) -> dict:
    """A Sample as JSON holds it. float32 numbers survive the way through decimal exactly.

    `prompt` is a checksum: what was sampled belongs to the very prompt that it was sampled from.
    """
    row = {k: v for k, v in vars(sample).items() if k not in ("prompt", "second_look")}
    row |= {k: row[k].tolist() for k in ("tokens", "logprobs", "mask")}
    return row | {"qid": sample.prompt.question.id, "prompt": checksum(sample.prompt)}


def checksum(prompt: Prompt) -> int:
    """Of its tokens and the sizes of its pictures."""
    numbers = [*prompt.input_ids.tolist(), *prompt.image_grid_thw.flatten().tolist()]
    return zlib.crc32(json.dumps(numbers).encode())


def unpack_sample(row: dict, prompts: dict) -> Sample:
    """The Sample that `pack_sample` wrote; `prompts` maps question ids to Prompts."""
    row = dict(row)
    prompt = prompts[row.pop("qid")]
    if row.pop("prompt") != checksum(prompt):
        changed = f"qid {prompt.question.id}: its question, pictures or --template changed within an episode"
        raise UserError(f"{changed}; resume with the data and the flags as before")
    for name, dtype in (("tokens", torch.long), ("logprobs", torch.float32), ("mask", torch.bool)):
        row[name] = torch.tensor(row[name], dtype=dtype)
    if not 0 < len(row["tokens"]) == len(row["logprobs"]) == len(row["mask"]):
        raise ValueError("a sample's tokens, logprobs and mask differ in length")
    return Sample(prompt=prompt, **row)


def load_samples(directory: Path, run) -> list[list[Sample]]:
    """[what is left of the episode, the replay buffer], with their prompts encoded again."""
    packed = read_json(directory / "samples.json", SAMPLES)
    known = {q.id: q for q in run.questions or []}
    prompts = {}
    for qid in {row["qid"] for part in packed.values() for row in part}:
        if run.questions is None:
            known[qid] = toy.question_by_id(toy.level(run.config.toy_level), qid)
        if qid not in known:
            raise UserError(
                f"qid {qid}: gone within an episode; resume with the data and the flags as before"
            )
        prompt = encode(run.policy, known[qid], run.config.template)
        # As in `sample_episode`: each rank holds all prompts, so none holds their pictures.
        prompts[qid] = replace(prompt, pixel_values=None) if parallel.world() > 1 else prompt
    return [[unpack_sample(row, prompts) for row in packed[part]] for part in SAMPLES]


# ---------------------------------------------------------------------------- save


def save_run(run) -> None:
    """Write OUT/checkpoint-STEP, on all ranks together. Raises UserError where weights are not finite."""
    names = [n for n, p in run.policy.named_parameters() if not is_finite(parallel.local(p))]
    if ruined := parallel.gather(names):
        raise UserError(f"step {run.step}: {ruined[0]} is not finite, and not saved; {RUINED} in {run.out}")
    # While gradients are not finite, what may be ruined soon does not push out what was sound.
    keep = run.config.keep_last + (run.not_finite > 0)
    trainer = {name: getattr(run, name) for name in COUNTERS}
    trainer |= {"draws": run.buffer.draws, "config": asdict(run.config), "data_checksum": run.data_checksum}
    # At an episode's end nothing will be drawn from the buffer any more.
    samples = {"fresh": run.fresh, "buffer": run.buffer.samples if run.fresh else []}
    save(run.out, run.policy, run.optimizer, trainer, samples, keep)


def save(directory: Path, policy, optimizer, trainer: dict, samples: dict, keep_last: int) -> None:
    """Write OUT/checkpoint-STEP on all ranks together, then drop the oldest beyond `keep_last`.

    trainer  JSON-able, with "step";  samples  {"fresh": [Sample], "buffer": [Sample]}
    """
    final = directory / f"checkpoint-{trainer['step']}"
    unfinished = directory / f"unfinished-{trainer['step']}"
    first = parallel.rank() == 0
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    parallel.barrier()
    index, count, copy = parallel.shard_place_of(policy)
    if copy == 0:  # with hybrid sharding the other nodes hold the same
        save_file(state_tensors(policy, optimizer), unfinished / f"state-{index}-of-{count}.safetensors")
    save_weights(unfinished, policy)
    adapter = lora.adapter_weights(policy)
    if first:
        if adapter:
            lora.save_adapter(policy, adapter, trainer["config"]["model"], unfinished / "adapter")
        packed = {name: [pack_sample(s) for s in part] for name, part in samples.items()}
        (unfinished / "samples.json").write_text(json.dumps(packed))
        (unfinished / "trainer.json").write_text(json.dumps(trainer, indent=1))
    parallel.barrier()
    sums = digests(unfinished)
    if first:
        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
        (unfinished / SUMS).write_text("".join(lines))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for old in list_checkpoints(directory)[:-keep_last]:
            if not old.is_symlink():
                shutil.rmtree(old)
    parallel.barrier()


def trained(policy: Policy):
    return ((name, p) for name, p in policy.named_parameters() if p.requires_grad)


def state_tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This rank's part of the weights that train and of the optimiser, by name.

    Frozen ones are those of --model, and resuming finds them there.
    """
    tensors = {}
    for name, parameter in trained(policy):
        tensors[f"param/{name}"] = parallel.local(parameter.detach()).contiguous()
        state = optimizer.state.get(parameter)
        if state:  # none where there was no gradient yet, as in the tower before the first picture
            tensors[f"step/{name}"] = state["step"].reshape(1)
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = parallel.local(state[moment]).contiguous()
    return tensors


def save_weights(directory: Path, policy: Policy) -> None:
    """The hub's copy, adapters merged, in the dtype of computing. All ranks gather, each writes some files.

    For 72B these are 147 GB: one rank would write for minutes while the others wait.
    """
    dtype, projections = policy.compute_dtype, lora.adapted(policy)
    parameters = {n: p for n, p in policy.model.named_parameters() if not n.endswith(lora.NAMES)}
    sizes = {n: torch.empty(p.shape, dtype=dtype, device="meta") for n, p in parameters.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=FILE_BYTES).filename_to_tensors
    files, rank, world = list(split.items()), parallel.rank(), parallel.world()
    where = {}  # the hub's name of a weight -> its file
    for start in range(0, len(files), world):
        mine = {}
        for number, (_, names) in enumerate(files[start : start + world]):
            for name in names:
                projection = projections.get(name.removesuffix(".weight"))
                tensor = parameters[name].detach().to(dtype)
                tensor = lora.merged(projection) if projection else parallel.whole(tensor)
                if number == rank:
                    mine[name] = tensor.to("cpu", dtype)
        if mine:
            file = files[start + rank][0]
            where |= dict.fromkeys(save_some_weights(policy, mine, directory / file), file)
    where = dict(parallel.gather(list(where.items())))
    if rank == 0:
        save_settings(policy, directory, dtype)
        if len(files) > 1:
            index = {"metadata": {}, "weight_map": where}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def list_checkpoints(directory: Path) -> list[Path]:
    """OUT's checkpoints, oldest first. Any other name is somebody else's."""
    found = [p for p in directory.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", p.name)]
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """
    >>> number_of(Path("checkpoint-12")), number_of(Path("state-3-of-8.safetensors"))
    (12, 3)
    """
    return int(path.name.split("-")[1])


# ---------------------------------------------------------------------------- checksums


def digests(directory: Path) -> dict[str, str]:
    """{file: SHA-256 of what it holds}; ranks that have met read a share of the files each."""
    files = (p for p in directory.rglob("*") if p.is_file() and p.name != SUMS)
    names = sorted(p.relative_to(directory).as_posix() for p in files)
    found, world = [], parallel.world()
    for name in names[parallel.rank() % world :: world]:
        try:
            with open(directory / name, "rb") as file:
                found.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
        except OSError as error:
            found.append((name, error.strerror))
    return dict(parallel.gather(found))


def find_damage(directory: Path) -> str | None:
    """What is not as `save` wrote it, in words. All ranks must ask."""
    if not (directory / SUMS).is_file():
        return f"{directory / SUMS} is missing"
    lines = (directory / SUMS).read_text(errors="replace").splitlines()
    found = digests(directory)
    for digest, _, name in (line.partition("  ") for line in lines):
        if found.get(name) != digest:
            return f"{directory / name} {'was changed' if name in found else 'is missing'}"
    return None


def check_model(path: str) -> None:
    """Raise UserError where --model is a checkpoint of ours and not as it was written."""
    directory = find_checkpoint(path)
    if (directory / SUMS).exists() and (damage := find_damage(directory)):
        raise UserError(f"--model: {damage}; if that was meant, delete {directory / SUMS}")


# ---------------------------------------------------------------------------- load


def rows_from(files: list, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor whose first dimension is laid out over `files` in order."""
    parts, offset = [], 0
    for file in files:
        piece = file.get_slice(name)
        rows = piece.get_shape()[0]
        low, high = max(start - offset, 0), min(stop - offset, rows)
        if low < high:
            parts.append(piece[low:high])
        offset += rows
    return torch.cat(parts) if parts else piece[0:0]


def state_files(directory: Path) -> list:
    """The parts of a checkpoint's state in order, open; none where it is not one of ours."""
    paths = sorted(directory.glob("state-*-of-*.safetensors"), key=number_of)
    return [safe_open(path, framework="pt") for path in paths]


@torch.no_grad()
def load_state(directory: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Restore weights and optimiser, whatever the number of ranks was.

    Raises UserError where the checkpoint is of another model, or trained other weights.
    """
    files = state_files(directory)
    names, parameters = set(files[0].keys()), dict(trained(policy))
    saved = {name.removeprefix("param/") for name in names if name.startswith("param/")}
    if different := sorted(saved ^ parameters.keys()):
        what = f"a checkpoint of another model, or that trained other weights, such as {different[0]}"
        raise UserError(f"{directory}: {what}; give --model, --lora_rank and --train_vision as before")
    for name, parameter in parameters.items():
        rows = parallel.rows_of(parameter)
        shapes = [file.get_slice(f"param/{name}").get_shape() for file in files]
        found = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        if found != list(parameter.shape):
            shapes = f"{name} has shape {found}, not {list(parameter.shape)}"
            raise UserError(f"{directory}: {shapes}; give --model and --lora_rank as before")
        parallel.local(parameter).copy_(rows_from(files, f"param/{name}", *rows))
        if f"step/{name}" not in names:
            continue
        # On the parameter's device: a fused optimiser reads it there.
        state = {"step": files[0].get_tensor(f"step/{name}")[0].to(parameter.device)}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter)
            parallel.local(state[moment]).copy_(rows_from(files, f"{moment}/{name}", *rows))
        optimizer.state[parameter] = state


def module_name(key: str) -> str:
    """A published checkpoint's key as the model's own name.

    >>> module_name("visual.merger.ln_q.weight"), module_name("model.norm.weight")
    ('model.visual.merger.ln_q.weight', 'model.language_model.norm.weight')
    """
    if key.startswith(("lm_head.", "model.visual.", "model.language_model.")):
        return key
    return f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)


@torch.no_grad()
def load_weights(directory: Path, policy: Policy) -> None:
    """Fill a sharded policy from published safetensors: each rank reads its own rows and no more.

    A checkpoint of our own holds the weights that were trained in fp32 too, beside the hub's copy in bf16:
    those are taken, or a second stage would begin by forgetting the smallest updates of the first.
    """
    where = {}
    for path in sorted(directory.glob("*.safetensors")):
        if not path.name.startswith("state-"):
            with safe_open(path, framework="pt") as file:
                keys = file.keys()
            where |= {module_name(key): (path, key) for key in keys}
    own = state_files(directory)
    exact = set(own[0].keys()) if own else set()
    for name, parameter in policy.model.named_parameters():
        if name.endswith(lora.NAMES):
            continue  # new ones, by `lora.initialise`: the copy has the old ones merged
        if name not in where:
            raise UserError(f"--model {directory}: no weights for {name} in its safetensors")
        path, key = where[name]
        start, stop = parallel.rows_of(parameter)
        with safe_open(path, framework="pt") as file:
            piece = file.get_slice(key)
            shape, wanted = piece.get_shape(), list(parameter.shape)
            # Experts on the hub are [E, in, out], in transformers [E, out, in]. Its loader too turns them
            # by their shape, since there are checkpoints of both kinds.
            turned = ".experts." in name and shape != wanted and [shape[0], *shape[:0:-1]] == wanted
            if shape != wanted and not turned:
                raise UserError(f"{path}: {key} has shape {shape}, not {wanted}")
            rows = piece[start:stop].mT if turned else piece[start:stop]
        # Not for eval.py --tensor, whose parameters are meta: it samples from the hub's copy.
        if f"param/model.{name}" in exact and not parameter.is_meta:
            rows = rows_from(own, f"param/model.{name}", start, stop)
        if not is_finite(rows):
            raise UserError(f"{path}: {key} holds values that are not finite")
        if parameter.is_meta:
            parallel.keep_slice(policy, name, rows)
        else:
            parallel.local(parameter).copy_(rows)


# ---------------------------------------------------------------------------- resume


def resume_run(run) -> bool:
    """Go back to the newest checkpoint of OUT; False where there is none yet."""
    found = parallel.from_first([str(p) for p in list_checkpoints(run.out)])
    if not found:
        return False
    directory = Path(found[-1])
    if damage := find_damage(directory):
        older = f"to go on from {Path(found[-2]).name}" if found[1:] else "to begin again"
        raise UserError(f"{damage} since it was written; delete {directory} {older}")
    trainer = parallel.agree(lambda: read_json(directory / "trainer.json", TRAINER))
    check_same_run(run, directory, trainer)

    def load() -> list[list[Sample]]:
        try:
            load_state(directory, run.policy, run.optimizer)
            return load_samples(directory, run)
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            SafetensorError,
        ) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{directory}: of another version ({reason}); delete it") from None

    run.fresh, run.buffer.samples = parallel.agree(load)
    for name in COUNTERS:
        setattr(run, name, trainer[name])
    run.buffer.draws = trainer["draws"]
    if parallel.rank() == 0:
        record.write_config(run.out, run.config)
    return True


def check_same_run(run, directory: Path, trainer: dict) -> None:
    """Raise UserError where going on with these flags would make another run of it; note other changes."""
    before, now = trainer["config"], asdict(run.config)
    same = ["toy_level"]
    if "toy" in (before.get("data"), now["data"]):  # a file may have moved: its questions are compared
        same.append("data")
    if any(not p.requires_grad for p in run.policy.parameters()):  # then --model is half of the policy
        same.append("model")
    reasons = [f"was made with --{k} {before.get(k)}" for k in same if before.get(k) != now[k]]
    if trainer["data_checksum"] != run.data_checksum:
        reasons.append(f"the questions of {now['data']}, or the flags that choose among them, changed since")
    if bool(reward := before.get("reward")) != bool(now["reward"]):  # its file may have moved
        reasons.append(f"was made with --reward {reward}" if reward else "was made without --reward")
    if reasons:
        how = f"resume with the same ones, or start a new run from it: --model {directory}"
        raise UserError(f"{directory}: {reasons[0]}; {how}")
    if trainer["step"] > run.total_steps:
        raise UserError(f"--steps {run.total_steps}: {directory} is further already; raise it")
    changed = [k for k, v in before.items() if k not in HARMLESS and v != now.get(k, v)]
    if parallel.rank() == 0:
        tqdm.write(f"resuming {directory}")
        if changed:
            tqdm.write(f"note: flags changed since: {', '.join(changed)}")


def explain_os_error(error: OSError | SafetensorError, directory: Path) -> UserError:
    """A full or read-only disk, said in one line."""
    reason = str(error)
    if isinstance(error, OSError):
        reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
    return UserError(f"--out {directory}: {reason}; choose another place or make room")
