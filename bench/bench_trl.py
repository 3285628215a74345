"""Whole optimiser steps of TRL's GRPOTrainer and of ours, on the same work, in one run.

    python -m venv --system-site-packages /tmp/trl && /tmp/trl/bin/pip install trl
    /tmp/trl/bin/python bench/bench_trl.py           (--quick: a tiny model, to see that it runs)

TRL is needed for this bench and nothing else. It trains in its own loop; after each of its
optimiser steps a callback takes one of ours, so that both meet the same machine at the same time.

The same in both: the random Qwen2.5-VL and its fp32 weights; 8 questions x 8 responses, with
pictures of 64, 144 or 400 visual tokens; the chat template and tokenizer; up to 100 new tokens at
temperature 1 and never a token that ends a turn, so that all responses have 100; rewards that
alternate 0 and 1 within every group, so that every group has advantages and all 64 responses are
trained (`--ssr off` here); one optimiser step an episode, hence no second pass for old
log-probabilities; no reference model; clipped token-mean loss with 0.2 and 0.35, advantages
r - mean; eight micro-batches of eight responses; torch's AdamW, gradient norm 1.0; no gradient
checkpointing; nothing logged or saved.

A step is everything from the questions to the new weights: pictures through the processor,
sampling, rewards, advantages, forward, backward, AdamW. It is TRL's own path without vLLM: HF
generate on 64 rows, and 64 rows of prompt + response in training. Not compared: vLLM, several
ranks, GPUs, and what either gains when responses end early.

What differs: ours also records the log-probability of each token as it is sampled, and takes the
ratio against that; TRL takes it against the same forward pass. Ours leaves banned ids out of the
softmax; TRL does so in sampling alone. A micro-batch of ours is one question's tree; TRL shuffles.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import benching  # first: it puts the repository on the path
import torch
from PIL import Image
from transformers import PrinterCallback, TrainerCallback
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

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


class AfterEachStep(TrainerCallback):
    """Times TRL's optimiser steps, and takes one of ours after each."""

    def __init__(self, step):
        self.step, self.seconds, self.tokens = step, {"TRL": [], "ours": []}, 0

    def on_train_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds["TRL"].append(time.perf_counter() - self.start)
        self.start = time.perf_counter()
        self.tokens = self.step()
        self.seconds["ours"].append(time.perf_counter() - self.start)
        self.start = time.perf_counter()


def compare(policy, image_tokens: int, args) -> AfterEachStep:
    """Alternate whole steps: TRL's on a copy of the policy, ours on the policy."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    questions = make_questions(args.questions, image_tokens)
    theirs = copy.deepcopy(policy)
    callback = AfterEachStep(our_step(policy, questions, args))
    responses = args.questions * args.group_size
    micro_batches = args.questions  # as many as ours: a group each
    lengths = []

    def alternating_reward(completion_ids, **kwargs):
        lengths.append(sum(map(len, completion_ids)))
        return [float(i % 2) for i in range(len(completion_ids))]

    with tempfile.TemporaryDirectory() as out:
        settings = GRPOConfig(
            output_dir=out, max_steps=args.steps + 1, per_device_train_batch_size=args.group_size,
            gradient_accumulation_steps=micro_batches, num_generations=args.group_size,
            generation_batch_size=responses, max_completion_length=args.new_tokens,
            generation_kwargs={"suppress_tokens": policy.banned_ids},
            temperature=1.0, beta=0.0, num_iterations=1, epsilon=0.2, epsilon_high=0.35,
            scale_rewards=False, loss_type="dapo", max_grad_norm=1.0, bf16=False, use_cpu=True,
            gradient_checkpointing=False, lr_scheduler_type="constant", report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        rows = [
            {"prompt": [{"role": "user", "content": q.text.removeprefix(MARKER)}], "image": q.images[0]}
            for q in questions
        ]
        trainer = GRPOTrainer(
            model=theirs.model, args=settings, reward_funcs=alternating_reward,
            train_dataset=datasets.Dataset.from_list(rows), callbacks=[callback],
            processing_class=Processor(policy.image_processor, policy.tokenizer),
            optimizers=(optimiser(theirs), None),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    expected = responses * args.new_tokens
    if set(lengths) != {expected} or callback.tokens != expected:
        raise RuntimeError(f"tokens: TRL {lengths}, ours {callback.tokens}, expected {expected}")
    return callback


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and one step")
    parser.add_argument("--image_tokens", type=int, nargs="+", default=[64, 144, 400])
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3, help="measured steps; one more warms up")
    args = parser.parse_args(argv)
    try:
        import trl
    except ImportError:
        print(MISSING)
        return
    if args.quick:
        args.image_tokens, args.questions, args.new_tokens, args.steps = [4, 16], 2, 6, 1
    rows = []
    for image_tokens in args.image_tokens:
        policy = benching.random_policy(SHAPES["quick" if args.quick else "small"])
        prompt = encode(policy, make_questions(1, image_tokens)[0], "bare")
        callback = compare(policy, image_tokens, args)
        seconds = {who: statistics.median(s[1:]) for who, s in callback.seconds.items()}
        rate = {who: callback.tokens / s for who, s in seconds.items()}
        rows.append([
            image_tokens, len(prompt.input_ids), rate["TRL"], rate["ours"],
            benching.times(rate["ours"], rate["TRL"]), seconds["TRL"], seconds["ours"],
        ])  # fmt: skip
    header = ["image tokens", "prompt", "TRL, response tokens/s", "ours", "ratio",
              "TRL, seconds per step", "ours"]  # fmt: skip
    print(benching.table(header, rows))
    print(
        f"\nWhole optimiser steps, alternating, median of {args.steps}: {args.questions} questions "
        f"x {args.group_size} responses x {args.new_tokens} tokens, all groups trained; "
        f"{benching.parameters(policy) / 1e6:.1f}M parameters, fp32. TRL {trl.__version__}.\n"
        f"{benching.machine()}"
    )


if __name__ == "__main__":
    main()
