"""Selective Sample Replay (paper, Section 3 and Algorithm 1).

*Vanishing advantages*: a question whose G rewards are all equal has A = 0 for every response and
gives no gradient. As a policy improves, fewer and fewer samples of a batch are effective (the
paper's 72B: from 40 % to below 20 % in 256 steps). SSR keeps the batch full of effective ones:

    D_eff   = samples of the fresh batch of N with |A| > 0
    buffer  = buffer + D_eff                       before drawing: fresh samples may be replayed
    n       = N - |D_eff|
    D_buf   = n draws from the buffer with P(j) = |A_j|^alpha / sum_k |A_k|^alpha
    train on D_eff + D_buf

The unit is one sample, with the log-probabilities of the policy that sampled it: the clipped ratio
corrects for its age. The buffer lives for one episode, then it is cleared.

What we do differently: the paper says neither alpha nor whether a sample may be drawn twice; we take
alpha = 1, as the released code effectively does, and draw with replacement. An empty buffer draws nothing,
where the released replay, which its own trainer never reaches, would loop forever.

A draw is a function of (seed, how many draws came before it): resuming needs the buffer's samples
and one number. No model and no tensors: a sample is anything with an `.advantage`.

Your own rule of replay: `train.main(argv, buffer=...)` takes any object with `begin`, `add` and
`draw`, whose `samples` and `draws` a checkpoint can keep; recipes/buffers.py has three.

Next: rethink.py, how a policy that never looks twice can learn to.
"""

import math
import random


def is_effective(sample) -> bool:
    """True where the sample has a gradient to give: |A| > 0, and finite."""
    return math.isfinite(sample.advantage) and sample.advantage != 0


class ReplayBuffer:
    """Effective samples of one episode, drawn in proportion to |A|^alpha.

    alpha  0 draws uniformly; large values draw only the largest |A|
    seed   of the draws
    """

    def __init__(self, alpha: float = 1.0, seed: int = 0):
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, not {alpha}")
        self.alpha, self.seed = alpha, seed
        self.samples = []
        self.draws = 0  # calls of draw() so far

    def __len__(self) -> int:
        return len(self.samples)

    def begin(self, samples) -> None:
        """Start an episode of these samples: this buffer is emptied, and `add` fills it batch by batch."""
        self.clear()

    def add(self, samples) -> None:
        """Keep the effective ones: with alpha = 0 even a zero advantage would have weight 0^0 = 1."""
        self.samples += [sample for sample in samples if is_effective(sample)]

    def clear(self) -> None:
        self.samples = []

    def weights(self) -> list[float]:
        """|A_j|^alpha, scaled so that the largest is 1: any alpha is then safe from overflow."""
        sizes = [abs(sample.advantage) for sample in self.samples]
        largest = max(sizes, default=1.0)
        return [(size / largest) ** self.alpha for size in sizes]

    def draw(self, n: int) -> list:
        """n samples, with replacement; none where the buffer is empty."""
        rng = random.Random(f"{self.seed} {self.draws}")
        self.draws += 1
        return rng.choices(self.samples, self.weights(), k=n) if self.samples and n > 0 else []


def replay_batch(fresh: list, buffer: ReplayBuffer, size: int) -> list:
    """Algorithm 1 for one batch: its effective samples, filled up to `size` from the buffer.

    >>> from types import SimpleNamespace as S
    >>> fresh = [S(advantage=0.5), S(advantage=0.0), S(advantage=-0.5), S(advantage=0.0)]
    >>> batch = replay_batch(fresh, ReplayBuffer(), size=4)
    >>> len(batch), batch[:2] == [fresh[0], fresh[2]], all(s.advantage for s in batch)
    (4, True, True)
    """
    effective = [sample for sample in fresh if is_effective(sample)]
    buffer.add(effective)
    return effective + buffer.draw(size - len(effective))


def effective_sample_size(weights: list[float]) -> float:
    """How many equal weights these amount to: (sum w)^2 / sum w^2.

    >>> effective_sample_size([1, 1, 1, 0])
    3.0
    """
    squares = sum(w * w for w in weights)
    return sum(weights) ** 2 / squares if squares else 0.0
