"""Checkpoints that cannot be half written, and resuming exactly.

    OUT/checkpoint-STEP/
        config.json, *.safetensors, tokenizer ...   the policy in the hub's layout: any tool loads it
        adapter/                                    with --lora_rank: the adapter alone, as PEFT reads it
        trainer.json                                step, episode, settings: everything but tensors
        samples.json                                what is left of the episode, and the replay buffer
        state-PART-of-PARTS.safetensors             each part's fp32 weights that train, and Adam moments
        SHA256SUMS                                  of all these files, as sha256sum writes and checks it

A checkpoint is written under another name and renamed when it is whole, so one that can be seen is
complete. Nothing is pickled: reading a checkpoint from elsewhere can do no harm. A bit that flips on disk
shows in the checksums.

Parameters are split over ranks along their first dimension, in order. A run with another number of
ranks therefore finds any row it needs by counting through the old files (`rows_from`).
"""

import hashlib
import json
import re
import shutil
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
from model import Policy, Sample, encode, is_finite, save_settings, save_some_weights

RUINED = "lower --lr, and go on from an earlier checkpoint"  # what to do where weights are not finite
MOMENTS = ("exp_avg", "exp_avg_sq")
SUMS = "SHA256SUMS"
# A file of the hub's copy: what a rank holds in the host's memory while it writes.
FILE_BYTES = 5 * 10**9
# What a Run counts, beside its settings, weights and samples.
COUNTERS = ("step", "episode", "counts", "not_finite")
# Flags that must be as before when a run is resumed: samples belong to the prompts that these make.
SAME = ("toy_level", "template", "min_pixels", "max_pixels", "max_prompt_tokens")
# Flags that may change without a note.
HARMLESS = ("out", "resume", "steps", "save_every", "keep_last", "eval_every")


# ---------------------------------------------------------------------------- samples


def pack_sample(sample: Sample) -> dict:
    """A Sample as JSON holds it. float32 numbers survive the way through decimal exactly."""
    row = {k: v for k, v in vars(sample).items() if k not in ("prompt", "second_look")}
    row |= {k: row[k].tolist() for k in ("tokens", "logprobs", "mask")}
    return row | {"qid": sample.prompt.question.id}


def unpack_sample(row: dict, prompts: dict) -> Sample:
    """The Sample that `pack_sample` wrote; `prompts` maps question ids to Prompts."""
    row = dict(row)
    for name, dtype in (("tokens", torch.long), ("logprobs", torch.float32), ("mask", torch.bool)):
        row[name] = torch.tensor(row[name], dtype=dtype)
    return Sample(prompt=prompts[row.pop("qid")], **row)


def load_samples(directory: Path, run) -> list[list[Sample]]:
    """[what is left of the episode, the replay buffer], with their prompts encoded again."""
    packed = read_json(directory / "samples.json")
    known = {q.id: q for q in run.questions or []}
    prompts = {}
    for qid in {row["qid"] for part in packed.values() for row in part}:
        if run.questions is None:
            known[qid] = toy.question_by_id(toy.level(run.config.toy_level), qid)
        prompt = encode(run.policy, known[qid], run.config.template)
        # As in `sample_episode`: each rank holds all prompts, so none holds their pictures.
        prompts[qid] = replace(prompt, pixel_values=None) if parallel.world() > 1 else prompt
    return [[unpack_sample(row, prompts) for row in packed[part]] for part in ("fresh", "buffer")]


# ---------------------------------------------------------------------------- save


