"""The loop, end to end: runs of seconds on a tiny policy, in this process."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from buffers import BUFFERS
from conftest import hf_logprobs
from tiny import (
    flags,
    heldout_of,
    let_be_right,
    lucky,
    odd_start,
    odd_sum,
    read_jsonl,
    run_training,
    same_tensors,
    steps_of,
    weights_of,
)

import toy
import train
from config import Config
from data import UserError, load_questions
from model import Sample, encode, load_policy, save_policy
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
        assert row["rethought"] == row["rethink_kept"] / 32


def test_samples_show_pictures_and_tell_forced_text_from_sampled(finished):
    rows = read_jsonl(finished / "samples.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 5, 5]  # the first step that trains on them
    responses = [response for row in rows for response in row["responses"]]
    assert len(responses) == 4 * 8
    for row in rows:
        assert row["question"]["answer"] in toy.COLOURS
        assert row["question"]["images"][0].startswith("data:image/png;base64,")
    for response in responses:
        forced = [text for text, is_forced in response["pieces"] if is_forced]
        # A trigger's spaces may be joined to the token before it; its words are forced.
        expected = [TRIGGERS[response["rethought"]]] if response["rethought"] else []
        assert forced == expected
        said = "".join(text for text, _ in response["pieces"])
        assert said.removesuffix("<|im_end|>") == response["text"]
    assert any(response["rethought"] for response in responses)


def test_the_last_line_says_what_was_learnt_and_where_it_is(base, tmp_path, capsys):
    run_training(base, tmp_path, steps=2)
    last = capsys.readouterr().out.splitlines()[-1]
    before, after = (row["heldout_accuracy"] for row in heldout_of(tmp_path))
    assert last.startswith("2 steps; held-out accuracy")
    assert f"{before:.2f} -> {after:.2f}" in last and str(tmp_path / "checkpoint-2") in last


def test_without_out_runs_are_numbered_and_resuming_asks_which(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = flags(base, "", steps=1, heldout=0)
    del command[command.index("--out") : command.index("--out") + 2]
    assert train.main(command) == train.main(command) == 0
    assert [len(steps_of(tmp_path / "runs" / name)) for name in ("toy", "toy-2")] == [1, 1]
    assert train.main([*command, "--resume"]) == 2 and "--out" in capsys.readouterr().err


# ---------------------------------------------------------------------------- the gradient


def spy_on_updates(monkeypatch) -> list:
    """Collect (run, branches, gradients before clipping) of every optimiser step."""
    seen, real = [], train.update

    def update(run, branches):
        def note(optimizer, args, kwargs):
            gradients = {n: p.grad.clone() for n, p in run.policy.named_parameters()}
            seen.append((run, branches, gradients))

        handle = run.optimizer.register_step_pre_hook(note)
        numbers = real(run, branches)
        handle.remove()
        return numbers

    monkeypatch.setattr(train, "update", update)
    return seen


def formula_loss(run, branches) -> torch.Tensor:
    """The loss as the paper writes it, a response at a time, by transformers' own forward pass."""
    c = run.config
    policy_terms, policy_weights, imitation = [], [], []
    for b in branches:
        s = b.sample
        logprobs = hf_logprobs(run.policy, s.prompt, s.tokens, c.temperature)
        ratio = (logprobs - s.logprobs).exp()
        clipped = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
        terms = -torch.minimum(ratio * s.advantage, clipped * s.advantage)[s.mask]
        for _ in range(b.draws):
            if c.average == "sequence":
                policy_terms.append(terms.mean())
                policy_weights.append(1)
            else:
                policy_terms.append(terms.sum())
                policy_weights.append(len(terms))
        if b.imitate:
            imitation.append(-logprobs)
    loss = torch.stack(policy_terms).sum() / sum(policy_weights)
    if imitation:
        loss = loss + c.rethink_sft_coef * torch.cat(imitation).mean()
    return loss


