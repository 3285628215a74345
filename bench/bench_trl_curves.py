"""Do TRL's loop and ours learn alike on the same job, and how long does each take to 0.95?

    /tmp/trl/bin/python bench/bench_trl_curves.py                    seeds 0-4, then the table and results/
    /tmp/trl/bin/python bench/bench_trl_curves.py --seeds 3          one of them; those that are done are kept

Whole training runs from the toy's base policy: GRPOTrainer with transformers' own model, and train.py's
loop with ours. The same questions in the same order, reward (reward.py), 32 questions x 8 responses per
episode and two optimiser steps of 128 responses, up to 48 tokens at temperature 1, learning rate 1e-4
without schedule, AdamW with betas 0.9 and 0.95, gradient norm 1.0, clipping at 0.8 and 1.35, token-mean
loss, advantages r - mean; no replay, no forced second look. Each loop samples with its own random numbers.

What is left of difference: TRL deals the 256 responses of an episode at random to its two steps, where
ours takes the questions in order, and divides by half of the episode's tokens, where ours counts those of the
step; the second step's old log-probabilities come from a forward pass of training, ours from sampling.

The two loops take their steps in turn, in one process of one thread on the CPU, so that the clock is
fair whatever else the machine does. Accuracy is that of an episode's 256 sampled responses, under the
weights that its first step starts from. A loop has reached 0.95 with the first such episode; its seconds
are those of all steps before. Intervals are 95 % over seeds (Student's t); differences are paired by seed.
"""

import argparse
import csv
import math
import os
import statistics
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

import bench_trl  # first: it puts the repository on the path
import benching
import torch
from transformers import AutoModelForImageTextToText

sys.path.append(str(Path(__file__).resolve().parent.parent / "recipes"))
from study_figures import COLOURS, card, curves
from study_tables import interval, show

import toy
import train
from config import parse
from prepare import prepare
from record import Recorder
from reward import reward

QUESTIONS, GROUP, BATCH, TOKENS = 32, 8, 128, 48
STEPS_PER_EPISODE = QUESTIONS * GROUP // BATCH
GOAL = 0.95
RESULTS = Path(__file__).resolve().parent.parent / "results"
COLUMNS = ("seed", "loop", "step", "accuracy", "tokens", "seconds")
LOOPS = ("TRL", "ours")


# ---------------------------------------------------------------------------- one seed


def learn(seed: int, steps: int, path: Path) -> None:
    """Both loops in turn. Writes a row per episode and loop to `path`, anew after each episode."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for a million parameters
    torch.set_num_threads(1)
    curves: dict[str, list[tuple]] = {"TRL": [], "ours": []}  # of (step, accuracy, tokens of a response)
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(
            parse(
                f"--steps {steps} --seed {seed} --episode_queries {QUESTIONS} --group_size {GROUP} "
                f"--batch_size {BATCH} --max_new_tokens {TOKENS} --lr 1e-4 --warmup 0 --final_lr 1 --ssr off "
                f"--rethink_fraction 0 --heldout 0 --out {folder}/ours".split()
            )
        )
        record = Recorder(run.out, active=False)

        def our_step() -> int:
            if not run.fresh:
                train.begin_episode(run, record)
                means = (run.counts[name] / (QUESTIONS * GROUP) for name in ("rewards", "response_tokens"))
                curves["ours"].append((run.step, *means))
                write(path, rows_of(seed, curves, watch.seconds))
            return train.train_step(run, 0.0)["batch_responses"]

        def their_reward(completions, completion_ids, answer, trainer_state, **_) -> list[float]:
            rewards = [reward(said["content"], right) for [said], right in zip(completions, answer)]
            length = statistics.mean(map(len, completion_ids))
            curves["TRL"].append((trainer_state.global_step, statistics.mean(rewards), length))
            return rewards

        base = toy.toy_policy_dir(toy.LEVELS["easy"])
        model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        episodes = -(-steps // STEPS_PER_EPISODE)
        questions = [
            question
            for episode in range(episodes)
            for question in toy.toy_questions(toy.LEVELS["easy"], QUESTIONS, f"{seed}-{episode}")
        ]
        watch = bench_trl.Stopwatch(our_step, alternate=True)
        trainer = bench_trl.make_trainer(
            model, run.policy, questions, their_reward, watch, folder, seed=seed, max_steps=steps,
            shuffle_dataset=False, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1,
            num_generations=GROUP, generation_batch_size=QUESTIONS * GROUP, max_completion_length=TOKENS,
            learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.0,
        )  # fmt: skip
        trainer.train()


def rows_of(seed: int, curves: dict[str, list[tuple]], seconds: dict[str, list[float]]) -> list[dict]:
    """The rows of a seed's file; seconds are those of all steps before an episode."""
    rows = []
    for loop, curve in curves.items():
        spent = [0.0, *accumulate(seconds[loop])]
        for step, accuracy, tokens in curve:
            rows.append(dict(zip(COLUMNS, (seed, loop, step, accuracy, tokens, round(spent[step], 3)))))
    return rows


