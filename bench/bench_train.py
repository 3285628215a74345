"""One row a group against G separate rows; the vocabulary in chunks against all at once.

    python bench/bench_train.py                  a small model on a CPU, the 3B shape on a GPU
    python bench/bench_train.py --shape 3b       the published 3B shape, random bf16; GPU only
    python bench/bench_train.py --quick          shapes that take seconds, to see that it runs

A step is the forward and backward pass of one question's group of G responses, pictures included,
with no optimiser. Four ways to take it, and their log-probabilities must agree:

    rows, full logits     what most trainers do: the model of transformers on G rows of prompt +
                          response, causal attention without a mask (rows of one length need none,
                          so it keeps its fastest kernel), logits of all response tokens at once
    rows, chunked         the same, with the projection in chunks that are computed twice
    tree, full logits     one row [prompt | y_1 | ... | y_G], logits at once
    tree, chunked         `Policy.forward`, as train.py calls it

Tokens per second are counted in two ways, each the same count for all four, so that they compare
the time of the same work: *tree tokens* (P + G R, each different token once) and *response tokens*
(G R). Memory is the peak of a step above what stood before it (the weights), gradients included.

MFU (on a GPU) = FLOPs of the tree / seconds / peak of the chip's dense bf16, for rows too, where

    FLOPs = 6 (layers' weights) (P + G R)  +  6 (V D) (G R)  +  6 (vision weights) (patches)
            + 12 (layers) (heads d) (P^2 / 2 + G (P R + R^2 / 2))

6 = two FLOPs a weight forward and four backward; what is computed again in the backward pass is not
counted, nor is attention inside the vision tower.
"""

import argparse
from unittest import mock

import benching  # first: it puts the repository on the path
import torch
from torch.nn import functional as F

import model
from grpo import NEVER, token_logprobs
from tree import build_trees

# Dense bf16 FLOP/s, from the makers' data sheets.
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
WAYS = ["rows, full logits", "rows, chunked", "tree, full logits", "tree, chunked"]


def full_logprobs(hidden, weight, targets, banned_ids, temperature) -> tuple:
    """`token_logprobs` as most trainers have it: by autograd, all logits at once."""
    logits = F.linear(hidden, weight).float() / temperature
    logits = logits.index_fill(-1, torch.tensor(banned_ids, device=logits.device), NEVER)
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0], None


def rows_logprobs(policy, prompt, responses, chunked: bool) -> torch.Tensor:
    """Log-probabilities [G * R] by separate rows of equal length, as transformers runs them."""
    G, P, device = len(responses), len(prompt.input_ids), policy.device
    y = torch.stack(responses)  # [G, R]
    steps = torch.arange(y.shape[1]) + prompt.next_position
    positions = torch.cat([prompt.position_ids, steps.expand(3, -1)], dim=1)  # [3, P + R]
    hidden = policy.model.model(
        input_ids=torch.cat([prompt.input_ids.expand(G, -1), y], dim=1).to(device),
        position_ids=positions[:, None].expand(-1, G, -1).to(device),
        pixel_values=prompt.pixel_values.repeat(G, 1).to(device),
        image_grid_thw=prompt.image_grid_thw.repeat(G, 1).to(device),
        use_cache=False,
    ).last_hidden_state
    hidden, y = hidden[:, P - 1 : -1].flatten(0, 1), y.flatten().to(device)
    weight, banned = policy.head_weight(), policy.banned_ids
    return (token_logprobs if chunked else full_logprobs)(hidden, weight, y, banned, 1.0)[0]


def tree_logprobs(policy, prompt, responses, chunked: bool) -> torch.Tensor:
    """Log-probabilities [G * R] by one row."""
    trees = build_trees([(prompt, responses)]).to(policy.device)
    if chunked:
        return policy(trees)[0]

    with mock.patch.object(model, "token_logprobs", full_logprobs):
        return policy(trees)[0]


def make_logprobs(policy, prompt_length: int, response_length: int, group_size: int) -> dict:
    """The four ways: {name: () -> log-probabilities}."""
    prompt = benching.random_prompt(policy, prompt_length, seed=0)
    generator = torch.Generator().manual_seed(1)
    responses = [benching.random_ids(policy, response_length, generator) for _ in range(group_size)]
    actions = [
        lambda: rows_logprobs(policy, prompt, responses, False),
        lambda: rows_logprobs(policy, prompt, responses, True),
        lambda: tree_logprobs(policy, prompt, responses, False),
        lambda: tree_logprobs(policy, prompt, responses, True),
    ]
    return dict(zip(WAYS, actions))


