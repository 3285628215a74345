"""Is every fast path right on this machine? In bf16, at the 3B shape, with keys as biased as Qwen's.

    python bench/bench_paths.py              the small shape on a CPU, the published 3B shape on a GPU
    python bench/bench_paths.py --quick      shapes that take seconds, to see that it runs

Weights are random; `add_key_bias` adds a common number to all attention scores, as the biases of
Qwen2.5's keys do, so that what rounds scores to bf16 is caught. A line per check, with what was measured and
its limit; exit status 1 where a limit is passed.

    vision    features of the packed tower against an fp32 tower: at most 1.5 times the error that
              transformers' own tower has in bf16
    tree      log-probabilities of a tree against separate rows in fp32, the same way
    rollout   log-probabilities met in sampling against the training forward pass: KL in nats per token, at most
              ten times that of the training pass against fp32, both without biases. (With biases a key rounded
              to bf16 is another key, in sampling and training alike: fp32 is then no measure.)
    graphs    decoding as CUDA graphs against plain steps: log-probabilities up to the first token
              that differs (a GPU only)
    recipe    train.py with the flags of recipes/one_gpu_3b.sh on this shape, random pictures of 1280 tokens and
              responses that never end: peak memory (a GPU only) against the card's
"""

import argparse
import contextlib
import copy
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from unittest import mock

import bench_train
import bench_vision
import benching
import torch
from PIL import Image

import train
from model import save_policy
from rollout import generate
from tree import build_trees

RECIPE = Path(__file__).resolve().parent.parent / "recipes/one_gpu_3b.sh"
SCORES = (0, 100, 1000, 5000)  # added to attention scores by q and k biases


