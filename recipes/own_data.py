"""Own data, worked through: pictures, questions and a reward, written as you would write yours.

    python recipes/own_data.py FOLDER       draws the pictures; writes train.jsonl and heldout.jsonl

A map of six coloured cells comes in two pictures. A dot in a cell says which colour comes next, and
the question asks, with three options, where some steps lead. Each line of the files has two paths
in `image`, a list of `choices`, and the letter of the right one in `answer`. recipes/own_data.sh
trains on them, with the reward below, and evaluates the result.
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a call of this file alone

from reward import extract_answer, is_correct

COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 220, 50),
    "pink": (250, 150, 190), "black": (20, 20, 20),
}  # fmt: skip
SIDE = 28  # pixels of a cell


def reward(response: str, question) -> float:
    """1 for the right option, 0.2 for another option, 0 for what is not among them.

    `--reward FILE.py:NAME` takes any such function: of the response's text and the Question
    (data.py), which has the answer, the choices and the category.
    """
    said = extract_answer(response)
    if said is None:
        return 0.0
    if is_correct(said, question.answer, question.choices):
        return 1.0
    return 0.2 * any(is_correct(said, option, question.choices) for option in question.choices)


def draw(cells: list[str], dots: list[str]) -> Image.Image:
    """A row of cells, each with a dot in the colour that comes next."""
    image = Image.new("RGB", (SIDE * len(cells), SIDE))
    pen = ImageDraw.Draw(image)
    for i, (cell, dot) in enumerate(zip(cells, dots)):
        pen.rectangle((i * SIDE, 0, i * SIDE + SIDE - 1, SIDE - 1), fill=COLOURS[cell])
        pen.ellipse((i * SIDE + 7, 7, i * SIDE + SIDE - 8, SIDE - 8), fill=COLOURS[dot])
    return image


def write(folder: Path, name: str, n: int) -> None:
    """n questions as FOLDER/NAME.jsonl, their pictures in FOLDER/NAME."""
    rng = random.Random(name)
    (folder / name).mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for i in range(n):
            cells = rng.sample(list(COLOURS), len(COLOURS))
            dots = [rng.choice([c for c in cells if c != cell]) for cell in cells]
            paths = [f"{name}/{i}-left.png", f"{name}/{i}-right.png"]
            for path, half in zip(paths, (slice(0, 3), slice(3, 6))):
                draw(cells[half], dots[half]).save(folder / path)
            start, steps = rng.choice(cells), rng.choice([1, 2])
            phrase = f"{steps} step{'s' if steps > 1 else ''}"
            at = start
            for _ in range(steps):
                at = dots[cells.index(at)]
            choices = rng.sample([c for c in cells if c != at], 2) + [at]
            rng.shuffle(choices)
            row = {
                "question": f"<image><image>Start at {start} and take {phrase}.",
                "image": paths, "choices": choices, "answer": "ABC"[choices.index(at)],
                "category": phrase,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]), "train", 200)
    write(Path(sys.argv[1]), "heldout", 64)
