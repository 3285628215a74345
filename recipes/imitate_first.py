"""Does imitation help reinforcement learning, or hurt it? Phases of both in one run.

    python recipes/imitate_first.py imitate:64,rl:192 [flags of train.py]
    python recipes/imitate_first.py imitate:64,rl:64,imitate:64,rl:64 ...        iterated, as in OpenVLThinker

    imitate:K   rejection sampling: as many responses as RL samples in K steps, all from the policy as it is;
                then the *base* is supervised for K steps on the right ones, drawn anew in each pass over them
    rl:K        K steps of train.py's own loop

OpenVLThinker (arXiv 2503.17352) alternates the two, and each time supervises its base anew; VLAA-Thinking (arXiv
2504.11468) found that imitation first can hurt the reinforcement after it. There a larger model is
imitated; here only the policy's own right responses, so that both halves learn from the same reward and
sample the same number of responses. The supervised loss is train.py's own for kept second looks, the
mean of -log pi(y_t), and the optimiser starts anew in each phase. The phases' sum replaces --steps.
"""

import random
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import checkpoint
import parallel
import train
from config import parse
from data import UserError
from prepare import Run, prepare
from record import Recorder, step_metrics


def imitate(run: Run, record: Recorder, steps: int, base: list[torch.Tensor]) -> Iterator[dict]:
    """Supervise the base on right responses of the policy: a line of metrics.jsonl per step."""
    c, episodes, first = run.config, [], run.episode
    per_episode = c.episode_queries * c.group_size // c.batch_size
    for _ in range(0, steps, per_episode):
        train.begin_episode(run, record)
        episodes.append((run.counts, run.fresh))
    right = [sample for _, samples in episodes for sample in samples if sample.right]
    if not right:
        raise UserError(
            f"step {run.step}: no response is right, so there is nothing to imitate; begin with rl"
        )
    with torch.no_grad():
        for parameter, weight in zip(run.policy.parameters(), base):
            parameter.copy_(weight)
    rng, left = random.Random(f"imitate {c.seed} {run.step}"), []
    run.config = replace(c, rethink_sft_coef=1.0)
    for step in range(steps):
        run.episode, run.counts = first + 1 + step // per_episode, episodes[step // per_episode][0]
        while len(left) < c.batch_size:
            left += rng.sample(right, len(right))
        batch, left = left[: c.batch_size], left[c.batch_size :]
        branches = [train.Branch(sample, imitate=True) for sample in batch]
        row = step_metrics(run, branches, train.update(run, branches))
        run.step += 1
        yield row
    run.config, run.fresh = c, []


def reinforce(run: Run, record: Recorder, steps: int, _) -> Iterator[dict]:
    """Steps of train.py's own loop."""
    for _ in range(steps):
        if not run.fresh:
            train.begin_episode(run, record)
        yield train.train_step(run, 0.0)


PHASES = {"imitate": imitate, "rl": reinforce}


def read_phases(text: str) -> list[tuple[str, int]]:
    """
    >>> read_phases("imitate:64,rl:192")
    [('imitate', 64), ('rl', 192)]
    """
    found = re.findall(r"(imitate|rl):(\d+)", text)
    if ",".join(":".join(phase) for phase in found) != text or not found:
        raise UserError(f"phases {text!r}: give them as imitate:64,rl:192")
    return [(name, int(steps)) for name, steps in found]


def main(phases: str = "", *flags: str) -> None:
    plan = read_phases(phases)
    flags = [*flags, "--steps", str(sum(steps for _, steps in plan))]
    run = prepare(parse(flags))
    record = Recorder(run.out, active=True)
    record.start(0, [phases, *flags], 1)
    record.heldout(run.heldout, *train.measure(run))
    base = [parameter.detach().clone() for parameter in run.policy.parameters()]
    for name, steps in plan:
        run.optimizer = parallel.optimizer(run.policy, run.config.lr, run.config.weight_decay)
        run.fresh = []
        for row in PHASES[name](run, record, steps, base):
            record.metrics(row)
            if train.measurement_due(run):
                record.heldout(run.heldout, *train.measure(run))
    checkpoint.save_run(run)
    print(record.summary(run.step, run.total_steps, checkpoint.list_checkpoints(run.out)))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
