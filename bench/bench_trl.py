"""Whole optimiser steps of TRL's GRPOTrainer and of ours, on the same work, in one run.

    python -m venv --system-site-packages /tmp/trl && /tmp/trl/bin/pip install trl
    /tmp/trl/bin/python bench/bench_trl.py           (--quick: a tiny model, to see that it runs)

TRL is needed for this bench and bench_trl_curves.py alone. It trains in its own loop. On a CPU a callback
takes one of our steps after each of its own, so that both meet the same machine at the same time. On a GPU
our steps follow when TRL's are done: recording a decoding step empties the allocator's cache, and TRL would
pay for filling it again.

The same in both: the random Qwen2.5-VL and its weights, fp32 on a CPU and bf16 on a GPU; 8 questions x 8
responses; the chat template and tokenizer; responses of 100 tokens (256 on a GPU) at temperature 1, since
no token that ends a turn is ever sampled; rewards that alternate 0 and 1 within every group, so that every
group has advantages and all 64 responses are trained (`--ssr off` here); one optimiser step per episode,
hence no second pass for old log-probabilities; no reference model; clipped token-mean loss with 0.2 and
0.35, advantages r - mean; eight micro-batches of eight responses; torch's AdamW, gradient norm 1.0; no
gradient checkpointing; nothing logged or saved.

A step is everything from the questions to the new weights: pictures through the processor, sampling,
rewards, advantages, forward, backward, AdamW. It is TRL's own path without vLLM: HF generate on 64 rows,
and 64 rows of prompt + response in training. TRL's copy of the model keeps two of our changes, which make
it faster: windows of a picture in one attention call, and norms in one kernel. TRL reads pictures with
torchvision where that is installed, ours never does. Not compared: vLLM, several ranks, and what either
gains when responses end early.

What differs: ours also records the log-probability of each token as it is sampled, and takes the ratio
against that; TRL takes it against the same forward pass. Ours leaves banned ids out of the softmax; TRL
does so in sampling alone. A micro-batch of ours is one question's tree; TRL shuffles.
"""

import argparse
import copy
import gc
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import benching  # first: it puts the repository on the path
import torch
from PIL import Image
from transformers import PrinterCallback, TrainerCallback
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

import train
from config import Config
from data import MARKER, Question
from model import encode
from prepare import Run
from ssr import ReplayBuffer

MISSING = (
    "This bench needs TRL, which nothing else here does. Install it apart and run it there:\n"
    "    python -m venv --system-site-packages /tmp/trl && /tmp/trl/bin/pip install trl\n"
    "    /tmp/trl/bin/python bench/bench_trl.py"
)
# Weights in the proportions of the published 3B: the vocabulary about a tenth of the layers, the
# vision tower about a quarter of them.
SHAPES = {
    "gpu": benching.Shape(1536, 8256, 12, 12, 2, 65536, 800, 2140, 16, 10, (), 128),
    "small": benching.Shape(256, 1024, 8, 4, 2, 4096, 128, 288, 8, 4, ()),
    "quick": benching.Shape(64, 128, 2, 2, 1, 1024, 32, 64, 2, 2, (), 32),
}


class Processor(Qwen2_5_VLProcessor):
    """transformers' own processor without its half for videos, which needs torchvision."""

    def __init__(self, image_processor, tokenizer):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        template = tokenizer.chat_template
        super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=template)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def make_questions(count: int, image_tokens: int) -> list[Question]:
    """Questions of one length with pictures of noise, `image_tokens` visual tokens each."""
    side = round(image_tokens**0.5) * 28
    generator = torch.Generator().manual_seed(0)
    questions = []
    for i in range(count):
        noise = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=generator)
        text = f"{MARKER}Start at red and take {i % 10} steps. Which colour is reached?"
        questions.append(Question(str(i), text, [Image.fromarray(noise.numpy())], "red"))
    return questions


def optimiser(policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)


# ---------------------------------------------------------------------------- ours


def our_step(policy, questions: list[Question], args):
    """A function that takes one whole step as train.py does, and returns its response tokens."""
    prompt_length = len(encode(policy, questions[0], "bare").input_ids)
    config = Config(
        episode_queries=len(questions), group_size=args.group_size, ssr="off", lr=1e-5,
        final_lr=1.0, batch_size=len(questions) * args.group_size, warmup=0.0,
        max_new_tokens=args.new_tokens,
        micro_batch_tokens=prompt_length + args.group_size * args.new_tokens,  # one tree
    )  # fmt: skip
    run = Run(
        config, Path(), policy.train(), optimiser(policy), questions, heldout=[],
        total_steps=1 << 30, buffer=ReplayBuffer(),
    )  # fmt: skip
    coin = itertools.cycle((0.0, 1.0))
    run.grade = lambda text, question: next(coin)

    def step() -> int:
        groups, run.counts = train.sample_episode(run)
        run.fresh = [sample for group in groups for sample in group]
        run.episode += 1
        row = train.train_step(run, 0.0)
        if row["effective_queries"] < 1 or row["batch_responses"] != len(groups) * args.group_size:
            raise RuntimeError("not all groups were trained")
        return int(row["response_tokens"])

    return step


# ---------------------------------------------------------------------------- TRL's


