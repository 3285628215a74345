"""Checkpoints that cannot be half written, and resuming exactly.

    OUT/checkpoint-STEP/
        config.json, *.safetensors, tokenizer ...   the policy in the hub's layout: any tool loads it
        adapter/                                    with --lora_rank: the adapter alone, as PEFT reads it
        trainer.json                                step, episode, settings: everything but tensors
        samples.json                                what is left of the episode, and the replay buffer
        state-PART-of-PARTS.safetensors             each part's fp32 weights that train, and Adam moments
        SHA256SUMS                                  of all these files, as sha256sum writes and checks it

A checkpoint is written under another name and renamed when it is whole, so one that can be seen is
complete. Nothing is pickled: a checkpoint from elsewhere can do no harm by being read. What the disk
did to it meanwhile shows in the checksums: without them a flipped bit resumes, with other numbers.

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import lora
import parallel
import record
import toy
from data import UserError, read_json
from model import Policy, Prompt, Sample, encode, find_checkpoint, is_finite, save_settings, save_some_weights

MOMENTS = ("exp_avg", "exp_avg_sq")
SUMS = "SHA256SUMS"
# A file of the hub's copy: what a rank holds in the host's memory while it writes.
FILE_BYTES = 5 * 10**9
# What a Run counts, beside its settings, weights and samples.
COUNTERS = ("step", "episode", "counts", "not_finite")
TRAINER = {
    "step": int,
    "episode": int,
    "counts": dict,
    "not_finite": int,
    "draws": int,
    "config": dict,
    "data_checksum": int,
}
SAMPLES = {"fresh": [dict], "buffer": [dict]}


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
    """The Sample that `pack_sample` wrote; `prompts` maps question ids to Prompts.

    Raises UserError where the prompt is not the one that was sampled from.
    """
    row = dict(row)
    prompt = prompts[row.pop("qid")]
    if row.pop("prompt") != checksum(prompt):
        raise UserError(
            f"qid {prompt.question.id}: its question, pictures or --template changed within an episode; "
            "resume with the data and the same flags as before"
        )
    row["tokens"] = torch.tensor(row["tokens"], dtype=torch.long)
    row["logprobs"] = torch.tensor(row["logprobs"], dtype=torch.float32)
    row["mask"] = torch.tensor(row["mask"], dtype=torch.bool)
    if not 0 < len(row["tokens"]) == len(row["logprobs"]) == len(row["mask"]):
        raise ValueError("a sample's tokens, logprobs and mask differ in length")
    return Sample(prompt=prompt, **row)


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


def digests(directory: Path, alone: bool = False) -> dict[str, str]:
    """{file: SHA-256 of what it holds}; each rank reads a share of the files, or this one all of them."""
    rank, world = (0, 1) if alone else (parallel.rank(), parallel.world())
    files = (p for p in directory.rglob("*") if p.is_file() and p.name != SUMS)
    names = sorted(p.relative_to(directory).as_posix() for p in files)
    found = []
    for name in names[rank::world]:
        try:
            with open(directory / name, "rb") as file:
                found.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
        except OSError as error:
            found.append((name, error.strerror))
    return dict(found if alone else parallel.gather(found))


def find_damage(directory: Path, alone: bool = False) -> str | None:
    """What is not as `save` wrote it, in words; unless `alone`, all ranks must ask."""
    if not (directory / SUMS).is_file():
        return f"{directory / SUMS} is missing"
    lines = (directory / SUMS).read_text(errors="replace").splitlines()
    found = digests(directory, alone)
    for digest, _, name in (line.partition("  ") for line in lines):
        if found.get(name) != digest:
            return f"{directory / name} {'was changed' if name in found else 'is missing'}"
    return None


def check_model(path: str, alone: bool = False) -> None:
    """Raise UserError where --model is a checkpoint of ours and not as it was written."""
    directory = find_checkpoint(path)
    if (directory / SUMS).exists() and (damage := find_damage(directory, alone)):
        raise UserError(f"--model: {damage}; if that was meant, delete {directory / SUMS}")


def save_run(run) -> None:
    """Write OUT/checkpoint-STEP, on all ranks together. Raises UserError where weights are not finite."""
    names = [n for n, p in run.policy.named_parameters() if not is_finite(parallel.local(p))]
    if ruined := parallel.gather(names):
        raise UserError(
            f"step {run.step}: {ruined[0]} is not finite, and not saved; lower --lr, and "
            f"go on from an earlier checkpoint in {run.out}"
        )
    # While gradients are not finite, what may be ruined soon does not push out what was sound.
    keep = run.config.keep_last + (run.not_finite > 0)
    trainer = {name: getattr(run, name) for name in COUNTERS}
    trainer |= {"draws": run.buffer.draws, "config": asdict(run.config)}
    trainer["data_checksum"] = run.data_checksum
    # At an episode's end nothing will be drawn from the buffer any more.
    samples = {"fresh": run.fresh, "buffer": run.buffer.samples if run.fresh else []}
    save(run.out, run.policy, run.optimizer, trainer, samples, keep)


def save_weights(directory: Path, policy: Policy) -> None:
    """The hub's copy, adapters merged, in the dtype of computing. All ranks gather, each writes some files.

    For 72B these are 147 GB: one rank would write for minutes while the others wait.
    """
    files = weight_files(policy)
    projections = lora.adapted(policy)
    rank, world = parallel.rank(), parallel.world()
    where = {}  # the hub's name of a weight -> its file
    for start in range(0, len(files), world):
        mine = {}
        for number, part in enumerate(files[start : start + world]):
            for name, parameter in part.items():
                projection = projections.get(name.removesuffix(".weight"))
                tensor = parameter.detach().to(policy.compute_dtype)
                tensor = lora.merged(projection) if projection else parallel.whole(tensor)
                if number == rank:
                    mine[name] = tensor.to("cpu", policy.compute_dtype)
        if mine:
            path = directory / file_name(start + rank, len(files))
            where |= dict.fromkeys(save_some_weights(policy, mine, path), path.name)
    where = parallel.gather(list(where.items()))
    if rank == 0:
        save_settings(policy, directory, policy.compute_dtype)
        if len(files) > 1:
            index = {"metadata": {}, "weight_map": dict(where)}
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def file_name(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"


def weight_files(policy: Policy) -> list[dict]:
    """The model's parameters by name, cut into the files of the hub's copy."""
    files, size = [{}], 0
    for name, parameter in policy.model.named_parameters():  # a head that is tied comes once
        if name.endswith(lora.NAMES):
            continue
        more = parameter.numel() * policy.compute_dtype.itemsize
        if files[-1] and size + more > FILE_BYTES:
            files.append({})
            size = 0
        files[-1][name] = parameter
        size += more
    return files


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


def rows_from(files: list, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor whose first dimension is laid out over `files` in order."""
    parts, offset = [], 0
    for file in files:
        piece = file.get_slice(name)
        shape = piece.get_shape()
        low, high = max(start - offset, 0), min(stop - offset, shape[0])
        if low < high:
            parts.append(piece[low:high])
        offset += shape[0]
    return torch.cat(parts) if parts else piece[0:0]


