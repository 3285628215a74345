"""The loop, end to end: runs of seconds on a tiny policy, in this process."""

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from buffers import BUFFERS
from conftest import hf_logprobs, noise_image, relative_difference
from test_data import write_jsonl
from tiny import flags, heldout_of, let_be_right, read_jsonl, run_training, same_tensors, steps_of, weights_of

import toy
import train
from checkpoint import list_checkpoints
from config import parse
from data import UserError, load_questions
from model import encode, load_policy
from record import step_metrics
from rethink import TRIGGERS

# What other tools may count on in a line of metrics.jsonl.
FIELDS = {
    "step", "episode", "reward", "effective_queries", "replayed", "rethought", "loss", "sft_loss",
    "grad_norm", "clip_fraction", "entropy", "logp_mismatch", "response_length", "response_tokens",
    "truncated", "lr", "step_seconds", "rollout_seconds",
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("reward_by_luck")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory, by_luck):
    """A run with both ideas of the paper: 2 episodes of 4 steps, half of the responses look again."""
    out = tmp_path_factory.mktemp("finished")
    with by_luck():
        return run_training(base, out, steps=8, batch_size=8, rethink_fraction=0.5, eval_every=4)


# ---------------------------------------------------------------------------- what is written


def test_metrics_have_a_line_per_step_with_the_promised_fields_and_held_out_accuracy_between(finished):
    rows, steps = read_jsonl(finished / "metrics.jsonl"), steps_of(finished)
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["episode"] for row in steps] == [1] * 4 + [2] * 4
    for row in rows:
        if "heldout_accuracy" not in row:
            assert not FIELDS - row.keys()
            assert row["step_seconds"] > row["rollout_seconds"] > 0
    assert rows[0]["step"] == 0 and [row["step"] for row in heldout_of(finished)] == [0, 4, 8]
    assert all(0 <= row["heldout_accuracy"] <= 1 for row in heldout_of(finished))


def test_sampling_and_training_agree_and_counts_of_second_looks_add_up(finished):
    rows = steps_of(finished)
    assert 0 < max(row["logp_mismatch"] for row in rows) < 1e-4
    for name in ("rethink_kept", "sft_loss", "replayed"):  # else this run would test nothing
        assert any(row[name] > 0 for row in rows)
    assert any(0 < row["reward"] < 1 for row in rows)
    for row in rows:
        outcomes = ("wrong_right", "right_right", "right_wrong", "wrong_wrong")
        assert sum(row[f"rethink_{name}"] for name in outcomes) == row["rethink_attempted"]
        assert 6 < row["rethink_attempted"] < 26  # half of 32; some run into the limit
        assert row["rethink_kept"] <= row["rethink_wrong_right"] + row["rethink_right_right"]
        assert row["rethought"] == row["rethink_kept"] / 32 and 0 < row["prompt_share"] < 1


def test_metrics_are_of_the_episode_that_was_sampled_whatever_the_flags_say_since():
    """As where a run is resumed within an episode with another --group_size."""
    counts = {"questions": 2, "responses": 8, "rewards": 4, "effective": 1, "response_tokens": 80}
    run = SimpleNamespace(config=parse([]), counts=counts, step=0, episode=1)
    row = step_metrics(run, [], Counter())
    assert (row["reward"], row["effective_queries"], row["response_length"]) == (0.5, 0.5, 10)


def test_samples_show_pictures_and_tell_forced_text_from_sampled(finished):
    rows = read_jsonl(finished / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 5, 5]  # the first step that trains on them
    for row in rows:
        assert len(row["responses"]) == 8 and row["question"]["answer"] in toy.COLOURS
        assert row["question"]["images"][0].startswith("data:image/png;base64,")
    responses = [response for row in rows for response in row["responses"]]
    for response in responses:
        forced = [text for text, is_forced in response["pieces"] if is_forced]
        # A trigger's spaces may be joined to the token before it; its words are forced.
        assert forced == ([TRIGGERS[response["rethought"]]] if response["rethought"] else [])
        said = "".join(text for text, _ in response["pieces"])
        assert said.removesuffix("<|im_end|>") == response["text"]
    assert any(response["rethought"] for response in responses)


