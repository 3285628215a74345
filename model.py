"""The policy: a Qwen vision-language model, and the log-probability of what it said.

One row holds a group as a tree (tree.py): the vision tower and the prompt run once per group, forward and
backward, and the log-probabilities are those of G separate rows (tests/test_model.py holds them to 1e-5).

What we do differently from the released code: image, video and vision ids are banned, in sampling
and in the log-probabilities, since a response that holds `<|image_pad|>` breaks the next forward
pass; prompts are never cut; torchvision is not needed.

Letters in shape comments: N questions or trees, G responses per question, P prompt tokens,
R response tokens, T tokens of a packed row, K response tokens of a batch, V vocabulary, D features.
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from config import FAMILIES
from data import MARKER, MIN_SIDE, Question, UserError, load_pictures, prompt_text, read_json
from grpo import token_logprobs
from tree import Trees, build_trees, join_pictures, pack_pictures, tree_attention, vision_layout

# Its progress bars for reading and writing files would break ours in two.
transformers.utils.logging.disable_progress_bar()

IMAGE_PAD = "<|image_pad|>"


@dataclass
class Prompt:
    """A Question encoded once. Its pictures can be left behind: `with_pixels` makes them again."""

    question: Question
    template: str
    input_ids: torch.Tensor  # [P]
    position_ids: torch.Tensor  # [3, P]: temporal, height, width (M-RoPE)
    image_grid_thw: torch.Tensor  # [images, 3], in patches
    pixel_values: torch.Tensor | None  # [patches, channels * temporal_patch * patch * patch]

    @property
    def next_position(self) -> int:
        """The position of the first response token: one past the largest of the prompt."""
        return int(self.position_ids.max()) + 1


@dataclass
class Sample:
    """The unit of RL: one response, as it was sampled, and what it earned."""

    prompt: Prompt
    tokens: torch.Tensor  # [R], EOS included where the policy sampled it
    logprobs: torch.Tensor  # [R], under the policy that sampled them; where forced, not meaningful
    mask: torch.Tensor  # [R], True = sampled by the policy, False = forced
    text: str  # of a second look: y1, the trigger and y2
    finish: str  # "stop" (EOS) or "length" (reached the limit)
    answered: bool = False  # does it hold a box of its own? A second look must: y1's does not count
    right: bool = False  # by the rule: the last box holds the answer; of a second look, the last box of y2
    reward: float = 0.0  # 1 where it is right, else 0; or what the run's own reward says
    advantage: float = 0.0
    step: int = 0  # optimiser step at which it was sampled
    rethought: str | None = None  # the kind of trigger that was forced, if one was
    first_right: bool = False  # of a second look: whether y1 was right
    second_look: "Sample | None" = None  # this response, continued after a forced trigger


class Policy(nn.Module):
    """A Qwen-VL and what it needs to read a question and speak. Made by `load_policy`."""

    def __init__(self, model, tokenizer, image_processor):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.compute_device: torch.device | None = None
        self.compute_dtype = torch.float32  # bf16 with `parallel.shard`'s mixed precision
        self.sampling = False  # weights are whole or in slices, to be used directly
        self.slices = None  # a DeviceMesh: the ranks that sample together, each a part of every layer
        self.cuda_graphs = True  # on a GPU a decoding step is launched as a whole
        self.text_model.config._attn_implementation = "carried"  # tree.carried_attention
        pack_pictures(model.model.visual)
        for module in model.modules():  # one kernel instead of the eight that transformers launches
            if hasattr(module, "variance_epsilon"):
                module.forward = partial(rms_norm, module)
        kinds = ("image", "video", "vision_start", "vision_end", "vision")
        banned = {getattr(model.config, f"{kind}_token_id", None) for kind in kinds}
        banned |= {tokenizer.convert_tokens_to_ids("<|vision_pad|>")}
        size = model.config.get_text_config().vocab_size
        self.banned_ids = sorted(i for i in banned if isinstance(i, int) and 0 <= i < size)
        # Only the ids that end a turn are taken from the generation_config, and none of its sampling
        # settings: the published ones carry a repetition penalty and a temperature of 1e-6.
        eos = model.generation_config.eos_token_id if model.generation_config else None
        eos = eos if isinstance(eos, list) else [eos]
        self.eos_ids = sorted({i for i in [*eos, tokenizer.eos_token_id] if i is not None})

    @property
    def device(self) -> torch.device:
        """Where it computes; weights that are offloaded live elsewhere between uses."""
        return self.compute_device or self.model.device

    @property
    def text_model(self) -> nn.Module:
        return self.model.model.language_model

    def head_weight(self) -> torch.Tensor:
        """[V, D]: the vocabulary projection (the embedding itself where they are tied)."""
        tied = self.model.config.tie_word_embeddings
        return (self.text_model.embed_tokens if tied else self.model.lm_head).weight

    def embed(self, input_ids, pixel_values, image_grid_thw) -> tuple[torch.Tensor, list]:
        """Token embeddings [N, T, D] with the vision tower's features at the image tokens, and what
        DeepStack (Qwen3-VL) adds after the first layers, [N, T, D] each.

        image_grid_thw is on the host: it decides shapes, and reading it would wait for a GPU.
        """
        embeds = self.text_model.embed_tokens(input_ids)
        blank = pixel_values is None
        if blank:
            if not torch.distributed.is_initialized():
                return embeds, []
            # Another rank may hold pictures, and the tower's parameters are gathered and reduced
            # by all ranks or by none: look at one blank picture and use nothing of it.
            merge, of = self.image_processor.merge_size, self.image_processor
            width = 3 * of.temporal_patch_size * of.patch_size**2
            pixel_values = torch.zeros(merge * merge, width, device=embeds.device)
            image_grid_thw = torch.tensor([[1, merge, merge]])
        visual = self.model.model.visual
        layout = vision_layout(visual, image_grid_thw, embeds.device)
        seen = visual(pixel_values, grid_thw=image_grid_thw, return_dict=True, **layout)
        levels = [seen.pooler_output, *(seen.get("deepstack_features") or [])]  # [image tokens, D]
        if blank:
            return embeds + 0.0 * sum(level.sum() for level in levels), []
        at_image = (input_ids == self.model.config.image_token_id)[..., None]
        into = [embeds] + [torch.zeros_like(embeds)] * (len(levels) - 1)
        embeds, *deeper = (x.masked_scatter(at_image, y.to(x.dtype)) for x, y in zip(into, levels))
        return embeds, deeper

    def decoder(self, x, position_ids, attend, deeper=()) -> torch.Tensor:
        """The checkpoint's own decoder layers, attending as `attend` does: [N, T, D] -> [N, T, D].

        position_ids [3, N, T];  deeper  what is added after the first layers (`embed`)
        """
        angles = self.text_model.rotary_emb(x, position_ids)
        for i, layer in enumerate(self.text_model.layers):
            # While weights are there to be used, `forward` and not a call: FSDP would gather the layer.
            run = layer.forward if self.sampling else layer
            x = run(x, position_embeddings=angles, attention_mask=None, attend=attend)
            if i < len(deeper):
                x = x + deeper[i]
        x = self.text_model.norm(x)
        if self.sampling and self.slices:  # to the bit the same on ranks that sample one response together
            torch.distributed.broadcast(x, group=self.slices.get_group(), group_src=0)
        return x

    def prefill(self, prompts: list[Prompt]) -> tuple[torch.Tensor, list, list]:
        """Run N prompts: hidden states of their last tokens [N, D], keys and values [N, H, P, d] per layer.

        No mask: attention is causal, and padding on the right is seen by padding alone.
        """
        device, keys, values = self.device, [], []

        def attend(module, q, k, v, scaling, **_):
            keys.append(k.contiguous())  # head by head, as decoding reads them at every token
            values.append(v.contiguous())
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            return mixed.transpose(1, 2)

        input_ids = pad_sequence([p.input_ids for p in prompts], batch_first=True)  # [N, P]
        position_ids = pad_sequence([p.position_ids.T for p in prompts], batch_first=True).movedim(-1, 0)
        if device.type == "cuda":  # whose fast kernels want P to be a multiple of 8
            more = -input_ids.shape[1] % 8
            input_ids, position_ids = F.pad(input_ids, (0, more)), F.pad(position_ids, (0, more))
        pixels, grids = join_pictures(prompts)
        x, deeper = self.embed(input_ids.to(device), None if pixels is None else pixels.to(device), grids)
        hidden = self.decoder(x, position_ids.to(device), attend, deeper)  # [N, P, D]
        last = torch.tensor([len(p.input_ids) - 1 for p in prompts], device=device)
        return hidden[torch.arange(len(prompts), device=device), last], keys, values

    def forward(self, trees: Trees, temperature: float = 1.0):
        """Log-probability and entropy of every response token: ([K], [K]), fp32.

        Both are of the distribution that was sampled from: softmax(logits / temperature) without
        the banned ids.
        """
        x, deeper = self.embed(trees.input_ids, trees.pixel_values, trees.image_grid_thw)
        attend = partial(tree_attention, trees)
        hidden = self.decoder(x, trees.position_ids, attend, deeper)  # [N, T, D]
        hidden = hidden.flatten(0, 1)[trees.predictor]  # [K, D]
        return token_logprobs(hidden, self.head_weight(), trees.targets, self.banned_ids, temperature)


def rms_norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def response_logprobs(policy: Policy, groups, temperature: float = 1.0):
    """Log-probabilities and entropies of all responses of all groups, each [B, R], right-padded
    with 0: B responses in order, R the longest. `groups` as `build_trees` takes them."""
    trees = build_trees(groups).to(policy.device)
    return tuple(pad_sequence(x.split(trees.lengths), batch_first=True) for x in policy(trees, temperature))


# ---------------------------------------------------------------------------- encoding


def mrope_positions(policy: Policy, input_ids: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    """M-RoPE positions [3, P] of a prompt (Qwen2-VL, Section 2.1), as transformers computes them.

    Text counts on in all three rows alike. A picture of h x w visual tokens starts where the text stopped;
    its tokens share the temporal position and count rows and columns in the other two; the text after it
    starts one past the largest.
    """
    is_image = (input_ids == policy.model.config.image_token_id).int()
    positions, _ = policy.model.model.get_rope_index(input_ids[None], is_image[None], image_grid_thw=grid_thw)
    return positions[:, 0]


def chat_text(policy: Policy, question: Question, template: str) -> str:
    """The conversation as the checkpoint's chat template writes it, one IMAGE_PAD per picture."""
    content = []
    text = prompt_text(question, template)
    for token in policy.tokenizer.get_added_vocab():
        # A question that *says* <|image_pad|> must not claim a picture's place.
        text = text.replace(token, token.replace("|", " | "))
    for i, part in enumerate(text.split(MARKER)):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": part}] if part else []
    return policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def encode(policy: Policy, question: Question, template: str = "plain") -> Prompt:
    """Encode a question: chat template, pictures resized and patched, one IMAGE_PAD per visual token."""
    pixels, grid = None, torch.zeros(0, 3, dtype=torch.long)
    if question.images:
        features = policy.image_processor(images=load_pictures(question), return_tensors="pt")
        pixels, grid = features["pixel_values"], features["image_grid_thw"]
    pieces = chat_text(policy, question, template).split(IMAGE_PAD)
    counts = (grid.prod(-1) // policy.image_processor.merge_size**2).tolist()
    if len(pieces) != len(counts) + 1:
        wrote = f"the chat template wrote {len(pieces) - 1} pictures, not {len(counts)}"
        raise UserError(f"qid {question.id}: {wrote}; is it the template of a Qwen-VL?")
    text = pieces[0] + "".join(IMAGE_PAD * n + piece for n, piece in zip(counts, pieces[1:]))
    input_ids = policy.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    positions = mrope_positions(policy, input_ids, grid)
    return Prompt(question, template, input_ids, positions, grid, pixels)


def prompt_length(policy: Policy, question: Question, template: str, sizes) -> int:
    """Tokens of a question's prompt, from its pictures' (width, height) alone; cheap beside `encode`."""
    processor = policy.image_processor
    patches = sum(processor.get_number_of_image_patches(height, width) for width, height in sizes)
    text = chat_text(policy, question, template)
    tokens = len(policy.tokenizer(text, add_special_tokens=False).input_ids)
    return tokens - len(sizes) + patches // processor.merge_size**2


def with_pixels(policy: Policy, prompt: Prompt) -> Prompt:
    """The prompt with its pictures, made again where they were left behind."""
    if prompt.pixel_values is not None or not len(prompt.image_grid_thw):
        return prompt
    return encode(policy, prompt.question, prompt.template)


def decode(policy: Policy, tokens: torch.Tensor) -> str:
    """The text of response tokens [R], without the ids that end a turn."""
    ids = [i for i in tokens.tolist() if i not in policy.eos_ids]
    return policy.tokenizer.decode(ids, skip_special_tokens=False)


# ---------------------------------------------------------------------------- load and save


def find_checkpoint(path: str) -> Path:
    """The directory of a checkpoint: `path` itself, or the hub's snapshot of that id."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--model {path}: no such directory, and the hub gives no model ({reason})") from None


def load_policy(
    path: str, dtype: torch.dtype = torch.float32, empty=False, min_pixels=0, max_pixels=0
) -> Policy:
    """Load a Qwen-VL (one of FAMILIES) from a directory or a hub id, in the published layout.

    empty  build it without weights, on the meta device, for `parallel.shard`
    min_pixels, max_pixels  bounds of a picture's area after resizing; 0: the checkpoint's own
    """
    directory = find_checkpoint(path)
    try:
        policy = read_policy(directory, dtype, empty)
        size = policy.image_processor.size
        size["shortest_edge"] = low = min_pixels or size["shortest_edge"]
        size["longest_edge"] = high = max_pixels or size["longest_edge"]
        if low > high:
            raise UserError(f"--min_pixels {low} is more than --max_pixels {high}; change one")
        check_encoding(policy)
        return policy
    except Exception as error:  # noqa: BLE001, damaged files make transformers raise whatever comes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not isinstance(error, UserError):
            reason = f"the checkpoint cannot be read ({reason})"
            if list(directory.glob("checkpoint-*")):
                reason = "a run's folder: give one of its checkpoint-STEP"
        raise UserError(f"--model {path}: {reason}") from None


def read_policy(directory: Path, dtype: torch.dtype, empty: bool) -> Policy:
    """As `load_policy`; raises UserError, or whatever the files make others' code raise."""
    code = {"trust_remote_code": False}  # else a config.json could have code run that lies beside it
    config = AutoConfig.from_pretrained(directory, **code)
    if config.model_type not in FAMILIES:
        raise UserError(f"a {config.model_type!r} model; this code trains {', '.join(FAMILIES)}")
    tokenizer = AutoTokenizer.from_pretrained(directory, **code)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(directory, **code)
    if empty:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, **code)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
    else:
        model, report = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype, config=config, output_loading_info=True, use_safetensors=True, **code
        )
        if report["missing_keys"]:  # transformers would fill them with random numbers
            raise UserError(f"no weights for {min(report['missing_keys'])} in its safetensors")
        for name, parameter in model.named_parameters():
            if not is_finite(parameter):
                raise UserError(f"{name} holds values that are not finite")
    # The processor's template (chat_template.json) knows pictures; a tokenizer's may not.
    template = directory / "chat_template.json"
    if template.is_file():
        tokenizer.chat_template = read_json(template, {"chat_template": str})["chat_template"]
    if tokenizer.chat_template is None:
        raise UserError("no chat template; take an Instruct checkpoint")
    return Policy(model, tokenizer, image_processor)


