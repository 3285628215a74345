"""A visual world small enough to learn on a laptop, and a policy small enough to learn it.

A picture is a grid of cells. Every cell has its own colour and holds a dot in the colour of another
cell: a pointer. "Start at red and take 2 steps." asks for the colour reached. Three ways to answer:

    fast   Looks like \\boxed{pink}.                                a guess from the colours it sees
    slow   red to blue, blue to pink. So \\boxed{pink}.             reads, and is right once it can see
    twice  Looks like \\boxed{red}. Wait, does it seem right? red to blue, blue to pink. So ...

The policy is a real Qwen2.5-VL (or another family: --toy_family) of about a million parameters with
a tokenizer of its own and Qwen's special tokens. `toy_policy_dir` makes it by a short supervised phase
(the warm start): first mostly slow and twice, so that it learns to see, then a mix in which the fast
guess dominates. That is the state the paper starts from: a base that can think slowly and rarely does.
From there, reinforcement learning has to find out which way pays.

A world the other way round (--toy_level inverse) asks "Which is 2 steps before red?". Finding a start
is hard, checking it is easy: a look tries one, and has a ? where that does not arrive. More looks may follow:

    pink to blue, blue to black? So \\boxed{pink}. Wait, let's double check cyan to blue, blue to ...

Training and held-out questions never share a picture: a hash of the picture decides its side.
"""

import hashlib
import json
import os
import random
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import MARKER, TEMPLATES, Question, UserError
from model import Policy, encode, load_policy, response_logprobs, save_policy
from rethink import TRIGGERS, rethinks

