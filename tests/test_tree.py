"""The tree's layout, its mask, packed pictures, and the plan of micro-batches."""

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import toy
import tree
from model import FAMILIES
from tree import build_trees, pack_pictures, plan_micro_batches, tree_attention, tree_mask, vision_layout


def ids(*values):
    return torch.tensor(values)


def text_prompt(*tokens):
    """A prompt without pictures, numbered from 0."""
    P = len(tokens)
    return SimpleNamespace(
        input_ids=ids(*tokens), position_ids=torch.arange(P).expand(3, P), next_position=P,
        image_grid_thw=torch.zeros(0, 3, dtype=torch.long), pixel_values=None,
    )  # fmt: skip


# ---------------------------------------------------------------------------- the mask


def test_the_mask_lets_a_token_see_its_prompt_and_its_own_response_only():
    branch = ids(0, 0, 0, 1, 1, 2, 3, 3, 3, -1, -1)
    mask = tree_mask(branch[None])[0]
    for q in range(len(branch)):
        for k in range(len(branch)):
            same = branch[k] == branch[q]
            prompt_of_a_real_token = branch[k] == 0 and branch[q] >= 0
            assert mask[q, k] == (k <= q and bool(same or prompt_of_a_real_token)), (q, k)


# ---------------------------------------------------------------------------- the layout


def test_trees_of_different_lengths_are_laid_out_as_by_hand():
    a, b = text_prompt(1, 2, 3), text_prompt(4, 5)
    trees = build_trees([(a, [ids(11, 12), ids(21)]), (b, [ids(31)])])
    assert trees.input_ids.tolist() == [[1, 2, 3, 11, 12, 21], [4, 5, 31, 0, 0, 0]]
    assert trees.branch.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 1, -1, -1, -1]]
    for row in trees.position_ids:
        assert row.tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 2, 0, 0, 0]]
    # Row 1 starts at flat index 6; the first token of a response is predicted by the prompt's last.
    assert trees.predictor.tolist() == [2, 3, 2, 7]
    assert trees.targets.tolist() == [11, 12, 21, 31]
    assert trees.lengths == [2, 1, 1]
    assert trees.pixel_values is None and trees.image_grid_thw is None


@pytest.mark.parametrize("short", [64, 1], ids=["one_call", "by_length"])
@pytest.mark.parametrize("seed", range(4))
def test_attention_on_trees_does_what_the_mask_says(seed, short, monkeypatch):
    """Values and gradients, for prompts and responses of different lengths and grouped heads."""
    monkeypatch.setattr(tree, "SHORT", short)
    rng = random.Random(seed)
    groups = [
        (text_prompt(*range(rng.randint(1, 9))),
         [torch.arange(rng.randint(1, 7)) for _ in range(rng.randint(1, 4))])
        for _ in range(3)
    ]  # fmt: skip
    trees = build_trees(groups)
    assert (len(trees.responses) > 1) == (short == 1)
    N, T = trees.input_ids.shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(N, h, T, 8, generator=generator) for h in (4, 2, 2))
    real = trees.branch >= 0  # what stands at padding is nobody's
    pull = torch.randn(N, T, 4, 8, generator=generator)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)

    def run(attend):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)  # [N, T, h, d]
        (out[real] * pull[real]).sum().backward()
        return out[real].detach(), *(x.grad for x in leaves)

    def by_the_mask(q, k, v):
        mask = tree_mask(trees.branch)[:, None]
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def in_two_calls(q, k, v):
        out = tree_attention(trees, module, q, k, v)
        assert torch.isfinite(out).all()
        return out

    for got, want in zip(run(in_two_calls), run(by_the_mask)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------- the vision tower

# Two pictures of one size, one that is no multiple of a window of 8 x 8 patches, two below a window.
GRIDS = torch.tensor([[1, 16, 24], [1, 14, 22], [1, 4, 6], [1, 16, 24], [1, 2, 4]])


def make_tower(family: str):
    """A tower as transformers makes it. Two layers; of Qwen2.5's the first sees windows."""
    settings = toy.toy_config(family, toy.toy_tokenizer(), hidden=64, layers=1, heads=2)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **settings))
    tower = model.model.visual.double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and positions that show
    return tower