def relative_distance(a: dict, b: dict) -> float:
    difference = math.sqrt(sum(float((a[n] - b[n]).square().sum()) for n in a))
    return difference / math.sqrt(sum(float(b[n].square().sum()) for n in b))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"average": "sequence", "advantage": "std"},
        {"ssr": "off", "rethink_fraction": 0, "temperature": 0.8},
    ],
    ids=["token", "sequence", "plain"],
)
def test_the_gradient_is_that_of_the_formula(base, tmp_path, monkeypatch, changes):
    expected, real = [], train.choose_batch

    def choose_batch(run):
        branches = real(run)
        loss = formula_loss(run, branches)
        gradients = torch.autograd.grad(loss, list(run.policy.parameters()))
        expected.append(dict(zip(dict(run.policy.named_parameters()), gradients)))
        return branches

    monkeypatch.setattr(train, "choose_batch", choose_batch)
    seen = spy_on_updates(monkeypatch)
    settings = {"rethink_fraction": 0.5, "max_grad_norm": 0, "steps": 4, "heldout": 0, "lr": 1e-3}
    run_training(base, tmp_path, **settings | changes)
    assert len(seen) == 4
    for (_, branches, gradients), formula in zip(seen, expected):
        assert relative_distance(gradients, formula) < 1e-4
    if not changes:
        assert any(b.draws > 1 for _, branches, _ in seen for b in branches)
        assert any(b.imitate for _, branches, _ in seen for b in branches)


def test_micro_batches_do_not_change_the_gradient(base, tmp_path, monkeypatch):
    seen, cuts, real = spy_on_updates(monkeypatch), [], train.token_terms

    def count(*args):
        cuts[-1] += 1
        return real(*args)

    monkeypatch.setattr(train, "token_terms", count)
    for tokens in (1, 150, 8192):
        cuts.append(0)
        run_training(base, tmp_path / str(tokens), steps=1, heldout=0, rethink_fraction=0.5,
                     batch_size=32, micro_batch_tokens=tokens)  # fmt: skip
    assert cuts[0] > cuts[1] > cuts[2] == 1
    whole = seen[2][2]
    for _, _, gradients in seen[:2]:
        assert relative_distance(gradients, whole) < 1e-5


def test_recomputed_log_probabilities_take_the_place_of_the_sampled(base, tmp_path, monkeypatch, capsys):
    """A sampler that is wrong by 1 shows in logp_mismatch and is warned of; recomputing mends the ratios."""
    real = train.generate

    def wrong(*args, **kwargs):
        groups = real(*args, **kwargs)
        for sample in (s for group in groups for s in group):
            for one in filter(None, (sample, sample.second_look)):
                one.logprobs = one.logprobs + 1.0
        return groups

    compare = train.compare_logprobs

    def compact(run, groups):
        differences = compare(run, groups)
        for sample in (s for group in groups for s in group):  # a view would travel with its whole row
            assert sample.logprobs.untyped_storage().nbytes() == 4 * len(sample.tokens)
        return differences

    monkeypatch.setattr(train, "generate", wrong)
    monkeypatch.setattr(train, "compare_logprobs", compact)
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


def test_the_mismatch_is_measured_where_nothing_is_trained(base, tmp_path, monkeypatch, capsys):
    let_be_right(monkeypatch, lambda sample: False)
    run_training(base, tmp_path, steps=2, heldout=0)
    for row in steps_of(tmp_path):
        assert row["skipped"] and 0 < row["logp_mismatch"] < row["logp_mismatch_max"] < 1e-4
        assert 0 <= row["logp_mismatch_kl"] < 1e-8
    assert "warning" not in capsys.readouterr().out


