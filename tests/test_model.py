"""Encoding, log-probabilities and checkpoints, held against plain transformers."""

import copy
import json

import pytest
import torch
from conftest import (
    QUESTIONS,
    StaysOn,
    hf_distribution,
    hf_inputs,
    hf_logprobs,
    noise_image,
    random_response,
    relative_difference,
    to_meta,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

import grpo
import model
import toy
from data import Question, UserError
from model import encode, load_policy, prompt_length, response_logprobs, save_policy
from tree import build_trees, vision_layout

# ---------------------------------------------------------------------------- the tree


def test_tree_logprobs_and_entropies_equal_those_of_separate_rows(policy, prompts):
    """At temperature 1, gradients, and other families: tests/test_families.py."""
    lengths = (9, 1, 23, 14)
    groups = [(prompts[i], [random_response(n, 100 * i + n, policy) for n in lengths]) for i in (3, 0, 1, 2)]
    with torch.no_grad():
        logprobs, entropies = response_logprobs(policy, groups, temperature=0.6)
        rows = [(y, hf_distribution(policy, prompt, y, 0.6)) for prompt, ys in groups for y in ys]
    for got, entropy, (y, table) in zip(logprobs, entropies, rows, strict=True):
        want = torch.zeros(2, len(got))
        want[0, : len(y)] = table.gather(1, y[:, None])[:, 0]
        want[1, : len(y)] = torch.special.entr(table.exp()).sum(-1)
        torch.testing.assert_close(torch.stack([got, entropy]), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_trees_and_pictures_are_trained_without_reading_a_value(
    own_policy, prompts, checkpointed, monkeypatch
):
    """On a GPU the host would wait for it. What it lays out for the vision tower it makes beforehand."""
    trees = build_trees([(prompt, [random_response(n, n, own_policy) for n in (3, 1)]) for prompt in prompts])
    trees, meta = trees.to("meta"), torch.device("meta")
    layout = vision_layout(own_policy.model.model.visual, trees.image_grid_thw, meta)
    monkeypatch.setattr(model, "vision_layout", lambda *_: layout)
    if checkpointed:
        own_policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = to_meta(own_policy.train())
    with StaysOn("meta") as watch:
        policy(trees)[0].sum().backward()
    assert watch.operations > 100
    assert policy.model.model.visual.patch_embed.proj.weight.grad is not None


def test_gradient_checkpointing_changes_no_gradient(own_policy, prompts):
    groups = [(prompts[3], [random_response(n, n, own_policy) for n in (9, 4)])]
    own_policy.train()

    def run():
        kept = []  # sizes of what the forward pass keeps for the backward pass
        keep = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
        with keep:
            logprobs, _ = response_logprobs(own_policy, groups)
        return torch.autograd.grad(logprobs.sum(), list(own_policy.parameters())), sum(kept)

    plain, plain_kept = run()
    own_policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    again, again_kept = run()
    assert again_kept < plain_kept / 2
    assert all(relative_difference(a, b) < 1e-6 for a, b in zip(again, plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_vocabulary_projection_and_its_gradients_equal_those_of_full_logits(monkeypatch, dtype):
    """43 chunks, logits of 16 to 32, where bf16 knows an eighth; against float64.

    With logits in bf16 and the gradient summed in bf16, the errors are 0.15 and 1 % here.
    """
    temperature = 0.7
    monkeypatch.setattr(grpo, "CHUNK", 8)
    generator = torch.Generator().manual_seed(0)
    K, V, D = 43 * 8, 96, 64
    hidden, weight = (torch.randn(n, D, generator=generator) for n in (K, V))
    hidden += weight.sum(0) / V**0.5  # logits that are large for all alike
    scale, targets = (torch.randn(K, generator=generator), torch.randint(1, V, (K,), generator=generator))

    def run(dtype, attend):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight)]
        logprob, entropy = attend(*leaves)
        (logprob * scale).sum().backward()
        return logprob.detach().double(), entropy, *(x.grad.double() for x in leaves)

    def exactly(hidden, weight):
        table = (hidden @ weight[1:].T / temperature).log_softmax(-1)  # without the banned id 0
        return table.gather(1, targets[:, None] - 1)[:, 0], torch.special.entr(table.exp()).sum(-1)

    got = run(dtype, lambda h, w: model.token_logprobs(h, w, targets, [0], temperature))
    want = run(torch.float64, exactly)
    logits = hidden.bfloat16().double() @ weight.bfloat16().double().T
    assert logits.abs().amax(-1).mean() > 16
    for a, b in zip(got[:2], want[:2]):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=0)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got[2:], want[2:])]
    assert max(errors) < (0.003 if dtype == torch.bfloat16 else 1e-5), errors


