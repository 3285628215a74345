"""Responses of very different lengths: refilled rows against HF generate and against an older commit.

    python bench/bench_tails.py                     a small model on a CPU
    python bench/bench_tails.py --against e869fd3   also that commit, in a temporary folder
    python bench/bench_tails.py --group_size 1      an evaluation: one response per question
    python bench/bench_tails.py --quick             shapes that take seconds, to see that it runs

A random policy says all ids about equally often, so if 1 in 50 of them ends a turn, lengths are about
geometric with mean 50; they are cut at four times the mean, as 2048 tokens are for a mean of 500. HF
generate gets batches of --rows rows, each of which runs until its last row ends. All ways draw from the
same distribution, so what is compared is response tokens per second. Each way is a process of its own
that waits while another runs; they take turns.
"""

import argparse
import importlib
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def make_policy(args):
    import benching

    # Small, so that an evaluation's or an episode's many rows take seconds on a CPU.
    shape = benching.Shape(128, 512, 4, 4, 2, 4096, 32, 64, 2, 2, ((64, 200),), 32)
    policy = benching.random_policy(shape)
    allowed = [i for i in range(policy.head_weight().shape[0]) if i not in policy.banned_ids]
    policy.eos_ids = allowed[:: args.mean]
    return policy, [text_prompt(policy, args.prompt, seed) for seed in range(args.questions)]


def text_prompt(policy, length: int, seed: int):
    """Made of what the older commits have as well."""
    import benching
    import torch

    from data import Question
    from model import Prompt

    ids = benching.random_ids(policy, length, torch.Generator().manual_seed(seed))
    grid, positions = torch.zeros(0, 3, dtype=torch.long), torch.arange(length).expand(3, -1)
    return Prompt(Question(str(seed), "", [], ""), "bare", ids, positions, grid, None)


def ours(args, policy, prompts) -> int:
    """Tokens said."""
    from rollout import generate

    limit = 4 * args.mean
    groups = generate(policy, prompts, args.group_size, limit, max_rows=args.rows)
    return sum(len(sample.tokens) for group in groups for sample in group)


def hf_generate(args, policy, prompts) -> int:
    import torch

    per_batch, tokens = max(1, args.rows // args.group_size), 0
    ends = torch.tensor(policy.eos_ids)
    for i in range(0, len(prompts), per_batch):
        out = policy.model.generate(
            input_ids=torch.stack([prompt.input_ids for prompt in prompts[i : i + per_batch]]), do_sample=True,
            max_new_tokens=4 * args.mean, top_k=0, top_p=1.0, eos_token_id=policy.eos_ids,
            num_return_sequences=args.group_size, suppress_tokens=policy.banned_ids,
        )[:, args.prompt :]  # fmt: skip
        before = torch.isin(out, ends).cumsum(1) - torch.isin(out, ends).long()
        tokens += int((before == 0).sum())
    return tokens


def work(args) -> None:
    """A way's process: for each line that comes, sample everything and say what it took."""
    sys.path[:0] = [args.root, str(HERE)]
    for name in ("data", "model", "rollout", "toy"):  # of `root`, before benching finds its own
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    policy, prompts = make_policy(args)
    sample = hf_generate if args.worker == "HF generate" else ours
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens = sample(args, policy, prompts)
        print(tokens, time.perf_counter() - start, flush=True)


def measure(ways: dict[str, str], argv: list[str], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each way, in turns; the first turn is not counted. {way: its code's folder}"""
    command = [sys.executable, __file__, *argv]
    workers = {
        way: subprocess.Popen([*command, "--worker", way, "--root", root], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for way, root in ways.items()
    }  # fmt: skip
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 1):
        for way, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            tokens, seconds = map(float, worker.stdout.readline().split())
            rates[way] += [tokens / seconds] if turn else []
    for worker in workers.values():
        worker.communicate()
    return rates


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="", help="a commit of this repository")
    parser.add_argument("--quick", action="store_true", help="few questions, short responses, one repeat")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="its tokens")
    parser.add_argument("--mean", type=int, default=50, help="tokens of a response; four times this at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--root", default=str(HERE.parent), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.questions, args.mean, args.repeats = 4, 8, 1
    if args.worker:
        work(args)
        return
    import benching

    with tempfile.TemporaryDirectory() as folder:
        ways = {"HF generate": args.root, "refilled rows": args.root}
        if args.against:
            ways[args.against] = folder
            commit = subprocess.check_output(["git", "-C", str(HERE.parent), "archive", args.against])
            with tarfile.open(fileobj=io.BytesIO(commit)) as archive:
                archive.extractall(folder, filter="data")
        rates = measure(ways, argv, args.repeats)
    rates = {way: statistics.median(seen) for way, seen in rates.items()}
    rows = [[way, rate, benching.times(rates["refilled rows"], rate)] for way, rate in rates.items()]
    print(benching.table(["way", "response tokens/s", "refilled rows are"], rows))
    print(
        f"\n{args.questions} questions x {args.group_size}, {args.rows} rows, prompts of {args.prompt}, "
        f"responses of {args.mean} on average; median of {args.repeats}, one thread.\n{benching.machine()}"
    )


if __name__ == "__main__":
    main()