def test_without_replay_samples_without_advantage_count_and_are_not_run(base, tmp_path, monkeypatch):
    ran, real = [], train.token_terms

    def watch(run, branches, *rest):
        ran.extend(b.sample.advantage for b in branches)
        return real(run, branches, *rest)

    monkeypatch.setattr(train, "token_terms", watch)
    run_training(base, tmp_path, steps=1, heldout=0, ssr="off", batch_size=32)
    [row] = steps_of(tmp_path)
    assert row["batch_responses"] == 32 > len(ran) > 0 and 0.0 not in ran
    assert 0 < row["prompt_share"] < 1


def test_the_next_micro_batch_is_laid_out_while_this_one_is_trained_on(monkeypatch, prompts):
    """In order, one ahead and no further; what goes wrong there is raised here."""
    laid_out = []

    def build(groups):
        laid_out.append(len(groups[0][1][0]))
        if laid_out[-1] == 2:
            raise UserError("no picture")
        return SimpleNamespace(to=lambda device: len(groups[0][1][0]))

    monkeypatch.setattr(train, "build_trees", build)
    monkeypatch.setattr(train, "with_pixels", lambda policy, prompt: prompt)
    branches = [
        train.Branch(Sample(prompts[0], torch.ones(n), torch.ones(n), torch.ones(n), "", "stop"))
        for n in (5, 4, 3, 2, 1)
    ]
    run = SimpleNamespace(policy=SimpleNamespace(device="cpu"), config=Config(micro_batch_tokens=1))
    seen = []
    with pytest.raises(UserError, match="no picture"):
        for [branch], trees in train.micro_batches(run, branches):
            assert len(branch.sample.tokens) == trees
            seen.append(trees)
            assert len(laid_out) <= len(seen) + 1
    assert seen == [5, 4, 3] and laid_out == [5, 4, 3, 2]


# ---------------------------------------------------------------------------- the reward