CELL = 28  # pixels on a side: one visual token
INITIALIZER_RANGE = 0.08  # the default of 0.02 learns two to three times slower at this size
MOST_LOOKS = 4  # in the warm start of the inverse world: a batch is as long as its longest
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 220, 50),
    "pink": (250, 150, 190), "black": (20, 20, 20), "white": (250, 250, 250), "cyan": (70, 210, 220),
    "orange": (245, 140, 30), "purple": (130, 50, 160), "brown": (120, 75, 40), "gray": (140, 140, 140),
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A difficulty of the world and the warm start that makes its base policy."""

    columns: int = 3
    rows: int = 2
    colours: int = 6
    chances: tuple = (1, 1, 1)  # of chains of 1, 2, ... steps, in training and held-out questions
    warm_chances: tuple = (1, 1, 1)  # in the warm start
    warm_steps: int = 240  # optimiser steps of the warm start
    warm_batch: int = 32  # worked solutions per step
    warm_lr: float = 1e-3
    reading_share: float = 0.75  # of the warm start, spent learning to see
    # Of fast, slow, twice. Reading is learnt from slow parts; "twice" has one as well, but is longer.
    reading_mix: tuple = (0.05, 0.8, 0.15)
    final_mix: tuple = (0.55, 0.15, 0.30)
    seed: int = 0
    inverse: bool = False  # asks for the start of a chain; mixes then are of looks, see `looks`
    family: str = "qwen2_5_vl"  # the policy's architecture, as config.FAMILIES has them
    version: int = 1  # counts changes of the recipe that its fields do not show


LEVELS = {
    "easy": Recipe(),
    # The same base. Four questions in five are soon solved and teach nothing more; the fifth is a chain
    # longer than any it has seen. This is where advantages vanish.
    "hard": Recipe(chances=(8, 0, 0, 0, 1, 0, 1)),
    # One step back could be read off the picture. The base names the first start that it tries and
    # knows how to go on, but does so after 3 looks in 100.
    "inverse": Recipe(
        inverse=True,
        chances=(0, 1),
        warm_chances=(0, 1),
        reading_mix=(0, 0.5, 0.5),
        final_mix=(0, 0.97, 0.03),
        warm_steps=200,
    ),
}


def level(name: str) -> Recipe:
    """What --toy_level names: one of LEVELS, or easy with other chances of chains of 1, 2, ... steps.

    >>> level("8,0,0,0,1,0,1") == LEVELS["hard"]
    True
    """
    if name in LEVELS:
        return LEVELS[name]
    if not re.fullmatch(r"\d{1,6}(,\d{1,6}){0,99}", name) or not re.search("[1-9]", name):
        raise UserError(f"--toy_level {name}: give {', '.join(LEVELS)}, or chances such as 8,0,0,0,1")
    return Recipe(chances=tuple(map(int, name.split(","))))


# ---------------------------------------------------------------------------- the world


@dataclass
class World:
    """One picture: `cells[i]` is the colour of cell i, `points_to[i]` the colour of its dot."""

    columns: int
    cells: list[str]
    points_to: list[str]

    def draw(self) -> Image.Image:
        rows = len(self.cells) // self.columns
        image = Image.new("RGB", (self.columns * CELL, rows * CELL))
        pen = ImageDraw.Draw(image)
        for i, (cell, dot) in enumerate(zip(self.cells, self.points_to)):
            x, y = i % self.columns * CELL, i // self.columns * CELL
            pen.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=COLOURS[cell])
            pen.ellipse((x + 7, y + 7, x + CELL - 8, y + CELL - 8), fill=COLOURS[dot])
        return image

    def follow(self, start: str, steps: int) -> list[str]:
        """The colours met: [start, ..., answer], steps + 1 of them.

        >>> World(3, ["red", "blue", "pink"], ["blue", "pink", "red"]).follow("red", 2)
        ['red', 'blue', 'pink']
        """
        arrow = dict(zip(self.cells, self.points_to))
        path = [start]
        for _ in range(steps):
            path.append(arrow[path[-1]])
        return path

    def heldout(self) -> bool:
        """True for one picture in eight, by its content: the split is a property of the picture."""
        key = " ".join([*self.cells, *self.points_to])
        return hashlib.sha256(key.encode()).digest()[0] < 32


def draw_world(recipe: Recipe, rng: random.Random, heldout: bool) -> World:
    while True:
        cells = rng.sample(list(COLOURS)[: recipe.colours], recipe.columns * recipe.rows)
        points_to = [rng.choice([c for c in cells if c != cell]) for cell in cells]
        world = World(recipe.columns, cells, points_to)
        if world.heldout() == heldout:
            return world


def draw_question(recipe: Recipe, rng: random.Random, heldout: bool, qid: str, chances: tuple):
    """A Question and the path that solves it: (Question, [start, ..., answer]).

    Of an inverse question: the paths of all starts, and the first one alone ends where it should.
    """
    world = draw_world(recipe, rng, heldout)
    start, steps = rng.choice(world.cells), rng.choices(range(1, len(chances) + 1), chances)[0]
    path, many = world.follow(start, steps), f"{steps} step{'s' if steps > 1 else ''}"
    asked, answer, solution = f"Start at {start} and take {many}.", path[-1], path
    if recipe.inverse:
        solution = [path, *(world.follow(cell, steps) for cell in world.cells if cell != start)]
        if [other[-1] for other in solution].count(path[-1]) > 1:  # the rule compares with one answer
            return draw_question(recipe, rng, heldout, qid, chances)
        asked, answer = f"Which is {many} before {path[-1]}?", start
    return Question(qid, MARKER + asked, [world.draw()], answer, None, many), solution


def toy_questions(recipe: Recipe, n: int, seed, heldout: bool = False) -> list[Question]:
    """n questions, the same ones for the same arguments."""
    side = "heldout" if heldout else "train"
    return [question_by_id(recipe, f"{side}/{seed}/{i}") for i in range(n)]


def question_by_id(recipe: Recipe, qid: str) -> Question:
    """A toy question is a function of its id, "side/seed/number"."""
    heldout = qid.startswith("heldout")
    return draw_question(recipe, random.Random(qid), heldout, qid, recipe.chances)[0]


def slow_solution(path: list[str]) -> str:
    """
    >>> slow_solution(["red", "blue", "pink"])
    'red to blue, blue to pink. So \\\\boxed{pink}.'
    """
    steps = ", ".join(f"{a} to {b}" for a, b in pairwise(path))
    return f"{steps}. So \\boxed{{{path[-1]}}}."


def worked_solution(path: list, recipe: Recipe, rng: random.Random, mix: tuple) -> list[str]:
    """A solution in one of the three ways, drawn with the chances `mix`, as pieces of text; of an inverse
    question, whose `path` is a list of all starts' paths, in looks.

    Pieces are tokenised apart, because forced rethinking appends a trigger in just this way.
    """
    if recipe.inverse:
        return looks(path, rng, mix[-1])
    way = rng.choices(("fast", "slow", "twice"), mix)[0]
    if way == "slow":
        return [slow_solution(path)]
    guesses = list(COLOURS)[: recipe.colours]
    if way == "twice":  # only a wrong guess is worth a second look
        guesses = [c for c in guesses if c != path[-1]]
    guess = f"Looks like \\boxed{{{rng.choice(guesses)}}}."
    if way == "fast":
        return [guess]
    return [guess, TRIGGERS[rng.choice(list(TRIGGERS))], "\n" + slow_solution(path)]


def looks(paths: list[list[str]], rng: random.Random, again: float) -> list[str]:
    """An inverse question's starts tried at random, the first of `paths` being the right one.

    Each look answers with the start that it tries, wherever that ends. After each, and with the chance
    `again`, another look follows, up to MOST_LOOKS: at a start not tried yet, or once more at the right one.
    """
    untried, pieces = rng.sample(paths, len(paths)), []
    path = untried.pop()
    for turn in range(1, MOST_LOOKS + 1):
        steps, mark = ", ".join(f"{a} to {b}" for a, b in pairwise(path)), "." if path is paths[0] else "?"
        pieces.append(f"{steps}{mark} So \\boxed{{{path[0]}}}.")
        if turn == MOST_LOOKS or rng.random() >= again:
            break
        pieces += [TRIGGERS[rng.choice(list(TRIGGERS))], "\n"]
        path = path if path is paths[0] else untried.pop()
    return pieces


def way(text: str) -> str:
    """Which of the three ways a response takes.

    >>> way("red to blue. So \\\\boxed{blue}."), way("Looks like \\\\boxed{red}.")
    ('slow', 'fast')
    """
    if rethinks(text):
        return "twice"
    return "fast" if text.startswith("Looks like") else "slow"


# ---------------------------------------------------------------------------- the policy

SPECIAL = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad"
SPECIAL = [f"<|{name}|>" for name in SPECIAL.split()]

# The layout of Qwen's own template: a default system turn, then the turns; pictures where they stand.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few hundred sentences: every text can be written, the world's words are
    one token each, and a colour is the same token wherever it stands."""
    colour = f"(?:{'|'.join(COLOURS)})(?![A-Za-z])"
    pieces = rf"\\boxed\{{|{colour}|\s*(?!{colour})[A-Za-z]+\s*|\s*[0-9]\s*|\s*[^\sA-Za-z0-9]+\s*|\s+"
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    recipe = Recipe(colours=len(COLOURS))
    corpus = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", *TEMPLATES.values()]
    corpus += list(TRIGGERS.values()) * 9
    for _ in range(300):
        question, path = draw_question(recipe, rng, False, "", (1,) * 9)
        corpus += [question.text, *worked_solution(path, recipe, rng, (1, 1, 1))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=560, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
    )