def test_runs_without_out_are_numbered_and_the_last_line_says_what_was_learnt_and_where_it_is(
    base, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    command = flags(base, "", steps=1)
    del command[command.index("--out") : command.index("--out") + 2]
    assert train.main(command) == train.main(command) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert [len(steps_of(tmp_path / "runs" / name)) for name in ("toy", "toy-2")] == [1, 1]
    before, after = (row["heldout_accuracy"] for row in heldout_of(tmp_path / "runs/toy-2"))
    assert f"held-out accuracy {before:.2f} -> {after:.2f}" in last and "runs/toy-2/checkpoint-1" in last
    assert train.main([*command, "--resume"]) == 2 and "--out" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the gradient


def spy_on_updates(monkeypatch) -> list:
    """Collect (branches, gradient before clipping) of every optimiser step."""
    seen, real = [], train.update

    def update(run, branches):
        def note(optimizer, args, kwargs):
            seen.append((branches, torch.cat([p.grad.flatten() for p in run.policy.parameters()])))

        handle = run.optimizer.register_step_pre_hook(note)
        numbers = real(run, branches)
        handle.remove()
        return numbers

    monkeypatch.setattr(train, "update", update)
    return seen


def formula_loss(run, branches) -> torch.Tensor:
    """The loss as the paper writes it, a response at a time, by transformers' own forward pass."""
    c, terms, imitation = run.config, [], []  # terms: (sum, what it is a sum of)
    for b in branches:
        s = b.sample
        logprobs = hf_logprobs(run.policy, s.prompt, s.tokens, c.temperature)
        ratio = (logprobs - s.logprobs).exp()
        clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
        losses = -torch.minimum(ratio * s.advantage, clipped * s.advantage)[s.mask]
        by_response = c.average == "sequence"
        terms += [(losses.mean(), 1) if by_response else (losses.sum(), len(losses))] * b.draws
        if b.imitate:
            imitation.append(-logprobs)
    loss = sum(total for total, _ in terms) / sum(count for _, count in terms)
    return loss + c.rethink_sft_coef * torch.cat(imitation).mean() if imitation else loss


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"average": "sequence", "advantage": "std", "micro_batch_tokens": 150},
        {"ssr": "off", "rethink_fraction": 0, "temperature": 0.8, "micro_batch_tokens": 1},
    ],
    ids=["token", "sequence", "plain"],
)
def test_the_gradient_is_that_of_the_formula_whatever_the_micro_batches(base, tmp_path, monkeypatch, changes):
    expected, real = [], train.choose_batch

    def choose_batch(run):
        branches = real(run)
        gradients = torch.autograd.grad(formula_loss(run, branches), list(run.policy.parameters()))
        expected.append(torch.cat([g.flatten() for g in gradients]))
        return branches

    monkeypatch.setattr(train, "choose_batch", choose_batch)
    seen = spy_on_updates(monkeypatch)
    settings = {"rethink_fraction": 0.5, "max_grad_norm": 0, "steps": 4, "heldout": 0, "lr": 1e-3}
    run_training(base, tmp_path, **settings | changes)
    assert len(seen) == 4
    for (_, gradient), formula in zip(seen, expected):
        assert relative_difference(gradient, formula) < 1e-4
    if not changes:
        assert any(b.draws > 1 for branches, _ in seen for b in branches)
        assert any(b.imitate for branches, _ in seen for b in branches)


def test_recomputed_log_probabilities_take_the_place_of_the_sampled(base, tmp_path, monkeypatch, capsys):
    """A sampler that is wrong by 1 shows in logp_mismatch and is warned of; recomputing mends the ratios."""
    real = train.generate

    def wrong(*args, **kwargs):
        groups = real(*args, **kwargs)
        for sample in (s for group in groups for s in group):
            for one in filter(None, (sample, sample.second_look)):
                one.logprobs = one.logprobs + 1.0
        return groups

    monkeypatch.setattr(train, "generate", wrong)
    settings = {"steps": 1, "heldout": 0, "rethink_fraction": 0.5, "batch_size": 32}
    clipped = []
    for recompute in ("false", "true"):
        run_training(base, tmp_path / recompute, **settings, recompute_logprobs=recompute)
        [row] = steps_of(tmp_path / recompute)
        assert row["logp_mismatch"] == pytest.approx(1.0, abs=1e-3)
        assert row["logp_mismatch_max"] == pytest.approx(1.0, abs=1e-3)
        assert row["logp_mismatch_kl"] == pytest.approx(math.exp(-1), abs=1e-3)
        assert "differ by 1.000 nats per token" in capsys.readouterr().out
        clipped.append(row["clip_fraction"])
    assert clipped[0] > 0 == clipped[1]


