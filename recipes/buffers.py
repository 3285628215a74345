"""Three other replay buffers, for the study in results/: what may be drawn, and how often.

    python recipes/buffers.py whole|two|most4 [the flags of train.py]

Each is what `train.main(argv, buffer=...)` takes, whole as it stands; all draw in proportion to |A|.
Of these only `whole` resumes exactly: a checkpoint keeps an episode's `samples` and `draws`, and nothing else.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import config
import parallel
import train
from data import UserError
from ssr import ReplayBuffer, is_effective


class WholeEpisode:
    """All effective samples of an episode are there from its first batch on: their advantages are known."""

    def __init__(self, seed: int):
        self.seed, self.samples, self.draws = seed, [], 0

    def begin(self, samples) -> None:
        self.samples = [s for s in samples if is_effective(s)]

    def add(self, samples) -> None:
        pass  # they have been there since the episode began

    def draw(self, n: int) -> list:
        return weighted_draws(self, n)


class TwoEpisodes:
    """A sample may be drawn until the episode after its own has ended."""

    def __init__(self, seed: int):
        self.seed, self.samples, self.draws = seed, [], 0
        self.old = 0  # samples[:old] are the last episode's

    def begin(self, samples) -> None:
        self.samples = self.samples[self.old :]
        self.old = len(self.samples)

    def add(self, samples) -> None:
        self.samples += [s for s in samples if is_effective(s)]

    def draw(self, n: int) -> list:
        return weighted_draws(self, n)


class AtMost:
    """A sample is drawn at most `most` times; then it leaves. The batch is smaller where none is left."""

    def __init__(self, seed: int, most: int):
        self.seed, self.most, self.samples, self.draws = seed, most, [], 0
        self.drawn = Counter()  # by identity

    def begin(self, samples) -> None:
        self.samples, self.drawn = [], Counter()

    def add(self, samples) -> None:
        self.samples += [s for s in samples if is_effective(s)]

    def draw(self, n: int) -> list:
        drawn = []
        while len(drawn) < n and self.samples:
            drawn += weighted_draws(self, 1)
            self.drawn[id(drawn[-1])] += 1
            self.samples = [s for s in self.samples if self.drawn[id(s)] < self.most]
        return drawn


def weighted_draws(buffer, n: int) -> list:
    """What the paper's buffer would draw from the same samples."""
    plain = ReplayBuffer(alpha=1.0, seed=buffer.seed)
    plain.samples, plain.draws = buffer.samples, buffer.draws
    buffer.draws += 1
    return plain.draw(n)


BUFFERS = {"whole": WholeEpisode, "two": TwoEpisodes, "most4": lambda seed: AtMost(seed, most=4)}

if __name__ == "__main__":
    name, *argv = sys.argv[1:] or [""]
    if name not in BUFFERS:
        sys.exit(f"error: give one of {', '.join(BUFFERS)}, then the flags of train.py")
    try:
        seed = config.parse(argv).seed
    except UserError as error:
        sys.exit(f"error: {error}")
    parallel.leave(train.main(argv, buffer=BUFFERS[name](seed)))
