"""What a training run is made of, and how it is put together before the first step.

Everything the user can get wrong is found here and reported in one line, before any training.
"""

import contextlib
import hashlib
import json
import math
import runpy
import shutil
import signal
import sys
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

import checkpoint
import lora
import parallel
import record
import toy
from config import SIZE, Config, sources
from data import Question, UserError, check_images, load_questions, printable
from model import Policy, Sample, find_checkpoint, load_policy, prompt_length
from record import lock_folder
from ssr import ReplayBuffer

# Your own reward: (text of the response, its Question) -> a number. Of a second look, the text is y2.
Grade = Callable[[str, Question], float]


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
    grade: Grade | None = None  # None: the rule's verdict, 1 or 0
    data_checksum: int = 0  # of the questions, by which a resumed run knows them
    lock: TextIO | None = None  # on `out`, held while the file is open; rank 0's
    step: int = 0  # optimiser steps done, skipped ones included
    episode: int = 0  # episodes sampled
    fresh: list[Sample] = field(default_factory=list)  # of this episode, not yet trained on
    counts: dict = field(default_factory=dict)  # of this episode, for the metrics
    not_finite: int = 0  # steps in a row skipped for a gradient that was not finite
    measured: int = -1  # the step of the last measurement on held-out questions
    interrupted: bool = False  # by Ctrl-C or SIGTERM: finish the step, save, stop


def prepare(config: Config, grade: Grade | None = None, buffer: ReplayBuffer | None = None) -> Run:
    """Load, check and shard everything. Raises UserError, on all ranks alike, for what cannot work."""
    device = parallel.start(config.precision)
    check_share(config)
    grade = own_reward(config, grade)
    out, lock = run_folder(config)
    say(sources(config))
    questions, heldout = load_data(config)
    # Of ids, texts and answers in the order of the file, which decides the order of training.
    asked = json.dumps([(q.id, q.text, q.answer) for q in questions + heldout]) if questions else ""
    checksum = zlib.crc32(asked.encode())
    # Before the model is loaded, which takes minutes.
    pictures = check_pictures(questions + heldout) if questions else {}
    model = model_path(config)
    directory = parallel.agree(lambda: find_checkpoint(model))
    checkpoint.check_model(directory)
    empty = torch.distributed.is_initialized()  # then each rank reads its own part of the weights
    areas = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
    policy = parallel.agree(lambda: load_policy(str(directory), empty=empty, **areas))
    if questions is not None:
        questions = drop_long_prompts(config, policy, questions, pictures)
        heldout = drop_long_prompts(config, policy, heldout, pictures)
        config.heldout = len(heldout)
        fit_sizes(config, len(questions))
    if config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.model.visual.requires_grad_(config.train_vision)
    if config.lora_rank:
        lora.adapt(policy, config.lora_rank, config.lora_alpha)
    policy.slices = parallel.agree(lambda: parallel.slices(policy, config.tensor))
    policy = parallel.shard(policy, device, config.shard, config.offload, config.precision).train()
    policy.cuda_graphs = config.cuda_graphs
    parallel.agree(lambda: check_room(out, policy, config.keep_last + 1))
    if empty:
        parallel.agree(lambda: checkpoint.load_weights(directory, policy))
    lora.initialise(policy, config.seed)
    optimizer = parallel.optimizer(policy, config.lr, config.weight_decay)
    total = config.steps or config.passes * len(questions) * config.group_size // config.batch_size
    if parallel.rank() == 0 and not checkpoint.list_checkpoints(out):
        record.write_config(out, config)  # with the sizes that fit
    buffer = ReplayBuffer(config.ssr_alpha, config.seed) if buffer is None else buffer
    return Run(config, out, policy, optimizer, questions, heldout, total, buffer, grade, checksum, lock)


def say(line: str) -> None:
    """Print it once, whatever the number of ranks."""
    if parallel.rank() == 0:
        tqdm.write(printable(line))


def own_reward(config: Config, grade: Grade | None) -> Grade | None:
    """The run's own reward, from an argument of `main` or from --reward, or None.

    Its mistakes become errors of one line; its name goes into the run's config.json.
    """
    if grade:
        named = grade if hasattr(grade, "__qualname__") else type(grade)  # such as functools.partial
        config.reward = f"{named.__module__}:{named.__qualname__}"
    grade = grade or parallel.agree(lambda: load_reward(config.reward))

    def guarded(text: str, question: Question) -> float:
        try:
            value = float(grade(text, question))
        except (Exception, SystemExit) as error:  # whatever the user's function does wrong
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{at.filename}:{at.lineno}, question {question.id}"
            raise UserError(f"--reward {config.reward}: {type(error).__name__}: {error} ({where})") from error
        if not abs(value) <= SIZE:  # nan too; and squares of gradients must fit float32
            raise UserError(f"--reward {config.reward}: {value} for question {question.id}; make it finite")
        return value

    return guarded if grade else None


def load_reward(place: str) -> Grade | None:
    """The function that --reward FILE.py:NAME names; None where the flag is not given."""
    if not place:
        return None
    path, _, name = place.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UserError(f"--reward {place}: must be FILE.py:NAME")
    sys.path.append(str(Path(path).parent))  # for what the file imports, now or when it is called
    try:
        grade = runpy.run_path(path).get(name)
    except (Exception, SystemExit) as error:  # noqa: BLE001, whatever the user's file does wrong
        raise UserError(f"--reward {place}: {type(error).__name__}: {error}") from None
    if not callable(grade):
        raise UserError(f"--reward {place}: {path} has no function {name}")
    return grade