def add_key_bias(policy, score: float) -> None:
    """Add `score` to every attention score, by biases of q and k in the slowest rotary dimension."""
    for layer in policy.text_model.layers:
        d = layer.self_attn.head_dim
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.bias.data.view(-1, d)[:, d // 2 - 1] = (score * d**0.5) ** 0.5


def speak_up(policy) -> None:
    """Give every matrix of the language model rows of length 1, whatever the shape: else a small random
    model says the same whatever it attends to."""
    for parameter in policy.text_model.parameters():
        if parameter.dim() == 2:
            parameter.data /= parameter.data.float().std() * parameter.shape[1] ** 0.5


@torch.no_grad()
def check_vision(policy, exact, patches: tuple[int, int]) -> tuple:
    grid = torch.tensor([[1, *patches], [1, patches[0], patches[1] - 6]])  # windows cut at an edge
    theirs, ours = (f().float() for f in bench_vision.make_ways(policy.model.model.visual, grid).values())
    want = bench_vision.make_ways(exact.model.model.visual, grid)["transformers"]()
    errors = [float((x - want).norm() / want.norm()) for x in (ours, theirs)]
    return "vision", "relative error of features", errors[0], 1.5 * errors[1]


@torch.no_grad()
def check_tree(policy, exact, P: int, R: int) -> tuple:
    """Mean |difference| in nats per token."""
    ways = bench_train.make_logprobs(policy, P, R, 4)
    want = bench_train.make_logprobs(exact, P, R, 4)["rows, chunked"]()
    errors = [float((ways[k]() - want).abs().mean()) for k in ("tree, chunked", "rows, chunked")]
    return "tree", "mean difference of log-probabilities, nats", errors[0], 1.5 * errors[1]


@torch.no_grad()
def sampled_and_trained(policy, P: int, R: int, *others) -> list[torch.Tensor]:
    """Log-probabilities [B, R] of one set of responses: met in sampling, in the training forward pass, and in
    that of the other policies."""
    prompts = [benching.random_prompt(policy, P - 3 * (seed % 2), seed) for seed in range(16)]
    groups = generate(policy, prompts, 2, R)
    trees = build_trees([(g[0].prompt, [s.tokens for s in g]) for g in groups]).to(policy.device)
    sampled = torch.stack([s.logprobs for g in groups for s in g])  # all are of length R
    passes = [model(trees)[0].view_as(sampled).cpu() for model in (policy, *others)]
    return [x.double() for x in (sampled, *passes)]


def kl(a: torch.Tensor, b: torch.Tensor) -> float:
    """In nats per token, of tokens sampled from b."""
    return float(((a - b).expm1() - (a - b)).mean())


def check_rollout(policy, P: int, R: int, score: float, limit: float) -> tuple:
    sampled, trained = sampled_and_trained(policy, P, R)
    return (
        f"rollout, biases of {score}",
        "KL(sampler || trainer), nats per token",
        kl(trained, sampled),
        limit,
    )


@torch.no_grad()
def check_graphs(policy, P: int, R: int) -> tuple:
    prompts, runs = [benching.random_prompt(policy, P, seed) for seed in (0, 1)], []
    for policy.cuda_graphs in (False, True):
        runs.append([s for g in generate(policy, prompts, 4, R) for s in g])
    differences = []
    for plain, replayed in zip(*runs):
        same = int((plain.tokens == replayed.tokens).int().cumprod(0).sum())
        differences.append((plain.logprobs - replayed.logprobs)[:same])
    differences = torch.cat(differences)
    said = f"mean difference of log-probabilities over {len(differences)} of {8 * R} tokens, nats"
    return "graphs", said, float(differences.abs().mean()), 0.02


def recipe_flags(folder: Path, quick: bool) -> list[str]:
    """The flags of the recipe's line, with one episode over pictures of noise."""
    line = re.search(r"train\.py ((?:.*\\\n)*.*)", RECIPE.read_text()).group(1)
    flags = [x for x in line.replace("\\\n", " ").split() if x != "--resume"]
    changes = {"--pass_rate_column": "", "--model": folder / "model", "--data": folder / "noise.jsonl", "--out": folder / "out",
               "--episode_queries": 16, "--heldout": 0, "--steps": 1}  # fmt: skip
    if quick:
        changes |= {"--episode_queries": 4, "--batch_size": 32, "--max_new_tokens": 8,
                    "--min_pixels": 28 * 28, "--max_pixels": 280 * 28}  # fmt: skip
    for name, value in changes.items():
        if name in flags:
            flags[flags.index(name) + 1] = str(value)
        else:
            flags += [name, str(value)]
    return flags


def check_recipe(policy, quick: bool) -> list[tuple]:
    """Peak bytes of each phase of one episode, as a share of the card; of nothing on a CPU."""
    cuda, peaks = torch.cuda.is_available(), {}

    def watched(phase: str, function):
        def run(*arguments):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            result = function(*arguments)
            peaks[phase] = torch.cuda.max_memory_reserved() if cuda else None
            return result

        return run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_policy(policy, folder / "model")
        side = 56 if quick else 1120
        noise = torch.randint(0, 256, (side * 4 // 5, side, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / "noise.png")
        row = {"question": "<image>What is it?", "answer": "1", "image": ["noise.png"]}
        rows = [json.dumps(row | {"qid": str(i)}) + "\n" for i in range(6 if quick else 16)]
        (folder / "noise.jsonl").write_text("".join(rows))
        phases = {f: watched(f, getattr(train, f)) for f in ("sample_episode", "update")}
        # The last step would write a checkpoint of 52 GB.
        with mock.patch.multiple(train, **phases), contextlib.ExitStack() as stack:
            for name in ("prepare.check_room", "checkpoint.save_run", "record.Recorder.summary"):
                stack.enter_context(mock.patch(name))
            # Any reward that differs within a group.
            status = train.main(recipe_flags(folder, quick), grade=lambda text, question: len(text) % 2)
    if status:
        raise RuntimeError(f"train.py ended with status {status}")
    card = torch.cuda.get_device_properties(0).total_memory if cuda else None
    return [(f"recipe, {phase}", "GiB reserved at the peak", peak and peak / 2**30, card and 0.9 * card / 2**30)
            for phase, peak in peaks.items()]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    quick = parser.parse_args(argv).quick
    cuda = torch.cuda.is_available()
    name = "quick" if quick else "3b" if cuda else "small"
    device = "cuda" if cuda else "cpu"
    policy = benching.random_policy(benching.SHAPES[name], device, torch.bfloat16)
    speak_up(policy)
    P, R = (1300, 256) if cuda and not quick else (48, 24)
    checks = []
    _, trained, exactly = sampled_and_trained(policy, P, R, copy.deepcopy(policy).float())
    limit = 10 * kl(trained, exactly)
    for score in SCORES:
        add_key_bias(policy, score)
        checks.append(check_rollout(policy, P, R, score, limit))
    add_key_bias(policy, 100)
    checks += [check_graphs(policy, P, R)] if cuda else []
    exact = copy.deepcopy(policy).float()
    checks.append(check_vision(policy, exact, (64, 80) if cuda else (16, 24)))
    checks.append(check_tree(policy, exact, P, R))
    del exact
    policy = policy.cpu()
    torch.cuda.empty_cache()
    if quick or cuda:
        try:
            checks += check_recipe(policy, quick)
        except RuntimeError as error:  # out of memory, say: the other checks have been paid for
            checks.append((f"recipe: {error}".splitlines()[0], "ran to its end", math.inf, 0))
    rows = []
    for check, what, measured, limit in checks:
        verdict = "not measured" if measured is None else "right" if measured <= limit else "WRONG"
        rows.append([check, what, measured, limit, verdict])
    print(benching.table(["path", "what", "measured", "limit", ""], rows))
    without = "" if cuda else " No GPU: CUDA graphs and the recipe's memory were not checked."
    print(f"\nThe {name} shape in bf16, random weights.{without}\n{benching.machine()}")
    return int(any(row[-1] == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
