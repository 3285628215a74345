"""What a training run is made of, and how it is put together, saved and taken up again.

Everything the user can get wrong is found here, in one line, before any training.
"""

import contextlib
import hashlib
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import parallel
import toy
from config import Config
from data import Question, UserError, check_images, load_questions, write_atomically
from grpo import group_advantages
from model import Policy, Sample, encode, find_checkpoint, load_policy, prompt_length
from rethink import Rethinking
from reward import reward
from ssr import ReplayBuffer


@dataclass
class Run:
    """All that a run is made of."""

    config: Config
    out: Path
    policy: Policy
    optimizer: torch.optim.Optimizer
    questions: list[Question] | None  # None: the toy world makes new ones for each episode
    heldout: list[Question]
    total_steps: int
    buffer: ReplayBuffer
    step: int = 0  # optimiser steps done, skipped ones included
    episode: int = 0  # episodes sampled
    fresh: list[Sample] = field(default_factory=list)  # of this episode, not yet trained on
    counts: dict = field(default_factory=dict)  # of this episode, for the metrics
    not_finite: int = 0  # steps in a row skipped for a gradient that was not finite
    logp_mismatch: float = 0.0  # of this episode: sampling against the training forward pass
    measured: int = -1  # the step of the last measurement on held-out questions
    interrupted: bool = False  # by Ctrl-C or SIGTERM: finish the step, save, stop


def generator(run: Run, purpose: str) -> torch.Generator:
    """Randomness as a function of (seed, step, rank): resuming needs no generator state."""
    key = f"{purpose} {run.config.seed} {run.step} {parallel.rank()}"
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.Generator(run.policy.device).manual_seed(seed)


def grade(sample: Sample, text: str | None = None) -> float:
    """The reward of a response; or of another text in its place."""
    question = sample.prompt.question
    return reward(sample.text if text is None else text, question.answer, question.choices)


def score(groups: list[list[Sample]], scale: str) -> None:
    """Set every sample's advantage from the rewards of its group."""
    if not groups:
        return
    rewards = torch.tensor([[sample.reward for sample in group] for group in groups])
    for group, row in zip(groups, group_advantages(rewards, scale).tolist()):
        for sample, advantage in zip(group, row):
            sample.advantage = advantage


def add_counts(parts) -> Counter:
    """Their sum. (Counter's own + forgets what is not positive.)"""
    total = Counter()
    for part in parts:
        total.update(part)
    return total


def rethinking(c: Config) -> Rethinking:
    return Rethinking(c.rethink_fraction, c.rethink_quota, c.rethink_trigger, c.rethink_cutback,
                      c.rethink_min_tokens, c.rethink_max_tokens)  # fmt: skip


# ---------------------------------------------------------------------------- set up


def prepare(config: Config) -> Run:
    """Load, check and shard everything. Raises UserError, on all ranks alike, for what cannot work."""
    device = parallel.start()
    if config.episode_queries < parallel.world():
        raise UserError(
            f"--episode_queries {config.episode_queries} cannot be shared by {parallel.world()} ranks; "
            "give each at least one question"
        )
    out = choose_out(config)
    questions, heldout = load_data(config)
    model = find_model(config)
    empty = torch.distributed.is_initialized()  # then each rank reads its own part of the weights
    policy = agree(lambda: load_policy(
        model, min_pixels=config.min_pixels or None, max_pixels=config.max_pixels or None, empty=empty
    ))  # fmt: skip
    agree(lambda: check_room(out, policy, config.keep_last + 1))
    if questions is not None:
        questions = drop_long_prompts(config, policy, questions)
        heldout = drop_long_prompts(config, policy, heldout) if heldout else heldout
    if config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = parallel.shard(policy, device, config.shard, config.offload).train()
    policy.cuda_graphs = config.cuda_graphs
    if empty:
        agree(lambda: checkpoint.load_weights(find_checkpoint(model), policy))
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
    )
    total = config.steps
    if total == 0:
        responses = config.passes * (len(questions) if questions else 0) * config.group_size
        total = responses // config.batch_size
        if total == 0:
            raise UserError("--steps 0: no data to pass over; give --steps or more data")
    buffer = ReplayBuffer(config.ssr_alpha, config.seed, config.ssr_replacement)
    return Run(config, out, policy, optimizer, questions, heldout, total, buffer)


