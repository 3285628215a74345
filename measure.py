"""What a policy has learnt, on questions that training never shows."""

from collections import Counter

import parallel
import toy
from model import encode
from rethink import before_rethinking, rethinks
from rollout import generate
from prepare import Run, add_counts, agree, generator, grade


def measure(run: Run) -> dict:
    """Held-out questions: greedy accuracy, accuracy of one sample, and how the policy answers."""
    c = run.config
    mine = run.heldout[parallel.rank() :: parallel.world()]
    # With fewer questions than ranks some have none, and decode one for nobody: see `layers_in_turn`.
    prompts = agree(lambda: [encode(run.policy, q, c.template) for q in mine or run.heldout[:1]])
    counts = Counter()
    with parallel.whole_weights(run.policy, c.rollout_weights == "layer"):
        for kind, temperature in (("greedy", 0.0), ("sampled", c.temperature)):
            groups = generate(run.policy, prompts, 1, c.max_new_tokens, temperature,
                              generator(run, "heldout"), max_rows=c.rollout_rows)  # fmt: skip
            for sample in (group[0] for group in groups[: len(mine)]):
                right = grade(sample)
                counts[f"{kind}_right"] += right
                if kind == "greedy":
                    category = sample.prompt.question.category
                    counts.update({(category, "n"): 1, (category, "right"): right})
                    continue
                counts["tokens"] += len(sample.tokens)
                if rethinks(sample.text):
                    counts["rethinks"] += 1
                    counts["helped"] += right - grade(sample, before_rethinking(sample.text))
                if c.data == "toy":
                    counts[toy.way(sample.text)] += 1
    counts = add_counts(parallel.gather([counts]))
    n = len(run.heldout)
    run.measured = run.step
    row = {
        "step": run.step, "heldout_accuracy": counts["greedy_right"] / n,
        "heldout_sampled": counts["sampled_right"] / n, "heldout_tokens": counts["tokens"] / n,
        "heldout_rethinks": counts["rethinks"] / n, "heldout_rethinks_helped": counts["helped"] / n,
    }  # fmt: skip
    names = sorted({q.category for q in run.heldout})
    row["heldout_categories"] = {k: counts[k, "right"] / counts[k, "n"] for k in names}
    if c.data == "toy":
        row |= {f"heldout_{way}": counts[way] / n for way in ("fast", "slow", "twice")}
    return row