def state_files(directory: Path) -> list:
    """The parts of a checkpoint's state in order, open; none where it is not one of ours."""
    paths = sorted(directory.glob("state-*-of-*.safetensors"), key=number_of)
    return [safe_open(path, framework="pt") for path in paths]


def load_state(directory: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    """Restore weights and optimiser, whatever the number of ranks was. Returns trainer.json.

    Raises UserError where the checkpoint is of another model, trained other weights, or lacks a file.
    """
    trainer = read_json(directory / "trainer.json", TRAINER)
    files = state_files(directory)
    names = set(files[0].keys())
    parameters = dict(trained(policy))
    saved = {name.removeprefix("param/") for name in names if name.startswith("param/")}
    if different := sorted(saved ^ parameters.keys()):
        where = "only in the checkpoint" if different[0] in saved else "not in the checkpoint"
        raise UserError(
            f"{directory}: a checkpoint of another model, or that trained other weights ({different[0]} is "
            f"{where}); give --model, --lora_rank and --train_vision as before"
        )
    for name, parameter in parameters.items():
        start, stop = parallel.rows_of(parameter)
        shapes = [file.get_slice(f"param/{name}").get_shape() for file in files]
        found = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        if found != list(parameter.shape):
            raise UserError(
                f"{directory}: {name} has shape {found}, not {list(parameter.shape)}; give --model and "
                "--lora_rank as before"
            )
        with torch.no_grad():
            rows = rows_from(files, f"param/{name}", start, stop)
            parallel.local(parameter).copy_(rows)
        if f"step/{name}" not in names:
            continue
        # On the parameter's device: a fused optimiser reads it there.
        step = files[0].get_tensor(f"step/{name}")[0].to(parameter.device)
        state = {"step": step}
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter)
            values = rows_from(files, f"{moment}/{name}", start, stop)
            parallel.local(state[moment]).copy_(values)
        optimizer.state[parameter] = state
    return trainer


def module_name(key: str) -> str:
    """A published checkpoint's key as the model's own name.

    >>> module_name("visual.merger.ln_q.weight"), module_name("model.norm.weight")
    ('model.visual.merger.ln_q.weight', 'model.language_model.norm.weight')
    """
    if key.startswith(("lm_head.", "model.visual.", "model.language_model.")):
        return key
    return f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)


