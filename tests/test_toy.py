"""The toy world: its questions, its tokenizer, and the base policy's warm start."""

import functools
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import follows
from tqdm import tqdm

import toy
from data import UserError
from model import encode, load_policy, response_logprobs
from rethink import TRIGGERS
from toy import COLOURS, LEVELS, Recipe, draw_question, toy_policy_dir, toy_questions, way, worked_solution

EASY, INVERSE = LEVELS["easy"], LEVELS["inverse"]
LARGE = Recipe(columns=4, rows=3, colours=12, chances=(1, 1, 1, 1, 1))


def read_picture(image) -> dict[str, str]:
    """{colour of a cell: colour of its dot}, from the pixels."""
    names = {colour: name for name, colour in COLOURS.items()}
    columns, rows = image.width // toy.CELL, image.height // toy.CELL
    corners = [(x * toy.CELL, y * toy.CELL) for y in range(rows) for x in range(columns)]
    return {
        names[image.getpixel((x + 1, y + 1))]: names[image.getpixel((x + 14, y + 14))] for x, y in corners
    }


# ---------------------------------------------------------------------------- the world


@pytest.mark.parametrize("recipe", [EASY, LEVELS["hard"], LARGE], ids=["easy", "hard", "large"])
def test_answers_are_right_by_following_the_dots_of_the_picture(recipe):
    steps_seen = set()
    for question in toy_questions(recipe, 150, "brute force"):
        [image] = question.images
        assert image.size == (recipe.columns * toy.CELL, recipe.rows * toy.CELL)
        arrow = read_picture(image)
        assert len(arrow) == recipe.columns * recipe.rows, "every cell has a colour of its own"
        assert all(cell != dot for cell, dot in arrow.items())
        asked = re.fullmatch(r"<image>Start at (\w+) and take ((\d) steps?)\.", question.text)
        at, category, steps = asked.groups()
        assert question.category == category and category.endswith("s") == (steps != "1")
        for _ in range(int(steps)):
            at = arrow[at]
        assert question.answer == at
        steps_seen.add(int(steps))
    assert steps_seen == {i for i, chance in enumerate(recipe.chances, 1) if chance}


def test_chains_have_the_lengths_that_the_recipe_gives_chances():
    recipe = replace(EASY, chances=(5, 0, 3, 2))
    counts = Counter(q.category for q in toy_questions(recipe, 1000, 0))
    assert not counts["2 steps"]
    counts = [counts[name] for name in ("1 step", "3 steps", "4 steps")]
    assert follows(counts, [0.5, 0.3, 0.2])


@pytest.mark.parametrize("recipe", [EASY, LARGE], ids=["easy", "large"])
def test_held_out_pictures_one_in_eight_never_meet_training(recipe):
    def pictures(heldout):
        questions = toy_questions(recipe, 300, 0, heldout)
        return {q.images[0].tobytes() for q in questions}

    assert not pictures(True) & pictures(False)
    rng = random.Random(0)
    worlds = [toy.draw_world(recipe, rng, i % 2 == 0) for i in range(100)]
    assert [world.heldout() for world in worlds] == [i % 2 == 0 for i in range(100)]
    cells = list(COLOURS)[:6]
    held = sum(toy.World(3, cells, rng.choices(cells, k=6)).heldout() for _ in range(4000))
    assert follows([held, 4000 - held], [1 / 8, 7 / 8])


def test_questions_are_a_function_of_their_arguments():
    def asked(*arguments, **more):
        questions = toy_questions(*arguments, **more)
        return [(q.id, q.text, q.answer, q.images[0].tobytes()) for q in questions]

    first = asked(EASY, 20, 0)
    assert asked(EASY, 20, 0) == first == asked(EASY, 30, 0)[:20]
    for other in (asked(EASY, 20, 1), asked(EASY, 20, 0, heldout=True)):
        assert not {row[0] for row in other} & {row[0] for row in first}
        assert [row[1:] for row in other] != [row[1:] for row in first]


# ---------------------------------------------------------------------------- worked solutions


