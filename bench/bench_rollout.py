"""One prefill a question and our decoding against HF generate(num_return_sequences=G).

    python bench/bench_rollout.py                a small model on a CPU, the 3B shape on a GPU
    python bench/bench_rollout.py --shape 3b     the published 3B shape, random bf16; GPU only
    python bench/bench_rollout.py --quick        shapes that take seconds, to see that it runs

A ladder, one idea a rung; each rung samples G responses to each of N questions:

    HF generate           transformers' own: every row has its own prompt, prefilled and kept
    + shared prefill      the model of transformers prefills each question once, its cache is
                          copied to the G rows and grows by concatenation; sampling as in rollout.py
    + static cache        `rollout.generate`: the prompt's cache is kept and read once per question,
                          the rows' caches are written in place
    + CUDA graphs         the same, a decoding step launched as a whole (only on a GPU)

The prompts, pictures, lengths and the distribution (softmax at temperature 1 without the banned
ids) are the same. Ids that end a turn are banned in all, so that all rows run to the full length;
what rollout.py gains when rows finish early is not measured here. All rungs but the first also
compute the log-probability of every token, which HF generate does not.

On a GPU the table also has the share of the memory roofline that decoding reaches:

    share = bytes / bandwidth / (seconds a decoding step)
    bytes = language model's weights + prompts' cache, once a question + half the rows' full cache

The bandwidth is measured: a copy of 1 GiB, counted as read and written. The seconds are those of
the whole, less those of the same with one new token, over the steps between: recording graphs is in.
"""

import argparse

import benching  # first: it puts the repository on the path
import torch

from rollout import generate, sample_token

WAYS = ["HF generate", "+ shared prefill", "+ static cache"]
if torch.cuda.is_available():
    WAYS.append("+ CUDA graphs")


def hf_inputs(policy, prompts) -> dict:
    """Prompts of one length, as transformers takes them."""
    ids = torch.stack([p.input_ids for p in prompts])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == policy.model.config.image_token_id).int(),
        "pixel_values": torch.cat([p.pixel_values for p in prompts]),
        "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts]),
    }  # fmt: skip
    return {name: tensor.to(policy.device) for name, tensor in inputs.items()}