def toy_config(family: str, tokenizer, hidden: int, layers: int, heads: int) -> dict:
    """The shape of a toy policy, in the words of each family's configuration."""
    ids = {token.strip("<|>"): tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    third = family.startswith("qwen3")  # heads wider than hidden / heads, and axes that interleave
    half = hidden // heads if third else hidden // heads // 2
    rows = half // 3 if third else (half - half // 4) // 2
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": 4096,
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "initializer_range": INITIALIZER_RANGE, "rms_norm_eps": 1e-6,
        "bos_token_id": ids["endoftext"], "eos_token_id": ids["im_end"], "pad_token_id": ids["endoftext"],
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [half - 2 * rows, rows, rows],
        },
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": hidden // 2, "intermediate_size": hidden, "num_heads": heads}
    vision |= {"out_hidden_size": hidden, "initializer_range": INITIALIZER_RANGE}
    if family == "qwen2_vl":
        vision |= {"embed_dim": hidden // 2, "hidden_size": hidden, "mlp_ratio": 2}
        del vision["intermediate_size"], vision["out_hidden_size"]
    elif family == "qwen2_5_vl":
        vision["fullatt_block_indexes"] = [1]
    else:
        text["head_dim"] = 2 * half
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    if family == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 2 * hidden}
    return {
        "text_config": text, "vision_config": vision, "tie_word_embeddings": True,
        "image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"],
        "vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"],
    }  # fmt: skip