def test_worked_solutions_are_right_in_the_ways_that_say_they_are():
    rng = random.Random(0)
    for _ in range(300):
        question, path = draw_question(EASY, rng, False, "", EASY.chances)
        arrow = read_picture(question.images[0])
        [slow] = worked_solution(path, EASY, rng, (0, 1, 0))
        pairs, answer = slow.removesuffix("}.").split(". So \\boxed{")
        steps = [tuple(pair.split(" to ")) for pair in pairs.split(", ")]
        assert all(arrow[a] == b for a, b in steps)
        assert steps[0][0] in question.text and answer == question.answer == steps[-1][1]
        assert slow == toy.slow_solution(path) and way(slow) == "slow"

        guess, trigger, second = worked_solution(path, EASY, rng, (0, 0, 1))
        assert guess.removeprefix("Looks like \\boxed{").removesuffix("}.") != question.answer
        assert trigger in TRIGGERS.values() and second == "\n" + slow
        assert way(guess + trigger + second) == "twice"

        [guess] = worked_solution(path, EASY, rng, (1, 0, 0))
        assert guess.startswith("Looks like \\boxed{") and way(guess) == "fast"


def test_the_ways_come_with_the_chances_of_the_mix_and_a_guess_is_right_by_chance_alone():
    rng, ways, right = random.Random(2), Counter(), 0
    for _ in range(4000):
        question, path = draw_question(EASY, rng, False, "", (1, 1, 1))
        text = "".join(worked_solution(path, EASY, rng, (0.5, 0.2, 0.3)))
        ways[way(text)] += 1
        right += way(text) == "fast" and f"\\boxed{{{question.answer}}}" in text
    assert follows([ways["fast"], ways["slow"], ways["twice"]], [0.5, 0.2, 0.3])
    assert follows([right, ways["fast"] - right], [1 / 6, 5 / 6])


def test_an_inverse_question_has_the_one_answer_that_following_forward_confirms():
    for question in toy_questions(INVERSE, 150, "brute force"):
        arrow = read_picture(question.images[0])
        words = question.text.removeprefix("<image>").removesuffix("?").split()
        arrives = []
        for start in arrow:
            at = start
            for _ in range(int(words[2])):
                at = arrow[at]
            arrives += [start] if at == words[5] else []
        assert arrives == [question.answer], question.text


def test_looks_follow_the_picture_try_no_start_twice_and_stay_with_the_right_one():
    rng, numbers = random.Random(0), Counter()
    for _ in range(300):
        question, paths = draw_question(INVERSE, rng, False, "", INVERSE.chances)
        pieces = worked_solution(paths, INVERSE, rng, (0, 0.3, 0.7))
        arrow, tried = read_picture(question.images[0]), []
        assert all(trigger in TRIGGERS.values() for trigger in pieces[1::3]) and set(pieces[2::3]) <= {"\n"}
        for look in pieces[::3]:
            chain, answer = look.removesuffix("}.").split(" So \\boxed{")
            links = [tuple(pair.split(" to ")) for pair in chain[:-1].split(", ")]
            assert all(arrow[a] == b for a, b in links) and links[0][0] == answer
            assert chain[-1] == ("." if answer == question.answer else "?")
            assert answer == tried[-1] if question.answer in tried else answer not in tried
            tried.append(answer)
        numbers[len(tried)] += 1
    assert follows([numbers[n] for n in (1, 2, 3, 4)], [0.3, 0.21, 0.147, 0.343])


# ---------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return toy.toy_tokenizer()


def test_any_text_can_be_written_and_read_back_and_makes_no_special_token(tokenizer):
    special = [tokenizer.convert_tokens_to_ids(token) for token in toy.SPECIAL]
    assert special == list(range(len(toy.SPECIAL))) == tokenizer("".join(toy.SPECIAL)).input_ids
    assert tokenizer.eos_token == "<|im_end|>" != tokenizer.pad_token
    rng = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    texts = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(30)) for _ in range(400)]
    texts += ["", " ", "  a  ", "\n\n\n", "Wait , what ' s this ?", "I'm, don't .", "é日本\u200d👩‍👩‍👧",
              "\\boxed{\\frac{1}{2}}", "redblue boxed{red}", "< | image_pad | >"]  # fmt: skip
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and not set(ids) & set(special)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_is_one_token_and_the_same_wherever_it_stands(tokenizer, colour):
    ids = tokenizer(colour).input_ids
    assert len(ids) == 1
    sentences = ["Start at {} and take 2 steps.", "{} to red, ", "red to {}.", "\\boxed{{{}}}.",
                 "\n{} to red"]  # fmt: skip
    for text in (sentence.format(colour) for sentence in sentences):
        assert tokenizer(text).input_ids.count(ids[0]) == text.count(colour)


# ---------------------------------------------------------------------------- the base policy