def patches(tower) -> torch.Tensor:
    width = 3 * tower.config.temporal_patch_size * tower.config.patch_size**2
    generator = torch.Generator().manual_seed(1)
    return torch.randn(int(GRIDS.prod(-1).sum()), width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("laid_out", [True, False], ids=["by_layout", "by_lengths"])
def test_packed_pictures_are_seen_as_by_transformers_own_tower_in_a_call_for_each_size(
    name, laid_out, monkeypatch
):
    """Features, what DeepStack adds, and gradients."""
    attend, calls = tree.sdpa_attention_forward, []

    def watched(module, q, *rest, **options):
        calls.append((len(q), q.shape[2]))
        return attend(module, q, *rest, **options)

    monkeypatch.setattr(tree, "sdpa_attention_forward", watched)
    tower, outcomes = make_tower(name), []
    for layout in ({}, vision_layout(tower, GRIDS, torch.device("cpu")) if laid_out else {}):
        out = tower(patches(tower), grid_thw=GRIDS, **layout)
        features = [out.pooler_output, *getattr(out, "deepstack_features", [])]
        gradients = torch.autograd.grad(
            sum(x.sin().sum() for x in features), list(tower.parameters()), allow_unused=True
        )
        outcomes.append([x.detach() for x in features] + [x for x in gradients if x is not None])
        pack_pictures(tower)
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    whole_pictures = [(2, 16 * 24), (1, 14 * 22), (1, 4 * 6), (1, 2 * 4)]
    # 2 x 3 windows of 8 x 8, twice; of the odd picture 1 x 2, and four that are cut; the smallest are whole.
    windows = [(14, 64), (3, 48), (1, 36), (1, 24), (1, 8)]
    assert calls == (windows if name == "qwen2_5_vl" else whole_pictures) + whole_pictures


# ---------------------------------------------------------------------------- the plan


def random_branches(rng):
    prompts = {f"q{i}": rng.randint(1, 60) for i in range(rng.randint(1, 9))}
    questions = [rng.choice(list(prompts)) for _ in range(rng.randint(1, 40))]
    return [(q, prompts[q], rng.randint(1, 80)) for q in questions]


def row_length(branches, tree):
    return branches[tree[0]][1] + sum(branches[i][2] for i in tree)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("budget", [1, 90, 200, 400, 10**6])
def test_the_plan_trains_every_branch_once_within_the_budget_and_shares_the_tokens(ranks, budget):
    rng = random.Random(f"{ranks} {budget}")
    for _ in range(30):
        branches = random_branches(rng)
        plan = plan_micro_batches(branches, ranks, budget)
        assert len(plan) == ranks
        micro_batches = [m for share in plan for m in share]
        trees = [tree for m in micro_batches for tree in m]
        assert sorted(i for tree in trees for i in tree) == list(range(len(branches)))
        assert all(len({branches[i][0] for i in tree}) == 1 for tree in trees)
        for m in micro_batches:
            padded = len(m) * max(row_length(branches, tree) for tree in m)
            assert padded <= budget or (len(m) == 1 and len(m[0]) == 1)
        loads = [sum(row_length(branches, tree) for m in share for tree in m) for share in plan]
        assert max(loads) - min(loads) <= max(row_length(branches, tree) for tree in trees)
        # Every rank computes the plan for itself and must find the same one: names do not matter.
        renamed = [("z" + question, p, r) for question, p, r in branches]
        assert plan == plan_micro_batches(renamed, ranks, budget)


@pytest.mark.parametrize(
    ("budget", "lengths", "trees"),
    [(170, [40, 40, 40, 40], [[0, 1, 2, 3]]), (50, [20, 20, 20, 20], [[0, 1], [2, 3]]),
     (50, [10, 30, 30, 10], [[0, 1], [2, 3]])],
    ids=["fits", "alike", "unlike"],  # one after the other, the unlike ones would take three trees
)  # fmt: skip
def test_a_group_is_one_tree_or_cut_into_few(budget, lengths, trees):
    [micro_batches] = plan_micro_batches([("a", 10, n) for n in lengths], ranks=1, budget=budget)
    assert sorted(sorted(tree) for [tree] in micro_batches) == trees
