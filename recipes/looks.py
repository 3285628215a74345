"""What looking again is worth in the guess-and-check world, from the runs of `study.py run guess`.

    python recipes/looks.py runs/study results [--jobs 2] [--base]

Of every run's last checkpoint: 512 held-out questions at temperature 1, answered as it likes, then forced to
look again once, and once more (the paper's Fig. 7). Every look counts by a box of its own. Writes
results/looks.csv, a line per run, and prints the means over seeds with 95 % intervals (Student's t).
--base measures the base policy alone, forced four times.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy
from model import Policy, Prompt, encode, load_policy
from rethink import OUTCOMES, TRIGGERS, outcome
from reward import extract_answer, reward
from rollout import generate, question_keys

ARMS = ("plain", "ssr", "rethink", "ssr_rethink", "rethink_oracle", "rethink_wrong")
ROOM = 128  # tokens of one look and of those that follow it unasked
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def continued(prompt: Prompt, ids: list[int]) -> Prompt:
    """The prompt with text behind it, for the policy to go on from."""
    positions = prompt.next_position + torch.arange(len(ids))
    return replace(
        prompt,
        input_ids=torch.cat((prompt.input_ids, torch.tensor(ids))),
        position_ids=torch.cat((prompt.position_ids, positions.expand(3, -1)), 1),
    )


def look_again(policy: Policy, questions: list, extra: int) -> list[list]:
    """What each question is answered: a Sample of its own for each of 1 + `extra` looks.

    The triggers take turns. A response that was cut off is not continued: its answer stays.
    """
    prompts, looks = [encode(policy, question, "bare") for question in questions], []
    for turn in range(extra + 1):
        if turn:
            trigger = policy.tokenizer(list(TRIGGERS.values())[turn % len(TRIGGERS)]).input_ids
            prompts = [
                continued(prompt, [*sample.tokens[:-1].tolist(), *trigger])
                for prompt, [sample] in zip(prompts, looks[-1])
            ]
        looks.append(generate(policy, prompts, 1, ROOM, 1.0, question_keys(questions, "looks", turn)))
    return [[sample for [sample] in answers] for answers in zip(*looks)]


def measure(folder: Path, extra: int, n: int = 512) -> dict:
    """The numbers of a policy. `first` is what it does unasked."""
    questions = toy.toy_questions(toy.LEVELS["inverse"], n, 0, heldout=True)
    counts = Counter()
    for question, samples in zip(questions, look_again(load_policy(str(folder)), questions, extra)):
        texts = [sample.text for sample in samples]
        right = [reward(text, question.answer) == 1.0 for text in texts]
        looks = 1 + sum(texts[0].count(trigger.strip()) for trigger in TRIGGERS.values())
        counts.update(looks=looks, rethinks=looks > 1, tokens=len(samples[0].tokens))
        counts.update({f"right_{turn}": value for turn, value in enumerate(right)})
        for turn, text in enumerate(texts[1:]):
            counts[outcome(right[turn], extract_answer(text) is not None, right[turn + 1])] += 1
    forced = {f"forced_{name}": counts[name] / (n * extra) for name in OUTCOMES}
    right = {f"right_{turn}": counts[f"right_{turn}"] / n for turn in range(extra + 1)}
    shares = {name: counts[name] / n for name in ("looks", "rethinks", "tokens")}
    return right | shares | {"tokens_per_right": counts["tokens"] / max(1, counts["right_0"])} | forced


def read_run(folder: Path) -> dict:
    """A line of looks.csv: what training tells, and what the last checkpoint does."""
    torch.set_num_threads(1)
    arm, _, seed = folder.name.removeprefix("guess_").rpartition("-")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    episodes = {row["episode"]: row for row in rows if "episode" in row}.values()
    held = [row for row in rows if "heldout_accuracy" in row]
    trained = {name: sum(row[f"rethink_{name}"] for row in episodes) for name in ("attempted", *OUTCOMES)}
    shares = {f"trained_{name}": trained[name] / max(1, trained["attempted"]) for name in OUTCOMES}
    curve = {
        "accuracy": held[-1]["heldout_accuracy"],
        "mean_sampled": float(np.mean([row["heldout_sampled"] for row in held[1:]])),
        "attempted": trained["attempted"],
    }
    [checkpoint] = folder.glob("checkpoint-*")
    return {"arm": arm, "seed": int(seed)} | curve | shares | measure(checkpoint, extra=2)


def interval(values) -> str:
    """Mean and 95 % interval."""
    values = np.array(values, dtype=float)
    half = T_95[len(values)] * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{values.mean():.3f} ± {half:.3f}"


COLUMNS = {
    "right_0": "accuracy", "accuracy": "greedy", "mean_sampled": "mean of the curve", "rethinks": "looks again unasked",
    "looks": "looks per response", "tokens_per_right": "tokens per right answer", "right_1": "1 forced look more",
    "right_2": "2 more", "trained_wrong_right": "wrong→right, of forced in training", "trained_right_wrong": "right→wrong",
}  # fmt: skip


def table(runs: list[dict]) -> str:
    """Means over seeds, and the difference of accuracy to plain GRPO, paired by seed."""
    plain = {run["seed"]: run["right_0"] for run in runs if run["arm"] == "plain"}
    lines = [
        f"| arm | seeds | minus plain | {' | '.join(COLUMNS.values())} |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        paired = [run["right_0"] - plain[run["seed"]] for run in mine if run["seed"] in plain]
        cells = [interval(paired) if arm != "plain" and paired else "–"]
        cells += [interval([run[name] for run in mine]) for name in COLUMNS]
        lines.append(f"| {arm} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("looks.py", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/study"))
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--base", action="store_true")
    args = parser.parse_args(argv)
    if args.base:
        print(json.dumps(measure(toy.toy_policy_dir(toy.LEVELS["inverse"]), extra=4), indent=1))
        return
    folders = [
        f for arm in ARMS for f in sorted(args.runs.glob(f"guess_{arm}-*")) if list(f.glob("checkpoint-*"))
    ]
    with get_context("spawn").Pool(args.jobs) as pool:
        runs = pool.map(read_run, folders, chunksize=1)
    with open(args.results / "looks.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(runs[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(runs)
    print(table(runs))


if __name__ == "__main__":
    main(sys.argv[1:])
