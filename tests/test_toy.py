"""The toy world: its questions, its tokenizer, and the base policy's warm start."""

import functools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import chi_squared

import toy
from data import UserError
from model import encode, load_policy, response_logprobs
from rethink import TRIGGERS
from toy import (
    CELL,
    COLOURS,
    LEVELS,
    SPECIAL,
    Recipe,
    World,
    draw_question,
    new_policy,
    question_by_id,
    slow_solution,
    toy_policy_dir,
    toy_questions,
    toy_tokenizer,
    way,
    worked_solution,
)

EASY, INVERSE = LEVELS["easy"], LEVELS["inverse"]
LARGE = Recipe(columns=4, rows=3, colours=12, chances=(1, 1, 1, 1, 1))


def read_picture(image) -> dict[str, str]:
    """{colour of a cell: colour of its dot}, from the pixels."""
    names = {colour: name for name, colour in COLOURS.items()}
    columns, rows = image.width // CELL, image.height // CELL
    corners = [(x * CELL, y * CELL) for y in range(rows) for x in range(columns)]
    return {
        names[image.getpixel((x + 1, y + 1))]: names[image.getpixel((x + 14, y + 14))] for x, y in corners
    }


# ---------------------------------------------------------------------------- the world


@pytest.mark.parametrize("recipe", [EASY, LEVELS["hard"], LARGE], ids=["easy", "hard", "large"])
def test_answers_are_right_by_following_the_dots_of_the_picture(recipe):
    steps_seen = set()
    for question in toy_questions(recipe, 150, "brute force"):
        [image] = question.images
        assert image.size == (recipe.columns * CELL, recipe.rows * CELL)
        arrow = read_picture(image)
        assert len(arrow) == recipe.columns * recipe.rows, "every cell has a colour of its own"
        words = question.text.removeprefix("<image>").split()
        assert [words[0], words[1], words[3], words[4]] == ["Start", "at", "and", "take"]
        at, steps = words[2], int(words[5])
        for _ in range(steps):
            assert arrow[at] != at, "a dot never has the colour of its cell"
            at = arrow[at]
        assert question.answer == at
        assert words[6] == ("step." if steps == 1 else "steps.")
        assert question.category == " ".join(words[5:]).removesuffix(".")
        steps_seen.add(steps)
    assert steps_seen == {i for i, chance in enumerate(recipe.chances, 1) if chance}


def test_chains_have_the_lengths_that_the_recipe_gives_chances():
    recipe = replace(EASY, chances=(5, 0, 3, 2))
    counts = Counter(q.category for q in toy_questions(recipe, 1000, 0))
    assert not counts["2 steps"]
    counts = [counts[name] for name in ("1 step", "3 steps", "4 steps")]
    statistic, limit = chi_squared(counts, [0.5, 0.3, 0.2])
    assert statistic < limit


@pytest.mark.parametrize("recipe", [EASY, LARGE], ids=["easy", "large"])
def test_held_out_pictures_never_meet_training(recipe):
    def pictures(heldout):
        questions = toy_questions(recipe, 300, 0, heldout)
        return {q.images[0].tobytes() for q in questions}

    assert not pictures(True) & pictures(False)
    worlds = [toy.draw_world(recipe, random.Random(i), i % 2 == 0) for i in range(100)]
    assert [world.heldout() for world in worlds] == [i % 2 == 0 for i in range(100)]


def test_the_side_of_a_picture_is_a_property_of_the_picture_and_one_in_eight_is_held_out():
    rng = random.Random(0)
    colours = list(COLOURS)[:6]
    sides = []
    for _ in range(4000):
        cells = rng.sample(colours, 6)
        points_to = [rng.choice([c for c in cells if c != cell]) for cell in cells]
        side = World(3, cells, points_to).heldout()
        assert World(3, list(cells), list(points_to)).heldout() == side
        sides.append(side)
    statistic, limit = chi_squared([sum(sides), 4000 - sum(sides)], [1 / 8, 7 / 8])
    assert statistic < limit


def test_the_warm_start_sees_no_held_out_picture(monkeypatch, tiny_policies):
    drawn = []
    real = toy.draw_world

    def watched(recipe, rng, heldout):
        drawn.append(real(recipe, rng, heldout))
        return drawn[-1]

    monkeypatch.setattr(toy, "draw_world", watched)
    toy.warm_start(replace(TINY, warm_steps=4), silent)
    in_the_warm_start = drawn[-4 * TINY.warm_batch :]
    assert len(in_the_warm_start) == 32
    assert not any(world.heldout() for world in in_the_warm_start)