def test_an_own_reward_trains_and_the_rule_measures(base, tmp_path):
    """By the flag, or as an argument of `main`: the same run."""

    def brief(text, question):
        return 1 / (1 + len(text))

    own, settings = tmp_path / "own.py", {"rethink_fraction": 0.5, "steps": 2}
    own.write_text("def brief(text, question):\n    return 1 / (1 + len(text))\n")
    flag = run_training(base, tmp_path / "flag", reward=f"{own}:brief", **settings)
    samples = read_jsonl(flag / "samples.jsonl")
    responses = [r for row in samples for r in row["responses"] if not r["rethought"]]
    assert all(r["reward"] == pytest.approx(1 / (1 + len(r["text"]))) for r in responses)
    assert heldout_of(flag)[0]["heldout_accuracy"] in [n / 4 for n in range(5)]
    argument = tmp_path / "argument"
    assert train.main(flags(base, argument, **settings), grade=brief) == 0
    assert [row["reward"] for row in steps_of(argument)] == [row["reward"] for row in steps_of(flag)]
    assert json.loads((argument / "config.json").read_text())["reward"].startswith("test_train:")


def test_a_reward_that_fails_late_loses_no_step(base, tmp_path, capsys):
    calls = []

    def fails_in_the_second_episode(text, question):
        calls.append(text)
        if len(calls) > 40:
            raise ValueError("no such file")
        return len(text) % 2

    argv = flags(base, tmp_path, steps=8, save_every=100, heldout=0, rethink_fraction=0)
    assert train.main(argv, grade=fails_in_the_second_episode) == 2
    assert "no such file" in capsys.readouterr().err
    done = len(steps_of(tmp_path))
    assert done > 0 and [p.name for p in list_checkpoints(tmp_path)] == [f"checkpoint-{done}"]


# ---------------------------------------------------------------------------- replay


def test_replay_keeps_the_batch_full_and_filter_does_not(base, tmp_path, monkeypatch):
    let_be_right(monkeypatch, lambda s: s.prompt.question.id.endswith("/0") and len(s.text) % 2 == 1)
    sizes = {}
    for ssr in ("replay", "filter", "off"):
        rows = steps_of(run_training(base, tmp_path / ssr, ssr=ssr, steps=2, heldout=0))
        sizes[ssr] = [row["batch_responses"] for row in rows]
    # Only question 0 of 4 is effective: half of the first batch of two questions.
    assert sizes == {"replay": [16, 16], "filter": [8, 0], "off": [16, 16]}


def test_nothing_is_replayed_from_an_earlier_episode(base, tmp_path, monkeypatch):
    seen = spy_on_updates(monkeypatch)
    rows = steps_of(run_training(base, tmp_path, steps=6, heldout=0))
    replayed = 0
    for step, (branches, _) in enumerate(seen):
        assert all(b.sample.step == step - step % 2 for b in branches)  # two steps an episode
        draws = sum(b.draws - (b.fresh and b.draws > 0) for b in branches)
        replayed += draws
        # Draws of the batch's own samples are replayed too, and as old as all of the episode.
        assert rows[step]["replayed"] == draws / 16
        assert rows[step]["replay_age"] == (step % 2 if draws else 0)
    assert replayed > 0