class Stopwatch(TrainerCallback):
    """Times TRL's optimiser steps and ours, and how much memory they take on a GPU."""

    def __init__(self, step, alternate: bool):
        """step  takes one of ours and returns its response tokens;  alternate  after each of TRL's"""
        self.step, self.alternate, self.tokens = step, alternate, 0
        self.seconds, self.memory = {"TRL": [], "ours": []}, {"TRL": 0, "ours": 0}

    def begin(self) -> None:
        benching.synchronise()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.start = time.perf_counter()

    def end(self, who: str) -> None:
        benching.synchronise()
        self.seconds[who].append(time.perf_counter() - self.start)
        if torch.cuda.is_available():
            self.memory[who] = max(self.memory[who], torch.cuda.max_memory_allocated() - self.before)

    def ours(self) -> None:
        self.begin()
        self.tokens = self.step()
        self.end("ours")

    def on_train_begin(self, *args, **kwargs):
        self.begin()

    def on_step_end(self, *args, **kwargs):
        self.end("TRL")
        if self.alternate:
            self.ours()
        self.begin()


def make_trainer(model, policy, questions: list[Question], reward, watch: Stopwatch, out: str, **settings):
    """TRL's trainer of `model`, with the tokenizer and the image processor of `policy`.

    reward    as TRL calls it;  optimizers  among the settings: (optimiser, schedule), default TRL's own
    settings  of GRPOConfig
    """
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    pictures, optimizers = policy.image_processor, settings.pop("optimizers", (None, None))
    if is_torchvision_available():  # several times faster, and what TRL's users have
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        area = {edge: pictures.size[edge] for edge in ("shortest_edge", "longest_edge")}
        pictures = Qwen2VLImageProcessor(size=area)
    config = GRPOConfig(
        output_dir=out, generation_kwargs={"suppress_tokens": policy.banned_ids}, temperature=1.0, beta=0.0,
        num_iterations=1, epsilon=0.2, epsilon_high=0.35, scale_rewards=False, loss_type="dapo",
        max_grad_norm=1.0, bf16=False, use_cpu=policy.device.type == "cpu", gradient_checkpointing=False,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, **settings,
    )  # fmt: skip
    rows = [
        {
            "prompt": [{"role": "user", "content": q.text.removeprefix(MARKER)}],
            "image": q.images[0],
            "answer": q.answer,
        }
        for q in questions
    ]
    trainer = GRPOTrainer(
        model=model, args=config, reward_funcs=reward, train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[watch], processing_class=Processor(pictures, policy.tokenizer),
        optimizers=optimizers,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def compare(policy, image_tokens: int, args) -> Stopwatch:
    """Whole steps: TRL's on a copy of the policy, ours on the policy."""
    questions = make_questions(args.questions, image_tokens)
    theirs = copy.deepcopy(policy)
    on_cpu = policy.device.type == "cpu"
    watch = Stopwatch(our_step(policy, questions, args), alternate=on_cpu)
    responses = args.questions * args.group_size
    lengths = []

    def alternating_reward(completion_ids, **kwargs):
        lengths.append(sum(map(len, completion_ids)))
        return [float(i % 2) for i in range(len(completion_ids))]

    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(
            theirs.model, policy, questions, alternating_reward, watch, out, seed=0, max_steps=args.steps + 1,
            per_device_train_batch_size=args.group_size, num_generations=args.group_size,
            gradient_accumulation_steps=args.questions,  # as many micro-batches as ours: a group each
            generation_batch_size=responses, max_completion_length=args.new_tokens,
            optimizers=(optimiser(theirs), None),
        )  # fmt: skip
        trainer.train()
    if not on_cpu:
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        for _ in range(args.steps + 1):
            watch.ours()
    expected = responses * args.new_tokens
    if set(lengths) != {expected} or watch.tokens != expected:
        raise RuntimeError(f"tokens: TRL {lengths}, ours {watch.tokens}, expected {expected}")
    return watch


def main(argv: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and one step")
    sizes = [256, 1024] if on_gpu else [64, 144, 400]
    parser.add_argument("--image_tokens", type=int, nargs="+", default=sizes)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=256 if on_gpu else 100)
    steps = 2 if on_gpu else 3
    parser.add_argument("--steps", type=int, default=steps, help="measured steps; one more warms up")
    args = parser.parse_args(argv)
    try:
        import trl
    except ImportError:
        print(MISSING)
        return
    if args.quick:
        args.image_tokens, args.questions, args.new_tokens, args.steps = [4, 16], 2, 6, 1
    shape = SHAPES["quick" if args.quick else "gpu" if on_gpu else "small"]
    kind = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    rows = []
    for image_tokens in args.image_tokens:
        policy = benching.random_policy(shape, *kind)
        prompt = encode(policy, make_questions(1, image_tokens)[0], "bare")
        watch = compare(policy, image_tokens, args)
        seconds = {who: statistics.median(s[1:]) for who, s in watch.seconds.items()}
        rate = {who: watch.tokens / s for who, s in seconds.items()}
        rows.append([
            image_tokens, len(prompt.input_ids), rate["TRL"], rate["ours"],
            benching.times(rate["ours"], rate["TRL"]), seconds["TRL"], seconds["ours"],
            *(benching.mib(watch.memory[who]) for who in seconds if on_gpu),
        ])  # fmt: skip
        print(f"{image_tokens} image tokens, seconds: {watch.seconds}", file=sys.stderr)
    header = ["image tokens", "prompt", "TRL, response tokens/s", "ours", "ratio",
              "TRL, seconds per step", "ours"]  # fmt: skip
    header += ["TRL, MiB above weights and moments", "ours"] if on_gpu else []
    print(benching.table(header, rows))
    how = "alternating" if not on_gpu else "TRL's, then ours"
    print(
        f"\nWhole optimiser steps, {how}, median of {args.steps}: {args.questions} questions "
        f"x {args.group_size} responses x {args.new_tokens} tokens, all groups trained; "
        f"{benching.parameters(policy) / 1e6:.1f}M parameters, {'bf16' if on_gpu else 'fp32'}. TRL {trl.__version__}.\n"
        f"{benching.machine()}"
    )


if __name__ == "__main__":
    main()