def make_steps(policy, logprobs: dict, group_size: int) -> dict:
    """The same as steps: forward, a loss with one advantage per response, backward."""
    advantages = torch.linspace(-1, 1, group_size, device=policy.device)[:, None]

    def step(forward):
        (forward().view(group_size, -1) * -advantages).mean().backward()
        policy.zero_grad()

    return {name: lambda f=forward: step(f) for name, forward in logprobs.items()}


def make_policy(shape_name: str, checkpointing: bool):
    cuda = torch.cuda.is_available()
    policy = benching.random_policy(
        benching.SHAPES[shape_name], "cuda" if cuda else "cpu",
        torch.bfloat16 if cuda else torch.float32,
    ).train()  # fmt: skip
    if checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    return policy


def steps_of_new_policy(shape_name: str, checkpointing: bool, P, R, group_size: int) -> dict:
    """What a process that measures memory builds for itself."""
    policy = make_policy(shape_name, checkpointing)
    return make_steps(policy, make_logprobs(policy, P, R, group_size), group_size)


def tree_flops(policy, shape, P: int, R: int, group_size: int, patches: int) -> float:
    """Forward and backward, by the formula above."""
    G = group_size
    layers = benching.parameters(policy.text_model.layers)
    vision = benching.parameters(policy.model.model.visual)
    pairs = P * P / 2 + G * (P * R + R * R / 2)
    return (
        6 * layers * (P + G * R) + 6 * shape.vocab * shape.hidden * G * R + 6 * vision * patches
        + 12 * shape.layers * shape.heads * shape.head_dim * pairs
    )  # fmt: skip


def disagreement(logprobs: dict) -> float:
    """The largest difference of a log-probability between any way and the first."""
    with torch.no_grad():
        first, *others = (forward().float() for forward in logprobs.values())
    return max(float((other - first).abs().max()) for other in others)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=("small", "3b"), default="3b" if cuda else "small")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repeat")
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="measured turns of each way")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--lengths", type=int, help="only the first so many prompt : response")
    parser.add_argument("--no_memory", action="store_true", help="measure time alone")
    args = parser.parse_args(argv)
    if args.shape == "3b" and not cuda:
        print("Skipped: --shape 3b needs a CUDA device, and this machine has none.")
        return
    name, repeats = ("quick", 1) if args.quick else (args.shape, args.repeats)
    shape, G = benching.SHAPES[name], args.group_size
    policy = make_policy(name, args.gradient_checkpointing)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    peak = next((v for k, v in PEAK.items() if cuda and k in torch.cuda.get_device_name()), None)
    rows, worst = [], 0.0
    for P, R in shape.lengths[: args.lengths]:
        logprobs = make_logprobs(policy, P, R, G)
        worst = max(worst, disagreement(logprobs))
        steps = make_steps(policy, logprobs, G)
        seconds = benching.alternate(steps, repeats)
        memory = dict.fromkeys(WAYS)
        if not args.no_memory and cuda:
            memory = {way: benching.gpu_step_memory(step) for way, step in steps.items()}
        elif not args.no_memory:
            arguments = (name, args.gradient_checkpointing, P, R, G)
            memory = benching.step_memory(steps_of_new_policy, arguments, WAYS)
        patches = len(benching.random_prompt(policy, P, 0).pixel_values)
        flops = tree_flops(policy, shape, P, R, G, patches)
        base = seconds[WAYS[0]]
        for way in WAYS:
            s = seconds[way]
            rows.append([
                f"{P} : {R}", way, benching.rate(P + G * R, s), benching.rate(G * R, s),
                benching.times(base, s), benching.mib(memory[way]),
                *([benching.rate(100 * flops / peak, s)] if peak else []),
            ])  # fmt: skip
    header = ["prompt : response", "way", "tree tokens/s", "response tokens/s", "speed-up",
              "memory of the step, MiB", *(["MFU, %"] if peak else [])]  # fmt: skip
    print(benching.table(header, rows))
    kept = "recomputed" if args.gradient_checkpointing else "kept"
    print(
        f"\nForward and backward of one group of {G}; {benching.parameters(policy) / 1e6:.1f}M "
        f"parameters (vocabulary {shape.vocab}), {next(policy.parameters()).dtype}, weights "
        f"{weights / benching.MIB:,.0f} MiB, activations {kept}; median of {repeats}. Largest "
        f"difference of a log-probability between the ways: {worst:.1e}.\n{benching.machine()}"
    )


if __name__ == "__main__":
    main()