def test_what_is_replayed_is_an_argument(base, tmp_path, monkeypatch):
    seen = spy_on_updates(monkeypatch)
    assert train.main(flags(base, tmp_path, steps=6, heldout=0), buffer=BUFFERS["two"](seed=2)) == 0
    episodes = [{(step - b.sample.step) // 2 for b in branches} for step, (branches, _) in enumerate(seen)]
    assert {0, 1} in episodes and max(map(max, episodes)) == 1


@pytest.mark.parametrize("ssr", ["filter", "replay"])
def test_a_step_without_anything_effective_is_skipped_and_counted_and_the_mismatch_measured(
    base, tmp_path, monkeypatch, capsys, ssr
):
    let_be_right(monkeypatch, lambda sample: True)
    rows = steps_of(run_training(base, tmp_path, ssr=ssr, heldout=0))
    assert [row["skipped"] for row in rows] == [True] * 4
    for row in rows:
        assert row["reward"] == 1 and row["effective_queries"] == 0 and row["lr"] is row["entropy"] is None
        assert 0 < row["logp_mismatch"] < row["logp_mismatch_max"] < 1e-4
        assert 0 <= row["logp_mismatch_kl"] < 1e-8
    assert "warning" not in capsys.readouterr().out
    assert same_tensors(weights_of(tmp_path / "checkpoint-4"), weights_of(base))


# ------------------------------------------------------------------ gradients that are not finite


def spoil(monkeypatch, steps: set[int]) -> list:
    """Make the loss of these steps nan; note the weights after each step."""
    weights, real_loss, real_step = [], train.policy_loss, train.train_step

    def policy_loss(*args):
        return real_loss(*args) * (math.nan if len(weights) + 1 in steps else 1.0)

    def train_step(run, seconds):
        row = real_step(run, seconds)
        weights.append({n: p.detach().clone() for n, p in run.policy.named_parameters()})
        return row

    monkeypatch.setattr(train, "policy_loss", policy_loss)
    monkeypatch.setattr(train, "train_step", train_step)
    return weights


def test_steps_that_are_not_finite_leave_the_weights_and_five_in_a_row_stop_the_run(
    base, tmp_path, monkeypatch, capsys
):
    weights = spoil(monkeypatch, {2, 4, 5, 6, 7, 8})
    assert train.main(flags(base, tmp_path, steps=20, heldout=0)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 8: 5 gradients in a row were not finite") and "--lr" in error
    skipped = [row["skipped"] for row in steps_of(tmp_path)]
    assert skipped == [False, True, False, True, True, True, True, True]
    assert [same_tensors(a, b) for a, b in itertools.pairwise(weights)] == skipped[1:]
    assert all(bool(w.isfinite().all()) for w in weights[-1].values())
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-8"]


@pytest.mark.parametrize(
    ("steps", "said"), [(4, "norm.weight is not finite"), (6, "log-probabilities are not finite")]
)
def test_ruined_weights_stop_the_run_and_are_not_saved(base, tmp_path, monkeypatch, capsys, steps, said):
    """Ruined in the fourth step, and found when the last checkpoint is due, or when an episode is sampled."""
    real = train.choose_batch

    def choose_batch(run):
        if run.step == 3:
            run.policy.text_model.norm.weight.data[0] = math.nan
        return real(run)

    monkeypatch.setattr(train, "choose_batch", choose_batch)
    assert train.main(flags(base, tmp_path, steps=steps, heldout=0)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]


# ---------------------------------------------------------------------------- a file of questions


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory):
    """Ten questions: one without a picture, one with two, the others with one."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    noise_image(84, 56).save(path.with_name("a.png"))
    images = [[], ["a.png", "a.png"], *[["a.png"]] * 8]
    rows = [{"qid": f"q{i}", "question": "?", "image": x, "answer": "red"} for i, x in enumerate(images)]
    return write_jsonl(path, rows)


def prepared(base, out, data, **changes):
    pixels = {"min_pixels": 28 * 28, "max_pixels": 64 * 28 * 28}  # as the tiny policy's own
    return train.prepare(parse(flags(base, out, data=data, template="bare", **pixels, **changes)))


def test_a_file_is_passed_over_in_a_new_order_each_time_and_some_of_it_held_out(
    base, questions_file, tmp_path
):
    run = prepared(base, tmp_path, questions_file, heldout=2, steps=0, passes=2)
    assert run.total_steps == 8  # 2 passes over 8 questions x 8 responses, in batches of 16
    asked = []
    for run.episode in range(4):
        asked += [question.id for question in train.episode_questions(run)]
    held = {question.id for question in run.heldout}
    assert len(held) == 2 and not held & set(asked)
    assert Counter(asked[:8]) == Counter(asked[8:]) == Counter(set(asked))
    assert asked[:8] != asked[8:]


def test_long_prompts_are_dropped_and_counted_never_cut(base, questions_file, tmp_path, capsys):
    policy = load_policy(str(base))
    lengths = {q.id: len(encode(policy, q, "bare").input_ids) for q in load_questions(questions_file)}
    limit = lengths["q1"] - 1  # with its two pictures
    run = prepared(base, tmp_path / "short", questions_file, heldout=0, max_prompt_tokens=limit)
    assert {question.id for question in run.questions} == lengths.keys() - {"q1"}
    assert "dropped 1 of 10 questions" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 10 prompts are longer"):
        prepared(base, tmp_path / "none", questions_file, heldout=0, max_prompt_tokens=3)


def test_one_seed_is_one_run_and_another_seed_another(base, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run_training(base, tmp_path / name, seed=seed, steps=1, heldout=0, rethink_fraction=0.5)
    a, b, c = (weights_of(tmp_path / name / "checkpoint-1") for name in "abc")
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b") and same_tensors(a, b)
    assert not same_tensors(a, c)
