"""Recipes are run with stand-ins for python and torchrun: every line they launch must parse.

The worked example of own data is then run for real, with a policy of a few thousand parameters.
"""

import re
import runpy
import shutil
import weakref
from pathlib import Path

import memory
import plan
import pytest
import tiny
import torch
from conftest import noise_image, random_response
from launches import calls, training
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config
import eval
import lora
import parallel
import report
import train
from config import Config
from data import Question
from model import encode, response_logprobs
from rollout import Sampler
from tree import build_trees

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.sh"))
PARSERS = {"train.py": config.parse, "eval.py": eval.parse}


def launched(name: str, programs=tuple(PARSERS), **variables) -> list[tuple[str, list[str]]]:
    """[(script, its flags), ...] as the shell itself puts them together."""
    found = [(next((w for w in call if w in programs), None), call) for call in calls(name, **variables)]
    return [(script, call[call.index(script) + 1 :]) for script, call in found if script]


@pytest.mark.parametrize("name", RECIPES)
def test_every_line_that_a_recipe_launches_is_understood_and_every_flag_explained(name):
    text = (FOLDER / f"{name}.sh").read_text(encoding="utf-8")
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    explained = set(re.findall(r"--\w+", comments))
    lines = launched(name)
    assert "train.py" in [script for script, _ in lines]
    for script, flags in lines:
        assert PARSERS[script](flags).out.startswith("runs/")
        used = {word for word in flags if word.startswith("--")}
        assert used <= explained, sorted(used - explained)


def test_the_stages_of_the_paper_follow_each_other():
    lines = launched("eight_gpus_7b")
    first, second = (config.parse(flags) for script, flags in lines if script == "train.py")
    assert (first.template, first.ssr, first.rethink_fraction) == ("plain", "replay", 0)
    assert second.model == f"{first.out}/checkpoint-1"
    assert second.template == "rethink" and second.rethink_fraction > 0


def test_the_example_of_own_data_trains_reports_and_evaluates(tmp_path, monkeypatch):
    example = runpy.run_path(str(FOLDER / "own_data.py"))
    question = Question("q", "?", [], "B", ["red", "blue", "pink"])
    said = ["\\boxed{B}", "\\boxed{blue}", "\\boxed{A}", "\\boxed{pink}", "\\boxed{black}", "blue"]
    assert [example["reward"](text, question) for text in said] == [1, 1, 0.2, 0.2, 0, 0]
    programs = {"train.py": train.main, "report.py": report.main, "eval.py": eval.main}
    settings = {"MODEL": str(tiny.make_base()), "STEPS": "1"}
    lines = launched("own_data", tuple(programs), **settings)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FOLDER, "recipes")
    out = Path("runs/own-data")
    example["write"](out / "data", "train", 10)
    example["write"](out / "data", "heldout", 3)
    assert [script for script, _ in lines] == list(programs)
    few = {"train.py": ["--max_new_tokens", "40", "--group_size", "2", "--rethink_fraction", "1"]}
    for script, flags in lines:
        assert programs[script]([*flags, *few.get(script, [])]) == 0
    settings = tiny.strict_json((out / "config.json").read_text())
    sizes = [settings[name] for name in ("preset", "heldout", "episode_queries", "batch_size")]
    assert sizes == ["own", 1, 9, 18] and settings["reward"] == "recipes/own_data.py:reward"
    assert tiny.strict_json((out / "eval/summary.json").read_text())["own"]["n"] == 3
    page = (out / "report.html").read_text()
    for shown in ("train.py --model", "data:image/png", "1 questions, from step 0 to step 1",
                  'class="forced" title="forced">Wait', "forced to look again, not kept"):  # fmt: skip
        assert shown in page


@pytest.mark.parametrize("name", [name for name in RECIPES if "toy" not in name])
def test_a_recipe_fits_its_cards_with_a_tenth_to_spare(name):
    lines = training(name)
    assert lines
    for size, gpus, card, settings in lines:
        found = memory.peaks(plan.build(size), gpus, settings)
        assert max(found.values()) < 0.9e9 * card, found


@pytest.mark.parametrize(("rank", "G"), [(0, 2), (4, 1)])
def test_what_memory_py_counts_is_what_a_step_holds(rank, G, alone, own_policy, prompts):
    policy, c = own_policy, Config(rollout_rows=4 * G, max_new_tokens=70)
    policy.eos_ids = []  # every response is as long as it may be
    if rank:
        lora.adapt(policy, rank, c.lora_alpha)
    parallel.shard(policy, torch.device("cpu"), precision="bf16")
    lora.initialise(policy, 0)
    optimizer = parallel.optimizer(policy, 1e-3, 0.0)
    with torch.no_grad(), parallel.weights_to_sample(policy):
        sampler = Sampler(policy, prompts, G, c.max_new_tokens, 1.0, None, None, c.rollout_rows)
        groups = sampler.run(lambda *_: None)
    longest = max(len(prompt.input_ids) for prompt in prompts)
    counted, *most = memory.most_pages(policy, c, G, c.rollout_rows, longest)
    for name, bound in zip(("prompts", "responses"), most):
        real, empty = getattr(sampler.cache, name), getattr(counted, name)
        assert [x[0].nbytes for x in real.k] == [x[0].nbytes for x in empty.k]
        assert bound / 2 <= len(real) <= bound

    trees = [(prompt, [sample.tokens for sample in group]) for prompt, group in zip(prompts, groups)]
    response_logprobs(policy, trees)[0].sum().backward()
    optimizer.step()
    trained = [p for p in policy.parameters() if p.requires_grad]
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    weights = sum(parallel.local(x).nbytes for x in (*policy.parameters(), *moments))
    gradients = sum(parallel.local(p.grad).nbytes for p in trained)
    assert memory.held(policy) == (weights, gradients)


class Live(TorchDispatchMode):
    """`peak`: the most bytes of tensors made since it was entered that were there at once."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made, given = (
            [x.untyped_storage() for x in tree_leaves(xs) if isinstance(x, torch.Tensor)]
            for xs in (out, (args, kwargs))
        )
        for storage in made:
            if storage._cdata not in {x._cdata for x in given} | self.sizes.keys():
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def test_activations_stay_below_what_memory_py_says(alone, own_policy):
    policy = own_policy
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    parallel.shard(policy, torch.device("cpu"), precision="bf16").train()
    text = policy.text_model.config
    question = Question("wide", "<image>What is shown?", [noise_image(560, 560)], "noise")
    prompt = encode(policy, question, "bare")

    with torch.no_grad(), parallel.weights_to_sample(policy), Live() as live:
        _, keys, values = policy.prefill([prompt] * 8)
    tokens = 8 * len(prompt.input_ids)
    said = max(memory.block(text, tokens), memory.tower_block(policy, tokens))
    said += sum(x.nbytes for x in (*keys, *values))
    assert said / 2 < live.peak < said

    prompt = encode(policy, Question("text", "What is shown?", [], "noise"), "bare")
    trees = build_trees([(prompt, [random_response(100, i, policy) for i in range(8)])] * 6)
    for _ in range(2):  # the second time, gradients are there
        with Live() as live:
            policy(trees)[0].sum().backward()
    said = memory.updating(policy, Config(micro_batch_tokens=trees.input_ids.numel()))
    assert said["layers"] / 2 < live.peak < said["layers"]