def is_finite(weight: torch.Tensor) -> bool:
    """Whether no value is nan or infinite: such weights would train, and score 0, in silence."""
    return not weight.numel() or bool(torch.stack(weight.detach().aminmax()).isfinite().all())


def check_encoding(policy: Policy) -> None:
    """Encode a small question, so that what is wrong with a checkpoint's files shows when it is loaded."""
    picture = Image.new("RGB", (2 * MIN_SIDE, 2 * MIN_SIDE))
    prompt = encode(policy, Question("for a trial", f"{MARKER}Is it red?", [picture], ""), "plain")
    if prompt.input_ids.max() >= policy.head_weight().shape[0]:
        raise UserError("its tokenizer has more tokens than the model")
    vision, processor = policy.model.config.vision_config, policy.image_processor
    sizes = processor.merge_size, processor.patch_size, processor.temporal_patch_size
    if sizes != (vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size):
        raise UserError(f"its preprocessor cuts pictures as {sizes}, other than its vision tower")
    if not policy.eos_ids or not all(type(i) is int for i in policy.eos_ids):
        raise UserError(f"no token ends a turn: eos_token_id is {policy.eos_ids}")


def save_policy(policy: Policy, directory: Path) -> None:
    """Write the model in the layout of the hub: `from_pretrained` and others' tools load it."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach() for name, p in policy.model.named_parameters()}  # tied ones once
    save_some_weights(policy, weights, directory / "model.safetensors")
    save_settings(policy, directory, policy.model.dtype)


def save_some_weights(policy: Policy, weights: dict[str, torch.Tensor], path: Path) -> list[str]:
    """Write weights, by their names in the model, under the hub's names, which are returned."""
    weights = revert_weight_conversion(policy.model, weights)
    save_file({k: w.contiguous() for k, w in weights.items()}, path, {"format": "pt"})
    return list(weights)


def save_settings(policy: Policy, directory: Path, dtype: torch.dtype) -> None:
    """All but the weights; config.json says that they are of this dtype."""
    config = copy.deepcopy(policy.model.config)
    config.architectures = [type(policy.model).__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(directory)
    policy.model.generation_config.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)
    policy.image_processor.save_pretrained(directory)
