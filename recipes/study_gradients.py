"""What replay does to the direction of a step: gradients at checkpoints along a plain run on the hard level.

    python recipes/study_gradients.py [FOLDER of the run] [FOLDER of results]        a core, 15 minutes

At each checkpoint, with G the gradient of 8,192 fresh samples (1,024 questions x 8 responses) and g that
of one batch of 32 as an arm chooses it from an episode of 64 questions:

    cosine = g G / |g| |G|        one batch, and the mean of an episode's 16, which is about what Adam averages

Adam makes the length of a step its own; what is left for an arm to change is the direction, and in how many
batches there is one. An episode's batches are chosen in order, as in training (early ones have few samples to
replay), but the weights stand still, so that all are gradients at the same point: ratios are 1 and
nothing is clipped. All arms see the same episodes, and none shares a sample with G.

`adam` compares what Adam makes of both: the first step of each, its momentum apart, with the second
moments as the run left them. G is noisy too: `ceiling` is the cosine that the true direction would have
with it, estimated from its two halves. Each checkpoint's numbers are kept in FOLDER; the same command goes
on where it ended, and writes gradients.csv, .md and .svg to the results.
"""

import csv
import math
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from buffers import WholeEpisode
from study_figures import COLOURS, SHARES, axis, card, panel
from study_tables import differences, interval, markdown, show, write_csv

import checkpoint
import parallel
import train
from config import parse
from prepare import Run, prepare
from ssr import ReplayBuffer

RUN = (
    "--toy_level hard --episode_queries 64 --batch_size 32 --steps 256 --max_new_tokens 72 --heldout 128 "
    "--eval_every 64 --save_every 64 --keep_last 5 --rethink_fraction 0 --ssr off"
)
STEPS = (0, 64, 128, 192, 256)
# --ssr, and what is replayed from, by the seed.
ARMS = {
    "plain": ("off", partial(ReplayBuffer, 1.0)),
    "filter": ("filter", partial(ReplayBuffer, 1.0)),
    "ssr": ("replay", partial(ReplayBuffer, 1.0)),
    "ssr_alpha2": ("replay", partial(ReplayBuffer, 2.0)),
    "ssr_whole": ("replay", WholeEpisode),
}
EPISODES = 5  # that arms choose from, per checkpoint
QUESTIONS = 1024  # of G
COLUMNS = ("step", "effective", "ceiling", "arm", "episode", "batch", "cosine", "adam", "norm", "replayed")