def test_questions_are_a_function_of_their_arguments():
    def asked(*arguments, **more):
        questions = toy_questions(*arguments, **more)
        return [(q.id, q.text, q.answer, q.images[0].tobytes()) for q in questions]

    first = asked(EASY, 20, 0)
    assert asked(EASY, 20, 0) == first == asked(EASY, 30, 0)[:20]
    for other in (asked(EASY, 20, 1), asked(EASY, 20, 0, heldout=True)):
        assert not {row[0] for row in other} & {row[0] for row in first}
        assert [row[1:] for row in other] != [row[1:] for row in first]
    for qid, text, answer, picture in first:
        again = question_by_id(EASY, qid)
        assert (again.id, again.text, again.answer) == (qid, text, answer)
        assert again.images[0].tobytes() == picture


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
        assert slow == slow_solution(path) and way(slow) == "slow"

        guess, trigger, second = worked_solution(path, EASY, rng, (0, 0, 1))
        assert guess.removeprefix("Looks like \\boxed{").removesuffix("}.") != question.answer
        assert trigger in TRIGGERS.values() and second == "\n" + slow
        assert way(guess + trigger + second) == "twice"

        [guess] = worked_solution(path, EASY, rng, (1, 0, 0))
        assert guess.startswith("Looks like \\boxed{") and way(guess) == "fast"


def test_a_guess_is_right_by_chance_alone():
    rng = random.Random(1)
    right = 0
    for _ in range(3000):
        question, path = draw_question(EASY, rng, False, "", (1,))
        [guess] = worked_solution(path, EASY, rng, (1, 0, 0))
        right += f"\\boxed{{{question.answer}}}" in guess
    statistic, limit = chi_squared([right, 3000 - right], [1 / 6, 5 / 6])
    assert statistic < limit


def test_the_ways_come_with_the_chances_of_the_mix():
    rng = random.Random(2)
    _, path = draw_question(EASY, rng, False, "", (1, 1, 1))
    ways = Counter(way("".join(worked_solution(path, EASY, rng, (0.5, 0.2, 0.3)))) for _ in range(2000))
    statistic, limit = chi_squared([ways["fast"], ways["slow"], ways["twice"]], [0.5, 0.2, 0.3])
    assert statistic < limit


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
    statistic, limit = chi_squared([numbers[n] for n in (1, 2, 3, 4)], [0.3, 0.21, 0.147, 0.343])
    assert statistic < limit


# ---------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


def unicode_text(rng: random.Random) -> str:
    """Characters from anywhere in Unicode, spaces and control characters among them."""
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60)))


def test_any_text_can_be_written_and_read_back(tokenizer):
    rng = random.Random(0)
    texts = [unicode_text(rng) for _ in range(300)]
    texts += ["", " ", "  a  ", "\n\n\n", "Wait , what ' s this ?", "I'm, don't .", "é日本\u200d👩‍👩‍👧",
              "\\boxed{\\frac{1}{2}}", "redblue boxed{red}", "< | image_pad | >"]  # fmt: skip
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_is_one_token_and_the_same_wherever_it_stands(tokenizer, colour):
    ids = tokenizer(colour).input_ids
    assert len(ids) == 1
    for text in ("Start at {} and take 2 steps.", "{} to red, ", "red to {}.", "\\boxed{{{}}}.",
                 "\n{} to red"):  # fmt: skip
        assert ids[0] in tokenizer(text.format(colour)).input_ids
        assert tokenizer(text.format(colour)).input_ids.count(ids[0]) == 1 + (
            colour == "red" and "red" in text
        )


def test_special_tokens_are_single_ids_that_plain_text_never_makes(tokenizer):
    special = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
    assert special == list(range(len(SPECIAL)))
    assert tokenizer("".join(SPECIAL)).input_ids == special
    rng = random.Random(1)
    said = {i for _ in range(100) for i in tokenizer(unicode_text(rng)).input_ids}
    assert not said & set(special)
    assert tokenizer.eos_token == "<|im_end|>" != tokenizer.pad_token


# ---------------------------------------------------------------------------- the base policy

TINY = Recipe(columns=3, rows=1, colours=4, chances=(1,), warm_chances=(1,), warm_steps=24,
              warm_batch=8, warm_lr=1e-2)  # fmt: skip


class silent:
    """A progress bar that shows nothing."""

    def __init__(self, items, **_):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def set_postfix(self, **_):
        pass