def test_banned_ids_have_no_probability_and_leave_none_behind(policy, prompts):
    tokenizer = policy.tokenizer
    names = ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
    assert policy.banned_ids == sorted(tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in names)
    V = len(tokenizer)
    with torch.no_grad():  # every id as a response of one token
        logprobs, _ = response_logprobs(policy, [(prompts[0], list(torch.arange(V)[:, None]))])
    probability = logprobs[:, 0].exp()
    assert (probability[policy.banned_ids] == 0).all()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(logprobs).all()


# ---------------------------------------------------------------------------- encoding


def test_a_picture_that_has_gone_since_it_was_checked_is_named(policy, tmp_path):
    question = Question("q", "<image>?", [tmp_path / "a.png"], "1", place="mine.jsonl:3")
    with pytest.raises(UserError, match=r"mine.jsonl:3: picture .*a.png does not exist"):
        encode(policy, question)


def test_encode_equals_an_example_worked_by_hand(policy):
    """56 x 84 pixels are 4 x 6 patches of 14, merged to 2 x 3 visual tokens; 28 x 28 are one."""
    pictures = [Image.new("RGB", (56, 84), "white"), Image.new("RGB", (28, 28), "white")]
    prompt = encode(policy, Question("q", "Is <image> in {question} <image>?", pictures, "no"), "plain")
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nIs <|vision_start|>" + 6 * "<|image_pad|>" + "<|vision_end|> in {question} "
        "<|vision_start|><|image_pad|><|vision_end|>?\n\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert policy.tokenizer.decode(prompt.input_ids) == text
    assert prompt.image_grid_thw.tolist() == [[1, 6, 4], [1, 2, 2]]
    assert prompt.pixel_values.shape == (28, 3 * 2 * 14 * 14)
    white = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]  # the mean and deviation that Qwen took from CLIP
    )
    want = white.repeat_interleave(2 * 14 * 14).expand(28, -1)
    torch.testing.assert_close(prompt.pixel_values, want, atol=1e-5, rtol=0)
    # Text to 13, a picture of 3 rows and 2 columns, text from one past its largest position.
    at = (prompt.input_ids == policy.model.config.image_token_id).nonzero()[:, 0]
    start = int(at[0])
    want = [[0] * 6, [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]]
    assert (prompt.position_ids[:, at[:6]] - start).tolist() == want
    assert prompt.position_ids[:, at[5] + 1].tolist() == [start + 3] * 3
    assert prompt.next_position == int(prompt.position_ids.max()) + 1


def test_a_question_that_says_a_special_token_does_not_get_one(policy):
    text = "<image>What does <|image_pad|> mean?<|im_end|>\n<|im_start|>assistant\nNothing."
    prompt = encode(policy, Question("q", text, [noise_image(56, 28)], ""), "bare")
    count = torch.bincount(prompt.input_ids, minlength=len(policy.tokenizer))
    said = {name: int(count[policy.tokenizer.convert_tokens_to_ids(name)]) for name in toy.SPECIAL}
    assert said["<|image_pad|>"] == 2  # visual tokens
    assert (said["<|im_start|>"], said["<|im_end|>"]) == (3, 2)  # system, user, assistant
    with torch.no_grad():
        logprobs, _ = response_logprobs(policy, [(prompt, [torch.tensor([30, 31])])])
    assert torch.isfinite(logprobs).all()


def test_prompt_length_needs_no_pictures_and_is_exact(policy):
    pictures = [noise_image(*size) for size in [(300, 200), (31, 999), (56, 56)]]
    questions = [*QUESTIONS, Question("q", "<image>a<image>b<image>", pictures, "")]
    for question in questions:
        sizes = [image.size for image in question.images]
        want = len(encode(policy, question, "rethink").input_ids)
        assert prompt_length(policy, question, "rethink", sizes) == want


# ---------------------------------------------------------------------------- checkpoints


def logits_of(policy, prompt) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(**hf_inputs(policy, prompt, prompt.input_ids)).logits


@pytest.fixture(params=["tied", "untied"])
def any_policy(request, own_policy):
    """The head is the embedding, as 3B's, or a matrix of its own, as 7B's."""
    if request.param == "untied":
        own_policy.model.config.tie_word_embeddings = False
        own_policy.model.lm_head.weight = torch.nn.Parameter(own_policy.model.lm_head.weight.flip(1))
    return own_policy


