"""The settings of a training run: a dataclass whose fields are the flags.

A preset changes some defaults; a flag on the command line wins over both. The help of each flag says
what the paper [P] or its released code [C] uses.
"""

import argparse
from dataclasses import asdict, dataclass, field, fields

from data import TEMPLATES, UserError

# The architectures that `model.load_policy` takes; tests hold each of them against transformers.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
MIN_PIXELS, MAX_PIXELS = 256 * 28 * 28, 1280 * 28 * 28  # the paper's; 28 x 28 are a visual token
SIZE = (1 << 31) - 1  # bound of every number: it fits int32, and is finite in float32


def flag(default, help: str, choices: tuple | None = None, low=-SIZE, high=SIZE):
    """A field that is a flag; its value lies in [low, high]."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass
class Config:
    preset: str = flag("toy", "defaults to start from; with --data: own", ("toy", "own", "7b", "72b"))
    model: str = flag("toy", "toy, a directory, or a hub id of a Qwen-VL: 2, 2.5 or 3")
    data: str = flag("toy", "toy, or a .parquet, .jsonl or .csv file, laid out as in data.py")
    toy_level: str = flag("easy", "easy, hard, inverse, or chances of 1, 2, ... steps, such as 8,0,0,0,1")
    toy_family: str = flag("qwen2_5_vl", "architecture of the toy policy", FAMILIES)
    pass_rate_column: str = flag("", "select questions by this column, such as PassRate_7BBase")
    pass_rate_min: float = flag(0.01, "lowest pass rate kept [P: non-zero pass@8]")
    pass_rate_max: float = flag(1.0, "highest pass rate kept")
    heldout: int = flag(None, "held out; default: 128, or a tenth of a smaller file", low=0, high=100_000)
    template: str = flag("bare", "prompt [P: plain in stage 1, rethink in stage 2]", tuple(TEMPLATES))
    min_pixels: int = flag(0, "smallest area of a picture; 0: the checkpoint's [C: 256 visual tokens]", low=0)
    max_pixels: int = flag(0, "largest area of a picture; 0: the checkpoint's [C: 1280 visual tokens]", low=0)
    max_prompt_tokens: int = flag(4096, "longer prompts are dropped and counted", low=1, high=1 << 17)

    out: str = flag("", "directory of the run; default: runs/PRESET, numbered if taken")
    steps: int = flag(60, "optimiser steps; 0: `passes` over the data", low=0, high=10_000_000)
    passes: int = flag(3, "passes over the data when steps is 0 [P: at most 3]", low=1, high=1_000_000)
    seed: int = flag(0, "of all randomness; a response depends on (seed, step, question, its number)")
    save_every: int = flag(50, "steps between checkpoints; the last step always writes one", low=1)
    keep_last: int = flag(2, "checkpoints kept", low=1)
    eval_every: int = flag(20, "steps between measurements on held-out questions; 0: first and last", low=0)
    resume: bool = flag(False, "continue from the newest checkpoint in --out")
    explain: bool = flag(False, "no training: follow one toy question through the method, in numbers")

    episode_queries: int = flag(32, "questions sampled with frozen weights [P: 1024]", low=1, high=100_000)
    group_size: int = flag(8, "responses per question, G [P: 8]", low=2, high=1024)
    batch_size: int = flag(128, "responses per optimiser step [P: 512]", low=1)
    max_new_tokens: int = flag(48, "longest response [C: 2048]", low=1, high=1 << 17)
    # 0 is greedy: all responses of a group would be one; and logits divided by less overflow.
    temperature: float = flag(1.0, "when sampling, and in the log-probabilities [P: 1.0]", low=0.01)
    rollout_rows: int = flag(256, "responses decoded at once on a rank: their KV cache must fit", low=1)

    lr: float = flag(1e-4, "peak learning rate of AdamW [C: 1e-6]", low=0)
    warmup: float = flag(0.03, "share of the steps in which the learning rate rises [C: 0.03]", low=0, high=1)
    final_lr: float = flag(0.5, "where the cosine ends, as a share of the peak [C: 0.5]", low=0, high=1)
    weight_decay: float = flag(0.0, "of AdamW [C: 0]", low=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: not at all [C: 1.0]", low=0)
    micro_batch_tokens: int = flag(8192, "tokens per forward pass, padding included", low=1)
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass [C: true]")

    train_vision: bool = flag(True, "train the vision tower too [C: true]; with --lora_rank it is frozen")
    lora_rank: int = flag(0, "train adapters of this rank in place of weights; 0: all weights", low=0)
    lora_alpha: float = flag(32.0, "adapters' updates are scaled by lora_alpha / lora_rank", low=0)
    precision: str = flag("auto", "bf16: with weights in fp32; auto: bf16 on a GPU", ("auto", "bf16", "fp32"))
    shard: str = flag("world", "over all ranks, or within a node with a copy on each", ("world", "node"))
    tensor: int = flag(1, "ranks of a node that sample together, each with 1/N of every layer", low=1)
    offload: bool = flag(False, "keep weights and optimiser state in host memory between uses")
    cuda_graphs: bool = flag(True, "on a GPU, launch each decoding step as one graph")

    reward: str = flag("", "FILE.py:NAME, a function (response text, Question) -> a number of your own")
    advantage: str = flag("mean", "divide r - mean by the group's std [P: std] [C: mean]", ("mean", "std"))
    average: str = flag("token", "mean over tokens, or over responses' means [P]", ("token", "sequence"))
    clip_low: float = flag(0.2, "how far below 1 the ratio may fall [C: 0.2]", low=0, high=1)
    clip_high: float = flag(0.35, "how far above 1 the ratio may rise [C: 0.35]", low=0)
    recompute_logprobs: bool = flag(False, "take logp_old from the training forward pass [C: true]")

    ssr: str = flag("replay", "fill up by replay, drop zero advantages, or off", ("replay", "filter", "off"))
    ssr_alpha: float = flag(1.0, "draw in proportion to |A|^alpha [P: not given] [C: 1]", low=0)

    rethink_fraction: float = flag(0.25, "share of responses forced to look again [C: 0.65]", low=0, high=1)
    rethink_quota: int = flag(2, "second looks kept per question [P: 2]", low=0)
    rethink_sft_coef: float = flag(0.05, "weight of the loss on kept second looks [C: 0.05]", low=0)
    rethink_trigger: str = flag(
        "uniform", "blind, by whether y1 was right [C], or where it was wrong", ("uniform", "oracle", "wrong")
    )
    rethink_cutback: float = flag(0.0, "chance to cut y1 back before its answer [C: 0.5]", low=0, high=1)
    rethink_min_tokens: int = flag(1, "fewest tokens of a kept y2 [C: 30]", low=0)
    rethink_max_tokens: int = flag(1024, "most tokens of a kept y2 [C: 1024]", low=1)
    rethink_baseline: str = flag("before", "group mean before or after replacement [C]", ("before", "after"))


# What differs from the defaults, which are the toy's.
REAL = {
    "min_pixels": MIN_PIXELS,
    "max_pixels": MAX_PIXELS,
    "steps": 0,
    "lr": 1e-6,
    "gradient_checkpointing": True,
}
LARGE = REAL | {
    "template": "plain", "episode_queries": 1024, "batch_size": 512, "max_new_tokens": 2048,
    "save_every": 16, "eval_every": 16,
    "rethink_fraction": 0.0, "rethink_min_tokens": 30,
}  # fmt: skip
PRESETS = {
    "toy": {},
    "own": REAL | {
        "template": "rethink", "passes": 10, "batch_size": 64, "max_new_tokens": 1024, "rollout_rows": 64,
        "save_every": 20, "keep_last": 1, "micro_batch_tokens": 12288,
    },
    "7b": LARGE | {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct", "pass_rate_column": "PassRate_7BBase", "rollout_rows": 192,
        "micro_batch_tokens": 24576,
    },
    "72b": LARGE | {
        "model": "Qwen/Qwen2.5-VL-72B-Instruct", "pass_rate_column": "PassRate_32BTrained",
        "tensor": 8, "rollout_rows": 128,
    },
}  # fmt: skip


def parse(argv: list[str]) -> Config:
    """Flags -> Config. Raises UserError for an unknown flag or value, and for values that clash.

    >>> parse(["--lr", "0.001", "--resume"]).lr
    0.001
    """
    given = read_flags(Config, "train.py", "Teach a Qwen vision-language model to think slowly.", argv)
    if given.get("data", "toy") != "toy" and given.get("model") != "toy":
        given = {"preset": "own"} | given
    config = Config(**(PRESETS[given.get("preset", "toy")] | given))
    if config.data != "toy" and config.model == "toy" and "model" not in given:
        how = "such as Qwen/Qwen2.5-VL-3B-Instruct; or --model toy, to try the file on any machine"
        raise UserError(f"--data {config.data}: give --model, {how}")
    if given.get("train_vision") and config.lora_rank:
        raise UserError("--train_vision true: --lora_rank trains the decoder's adapters alone; drop one")
    if config.steps == 0 and config.data == "toy":
        raise UserError("--steps 0 passes over a data file: give --data FILE, or --steps N")
    if config.rethink_min_tokens > config.rethink_max_tokens:
        window = f"--rethink_min_tokens {config.rethink_min_tokens}"
        raise UserError(f"{window} is above --rethink_max_tokens {config.rethink_max_tokens}; lower it")
    responses = config.episode_queries * config.group_size
    if responses % config.batch_size:
        product = f"--episode_queries {config.episode_queries} x --group_size {config.group_size}"
        raise UserError(f"--batch_size {config.batch_size} does not divide {product} = {responses}")
    return config


def sources(config: Config) -> str:
    """Where a run's settings come from.

    >>> sources(parse(["--model", "toy", "--data", "mine.csv", "--lr", "0.001"]))
    'settings: preset toy (the defaults); flags: data mine.csv, lr 0.001'
    """
    preset = PRESETS[config.preset]
    start = asdict(Config(**(preset | {"preset": config.preset})))
    flags = {k: v for k, v in asdict(config).items() if v != start[k]}
    listed, given = (", ".join(f"{k} {v}" for k, v in values.items()) for values in (preset, flags))
    return f"settings: preset {config.preset} ({listed or 'the defaults'}); flags: {given or 'none'}"


def read_flags(kind: type, program: str, description: str, argv: list[str]) -> dict:
    """{field: value} of those flags of a dataclass that are given. Raises UserError."""
    parser = argparse.ArgumentParser(
        program,
        description=description,
        usage=f"python {program} [--FIELD VALUE ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def fail(message):
        raise UserError(f"{message}; see python {program} --help")

    parser.error = fail
    for f in fields(kind):
        default = "" if f.default in (None, "") else f" (default: {f.default})"
        text = f"{f.metadata['help']}{default}".replace("%", "%%")
        options = {"help": text, "choices": f.metadata["choices"], "default": argparse.SUPPRESS}
        if f.type is bool:  # --flag, --flag true, --flag false
            options |= {"type": read_bool, "nargs": "?", "const": True, "metavar": "true|false"}
        elif f.type is tuple:
            options |= {"nargs": 2, "metavar": ("A", "B")}
        else:
            options |= {"type": f.type}
        parser.add_argument(f"--{f.name}", **options)
    given = vars(parser.parse_args(argv))
    for f in fields(kind):
        value = given.get(f.name)
        if isinstance(value, (int, float)):
            low, high = f.metadata["low"], f.metadata["high"]
            if not low <= value <= high:  # nan too
                fail(f"--{f.name} {value}: must be at least {low} and at most {high}")
    return given


def read_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() == "true"
