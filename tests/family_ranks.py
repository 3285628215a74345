"""What test_families.py runs on four processes: every family, sharded; gradients, with half of the ranks
without pictures; and responses, sampled by two and two ranks together from slices of every layer.

    torchrun --nproc_per_node 4 tests/family_ranks.py DIR

DIR holds a published policy a family; what the ranks found is written beside it.
"""

import json
import sys
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch
from conftest import QUESTIONS, random_response
from safetensors.torch import save_file

import checkpoint
import eval as evaluation
import model
import parallel
from model import FAMILIES, Policy, encode, load_policy, response_logprobs
from rollout import generate


def load_sharded(directory: Path) -> Policy:
    """Each rank reads its own part of the weights, as in training."""
    policy = load_policy(str(directory), torch.float64, empty=True)
    policy.model.set_experts_implementation("eager")
    policy = parallel.shard(policy, torch.device("cpu"))
    checkpoint.load_weights(directory, policy)
    return policy


def one_batch(policy: Policy, rank: int) -> list:
    """Two pictures on one rank, text alone on the next."""
    prompt = encode(policy, QUESTIONS[0 if rank % 2 else 3], "bare")
    return [(prompt, [random_response(5 + i, i, policy) for i in range(3)])]


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Every parameter's gradient, whole; clears them."""
    found = {
        name: parallel.whole(p.grad).clone() for name, p in policy.named_parameters() if p.grad is not None
    }
    policy.zero_grad()
    return found


def responses(policy: Policy) -> dict:
    """What is sampled, and log-probabilities by the training forward pass, from whole weights or slices."""
    prompts = [encode(policy, question, "bare") for question in QUESTIONS]
    said = {}
    with torch.no_grad(), parallel.weights_to_sample(policy):
        for temperature in (0.0, 1.0):
            groups = generate(policy, prompts, 2, 12, temperature)
            said[str(temperature)] = [[s.tokens.tolist() for s in group] for group in groups]
        pairs = [(prompt, [s.tokens for s in group]) for prompt, group in zip(prompts, groups)]
        said["logprobs"] = response_logprobs(policy, pairs)[0].tolist()
    return said


def evaluate(policy: Path, out: Path, *flags) -> None:
    """`eval.py` in float64, in a process that torchrun's others know already."""
    real = model.load_policy

    def in_float64(path, dtype, **bounds):
        return real(path, torch.float64, **bounds)

    command = ["--model", policy, "--limit", 12, "--max_new_tokens", 9, "--rows", 4, "--out", out]
    with mock.patch.object(model, "load_policy", in_float64), mock.patch.object(parallel, "start"):
        assert evaluation.main([str(x) for x in (*command, *flags)]) == 0


def main(out: Path) -> None:
    parallel.start()
    for name in FAMILIES:
        policy = load_sharded(out / name)
        logprobs, _ = response_logprobs(policy, one_batch(policy, parallel.rank()))
        # FSDP takes the mean over ranks, and each batch is on two of four.
        (logprobs.sum() * parallel.world() / 2).backward()
        found = gradients(policy)
        policy.slices = parallel.slices(policy, 2)
        together = parallel.gather([responses(policy)])
        if parallel.rank() == 0:
            save_file(found, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(together))
        response_logprobs(policy, one_batch(policy, 0))[0].sum().backward()  # it trains on
    evaluate(out / FAMILIES[1], out / "together", "--tensor", 2)
    parallel.barrier()
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
