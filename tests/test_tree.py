"""The tree's layout, its mask, packed pictures, and the plan of micro-batches."""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import StaysOn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as qwen3_moe

import tree
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


def test_no_response_is_padded_to_more_than_its_double_or_what_is_short():
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(6, 1)) + 1 for _ in range(200)]
    groups = tree.of_like_length(lengths)
    assert sorted(i for group in groups for i in group) == list(range(200))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert all(2 * lengths[i] >= longest for i in group) or longest <= tree.SHORT
    padded = sum(max(lengths[i] for i in group) * len(group) for group in groups)
    assert padded < 1.5 * sum(lengths) < max(lengths) * 200


# ---------------------------------------------------------------------------- the vision tower

# Two pictures of one size, one that is no multiple of a window of 8 x 8 patches, two below a window.
GRIDS = torch.tensor([[1, 16, 24], [1, 14, 22], [1, 4, 6], [1, 16, 24], [1, 2, 4]])
TOWERS = {
    "qwen2": lambda: qwen2.Qwen2VisionTransformerPretrainedModel(
        qwen2.Qwen2VLVisionConfig(depth=3, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=2)
    ),
    "qwen2_5": lambda: qwen2_5.Qwen2_5_VisionTransformerPretrainedModel(
        qwen2_5.Qwen2_5_VLVisionConfig(
            depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=48,
            fullatt_block_indexes=[1],
        )
    ),
    **{
        name: lambda kind=kind, config=config: kind(
            config(
                depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=48,
                num_position_embeddings=64, deepstack_visual_indexes=[0, 1],
            )
        )
        for name, kind, config in [
            ("qwen3", qwen3.Qwen3VLVisionModel, qwen3.Qwen3VLVisionConfig),
            ("qwen3_moe", qwen3_moe.Qwen3VLMoeVisionModel, qwen3_moe.Qwen3VLMoeVisionConfig),
        ]
    },
}  # fmt: skip


def make_tower(name: str):
    torch.manual_seed(0)
    tower = TOWERS[name]().double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and positions that show
    return tower


def patches(tower, grids=GRIDS) -> torch.Tensor:
    width = 3 * tower.config.temporal_patch_size * tower.config.patch_size**2
    generator = torch.Generator().manual_seed(1)
    return torch.randn(int(grids.prod(-1).sum()), width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("laid_out", [True, False], ids=["by_layout", "by_lengths"])
def test_packed_pictures_are_seen_as_by_transformers_own_tower(name, laid_out):
    """Features, what DeepStack adds, and gradients."""
    tower, outcomes = make_tower(name), []
    for layout in ({}, vision_layout(tower, GRIDS, torch.device("cpu")) if laid_out else {}):
        out = tower(patches(tower), grid_thw=GRIDS, **layout)
        features = [out.pooler_output, *getattr(out, "deepstack_features", [])]
        tower.zero_grad()
        sum(x.sin().sum() for x in features).backward()
        gradients = [p.grad for p in tower.parameters() if p.grad is not None]
        outcomes.append([x.detach() for x in features] + gradients)
        pack_pictures(tower)
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", TOWERS)
def test_the_tower_calls_attention_once_for_each_size_and_never_reads_a_value(name, monkeypatch):
    tower, calls = make_tower(name).to("meta"), []
    pack_pictures(tower)
    layout = vision_layout(tower, GRIDS, torch.device("meta"))
    attend = tree.sdpa_attention_forward
    monkeypatch.setattr(
        tree, "sdpa_attention_forward",
        lambda module, q, *rest, **options: calls.append(q.shape) or attend(module, q, *rest, **options),
    )  # fmt: skip
    for module in tower.modules():
        for buffer, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(module, buffer, value.to("meta"))
    pixels, grids = patches(tower).to("meta"), GRIDS.to("meta")
    with StaysOn("meta"):
        tower(pixels, grid_thw=grids, **layout)
    whole_pictures = [(2, 16 * 24), (1, 14 * 22), (1, 4 * 6), (1, 2 * 4)]
    # 2 x 3 windows of 8 x 8, twice; of the odd picture 1 x 2, and four that are cut; the smallest are whole.
    windows = [(14, 64), (3, 48), (1, 36), (1, 24), (1, 8)]
    layers = [windows, whole_pictures, windows] if name == "qwen2_5" else [whole_pictures] * 3
    assert [(shape[0], shape[2]) for shape in calls] == [call for layer in layers for call in layer]


# ---------------------------------------------------------------------------- the plan


def random_branches(rng):
    prompts = {f"q{i}": rng.randint(1, 60) for i in range(rng.randint(1, 9))}
    questions = [rng.choice(list(prompts)) for _ in range(rng.randint(1, 40))]
    return [(q, prompts[q], rng.randint(1, 80)) for q in questions]


def row_length(branches, tree):
    return branches[tree[0]][1] + sum(branches[i][2] for i in tree)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("budget", [1, 90, 400, 10**6])
def test_the_plan_trains_every_branch_once_within_the_budget(ranks, budget):
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


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_get_about_the_same_number_of_tokens(ranks):
    rng = random.Random(ranks)
    for _ in range(30):
        branches = random_branches(rng)
        plan = plan_micro_batches(branches, ranks, budget=200)
        lengths = [[row_length(branches, tree) for m in share for tree in m] for share in plan]
        loads = [sum(share) for share in lengths]
        longest = max(length for share in lengths for length in share)
        assert max(loads) - min(loads) <= longest


def test_a_group_that_fits_is_one_tree():
    branches = [("a", 10, 4), ("b", 10, 4), ("a", 10, 4), ("a", 10, 4)]
    [[micro_batch]] = plan_micro_batches(branches, ranks=1, budget=100)
    assert sorted(micro_batch) == [[0, 2, 3], [1]]


@pytest.mark.parametrize(
    ("lengths", "trees"),
    [([20, 20, 20, 20], [[0, 1], [2, 3]]), ([10, 30, 30, 10], [[0, 1], [2, 3]])],
    ids=["alike", "unlike"],  # one after the other, the unlike ones would take three trees
)
def test_a_group_longer_than_the_budget_is_cut_into_few_trees(lengths, trees):
    [micro_batches] = plan_micro_batches([("a", 10, n) for n in lengths], ranks=1, budget=50)
    assert [len(micro) for micro in micro_batches] == [1, 1]
    assert sorted(sorted(tree) for micro in micro_batches for tree in micro) == trees


def test_the_plan_depends_on_lengths_alone():
    """Every rank computes it for itself and must find the same one."""
    branches = random_branches(random.Random(3))
    renamed = [("z" + question, p, r) for question, p, r in branches]
    assert plan_micro_batches(branches, 3, 300) == plan_micro_batches(renamed, 3, 300)