class Catch:
    """Stands where the optimiser stands: keeps the gradient [K] of a step and leaves the weights alone."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        [self.settings] = optimizer.param_groups
        self.parameters, self.state = self.settings["params"], optimizer.state
        self.param_groups = []  # no learning rate to set

    def flat(self, tensors) -> torch.Tensor:
        return torch.cat([parallel.whole(x).flatten() for x in tensors])

    def step(self) -> None:
        self.gradient = self.flat(p.grad for p in self.parameters)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def as_adam(self, g: torch.Tensor) -> torch.Tensor:
        """The direction [K] that Adam steps in for g, its momentum apart: g over the root of v, g included."""
        v, t, beta = torch.zeros_like(g), 0, self.settings["betas"][1]
        if self.state:
            v = self.flat(self.state[p]["exp_avg_sq"] for p in self.parameters)
            t = int(self.state[self.parameters[0]]["step"])
        v = (beta * v + (1 - beta) * g**2) / (1 - beta ** (t + 1))
        return g / (v.sqrt() + self.settings["eps"])


def gradients(run: Run, samples: list, buffer: ReplayBuffer | WholeEpisode | None = None, **changes):
    """The gradient [K] and `train.update`'s numbers of each batch of these samples, as training with
    this buffer and these changes of its settings chooses them; (None, nothing) where there is none."""
    settings, run.fresh = run.config, list(samples)
    run.config, run.buffer = replace(settings, **changes), ReplayBuffer() if buffer is None else buffer
    run.buffer.begin(samples)
    while run.fresh:
        branches = train.choose_batch(run)
        numbers = train.update(run, branches)
        numbers["replayed"] = sum(b.replays for b in branches) / max(1, sum(b.draws for b in branches))
        yield (run.optimizer.gradient, numbers) if numbers["tokens"] else (None, numbers)
    run.config = settings


def whole_gradient(run: Run, samples: list) -> tuple[torch.Tensor, float]:
    """G, and the cosine that the true direction would have with it.

    Of two halves whose noise is independent, cos(G1, G2) = r is the share of the signal; in their sum it is
    2 r / (1 + r), and a cosine is the root of that.
    """
    sizes = {"ssr": "off", "batch_size": len(samples) // 2, "max_grad_norm": 0.0}
    (first, n), (second, m) = ((g, numbers["tokens"]) for g, numbers in gradients(run, samples, **sizes))
    r = max(0.0, cosine(first, second))
    return (n * first + m * second) / (n + m), math.sqrt(2 * r / (1 + r))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def sample(run: Run, episode: int, questions: int) -> tuple[list, float]:
    """Fresh samples of the policy as it stands, and the share of questions that are effective."""
    settings, run.episode = run.config, episode
    run.config = replace(settings, episode_queries=questions)
    groups, counts = train.sample_episode(run)
    run.config = settings
    return list(chain(*groups)), counts["effective"] / questions


def measure(run: Run, step: int) -> list[dict]:
    """All cosines at one checkpoint: a row per arm, episode and batch, and per episode one of batch "mean"."""
    samples, effective = sample(run, 100, QUESTIONS)  # no episode of the run's has such a number
    whole, ceiling = whole_gradient(run, samples)
    adam, rows = run.optimizer.as_adam, []
    goal = adam(whole)
    for episode in range(1, EPISODES + 1):
        samples, _ = sample(run, 100 + episode, run.config.episode_queries)
        for arm, (ssr, buffer) in ARMS.items():
            found = list(gradients(run, samples, buffer(run.config.seed), ssr=ssr))
            given = [g for g, _ in found if g is not None]
            found.append((sum(given) / len(given) if given else None, {}))
            for batch, (g, numbers) in enumerate(found, 1):
                row = dict(zip(COLUMNS, (step, effective, ceiling, arm, episode)))
                row["batch"] = batch if numbers else "mean"
                if g is not None:
                    row |= {"cosine": cosine(g, whole), "norm": numbers.get("grad_norm", float(g.norm()))}
                    row["adam"] = cosine(adam(g), goal)
                    row["replayed"] = numbers.get("replayed", "")
                rows.append({name: round(x, 5) if isinstance(x, float) else x for name, x in row.items()})
    return rows


# ---------------------------------------------------------------------------- what comes of it


def by_episode(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Of one arm at one checkpoint: {episode: its numbers}; no cosine where no batch has a gradient."""
    episodes, found = defaultdict(list), {}
    for row in rows:
        episodes[row["episode"]].append(row)
    for episode, (*batches, mean) in episodes.items():
        cosines = [float(row["cosine"]) for row in batches if row["cosine"] != ""]
        found[episode] = {"given": len(cosines) / len(batches)}
        if cosines:
            found[episode] |= {"one": sum(cosines) / len(cosines)}
            found[episode] |= {"spread": float(torch.tensor(cosines).std(correction=0))}
            found[episode] |= {"mean": float(mean["cosine"]), "adam": float(mean["adam"])}
    return found