def new_policy(
    seed: int = 0, hidden: int = 128, layers: int = 4, heads: int = 4, family: str = "qwen2_5_vl"
) -> Policy:
    """A Qwen-VL with random weights: about a million parameters at the default size."""
    tokenizer = toy_tokenizer()
    config = AutoConfig.for_model(family, **toy_config(family, tokenizer, hidden, layers, heads))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    patch = config.vision_config.patch_size
    area = (patch * config.vision_config.spatial_merge_size) ** 2  # of a visual token
    processor = Qwen2VLImageProcessorPil(min_pixels=area, max_pixels=64 * area, patch_size=patch)
    return Policy(model, tokenizer, processor)


def warm_start(recipe: Recipe, progress=tqdm) -> Policy:
    """The base policy: supervised on worked solutions, first to see, then to guess."""
    if recipe.inverse:  # can follow a chain already, and learns to look for its start
        policy = load_toy(replace(LEVELS["easy"], family=recipe.family), progress)
    else:
        policy = new_policy(recipe.seed, family=recipe.family)
    policy.train()
    rng = random.Random(f"warm start {recipe.seed}")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=recipe.warm_lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.warm_lr, total_steps=recipe.warm_steps + 1, pct_start=0.05
    )
    bar = progress(range(recipe.warm_steps), desc="warm start", unit="step")
    for step in bar:
        reading = step < recipe.reading_share * recipe.warm_steps
        mix = recipe.reading_mix if reading else recipe.final_mix
        groups = []
        for _ in range(recipe.warm_batch):
            question, path = draw_question(recipe, rng, False, "", recipe.warm_chances)
            pieces = worked_solution(path, recipe, rng, mix)
            ids = [i for piece in pieces for i in policy.tokenizer(piece).input_ids]
            response = torch.tensor([*ids, policy.tokenizer.eos_token_id])
            groups.append((encode(policy, question, "bare"), [response]))
        logprobs, _ = response_logprobs(policy, groups)  # [B, R], 0 where padded
        loss = -logprobs.sum() / sum(len(ys[0]) for _, ys in groups)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", phase="see" if reading else "guess")
    return policy


def toy_policy_dir(recipe: Recipe, progress=tqdm) -> Path:
    """The directory of the recipe's base policy; made once, then kept in the user's cache.

    The warm start does not depend on the seed of a training run: like a published checkpoint, the
    base is one, and seeds differ in what they sample from it.
    """
    # Switches that are off are left out of the name: a new one does not rename the bases that exist.
    made_by = {k: v for k, v in asdict(recipe).items() if k != "chances" and v is not False}
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vl-rethinker"
    directory = root / f"toy-{key}"
    if not directory.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)  # before the work: it may be refused
            with tempfile.TemporaryDirectory(dir=root, prefix="unfinished-") as unfinished:
                made = Path(unfinished) / "policy"
                save_policy(warm_start(recipe, progress), made)
                made.rename(directory)
        except OSError as error:
            if not directory.exists():  # else another process was faster
                raise UserError(f"the toy's cache {root}: {error.strerror}; change XDG_CACHE_HOME") from None
    return directory


def load_toy(recipe: Recipe, progress=tqdm) -> Policy:
    return load_policy(str(toy_policy_dir(recipe, progress)))