def load_weights(directory: Path, policy: Policy) -> None:
    """Fill a sharded policy from published safetensors: each rank reads its own rows and no more.

    A checkpoint of our own holds the weights that were trained in fp32 too, beside the hub's copy in bf16:
    those are taken, or a second stage would begin by forgetting the smallest updates of the first.

    Raises UserError naming a weight that the checkpoint lacks, or that has another shape.
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
        with safe_open(path, framework="pt") as file:
            piece = file.get_slice(key)
            shape, wanted = piece.get_shape(), list(parameter.shape)
            # The hub's experts are [E, in, out], transformers' [E, out, in].
            turned = shape != wanted and [*shape[:-2], *shape[:-3:-1]] == wanted and len(shape) == 3
            if shape != wanted and not turned:
                raise UserError(f"{path}: {key} has shape {shape}, not {wanted}")
            start, stop = parallel.rows_of(parameter)
            rows = piece[start:stop].mT if turned else piece[start:stop]
        # Not for eval.py --tensor, whose parameters are meta: it samples from the hub's copy.
        if f"param/model.{name}" in exact and not parameter.is_meta:
            rows = rows_from(own, f"param/model.{name}", start, stop)
        if not is_finite(rows):
            raise UserError(f"{path}: {key} holds values that are not finite")
        with torch.no_grad():
            if parameter.is_meta:
                parallel.keep_slice(policy, name, rows)
            else:
                parallel.local(parameter).copy_(rows)


SURPRISES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def readable(directory: Path, action):
    """Do what reads a checkpoint; one of another version is refused in one line."""
    try:
        return action()
    except (*SURPRISES, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{directory}: of another version ({reason}); delete it") from None


def resume_run(run) -> bool:
    """Go back to the newest checkpoint of OUT; False where there is none yet."""
    found = parallel.from_first([str(p) for p in list_checkpoints(run.out)])
    if not found:
        return False
    directory = Path(found[-1])
    if damage := find_damage(directory):
        older = f"to go on from {Path(found[-2]).name}" if found[1:] else "to begin again"
        raise UserError(f"{damage} since it was written; delete {directory} {older}")
    trainer = parallel.agree(
        lambda: readable(directory, lambda: load_state(directory, run.policy, run.optimizer))
    )
    before = trainer["config"]
    # With frozen weights, --model is half of the policy.
    frozen = any(not p.requires_grad for p in run.policy.parameters())
    for name in ("data", "toy_level", *(["model"] if frozen else [])):
        now, then = getattr(run.config, name), before.get(name)
        # A file may have moved; what its questions are is checked where they are needed.
        if then != now and (name != "data" or "toy" in (then, now)):
            raise UserError(
                f"{directory}: was made with --{name} {then}; resume with that, or start "
                f"a new run from it: --model {directory}"
            )
    if trainer["data_checksum"] != run.data_checksum:
        raise UserError(
            f"{directory}: the questions of {run.config.data}, or the flags that choose among them, "
            "changed since; resume with the same ones, or start a new run from it: "
            f"--model {directory}"
        )
    now, then = run.config.reward, before.get("reward", "")
    if bool(now) != bool(then):  # its file may have moved
        raise UserError(
            f"{directory}: was made {f'with --reward {then}' if then else 'without --reward'}; resume "
            f"so, or start a new run from it: --model {directory}"
        )
    changed = [
        name
        for name, value in before.items()
        if name not in ("out", "resume", "steps", "save_every", "keep_last", "eval_every")
        and value != getattr(run.config, name, value)
    ]
    if parallel.rank() == 0:
        tqdm.write(f"resuming {directory}")
        if changed:
            tqdm.write(f"note: flags changed since: {', '.join(changed)}")
    for name in COUNTERS:
        setattr(run, name, trainer[name])
    run.buffer.draws = trainer["draws"]
    packed = parallel.agree(lambda: read_json(directory / "samples.json", SAMPLES))
    known = {q.id: q for q in run.questions or []}

    def unpack() -> tuple[list[Sample], list[Sample]]:
        prompts = {}
        for qid in {row["qid"] for rows in packed.values() for row in rows}:
            if run.questions is None:
                known[qid] = toy.question_by_id(toy.LEVELS[run.config.toy_level], qid)
            elif qid not in known:
                raise UserError(
                    f"{run.config.data}: no question {qid}, which the episode under way needs; "
                    "resume with the file and the same flags as before"
                )
            prompt = encode(run.policy, known[qid], run.config.template)
            # As in `sample_episode`: each rank holds all prompts, so none holds their pictures.
            prompts[qid] = replace(prompt, pixel_values=None) if parallel.world() > 1 else prompt
        return tuple([unpack_sample(row, prompts) for row in packed[part]] for part in ("fresh", "buffer"))

    run.fresh, run.buffer.samples = parallel.agree(lambda: readable(directory, unpack))
    if run.step > run.total_steps:
        raise UserError(f"--steps {run.total_steps}: {directory} is further already; raise it")
    if parallel.rank() == 0:
        record.write_config(run.out, run.config)
    return True


def explain_os_error(error: OSError | SafetensorError, directory: Path) -> UserError:
    """A full or read-only disk, said in one line."""
    reason = str(error)
    if isinstance(error, OSError):
        reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
    return UserError(f"--out {directory}: {reason}; choose another place or make room")