def summary(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Of one arm at one checkpoint: (mean, half-width of the 95 % interval over episodes) of each number."""
    values = defaultdict(list)
    for name, value in chain(*(numbers.items() for numbers in by_episode(rows).values())):
        values[name].append(value)
    return {name: interval(xs) for name, xs in values.items()}


def against_plain(rows: list[dict]) -> str:
    """A line per arm: its cosines minus plain's, paired by checkpoint and episode."""
    runs = {arm: {} for arm in ARMS}  # arm -> (step, episode) -> its numbers
    for step, arm in dict.fromkeys((row["step"], row["arm"]) for row in rows):
        mine = by_episode([row for row in rows if (row["step"], row["arm"]) == (step, arm)])
        runs[arm] |= {(step, episode): numbers for episode, numbers in mine.items() if "one" in numbers}
    lines = []
    for arm in list(ARMS)[1:]:
        one, mean = (differences(runs, arm, "plain", name) for name in ("one", "mean"))
        lines.append([arm, str(len(one)), show(one, 3), show(mean, 3)])
    return markdown(["minus plain, all checkpoints", "pairs", "one batch", "mean of 16"], lines)


def summaries(rows: list[dict]) -> dict[tuple[str, float, float, str], dict]:
    """(step, effective, ceiling, arm) -> `summary`."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["step"], float(row["effective"]), float(row["ceiling"]), row["arm"]].append(row)
    return {key: summary(mine) for key, mine in groups.items()}


def table(found: dict) -> str:
    names = {
        "one": "one batch",
        "spread": "its deviation",
        "mean": "mean of 16",
        "adam": "the same, as Adam scales",
    }
    heads = ["step", "effective", "ceiling", "arm", "batches with a gradient", *names.values()]
    lines = []
    for (step, effective, ceiling, arm), numbers in found.items():
        cells = [str(step), f"{effective:.2f}", f"{ceiling:.2f}", arm, f"{numbers['given'][0]:.2f}"]
        cells += ["{:.3f} ± {:.3f}".format(*numbers[k]) if k in numbers else "–" for k in names]
        lines.append(cells)
    return markdown(heads, lines)


PANELS = {
    "one": "cosine of one batch",
    "mean": "cosine of an episode's mean",
    "given": "batches with a gradient",
}


def figure(found: dict) -> str:
    """Each number of PANELS over the share of effective questions, which falls as training goes on."""
    panels, colours = "", dict(zip(ARMS, COLOURS))
    for k, (name, title) in enumerate(PANELS.items()):
        marks = []
        for arm, colour in colours.items():
            mine = {
                key[1]: numbers[name] for key, numbers in found.items() if key[3] == arm and name in numbers
            }
            line = [(math.log2(effective), *ends) for effective, ends in mine.items()]
            marks.append(("line", colour, sorted((x, mean) for x, mean, _ in line)))
            marks += [("line", colour, [(x, mean - half), (x, mean + half)]) for x, mean, half in line]
        panels += panel(44 + 330 * k, 258, title, SHARES, axis(0, 1), marks)
    return card(panels, colours, "over the share of effective questions; 95 % intervals")


def main(folder: str = "runs/gradients", results: str = "results") -> int:
    out, results = Path(folder), Path(results)
    flags = [*RUN.split(), "--resume", "--out", folder]
    last = out / f"checkpoint-{STEPS[-1]}"
    if not last.is_dir():
        code = train.main(flags)
        if not last.is_dir():  # it was stopped, or could not start
            return code
    run = prepare(parse(flags))
    optimizer, run.optimizer = run.optimizer, Catch(run.optimizer)
    rows = []
    for step in STEPS:
        path = out / f"gradients-{step}.csv"
        if not path.exists():
            if step:  # `prepare` has loaded the base
                checkpoint.load_state(out / f"checkpoint-{step}", run.policy, optimizer)
            run.step = step
            write_csv(path, measure(run, step), COLUMNS)
        rows += csv.DictReader(path.read_text().splitlines())
    found = summaries(rows)
    results.mkdir(exist_ok=True)
    write_csv(results / "gradients.csv", rows, COLUMNS)
    (results / "gradients.svg").write_text(figure(found))
    text = f"{against_plain(rows)}\n\n{table(found)}\n"
    (results / "gradients.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    parallel.leave(main(*sys.argv[1:]))
