"""What looking again is worth in the guess-and-check world, from the runs of `guess` and `guess_long` (study.py).

    python recipes/looks.py results [--runs runs/study] [--jobs 2] [--base]

Of every run's last checkpoint: 512 held-out questions at temperature 1, answered as it likes, then forced to
look again once, and once more (the paper's Fig. 7). Every look counts by a box of its own. Writes
results/looks.csv, a line per run (those of other runs stay), and looks.md, the means over seeds with 95 %
intervals (Student's t).
"""

import argparse
import csv
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from study import EXPERIMENTS, is_done
from study_tables import SECOND_LOOKS, add_lines, markdown, show

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy
from model import Policy, Prompt, encode, load_policy
from rethink import OUTCOMES, TRIGGERS, outcome
from reward import extract_answer, reward
from rollout import generate, question_keys

ROOM = 128  # tokens of one look and of those that follow it unforced
COLUMNS = {  # of looks.csv -> title, digits
    "right_0": ("accuracy", 3), "right_1": ("forced once", 3), "right_2": ("forced twice", 3),
    "rethinks": ("looks again unforced", 3), "looks": ("looks per response", 2),
    "starts": ("different starts", 2), "first": ("first look right", 3),
    "tokens": ("tokens per response", 1), "tokens_per_right": ("tokens per right answer", 1),
}  # fmt: skip


def continued(prompt: Prompt, ids: list[int]) -> Prompt:
    """The prompt with text behind it, for the policy to go on from."""
    positions = prompt.next_position + torch.arange(len(ids))
    return replace(
        prompt,
        input_ids=torch.cat((prompt.input_ids, torch.tensor(ids))),
        position_ids=torch.cat((prompt.position_ids, positions.expand(3, -1)), 1),
    )


def look_again(policy: Policy, questions: list, extra: int) -> list[list]:
    """What each question is answered: a Sample for each of 1 + `extra` looks. The triggers take turns."""
    prompts, looks = [encode(policy, question, "bare") for question in questions], []
    for turn in range(extra + 1):
        if turn:
            trigger = policy.tokenizer(list(TRIGGERS.values())[turn % len(TRIGGERS)]).input_ids
            prompts = [
                continued(prompt, [*(i for i in sample.tokens.tolist() if i not in policy.eos_ids), *trigger])
                for prompt, [sample] in zip(prompts, looks[-1])
            ]
        looks.append(generate(policy, prompts, 1, ROOM, 1.0, question_keys(questions, "looks", turn)))
    return [[sample for [sample] in answers] for answers in zip(*looks)]


def measure(folder: Path, extra: int, n: int = 512) -> dict:
    """The numbers of a policy: `right_0` is what it does unforced, `right_1` after one forced look, and so on."""
    questions = toy.toy_questions(toy.LEVELS["inverse"], n, 0, heldout=True)
    counts = Counter()
    for question, samples in zip(questions, look_again(load_policy(str(folder)), questions, extra)):
        texts = [sample.text for sample in samples]
        right = [reward(text, question.answer) == 1.0 for text in texts]
        looks = re.split("|".join(re.escape(trigger.strip()) for trigger in TRIGGERS.values()), texts[0])
        starts = {extract_answer(look) for look in looks} - {None}
        counts.update(looks=len(looks), rethinks=len(looks) > 1, starts=len(starts))
        counts.update(first=reward(looks[0], question.answer), tokens=len(samples[0].tokens))
        counts.update({f"right_{turn}": value for turn, value in enumerate(right)})
        for turn, text in enumerate(texts[1:]):
            counts[outcome(right[turn], extract_answer(text) is not None, right[turn + 1])] += 1
    forced = {f"forced_{name}": counts[name] / (n * extra) for name in OUTCOMES}
    right = {f"right_{turn}": counts[f"right_{turn}"] / n for turn in range(extra + 1)}
    shares = {name: counts[name] / n for name in ("first", "looks", "starts", "rethinks", "tokens")}
    return right | shares | {"tokens_per_right": counts["tokens"] / max(1, counts["right_0"])} | forced


def read_run(folder: Path) -> dict:
    """A line of looks.csv: of the last checkpoint, and of the forced looks in training."""
    arm, _, seed = folder.name.rpartition("-")
    [checkpoint] = folder.glob("checkpoint-*")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    episodes = {row["episode"]: row for row in rows if "episode" in row}.values()
    forced = {name: sum(row[f"rethink_{name}"] for row in episodes) for name in SECOND_LOOKS}
    return {"arm": arm, "seed": int(seed)} | measure(checkpoint, extra=2) | forced


def table(runs: list[dict]) -> str:
    """Means over seeds; the difference of accuracy to plain GRPO is paired by seed."""
    plain = {run["seed"]: run["right_0"] for run in runs if run["arm"] == "guess_plain"}
    titles = ["arm", "seeds", "minus plain", *(title for title, _ in COLUMNS.values())]
    lines = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        paired = [run["right_0"] - plain[run["seed"]] for run in mine if run["seed"] in plain]
        cells = [arm, str(len(mine)), show(paired, 3) if arm != "guess_plain" and paired else "–"]
        cells += [show([run[name] for run in mine], digits) for name, (_, digits) in COLUMNS.items()]
        attempted = sum(run["attempted"] for run in mine)
        for name in ("wrong_right", "right_wrong"):  # of the looks forced in training
            cells.append(f"{sum(run[name] for run in mine) / attempted:.1%}" if attempted else "–")
        lines.append(cells)
    return markdown([*titles, "wrong→right", "right→wrong"], lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("looks.py", description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--jobs", type=int, default=2, help="checkpoints at a time")
    parser.add_argument("--base", action="store_true", help="the base policy alone, forced four times")
    args = parser.parse_args(argv)
    if args.base:
        print(json.dumps(measure(toy.toy_policy_dir(toy.LEVELS["inverse"]), extra=4), indent=1))
        return
    arms = [*EXPERIMENTS["guess"].arms, *EXPERIMENTS["guess_long"].arms]
    folders = [f for arm in arms for f in sorted(args.runs.glob(f"{arm}-*")) if is_done(f)]
    if not folders:
        sys.exit(f"error: {args.runs} holds no finished run of guess or guess_long")
    with get_context("spawn").Pool(args.jobs, torch.set_num_threads, (1,)) as pool:
        runs = pool.map(read_run, folders, chunksize=1)
    add_lines(args.results / "looks.csv", runs)
    with open(args.results / "looks.csv", newline="") as file:
        runs = [{k: v if k == "arm" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    text = table(sorted(runs, key=lambda run: arms.index(run["arm"])))
    (args.results / "looks.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