def hf_generate(policy, prompts, group_size: int, new_tokens: int, temperature: float):
    """Tokens [N G, R], by transformers alone."""
    inputs = hf_inputs(policy, prompts)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    out = policy.model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=temperature > 0, **sampling,
        num_return_sequences=group_size if temperature else 1, suppress_tokens=policy.banned_ids,
    )  # fmt: skip
    return out[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def shared_prefill(policy, prompts, group_size: int, new_tokens: int, temperature: float):
    """Tokens [N G, R], by the model of transformers, each prompt run once."""
    inner = policy.model.model
    out = inner(**hf_inputs(policy, prompts), use_cache=True)
    cache, hidden = out.past_key_values, out.last_hidden_state[:, -1]
    cache.batch_repeat_interleave(group_size)
    hidden = hidden.repeat_interleave(group_size, 0)
    seed = torch.arange(len(hidden), device=policy.device)
    tokens = []
    for place in range(new_tokens):
        if tokens:
            out = inner(input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True)
            hidden = out.last_hidden_state[:, -1]
        tokens.append(sample_token(policy, hidden, temperature, seed, torch.full_like(seed, place))[0])
    return torch.stack(tokens, dim=1)


def ours(policy, prompts, group_size: int, new_tokens: int, temperature: float):
    """Tokens [N G, R], by rollout.py."""
    rows = len(prompts) * group_size
    groups = generate(policy, prompts, group_size, new_tokens, temperature, max_rows=rows)
    return torch.stack([sample.tokens for group in groups for sample in group])


def without_graphs(policy, *arguments):
    policy.cuda_graphs = False
    try:
        return ours(policy, *arguments)
    finally:
        policy.cuda_graphs = True


def make_ways(policy, questions: int, P: int, R: int, group_size: int, temperature=1.0) -> dict:
    """The rungs: {name: () -> tokens [N G, R]}."""
    prompts = [benching.random_prompt(policy, P, seed) for seed in range(questions)]
    arguments = (policy, prompts, group_size, R, temperature)
    functions = [hf_generate, shared_prefill, without_graphs, ours]
    return {way: lambda f=f: f(*arguments) for way, f in zip(WAYS, functions)}


def make_policy(shape_name: str):
    device, dtype = ("cpu", torch.float32)
    if torch.cuda.is_available():
        device, dtype = ("cuda", torch.bfloat16)
    return benching.random_policy(benching.SHAPES[shape_name], device, dtype).eval()


def ways_of_new_policy(shape_name: str, questions: int, P: int, R: int, group_size: int) -> dict:
    """What a process that measures memory builds for itself."""
    return make_ways(make_policy(shape_name), questions, P, R, group_size)


def copy_bandwidth() -> float:
    """Bytes a second read and written by a copy of 1 GiB on the GPU; the best of ten."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / min(benching.timed(lambda: target.copy_(source)) for _ in range(10))


def step_bytes(policy, shape, questions: int, P: int, R: int, group_size: int) -> float:
    """The least that a decoding step must read, at half its length."""
    size = next(policy.parameters()).element_size()
    weights = benching.parameters(policy.text_model) * size  # the tied head is its embedding
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    return weights + token * questions * (P + group_size * R / 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=("small", "3b"), default="3b" if cuda else "small")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one repeat")
    parser.add_argument("--questions", type=int, default=8 if cuda else 4)
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="measured turns of each rung")
    parser.add_argument("--lengths", type=int, help="only the first so many prompt : response")
    parser.add_argument("--response", type=int, help="tokens, in place of the shape's own")
    parser.add_argument("--no_memory", action="store_true", help="measure time alone")
    args = parser.parse_args(argv)
    if args.shape == "3b" and not cuda:
        print("Skipped: --shape 3b needs a CUDA device, and this machine has none.")
        return
    name, repeats = ("quick", 1) if args.quick else (args.shape, args.repeats)
    shape, N, G = benching.SHAPES[name], args.questions, args.group_size
    policy = make_policy(name)
    bandwidth = copy_bandwidth() if cuda else None
    rows = []
    for P, R in shape.lengths[: args.lengths]:
        R = args.response or R
        ways = make_ways(policy, N, P, R, G)
        seconds = benching.alternate(ways, repeats)
        memory, first = dict.fromkeys(WAYS), {}
        if cuda:
            first = benching.alternate(make_ways(policy, N, P, 1, G), repeats)
        if not args.no_memory and cuda:
            memory = {way: benching.gpu_step_memory(action) for way, action in ways.items()}
        elif not args.no_memory:
            memory = benching.step_memory(ways_of_new_policy, (name, N, P, R, G), WAYS)
        for way in WAYS:
            s, share = seconds[way], None
            if cuda and s and first[way]:
                step = (s - first[way]) / (R - 1)
                share = 100 * step_bytes(policy, shape, N, P, R, G) / bandwidth / step
            rows.append([
                f"{P} : {R}", way, benching.rate(N * G * R, s),
                benching.times(seconds[WAYS[0]], s), benching.mib(memory[way]),
                *([share] if cuda else []),
            ])  # fmt: skip
    header = ["prompt : response", "way", "response tokens/s", "speed-up",
              "memory above weights, MiB", *(["roofline, %"] if cuda else [])]  # fmt: skip
    print(benching.table(header, rows))
    copying = f"; copies at {bandwidth / 1e9:,.0f} GB/s" if cuda else ""
    print(
        f"\n{N} questions x {G} responses; {benching.parameters(policy) / 1e6:.1f}M parameters "
        f"(vocabulary {shape.vocab}), {next(policy.parameters()).dtype}; median of {repeats}"
        f"{copying}.\n{benching.machine()}"
    )


if __name__ == "__main__":
    main()
