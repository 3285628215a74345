"""Two cores oversubscribe easily: every test process computes with one thread."""

import contextlib
import copy
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tiny import let_be_right, lucky, make_base
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import toy
from data import Question
from model import Policy, encode

torch.set_num_threads(1)


def unsettle(policy: Policy, seed: int = 0) -> Policy:
    """Give every bias and norm a value of its own and make the layers loud.

    At their initial values biases are 0, norms are 1 and greedy decoding repeats one token, so that
    a bias left out or a cache gone wrong would not show. A tenth of the vocabulary ends a turn, so
    that responses end at different times.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if p.dim() == 1:
                p += 0.2 * torch.randn(p.shape, generator=generator)
            elif ".layers." in name:
                p *= 3.0
        policy.text_model.norm.weight *= 2.0  # likelier and unlikelier tokens
    policy.eos_ids = sorted({*policy.eos_ids, *range(20, len(policy.tokenizer), 20)})
    return policy


@pytest.fixture(scope="session")
def policy() -> Policy:
    """A tiny Qwen2.5-VL with random weights. Tests that change it take `own_policy`."""
    return unsettle(toy.new_policy(0, hidden=64, layers=2, heads=4))


@pytest.fixture
def own_policy(policy) -> Policy:
    """A copy of `policy` that a test may change."""
    return copy.deepcopy(policy)


@pytest.fixture(scope="session")
def base():
    """The folder of a small policy that guesses."""
    return make_base()


@pytest.fixture(scope="session")
def by_luck():
    """`with by_luck():` half of the guesses are right; for runs that a module shares."""

    @contextlib.contextmanager
    def lucky_rewards():
        with pytest.MonkeyPatch.context() as monkeypatch:
            let_be_right(monkeypatch, lucky)
            yield

    return lucky_rewards


@pytest.fixture
def reward_by_luck(monkeypatch):
    let_be_right(monkeypatch, lucky)


@pytest.fixture
def alone():
    """One process that shards over itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


QUESTIONS = [
    Question("text", "How many legs do 3 spiders have?", [], "24"),
    Question("one", "<image>Start at red and take 2 steps.", [noise_image(84, 56, 1)], "blue"),
    Question("wide", "What is shown?<image>", [noise_image(140, 28, 2)], "noise"),
    Question(
        "two", "<image>Is it the same as <image> or not?",
        [noise_image(56, 112, 3), noise_image(84, 84, 4)], "no",
    ),
]  # fmt: skip


@pytest.fixture(scope="session")
def prompts(policy) -> list:
    """Prompts of different lengths, with no picture, one and two."""
    return [encode(policy, question, "bare") for question in QUESTIONS]


def random_response(length: int, seed: int, policy: Policy) -> torch.Tensor:
    """Tokens [length] that the policy may say."""
    allowed = [i for i in range(len(policy.tokenizer)) if i not in policy.banned_ids]
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(allowed)[torch.randint(0, len(allowed), (length,), generator=generator)]


# ---------------------------------------------------------------------------- oracles


def hf_inputs(policy: Policy, prompt, input_ids: torch.Tensor) -> dict:
    """What transformers' own forward and generate take, for one row."""
    inputs = {"input_ids": input_ids[None]}
    is_image = input_ids == policy.model.config.image_token_id
    inputs["mm_token_type_ids"] = is_image.int()[None]
    if len(prompt.image_grid_thw):
        inputs["pixel_values"] = prompt.pixel_values
        inputs["image_grid_thw"] = prompt.image_grid_thw
    return inputs


def hf_distribution(policy: Policy, prompt, response, temperature: float = 1.0) -> torch.Tensor:
    """log softmax [R, V] by the full logits of prompt + response on a row of its own."""
    row = torch.cat([prompt.input_ids, response])
    logits = policy.model(**hf_inputs(policy, prompt, row)).logits[0, len(prompt.input_ids) - 1 : -1]
    ban = torch.zeros(logits.shape[-1])
    ban[policy.banned_ids] = -torch.inf
    return (logits / temperature + ban).log_softmax(-1)


def hf_logprobs(policy: Policy, prompt, response, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities [R] of the response's tokens, by `hf_distribution`."""
    return hf_distribution(policy, prompt, response, temperature).gather(1, response[:, None])[:, 0]


def hf_generate(policy: Policy, prompt, max_new_tokens: int) -> torch.Tensor:
    """The greedy response [R] of transformers' generate, by the attention that is written out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.text_model.config, "_attn_implementation", "eager")
        out = policy.model.generate(
            **hf_inputs(policy, prompt, prompt.input_ids), max_new_tokens=max_new_tokens,
            do_sample=False, suppress_tokens=policy.banned_ids, eos_token_id=policy.eos_ids,
        )  # fmt: skip
    return out[0, len(prompt.input_ids) :]


# ---------------------------------------------------------------------------- statistics


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def follows(counts, probabilities) -> bool:
    """Pearson's chi-squared test: False for 1 in 1000 counts that do follow the probabilities.

    The quantile is Wilson and Hilferty's: exact to a percent.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    expected = torch.as_tensor(probabilities, dtype=torch.float64) * counts.sum()
    assert expected.min() >= 5, "too few draws for the statistic to be chi-squared"
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    k = 2 / (9 * (len(counts) - 1))
    return statistic < (len(counts) - 1) * (1 - k + 3.0902 * k**0.5) ** 3


class StaysOn(TorchDispatchMode):
    """Refuses operations that take a tensor of another device: on a GPU they would wait for it.

    Reading a value (`.item()`, `nonzero`, a mask as an index) the meta device refuses by itself.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        strangers = [x for x in tensors if x.device.type != self.device]
        assert not strangers, f"{function}: {strangers}"
        self.operations += 1
        return function(*args, **(kwargs or {}))


def to_meta(policy: Policy) -> Policy:
    """Without values: what then looks at one fails, as it would make a GPU's host wait."""
    policy = policy.to("meta")
    policy.text_model.rotary_emb.to("meta")
    return policy