def check_room(out: Path, policy: Policy, checkpoints: int) -> None:
    """Raise UserError where the disk cannot hold them: weights and two moments in fp32, and the hub's copy."""
    copy = 2 if torch.cuda.is_available() else 4
    needed = (12 + copy) * sum(p.numel() for p in policy.parameters()) * checkpoints
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(f"--out {out}: {free >> 20} MiB free, {checkpoints} checkpoints need "
                        f"{needed >> 20} MiB; make room or lower --keep_last")  # fmt: skip


def agree(action):
    """Do it on every rank; where it fails on one, fail on all, with the first one's message."""
    try:
        result, problem = action(), None
    except UserError as error:
        result, problem = None, str(error)
    problems = [p for p in parallel.gather([problem]) if p]
    if problems:
        raise UserError(problems[0])
    return result


def choose_out(config: Config) -> Path:
    """The run's directory, writable, and not another run's. Rank 0 chooses."""

    def is_taken(out: Path) -> bool:
        return (out / "metrics.jsonl").exists() or bool(checkpoint.list_checkpoints(out))

    def choose() -> Path | None:
        if parallel.rank() > 0:
            return None
        out = Path(config.out or f"runs/{config.preset}")
        if config.resume:
            if not config.out:
                own = re.compile(re.escape(out.name) + r"(-[0-9]+)?")
                numbered = [p for p in out.parent.glob("*/metrics.jsonl")]
                numbered = [p.parent for p in numbered if own.fullmatch(p.parent.name)]
                out = max(numbered, key=lambda p: p.stat().st_mtime, default=out)
        elif is_taken(out):
            if config.out:
                raise UserError(f"--out {out}: holds a run already; add --resume or choose another")
            number = 2
            while is_taken(Path(f"{out}-{number}")):
                number += 1
            out = Path(f"{out}-{number}")
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not is_taken(out):  # else when it has been resumed: that may fail
                write_config(out, config)
        except OSError as error:
            raise checkpoint.explain_os_error(error, out) from None
        return out

    out = agree(choose)
    return Path(parallel.from_first(out))


def write_config(out: Path, config: Config) -> None:
    write_atomically(out / "config.json", checkpoint.to_json(asdict(config)))


def load_data(config: Config) -> tuple[list[Question] | None, list[Question]]:
    """(training questions, held-out questions); None for the toy world, which makes new ones."""
    if config.data == "toy":
        recipe = toy.LEVELS[config.toy_level]
        return None, toy.toy_questions(recipe, config.heldout, 0, heldout=True)
    wanted = (config.pass_rate_column, config.pass_rate_min, config.pass_rate_max)
    questions = agree(lambda: load_questions(config.data, wanted if wanted[0] else None))
    if config.heldout >= len(questions):
        raise UserError(
            f"--heldout {config.heldout}: {config.data} has {len(questions)} questions; lower it, or 0 for none"
        )
    # By a hash of the id: the same questions are held out whatever the seed or the order of the file.
    by_hash = sorted(questions, key=lambda q: hashlib.sha256(q.id.encode()).digest())
    kept_out = {q.id for q in by_hash[: config.heldout]}
    return [q for q in questions if q.id not in kept_out], [
        q for q in questions if q.id in kept_out
    ]


def find_model(config: Config) -> str:
    """The directory or hub id to load. Rank 0 brings up the toy's base while the others wait."""
    if config.model != "toy":
        return config.model
    recipe = toy.LEVELS[config.toy_level]
    if parallel.rank() == 0:
        toy.toy_policy_dir(recipe)
    parallel.barrier()
    return str(toy.toy_policy_dir(recipe))


def drop_long_prompts(config: Config, policy: Policy, questions: list[Question]) -> list[Question]:
    """Check every picture and measure every prompt, each rank a share; drop and count what is too long."""
    mine = range(parallel.rank(), len(questions), parallel.world())

    def measure() -> list[int]:
        share = [questions[i] for i in mine]
        bar = tqdm(total=len(share), desc="checking pictures", disable=parallel.rank() > 0)
        with bar:
            sizes = check_images(
                share, lambda results: (bar.update() and None or r for r in results)
            )
        lengths = [prompt_length(policy, q, config.template, s) for q, s in zip(share, sizes)]
        return [i for i, n in zip(mine, lengths) if n > config.max_prompt_tokens]

    too_long = set(parallel.gather(agree(measure)))
    kept = [q for i, q in enumerate(questions) if i not in too_long]
    if too_long and parallel.rank() == 0:
        tqdm.write(f"dropped {len(too_long)} of {len(questions)} questions: prompts over "
                   f"--max_prompt_tokens {config.max_prompt_tokens}")  # fmt: skip
    if not kept:
        raise UserError(f"--max_prompt_tokens {config.max_prompt_tokens}: every prompt is longer; "
                        "raise it or lower --max_pixels")  # fmt: skip
    return kept