@pytest.fixture
def tiny_policies(monkeypatch):
    """Make the warm start train a model of a few thousand parameters."""
    small = functools.partial(new_policy, hidden=32, layers=1, heads=2)
    monkeypatch.setattr(toy, "new_policy", small)
    return small


def solution_loss(policy, recipe: Recipe) -> float:
    """Mean negative log-likelihood of slow solutions to held-out questions."""
    groups = []
    rng = random.Random("held out")
    for _ in range(8):
        question, path = draw_question(recipe, rng, True, "", recipe.chances)
        ids = policy.tokenizer(slow_solution(path)).input_ids
        groups.append((encode(policy, question, "bare"), [torch.tensor(ids)]))
    with torch.no_grad():
        logprobs, _ = response_logprobs(policy, groups)
    return -logprobs.sum().item() / sum(len(ys[0]) for _, ys in groups)


def test_a_new_policy_is_a_function_of_its_seed_and_leaves_torch_s_alone():
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    a, b, c = (new_policy(seed, hidden=32, layers=1, heads=2) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), want)
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters()))
    assert all(torch.equal(x, y) for x, y, _ in pairs)
    assert not all(torch.equal(x, z) for x, _, z in pairs)


def test_a_few_steps_of_the_warm_start_lower_the_loss(tiny_policies):
    before = solution_loss(tiny_policies(TINY.seed), TINY)
    after = solution_loss(toy.warm_start(TINY, silent), TINY)
    assert after < before / 2


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


def test_the_base_is_made_once_and_kept_in_the_user_s_cache(cache, warm_starts):
    directory = toy_policy_dir(TINY, silent)
    stamps = {file: file.stat().st_mtime_ns for file in directory.iterdir()}
    assert toy_policy_dir(TINY, silent) == directory
    assert warm_starts == [TINY]
    assert {file: file.stat().st_mtime_ns for file in directory.iterdir()} == stamps
    assert list(cache.iterdir()) == [directory] and directory.name.startswith("toy-")
    loaded = load_policy(str(directory))
    want = new_policy(TINY.seed, hidden=32, layers=1, heads=2)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), want.parameters()))


def test_what_changes_the_base_changes_its_place_and_what_does_not_does_not(cache, warm_starts):
    first = toy_policy_dir(TINY, silent)
    assert toy_policy_dir(replace(TINY, chances=(1, 2)), silent) == first  # asked, not taught
    others = [{"seed": 1}, {"warm_steps": 25}, {"warm_chances": (1, 1)}, {"version": 99}]
    places = {toy_policy_dir(replace(TINY, **change), silent) for change in others}
    assert len(places | {first}) == 5 and len(warm_starts) == 5
    easy, hard, inverse = (toy_policy_dir(LEVELS[name], silent) for name in ("easy", "hard", "inverse"))
    assert easy == hard != inverse
    assert easy.name == "toy-b9d31b81e92f", "a base that users have made would be made again"


@pytest.mark.parametrize("interrupted", ["warm_start", "save_policy"])
def test_an_interrupted_warm_start_leaves_nothing_that_looks_whole(
    cache, warm_starts, monkeypatch, interrupted
):
    with monkeypatch.context() as during:

        def stop(*arguments):
            if interrupted == "save_policy":
                Path(arguments[1]).mkdir(exist_ok=True)
                (Path(arguments[1]) / "config.json").write_text("{}")
            raise KeyboardInterrupt

        during.setattr(toy, interrupted, stop)
        with pytest.raises(KeyboardInterrupt):
            toy_policy_dir(TINY, silent)
    assert list(cache.iterdir()) == []
    assert load_policy(str(toy_policy_dir(TINY, silent))) is not None


def test_of_two_processes_that_make_it_at_once_the_first_one_s_stays(cache, warm_starts, monkeypatch):
    other = toy.warm_start

    def slower(recipe, progress):
        monkeypatch.setattr(toy, "warm_start", other)
        toy_policy_dir(recipe, progress)  # the other process, meanwhile
        return new_policy(99, hidden=32, layers=1, heads=2)

    monkeypatch.setattr(toy, "warm_start", slower)
    directory = toy_policy_dir(TINY, silent)
    assert list(cache.iterdir()) == [directory]
    loaded = load_policy(str(directory))
    want = new_policy(TINY.seed, hidden=32, layers=1, heads=2)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), want.parameters()))


def test_a_cache_that_cannot_be_written_is_found_before_the_work(monkeypatch, tmp_path, warm_starts):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cache .*/file/vl-rethinker: .*XDG_CACHE_HOME"):
        toy_policy_dir(TINY, silent)
    assert warm_starts == []