def save_run(run) -> None:
    """Write OUT/checkpoint-STEP, on all ranks together, then drop the oldest beyond --keep_last.

    Raises UserError where weights are not finite.
    """
    names = [n for n, p in run.policy.named_parameters() if not is_finite(parallel.local(p))]
    if ruined := parallel.gather(names):
        raise UserError(f"step {run.step}: {ruined[0]} is not finite, and not saved; {RUINED} in {run.out}")
    final, unfinished = (run.out / f"{name}-{run.step}" for name in ("checkpoint", "unfinished"))
    first = parallel.rank() == 0
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    parallel.barrier()
    index, count = parallel.shard_place(next(run.policy.parameters()))
    if parallel.rank() < count:  # with hybrid sharding the other nodes hold the same
        state = state_tensors(run.policy, run.optimizer)
        save_file(state, unfinished / f"state-{index}-of-{count}.safetensors")
    save_weights(unfinished, run.policy)
    lora.save_adapter(run.policy, run.config.model, unfinished / "adapter")
    if first:
        write_trainer(unfinished, run)
    parallel.barrier()
    sums = digests(unfinished)
    if first:
        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
        (unfinished / SUMS).write_text("".join(lines))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        # While gradients are not finite, what may be ruined soon does not push out what was sound.
        keep = run.config.keep_last + (run.not_finite > 0)
        for old in list_checkpoints(run.out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    parallel.barrier()


def write_trainer(directory: Path, run) -> None:
    """All that a run is made of but tensors."""
    trainer = {name: getattr(run, name) for name in COUNTERS}
    trainer |= {"draws": run.buffer.draws, "config": asdict(run.config), "data_checksum": run.data_checksum}
    (directory / "trainer.json").write_text(json.dumps(trainer, indent=1))
    # At an episode's end nothing will be drawn from the buffer any more.
    samples = {"fresh": run.fresh, "buffer": run.buffer.samples if run.fresh else []}
    packed = {name: [pack_sample(s) for s in part] for name, part in samples.items()}
    (directory / "samples.json").write_text(json.dumps(packed))


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
    """What is not as `save_run` wrote it, in words. All ranks must ask."""
    path = directory / SUMS
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    if not lines:
        return f"{path} is missing or empty"
    found = digests(directory)
    for digest, _, name in (line.partition("  ") for line in lines):
        if found.get(name) != digest:
            return f"{directory / name} {'was changed' if name in found else 'is missing'}"
    return None


def check_model(directory: Path) -> None:
    """Raise UserError where --model is a checkpoint of ours and not as it was written."""
    if (directory / SUMS).exists() and (damage := find_damage(directory)):
        raise UserError(f"--model: {damage}; if that was meant, delete {directory / SUMS}")


# ---------------------------------------------------------------------------- load


def shape_in(files: list, name: str) -> list[int]:
    """The shape of a tensor whose first dimension is laid out over `files`."""
    shapes = [file.get_slice(name).get_shape() for file in files]
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]]


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
    """Restore weights and optimiser, whatever the number of ranks was."""
    files = state_files(directory)
    names = set(files[0].keys())
    saved = {name: shape_in(files, name) for name in names if name.startswith("param/")}
    wanted = {f"param/{name}": list(p.shape) for name, p in trained(policy)}
    if saved != wanted:
        odd = next(name for name in saved | wanted if saved.get(name) != wanted.get(name))
        what = f"a checkpoint of another model, or that trained other weights, such as {odd}"
        raise UserError(f"{directory}: {what}; give --model, --lora_rank and --train_vision as before")
    for name, parameter in trained(policy):
        rows = parallel.rows_of(parameter)
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
            file = safe_open(path, framework="pt")
            where |= {module_name(key): (file, key) for key in list(file.keys())}
    own = state_files(directory)
    exact = set(own[0].keys()) if own else set()
    for name, parameter in policy.model.named_parameters():
        if name.endswith(lora.NAMES):
            continue  # new ones, by `lora.initialise`: the copy has the old ones merged
        if name not in where:
            raise UserError(f"--model {directory}: no weights for {name} in its safetensors")
        file, key = where[name]
        piece, wanted = file.get_slice(key), list(parameter.shape)
        shape, (start, stop) = piece.get_shape(), parallel.rows_of(parameter)
        # Experts on the hub are [E, in, out], in transformers [E, out, in]. Its loader too turns them
        # by their shape, since there are checkpoints of both kinds.
        turned = ".experts." in name and shape != wanted and [shape[0], *shape[:0:-1]] == wanted
        if shape != wanted and not turned:
            raise UserError(f"--model {directory}: {key} has shape {shape}, not {wanted}")
        if f"param/model.{name}" in exact:
            rows = rows_from(own, f"param/model.{name}", start, stop)
        else:
            rows = piece[start:stop].mT if turned else piece[start:stop]
        if not is_finite(rows):
            raise UserError(f"--model {directory}: {key} holds values that are not finite")
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
    parallel.agree(lambda: restore(run, directory))
    if parallel.rank() == 0:
        record.write_config(run.out, run.config)
    return True


def restore(run, directory: Path) -> None:
    """Put everything that a checkpoint holds into the run."""
    try:
        trainer = read_json(directory / "trainer.json")
        check_same_run(run, directory, trainer)
        load_state(directory, run.policy, run.optimizer)
        run.fresh, run.buffer.samples = load_samples(directory, run)
        run.buffer.draws = trainer["draws"]
        for name in COUNTERS:
            setattr(run, name, trainer[name])
    except (LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{directory}: of another version ({reason}); delete it") from None


def check_same_run(run, directory: Path, trainer: dict) -> None:
    """Raise UserError where going on with these flags would make another run of it; note other changes."""
    before, now = trainer["config"], asdict(run.config)
    same = [*SAME]
    if "toy" in (before["data"], now["data"]):  # a file may have moved: its questions are compared
        same.append("data")
    if any(not p.requires_grad for p in run.policy.parameters()):  # then --model is half of the policy
        same.append("model")
    if bool(before["reward"]) != bool(now["reward"]):  # its file may have moved
        same.append("reward")
    reasons = [f"--{k} was {before.get(k)!r}" for k in same if before.get(k) != now[k]]
    if trainer["data_checksum"] != run.data_checksum:
        reasons.append(f"the questions of {now['data']}, or the flags that choose among them, changed since")
    if reasons:
        how = f"resume with the same ones, or start a new run from it: --model {directory}"
        raise UserError(f"{directory}: {reasons[0]}; {how}")
    if trainer["step"] > run.total_steps:
        raise UserError(f"--steps {run.total_steps}: {directory} is further already; raise it")
    # A flag that this version does not have counts as changed.
    changed = [k for k, v in before.items() if k not in HARMLESS and v != now.get(k)]
    if parallel.rank() == 0:
        tqdm.write(f"resuming {directory}")
        if changed:
            tqdm.write(f"note: flags changed since: {', '.join(changed)}")


def explain_os_error(error: OSError | SafetensorError, directory: Path) -> UserError:
    """A full or read-only disk, said in one line."""
    return UserError(f"--out {directory}: {error}; choose another place or make room")