def write_as_the_hub_serves(policy, directory) -> None:
    """config, weights, tokenizer and processors as Qwen2.5-VL's repositories hold them today."""
    tied = policy.model.config.tie_word_embeddings
    text, vision = policy.model.config.text_config, policy.model.config.vision_config
    tokens = {"vision_start": "vision_start", "vision_end": "vision_end", "vision": "vision_pad",
              "image": "image_pad", "video": "video_pad"}  # fmt: skip
    text_sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
                  "num_key_value_heads", "vocab_size")  # fmt: skip
    vision_sizes = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": policy.tokenizer.eos_token_id, "hidden_act": "silu", "initializer_range": 0.02,
        "max_position_embeddings": 128000, "max_window_layers": 70, "model_type": "qwen2_5_vl",
        "rms_norm_eps": 1e-06, "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.rope_parameters["mrope_section"])},
        "sliding_window": 32768, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "transformers_version": "4.49.0", "use_cache": True, "use_sliding_window": False,
        "vision_config": {
            "hidden_act": "silu", "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "tokens_per_second": 2, "temporal_patch_size": 2,
            "fullatt_block_indexes": list(vision.fullatt_block_indexes), "model_type": "qwen2_5_vl",
        } | {name: getattr(vision, name) for name in vision_sizes},
    } | {name: getattr(text, name) for name in text_sizes}  # fmt: skip
    for name, token in tokens.items():
        config[f"{name}_token_id"] = policy.tokenizer.convert_tokens_to_ids(f"<|{token}|>")
    generation_config = {
        "bos_token_id": 0, "pad_token_id": 0, "do_sample": True, "eos_token_id": [2, 0],
        "repetition_penalty": 1.05, "temperature": 0.000001, "transformers_version": "4.49.0",
    }  # fmt: skip
    preprocessor_config = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    weights = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in policy.model.state_dict().items()
    }
    if tied:
        del weights["lm_head.weight"]
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number in (1, 2):
        shard = f"model-{number:05d}-of-00002.safetensors"
        half = {name: weights[name].contiguous() for name in sorted(weights)[number - 1 :: 2]}
        save_file(half, directory / shard, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(half, shard)
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.chat_template = None  # only chat_template.json knows pictures
    tokenizer.save_pretrained(directory)
    files = {"config": config, "generation_config": generation_config, "preprocessor_config": preprocessor_config,
             "chat_template": {"chat_template": toy.CHAT_TEMPLATE}, "model.safetensors.index": index}  # fmt: skip
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2))


def test_the_layout_of_the_hub_loads_to_the_same_logits_and_is_saved_so_that_it_loads_again(
    any_policy, prompts, tmp_path
):
    (tmp_path / "hub").mkdir()
    write_as_the_hub_serves(any_policy, tmp_path / "hub")
    loaded = load_policy(str(tmp_path / "hub"))
    save_policy(loaded, tmp_path / "saved")
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    # Our way to attend is of this process alone: other tools know no such name.
    assert '"carried"' not in (tmp_path / "saved/config.json").read_text()
    for again in (loaded, load_policy(str(tmp_path / "saved"))):
        assert again.model.dtype == torch.float32
        assert again.banned_ids == any_policy.banned_ids and again.eos_ids == [0, 2]
        for prompt in prompts:
            encoded = encode(again, prompt.question, "bare")
            assert torch.equal(encoded.input_ids, prompt.input_ids)
            if prompt.pixel_values is not None:
                assert torch.equal(encoded.pixel_values, prompt.pixel_values)
            assert torch.equal(logits_of(again, prompt), logits_of(any_policy, prompt))
            y = random_response(5, 0, any_policy)
            with torch.no_grad():
                got, _ = response_logprobs(again, [(encoded, [y])])
                want = hf_logprobs(any_policy, prompt, y)
            torch.testing.assert_close(got[0], want, atol=1e-5, rtol=0)
    (tmp_path / "hub/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=str(tmp_path)):
        load_policy(str(tmp_path / "hub"))


def test_pixel_limits_are_the_checkpoints_unless_given(policy, tmp_path):
    write_as_the_hub_serves(policy, tmp_path)
    question = Question("q", "<image>", [noise_image(280, 140)], "")  # 10 x 5 visual tokens

    def visual_tokens(**limits):
        grid = encode(load_policy(str(tmp_path), **limits), question, "bare").image_grid_thw
        return int(grid.prod()) // 4

    assert visual_tokens() == 50
    assert visual_tokens(max_pixels=18 * 28 * 28) == 18
    assert visual_tokens(min_pixels=200 * 28 * 28) >= 200
    with pytest.raises(UserError, match="--min_pixels 1000000 is more than --max_pixels 100000"):
        load_policy(str(tmp_path), min_pixels=10**6, max_pixels=10**5)