# ---------------------------------------------------------------------------- save and resume

COUNTERS = ("step", "episode", "counts", "not_finite", "logp_mismatch")


def save(run: Run) -> None:
    """Write OUT/checkpoint-STEP, on all ranks together."""
    trainer = {name: getattr(run, name) for name in COUNTERS}
    trainer |= {"draws": run.buffer.draws, "config": asdict(run.config)}
    # At an episode's end nothing will be drawn from the buffer any more.
    samples = {"fresh": run.fresh, "buffer": run.buffer.samples if run.fresh else []}
    checkpoint.save(run.out, run.policy, run.optimizer, trainer, samples, run.config.keep_last)


def undamaged(directory: Path, action):
    """Do what reads a checkpoint; what it trips over is said in one line."""
    try:
        return action()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{directory}: damaged, or of another version ({type(error).__name__}: {error}); delete it to "
            "resume from the one before"
        ) from None


def resume(run: Run) -> bool:
    """Go back to the newest checkpoint of OUT; False where there is none yet."""
    found = parallel.from_first([str(p) for p in checkpoint.list_checkpoints(run.out)])
    if not found:
        return False
    directory = Path(found[-1])

    def load() -> dict:
        trainer = checkpoint.load_state(directory, run.policy, run.optimizer)
        if missing := sorted({*COUNTERS, "draws", "config"} - trainer.keys()):
            raise KeyError(f"trainer.json has no {missing[0]}")
        return trainer

    trainer = agree(lambda: undamaged(directory, load))
    before = trainer["config"]
    for name in ("data", "toy_level"):
        now, then = getattr(run.config, name), before.get(name)
        # A file may have moved; what its questions are is checked where they are needed.
        if then != now and (name == "toy_level" or "toy" in (then, now)):
            raise UserError(f"{directory}: was made with --{name} {before[name]}; resume with that, or start "
                            f"a new run from it: --model {directory}")  # fmt: skip
    changed = [
        name for name, value in before.items()
        if name not in ("out", "resume", "steps", "save_every", "keep_last", "eval_every")
        and value != getattr(run.config, name, value)
    ]  # fmt: skip
    if parallel.rank() == 0:
        tqdm.write(f"resuming {directory}")
        if changed:
            tqdm.write(f"note: flags changed since: {', '.join(changed)}")
    for name in COUNTERS:
        setattr(run, name, trainer[name])
    run.buffer.draws = trainer["draws"]
    packed = agree(lambda: checkpoint.read_samples(directory))
    known = {q.id: q for q in run.questions or []}

    def unpack() -> tuple[list[Sample], list[Sample]]:
        prompts = {}
        for qid in {row["qid"] for rows in packed.values() for row in rows}:
            if run.questions is None:
                known[qid] = toy.question_by_id(toy.LEVELS[run.config.toy_level], qid)
            elif qid not in known:
                raise UserError(f"{run.config.data}: no question {qid}, which the episode under way needs; "
                                "resume with the file and the flags of before")  # fmt: skip
            prompt = encode(run.policy, known[qid], run.config.template)
            # As in `sample_episode`: each rank holds all prompts, so none holds their pictures.
            prompts[qid] = replace(prompt, pixel_values=None) if parallel.world() > 1 else prompt
        return tuple(
            [checkpoint.unpack_sample(row, prompts) for row in packed[part]]
            for part in ("fresh", "buffer")
        )

    run.fresh, run.buffer.samples = agree(lambda: undamaged(directory, unpack))
    if run.step > run.total_steps:
        raise UserError(f"--steps {run.total_steps}: {directory} is further already; raise it")
    if parallel.rank() == 0:
        write_config(run.out, run.config)
    return True


# ---------------------------------------------------------------------------- signals


@contextlib.contextmanager
def gentle_stop(run: Run):
    """Ctrl-C and SIGTERM ask the loop to finish the step; a second Ctrl-C stops at once."""

    def ask(number, frame):
        if run.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.interrupted = True
        if parallel.rank() == 0:
            print("\nfinishing this step, then saving", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
