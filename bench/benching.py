"""What the benches share: a random Qwen2.5-VL of a given shape, prompts of a given length, a table.

Speed does not depend on what the weights say, so nothing is downloaded: the model has the
published layout and random weights, the prompts random ids and pixels. Ways that are compared
alternate in one process (`alternate`), so that a busy machine disturbs all of them alike; memory is
that of one step in a process of its own (`step_memory`).

Importing this file puts the repository on the path, so that `python bench/bench_train.py` works.
"""

import ctypes
import datetime
import multiprocessing
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import Question
from model import Policy, Prompt, mrope_positions
from toy import SPECIAL, toy_tokenizer

MIB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5-VL, and the (prompt, response) lengths it is measured at."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    lengths: tuple  # of (prompt, response)
    head_dim: int = 64


SHAPES = {
    # Prompt : response = 1/4, 1, 4, on a model whose vocabulary weighs as much as its layers.
    "small": Shape(384, 1536, 8, 6, 2, 32768, 192, 384, 4, 4, ((48, 192), (128, 128), (256, 64))),
    "quick": Shape(64, 128, 2, 2, 1, 1024, 32, 64, 2, 2, ((8, 32), (16, 16), (32, 8)), 32),
    # Qwen2.5-VL-3B as published; a picture's prompt first, then the three ratios.
    "3b": Shape(2048, 11008, 36, 16, 2, 151936, 1280, 3420, 32, 16,
                ((1300, 512), (128, 512), (512, 512), (2048, 512)), 128),
}  # fmt: skip


# ---------------------------------------------------------------------------- what is measured


def random_policy(shape: Shape, device="cpu", dtype=torch.float32) -> Policy:
    """A policy with random weights that never says a token that ends a turn: lengths are fixed."""
    tokenizer = toy_tokenizer()
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("im_end", "endoftext", "image_pad", "video_pad", "vision_start", "vision_end")
    }
    half = shape.head_dim // 2
    time, height = half // 4, half // 4 + half // 8
    last = shape.vision_layers - 1
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocab, "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
            "bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [time, height, half - time - height]},
        },
        vision_config={
            "depth": shape.vision_layers, "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate, "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": [*range(7, last + 1, 8)] or [last],
        },
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    # The ids that end a turn; none of the sampling settings of a published generation_config.
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["im_end"], ids["endoftext"]], pad_token_id=ids["endoftext"]
    )
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4096 * 28 * 28)
    policy = Policy(model, tokenizer, processor)
    policy.banned_ids = sorted({*policy.banned_ids, *policy.eos_ids})
    return policy


def random_ids(policy: Policy, count: int, generator: torch.Generator) -> torch.Tensor:
    """Ids of plain text."""
    return torch.randint(len(SPECIAL), len(policy.tokenizer), (count,), generator=generator)


def random_prompt(policy: Policy, length: int, seed: int) -> Prompt:
    """A prompt of `length` tokens, about three quarters of them one square picture."""
    generator = torch.Generator().manual_seed(seed)
    config = policy.model.config
    side = max(1, int((0.75 * length) ** 0.5))
    text = random_ids(policy, length - side * side - 2, generator)
    start, end = torch.tensor([[config.vision_start_token_id], [config.vision_end_token_id]])
    picture = torch.full((side * side,), config.image_token_id)
    input_ids = torch.cat([text[: len(text) // 2], start, picture, end, text[len(text) // 2 :]])
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    width = 3 * policy.image_processor.temporal_patch_size * policy.image_processor.patch_size**2
    pixels = torch.randn(4 * side * side, width, generator=generator)
    positions = mrope_positions(policy, input_ids, grid)
    return Prompt(Question(str(seed), "", [], ""), "bare", input_ids, positions, grid, pixels)


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------- how it is measured


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(action) -> float:
    """Seconds it takes."""
    synchronise()
    start = time.perf_counter()
    action()
    synchronise()
    return time.perf_counter() - start


def alternate(ways: dict, repeats: int) -> dict:
    """The median seconds of each way: once unmeasured, then `repeats` times in turn.

    A way that does not fit on the GPU has None.
    """
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, action in ways.items():
            if seconds[name] is None:
                continue
            try:
                elapsed = timed(action)
            except torch.OutOfMemoryError:
                seconds[name] = None
                torch.cuda.empty_cache()
                continue
            if turn:
                seconds[name].append(elapsed)
    return {name: s and statistics.median(s) for name, s in seconds.items()}


def gpu_step_memory(action) -> int | None:
    """Bytes allocated at the peak of `action`, above what stood before it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        timed(action)
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated() - before


def cpu_step_memory(action) -> int | None:
    """The same of resident memory, which counts what torch takes (tracemalloc would not see it).

    Linux keeps a high-water mark a process; writing 5 to clear_refs sets it back to the present.
    A first, unmeasured time loads libraries; what it leaves behind is given back to the system.
    None where there is no such thing.
    """
    action()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        action()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def step_memory(make_ways, arguments: tuple, names: list[str]) -> dict:
    """Peak memory of one step of each way on a CPU: {name: bytes or None}.

    make_ways  a function of a module, (*arguments) -> {name: action}

    Each way runs in a new process, so that none finds memory that another has left. Those
    processes are forked from one that has only imported torch: a fork of this one would inherit
    its memory, and OpenMP does not survive a fork.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        jobs = [(make_ways, arguments, name, torch.get_num_threads()) for name in names]
        return dict(zip(names, pool.starmap(measure_one, jobs, chunksize=1)))


def measure_one(make_ways, arguments: tuple, name: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    return cpu_step_memory(make_ways(*arguments)[name])


# ---------------------------------------------------------------------------- how it is said


def machine() -> str:
    """Where and when: one line under every table."""
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        where = f"{processor_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return (
        f"{where}; torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}; {datetime.date.today()}"
    )


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def table(header: list[str], rows: list[list]) -> str:
    """A markdown table; numbers are rounded to three digits, None is a dash."""
    cells = [[shown(x) for x in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    lines = [" | ".join(x.ljust(w) for x, w in zip(row, widths)) for row in [header, *cells]]
    lines.insert(1, " | ".join("-" * w for w in widths))
    return "\n".join(f"| {line} |" for line in lines)


def shown(x) -> str:
    if x is None:
        return "-"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return str(x)


def rate(count: float, seconds: float | None) -> float | None:
    return count / seconds if seconds else None


def mib(size: int | None) -> float | None:
    return None if size is None else size / MIB


def times(value: float | None, base: float | None) -> str | None:
    """How many times `base`: '2.31x'."""
    return f"{value / base:.2f}x" if value and base else None