def read(path: Path) -> list[dict]:
    """Rows of a CSV file, numbers as numbers."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{k: v if k == "loop" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------------- all seeds


def by_seed(rows: list[dict], loop: str) -> dict[float, list[dict]]:
    """{seed: its rows in order} of a loop."""
    seeds = sorted({row["seed"] for row in rows})
    return {
        seed: sorted((r for r in rows if (r["seed"], r["loop"]) == (seed, loop)), key=lambda row: row["step"])
        for seed in seeds
    }


def seconds_to(curve: list[dict]) -> float:
    """When it first reached GOAL."""
    return next((row["seconds"] for row in curve if row["accuracy"] >= GOAL), math.inf)


def report(rows: list[dict]) -> str:
    runs = {loop: by_seed(rows, loop) for loop in LOOPS}
    lines = [
        f"| loop | seeds | accuracy, first episode | last | mean over episodes | seconds per step | seconds to {GOAL} |",
        "|---|---|---|---|---|---|---|",
    ]
    for loop, seeds in runs.items():
        accuracy = [[row["accuracy"] for row in curve] for curve in seeds.values()]
        pace = [curve[-1]["seconds"] / curve[-1]["step"] for curve in seeds.values()]
        there = [seconds_to(curve) for curve in seeds.values()]
        lines.append(
            f"| {loop} | {len(seeds)} | {show([a[0] for a in accuracy], 3)} | {show([a[-1] for a in accuracy], 3)} | "
            f"{show([statistics.mean(a) for a in accuracy], 3)} | {show(pace, 2)} | {show(there, 1)} |"
        )
    pairs = [list(zip(runs["ours"][seed], runs["TRL"][seed])) for seed in runs["ours"]]
    gaps = [[a["accuracy"] - b["accuracy"] for a, b in pair] for pair in pairs]  # [seeds, episodes]
    each = [interval(list(episode)) for episode in zip(*gaps)]
    outside = sum(abs(mean) > half for mean, half in each)
    lines.append(
        f"\nOurs minus TRL, paired by seed: {show([statistics.mean(gap) for gap in gaps], 3)} on average over the "
        f"episodes; 0 lies outside the interval of {outside} of {len(each)} episodes (5 % by chance alone: "
        f"{len(each) / 20:.1f})."
    )
    both = [(seconds_to(runs["TRL"][s]), seconds_to(runs["ours"][s])) for s in runs["ours"]]
    if math.isfinite(max(map(max, both))):
        lines.append(f"Seconds to {GOAL}, TRL / ours: {show([trl / ours for trl, ours in both], 2)}.")
    return "\n".join(lines)


def figure(rows: list[dict]) -> str:
    """Sampled accuracy over steps and over seconds, as SVG on a card of its own."""
    over: dict[str, dict[str, tuple]] = {"step": {}, "seconds": {}}
    for loop in LOOPS:
        seeds = by_seed(rows, loop).values()
        episodes = list(zip(*seeds))  # one episode of every seed
        means, halves = zip(*(interval([row["accuracy"] for row in same]) for same in episodes))
        halves = [0.0 if math.isnan(half) else half for half in halves]
        for unit, found in over.items():
            found[loop] = [statistics.mean(row[unit] for row in same) for same in episodes], means, halves
    steps = curves(120, "sampled accuracy over optimiser steps", over["step"], (0, 1))
    seconds = curves(600, "over seconds, one thread", over["seconds"], (0, 1))
    return card(steps + seconds, dict(zip(LOOPS, COLOURS)), f"95 % intervals of {len(seeds)} seeds")


def seeds_of(text: str) -> list[int]:
    """
    >>> seeds_of("0-2"), seeds_of("3"), seeds_of("")
    ([0, 1, 2], [3], [])
    """
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1)) if text else []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0-4", help="such as 0-4 or 3; '' only reads what is there")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/trl_curves"), help="a file per seed is kept here"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    for seed in seeds_of(args.seeds):
        path = args.runs / f"seed-{seed}.csv"
        if path.exists() and max(row["step"] for row in read(path)) >= args.steps - STEPS_PER_EPISODE:
            continue
        try:
            learn(seed, args.steps, path)
        except ImportError as error:
            print(f"{bench_trl.MISSING}\n({error})")
            return
    rows = [row for path in sorted(args.runs.glob("seed-*.csv")) for row in read(path)]
    write(args.results / "trl_curves.csv", rows)
    (args.results / "trl_curves.svg").write_text(figure(rows), encoding="utf-8")
    print(f"{report(rows)}\n{benching.machine()}")


if __name__ == "__main__":
    main()