TINY = Recipe(columns=3, rows=1, colours=4, chances=(1,), warm_chances=(1,), warm_steps=24,
              warm_batch=8, warm_lr=1e-2)  # fmt: skip
silent = functools.partial(tqdm, disable=True)


@pytest.fixture
def tiny_policies(monkeypatch):
    """Make the warm start train a model of a few thousand parameters."""
    small = functools.partial(toy.new_policy, hidden=32, layers=1, heads=2)
    monkeypatch.setattr(toy, "new_policy", small)
    return small


def solution_loss(policy) -> float:
    """Mean negative log-likelihood of slow solutions to held-out questions."""
    rng, groups = random.Random("held out"), []
    for _ in range(8):
        question, path = draw_question(TINY, rng, True, "", TINY.chances)
        ids = policy.tokenizer(toy.slow_solution(path)).input_ids
        groups.append((encode(policy, question, "bare"), [torch.tensor(ids)]))
    with torch.no_grad():
        logprobs, _ = response_logprobs(policy, groups)
    return -logprobs.sum().item() / sum(len(ys[0]) for _, ys in groups)


def test_a_few_steps_of_the_warm_start_lower_the_loss_and_see_no_held_out_picture(tiny_policies, monkeypatch):
    drawn, real = [], toy.draw_world

    def watched(recipe, rng, heldout):
        drawn.append(real(recipe, rng, heldout))
        return drawn[-1]

    before = solution_loss(tiny_policies(TINY.seed))
    with monkeypatch.context() as patch:
        patch.setattr(toy, "draw_world", watched)
        policy = toy.warm_start(TINY, silent)
    assert solution_loss(policy) < before / 2
    assert len(drawn) >= 24 * 8 and not any(world.heldout() for world in drawn)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vl-rethinker"


@pytest.fixture
def warm_starts(monkeypatch, tiny_policies) -> list:
    """The recipes whose warm start has run; it takes no time."""
    ran = []

    def warm_start(recipe, progress):
        ran.append(recipe)
        return tiny_policies(recipe.seed)

    monkeypatch.setattr(toy, "warm_start", warm_start)
    return ran


def is_base_of_seed(directory: Path, seed: int) -> bool:
    loaded, want = load_policy(str(directory)), toy.new_policy(seed)
    return all(torch.equal(a, b) for a, b in zip(loaded.parameters(), want.parameters()))


def test_the_base_is_made_once_and_kept_in_the_user_s_cache(cache, warm_starts):
    directory = toy_policy_dir(TINY, silent)
    for recipe in (TINY, replace(TINY, chances=(1, 2))):  # the chances are asked, not taught
        assert toy_policy_dir(recipe, silent) == directory
    assert warm_starts == [TINY] and list(cache.iterdir()) == [directory]
    assert is_base_of_seed(directory, TINY.seed)
    others = [{"seed": 1}, {"warm_steps": 25}, {"warm_chances": (1, 1)}, {"version": 99}]
    places = {toy_policy_dir(replace(TINY, **change), silent) for change in others}
    assert len(places | {directory}) == 5
    easy = toy_policy_dir(EASY, silent)
    assert easy.name == "toy-b9d31b81e92f", "a base that users have made would be made again"


def test_an_interrupted_warm_start_leaves_nothing_that_looks_whole(cache, warm_starts, monkeypatch):
    def stop(policy, directory):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(toy, "save_policy", stop)
        with pytest.raises(KeyboardInterrupt):
            toy_policy_dir(TINY, silent)
    assert list(cache.iterdir()) == []
    assert load_policy(str(toy_policy_dir(TINY, silent))) is not None


def test_of_two_processes_that_make_it_at_once_the_first_one_s_stays(cache, warm_starts, monkeypatch):
    other = toy.warm_start

    def slower(recipe, progress):
        monkeypatch.setattr(toy, "warm_start", other)
        toy_policy_dir(recipe, progress)  # the other process, meanwhile
        return toy.new_policy(99)

    monkeypatch.setattr(toy, "warm_start", slower)
    directory = toy_policy_dir(TINY, silent)
    assert list(cache.iterdir()) == [directory]
    assert is_base_of_seed(directory, TINY.seed)


def test_a_cache_that_cannot_be_written_is_found_before_the_work(monkeypatch, tmp_path, warm_starts):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cache .*/file/vl-rethinker: .*XDG_CACHE_HOME"):
        toy_policy_dir(TINY, silent)
    assert warm_starts == []