def check_room(out: Path, policy: Policy, checkpoints: int) -> None:
    """Raise UserError where the disk cannot hold so many checkpoints: of each trained weight 12 bytes (in
    fp32, and its two moments), and the hub's copy."""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    copy = policy.compute_dtype.itemsize * sum(p.numel() for p in policy.parameters())
    needed, free = (12 * trained + copy) * checkpoints, shutil.disk_usage(out).free
    if free < needed:
        sizes = f"{free >> 20} MiB free, {checkpoints} checkpoints need {needed >> 20} MiB"
        raise UserError(f"--out {out}: {sizes}; make room or lower --keep_last")


def is_taken(out: Path) -> bool:
    return (out / "metrics.jsonl").exists() or bool(checkpoint.list_checkpoints(out))


def run_folder(config: Config) -> tuple[Path, TextIO | None]:
    """The run's directory, writable and not another run's, and the lock on it. Rank 0 chooses: by default
    runs/PRESET, numbered if taken."""

    def choose() -> tuple[Path | None, TextIO | None]:
        if parallel.rank() > 0:
            return None, None
        if config.resume and not config.out:
            raise UserError("--resume: give the run's folder too, as --out")
        out, n = Path(config.out or f"runs/{config.preset}"), 1
        while not config.out and is_taken(out):
            n += 1
            out = Path(f"runs/{config.preset}-{n}")
        if is_taken(out) and not config.resume:
            raise UserError(f"--out {out}: holds a run already; add --resume or choose another")
        try:
            out.mkdir(parents=True, exist_ok=True)
            return out, lock_folder(out)
        except OSError as error:
            raise checkpoint.explain_os_error(error, out) from None

    out, lock = parallel.agree(choose)
    return Path(parallel.from_first(out)), lock


def load_data(config: Config) -> tuple[list[Question] | None, list[Question]]:
    """(training questions, held-out questions); None for the toy world, which makes new ones."""
    if config.data == "toy":
        config.heldout = 128 if config.heldout is None else config.heldout
        recipe = toy.level(config.toy_level)
        return None, toy.toy_questions(recipe, config.heldout, 0, heldout=True)
    everything = parallel.agree(lambda: load_questions(config.data, config.pass_rate_column))
    if config.heldout is None:
        config.heldout = min(128, max(1, len(everything) // 10), len(everything) - 1)
    # By a hash of the id, and before any filter: the same questions are held out whatever the seed, the order
    # of the file or the pass rate, so that no stage trains on what another is measured on.
    by_hash = sorted(everything, key=lambda q: hashlib.sha256(q.id.encode()).digest())
    kept_out = {q.id for q in by_hash[: config.heldout]}
    training, heldout = ([q for q in everything if (q.id in kept_out) == out] for out in (False, True))
    if config.pass_rate_column:
        training = [q for q in training if config.pass_rate_min <= q.pass_rate <= config.pass_rate_max]
    if not training:
        none = f"{config.data}: of {len(everything)} questions none is left to train on"
        raise UserError(f"{none}; lower --heldout {config.heldout}, or widen --pass_rate_min and _max")
    return training, heldout


def check_share(config: Config) -> None:
    if config.episode_queries < parallel.world():
        shared = f"--episode_queries {config.episode_queries} cannot be shared by {parallel.world()} ranks"
        raise UserError(f"{shared}; give each at least one question")


def fit_sizes(config: Config, n: int) -> None:
    """Lower what does not fit a file of n training questions, and say so in one line: questions, to a
    number whose responses fill batches; where n is too small for one batch, the batch."""
    queries, batch, G = config.episode_queries, config.batch_size, config.group_size
    if n < queries:
        fill = batch // math.gcd(batch, G)  # the fewest questions whose responses fill whole batches
        config.episode_queries = n - n % fill or n
    responses = config.episode_queries * G
    config.batch_size = max(b for b in range(1, batch + 1) if responses % b == 0)
    check_share(config)
    pairs = {"episode_queries": (queries, config.episode_queries), "batch_size": (batch, config.batch_size)}
    lowered = ", ".join(f"--{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new)
    counts = f"{config.data}: {n} questions to train on, {config.heldout} held out"
    say(f"{counts}; lowered to fit: {lowered}" if lowered else counts)


def model_path(config: Config) -> str:
    """The directory or hub id to load. Rank 0 makes the toy's base while the others wait."""
    if config.model != "toy":
        return config.model
    recipe = replace(toy.level(config.toy_level), family=config.toy_family)
    parallel.agree(lambda: parallel.rank() == 0 and toy.toy_policy_dir(recipe))
    return str(toy.toy_policy_dir(recipe))


def check_pictures(questions: list[Question]) -> dict[str, list[tuple]]:
    """Decode every picture once, each rank a share: {question id: picture sizes} of this rank's."""
    share = questions[parallel.rank() :: parallel.world()]
    sizes = parallel.agree(lambda: check_images(share, show=parallel.rank() == 0))
    return dict(zip([q.id for q in share], sizes))


def drop_long_prompts(config: Config, policy: Policy, questions: list[Question], pictures: dict):
    """The questions whose prompts fit; others are counted. `pictures` are this rank's share."""
    limit, mine = config.max_prompt_tokens, [q for q in questions if q.id in pictures]
    too_long = [q.id for q in mine if prompt_length(policy, q, config.template, pictures[q.id]) > limit]
    too_long = set(parallel.gather(too_long))
    if too_long:
        counts = f"{len(too_long)} of {len(questions)}"
        say(f"dropped {counts} questions: prompts over --max_prompt_tokens {limit}")
    if questions and len(too_long) == len(questions):
        how = "raise it or lower --max_pixels"
        raise UserError(f"--max_prompt_tokens {limit}: all {len(questions)} prompts are longer; {how}")
    return [q for q in questions if q.id not in too_long]


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