def test_an_own_reward_trains_and_the_rule_measures(base, tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def brief(text, question):\n    return 1 / (1 + len(text))\n")
    out = run_training(base, tmp_path / "run", reward=f"{own}:brief", rethink_fraction=0.5, steps=2)
    samples = read_jsonl(out / "samples.jsonl")
    responses = [r for row in samples for r in row["responses"] if not r["rethought"]]
    assert all(r["reward"] == pytest.approx(1 / (1 + len(r["text"]))) for r in responses)
    row = steps_of(out)[0]
    assert (
        row["rethink_kept"]
        <= row["rethink_wrong_right"] + row["rethink_right_right"] + row["rethink_no_answer"]
    )  # the stand-in for the rule asks for no box
    measured = heldout_of(out)[0]
    assert measured["heldout_accuracy"] in [n / 4 for n in range(5)]
    # The same function as an argument: the same run.
    flagged = steps_of(out)
    argument = tmp_path / "argument"
    assert train.main(flags(base, argument, rethink_fraction=0.5, steps=2),
                      grade=lambda text, question: 1 / (1 + len(text))) == 0  # fmt: skip
    assert [r["reward"] for r in steps_of(argument)] == [r["reward"] for r in flagged]


# ---------------------------------------------------------------------------- off means off


def test_without_replay_and_rethinking_their_flags_change_nothing(base, tmp_path):
    run_training(base, tmp_path / "plain", ssr="off", heldout=0, steps=2)
    run_training(base, tmp_path / "flags", ssr="off", heldout=0, steps=2, rethink_fraction=0, rethink_quota=1,
                 rethink_sft_coef=1.0, rethink_sft_on="second", rethink_trigger="oracle",
                 rethink_cutback=1.0, rethink_min_tokens=5, rethink_baseline="after", ssr_alpha=3)  # fmt: skip
    assert steps_of(tmp_path / "plain") == steps_of(tmp_path / "flags")
    plain, other = (weights_of(tmp_path / name / "checkpoint-2") for name in ("plain", "flags"))
    assert same_tensors(plain, other)
    assert not same_tensors(plain, weights_of(base))


def test_replay_keeps_the_batch_full_and_filter_does_not(base, tmp_path, monkeypatch):
    let_be_right(monkeypatch, lambda s: lucky(s) and s.prompt.question.id.endswith("/0"))
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
    for step, (_, branches, _) in enumerate(seen):
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
    episodes = [{(step - b.sample.step) // 2 for b in branches} for step, (_, branches, _) in enumerate(seen)]
    assert {0, 1} in episodes and max(map(max, episodes)) == 1


@pytest.mark.parametrize("ssr", ["filter", "replay"])
def test_a_step_without_anything_effective_is_skipped_and_counted(base, tmp_path, monkeypatch, ssr):
    let_be_right(monkeypatch, lambda sample: True)
    rows = steps_of(run_training(base, tmp_path, ssr=ssr, heldout=0))
    assert [row["skipped"] for row in rows] == [True] * 4
    assert all(row["reward"] == 1 and row["effective_queries"] == 0 for row in rows)
    assert all(row["lr"] is row["entropy"] is None for row in rows)
    assert same_tensors(weights_of(tmp_path / "checkpoint-4"), weights_of(base))


# ------------------------------------------------------------------ gradients that are not finite


def spoil(monkeypatch, steps: set[int]) -> dict:
    """Make the loss of these steps nan; note the weights after each step."""
    weights, real_loss, real_step = {}, train.policy_loss, train.train_step
    current = [0]

    def policy_loss(*args):
        loss = real_loss(*args)
        return loss * math.nan if current[0] in steps else loss

    def train_step(run, seconds):
        current[0] = run.step + 1
        row = real_step(run, seconds)
        weights[run.step] = {n: p.detach().clone() for n, p in run.policy.named_parameters()}
        return row

    monkeypatch.setattr(train, "policy_loss", policy_loss)
    monkeypatch.setattr(train, "train_step", train_step)
    return weights


def test_a_step_that_is_not_finite_is_skipped_and_leaves_the_weights(base, tmp_path, monkeypatch):
    weights = spoil(monkeypatch, {2, 3})
    rows = steps_of(run_training(base, tmp_path, heldout=0))
    assert [row["skipped"] for row in rows] == [False, True, True, False]
    assert same_tensors(weights[1], weights[2]) and same_tensors(weights[2], weights[3])
    assert not same_tensors(weights[3], weights[4])
    assert all(bool(w.isfinite().all()) for w in weights[4].values())


def test_five_steps_in_a_row_that_are_not_finite_stop_the_run(base, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {1, 2, 4, 5, 6, 7, 8})
    assert train.main(flags(base, tmp_path, steps=20, heldout=0)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 8: 5 gradients in a row were not finite")
    assert "--lr" in error and "Traceback" not in error
    assert len(steps_of(tmp_path)) == 8


@pytest.mark.parametrize("ssr", ["replay", "off"])
def test_a_broken_weight_stops_the_run(base, tmp_path, monkeypatch, capsys, ssr):
    real = train.prepare

    def ruined(*args):
        prepared = real(*args)
        with torch.no_grad():
            prepared.policy.text_model.norm.weight[0] = math.nan
        return prepared

    monkeypatch.setattr(train, "prepare", ruined)
    assert train.main(flags(base, tmp_path, steps=20, heldout=0, ssr=ssr)) == 2
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------- a file of questions


SMALL = {"min_pixels": 28 * 28, "max_pixels": 64 * 28 * 28}  # as the tiny policy's own


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory):
    """Ten questions: one without a picture, one with two, the others with one."""
    folder = tmp_path_factory.mktemp("data")
    recipe, lines = toy.LEVELS["easy"], []
    (folder / "images").mkdir()
    for i, question in enumerate(toy.toy_questions(recipe, 10, "file")):
        names = [f"images/{i}.png"] * (0 if i == 0 else 2 if i == 1 else 1)
        for name in names:
            question.images[0].save(folder / name)
        text = question.text.removeprefix("<image>") if i == 0 else question.text
        lines.append({"qid": f"q{i}", "question": text, "image": names, "category": "toy",
                      "answer": f"\\boxed{{{question.answer}}}"})  # fmt: skip
    return write_lines(folder / "train.jsonl", lines)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spy_on_questions(monkeypatch) -> tuple[list, list]:
    """The ids asked in training, in order, and those asked in measuring."""
    trained, measured = [], []
    real_sample, real_measure = train.sample_episode, train.measure

    def sample_episode(run):
        groups, counts = real_sample(run)
        trained.extend(group[0].prompt.question.id for group in groups)
        return groups, counts

    def measure(run):
        measured.extend(question.id for question in run.heldout)
        return real_measure(run)

    monkeypatch.setattr(train, "sample_episode", sample_episode)
    monkeypatch.setattr(train, "measure", measure)
    return trained, measured


def test_a_file_with_pictures_is_passed_over_and_some_of_it_held_out(
    base, questions_file, tmp_path, monkeypatch
):
    let_be_right(monkeypatch, odd_sum)
    trained, measured = spy_on_questions(monkeypatch)
    out = run_training(base, tmp_path, data=questions_file, template="plain", heldout=2, steps=0,
                       passes=2, **SMALL)  # fmt: skip
    # 2 passes over 8 questions x 8 responses are 8 steps of 16.
    assert len(steps_of(out)) == 8 and len(heldout_of(out)) == 2
    held = set(measured)
    assert len(held) == 2 and not held & set(trained)
    assert Counter(trained[:8]) == Counter(trained[8:]) == Counter(set(trained))
    assert trained[:8] != trained[8:]  # every pass in an order of its own
    assert not same_tensors(weights_of(out / "checkpoint-8"), weights_of(base))


def test_long_prompts_are_dropped_and_counted_never_cut(base, questions_file, tmp_path, monkeypatch, capsys):
    trained, _ = spy_on_questions(monkeypatch)
    policy, [longest, *others] = load_policy(str(base)), load_questions(questions_file)[1::-1]
    limit = len(encode(policy, longest, "bare").input_ids)  # with its two pictures
    assert limit > len(encode(policy, *others, "bare").input_ids)
    settings = {
        "data": questions_file,
        "heldout": 0,
        "steps": 1,
        "episode_queries": 9,
        "batch_size": 72,
    } | SMALL
    run_training(base, tmp_path / "short", **settings, template="bare", max_prompt_tokens=limit - 1)
    assert "dropped 1 of 10 questions" in capsys.readouterr().out
    assert "q1" not in trained and len(set(trained)) == 9
    assert train.main(flags(base, tmp_path / "none", **settings, max_prompt_tokens=3)) == 2
    assert "every prompt is longer" in capsys.readouterr().err


# ---------------------------------------------------------------------------- learning


def test_a_handful_of_steps_raises_the_reward_of_a_bandit(tmp_path, monkeypatch):
    """A random policy learns to begin with an odd token, from nothing but the reward."""
    save_policy(toy.new_policy(1, hidden=32, layers=2, heads=2), tmp_path / "random")
    let_be_right(monkeypatch, odd_start)
    settings = {"steps": 20, "group_size": 16, "batch_size": 64, "max_new_tokens": 2, "lr": 3e-2}
    out = run_training(tmp_path / "random", tmp_path / "run", **settings, heldout=0)
    rewards = [row["reward"] for row in steps_of(out)]
    assert rewards[0] < 0.7 and min(rewards[-3:]) > 0.85, rewards


def test_the_learning_rate_rises_then_falls():
    c = Config(warmup=0.1, final_lr=0.5)
    rates = [train.lr_factor(step, 100, c) for step in range(101)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] == 0.1 and max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == 0.5


def test_one_seed_is_one_run_and_another_seed_another(base, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run_training(base, tmp_path / name, seed=seed, steps=1, heldout=0, rethink_fraction=0.5)
    a, b, c = (weights_of(tmp_path / name / "checkpoint-1") for name in "abc")
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b") and same_tensors(a, b)
    assert not same_tensors(a, c)
