"""The benches run, on shapes that take a second or two. What they measure is not tested."""

import importlib.util

import bench_all
import bench_paths
import bench_rollout
import bench_train
import bench_trl
import bench_trl_curves
import bench_vision
import benching
import pytest
import torch

import decoding


@pytest.mark.parametrize("bench", [bench_train, bench_rollout])
def test_a_quick_bench_prints_a_row_for_each_way_and_says_where(bench, capsys):
    bench.main(["--quick", "--no_memory"])
    out = capsys.readouterr().out
    lengths = benching.SHAPES["quick"].lengths
    assert all(out.count(f"| {way} ") == len(lengths) for way in bench.WAYS)
    assert torch.__version__ in out


@pytest.mark.parametrize("bench", [bench_train, bench_rollout])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_published_shape_is_skipped_without_a_gpu(bench, capsys):
    bench.main(["--shape", "3b"])
    assert "needs a CUDA device" in capsys.readouterr().out


def test_the_ways_of_a_training_step_agree():
    policy = bench_train.make_policy("quick", False)
    logprobs = bench_train.make_logprobs(policy, 16, 8, 3)
    assert bench_train.disagreement(logprobs) < 1e-5


def test_the_rungs_of_the_ladder_sample_the_same_tokens_greedily():
    policy = bench_rollout.make_policy("quick")
    for parameter in policy.parameters():
        parameter.data.mul_(3)  # decided: a greedy choice must not hang on rounding
    ways = bench_rollout.make_ways(policy, 2, 16, 6, 1, temperature=0.0)
    first, *others = (action() for action in ways.values())
    assert all(torch.equal(first, other) for other in others)


def test_every_fast_path_is_right_in_bf16_and_what_was_not_checked_is_said(capsys):
    assert bench_paths.main(["--quick"]) == 0
    table = capsys.readouterr().out
    assert table.count("| right") == len(bench_paths.SCORES) + 2 + torch.cuda.is_available() * 3
    assert ("were not checked" in table) != torch.cuda.is_available()


def test_scores_rounded_to_bf16_are_caught(monkeypatch):
    policy = benching.random_policy(benching.SHAPES["quick"], "cpu", torch.bfloat16)
    bench_paths.speak_up(policy)
    bench_paths.add_key_bias(policy, 1000)
    monkeypatch.setattr(decoding, "product", lambda a, b: (a @ b).float())
    sampled, trained = bench_paths.sampled_and_trained(policy, 48, 24)
    assert bench_paths.kl(trained, sampled) > 0.01


def test_the_vision_bench_shows_both_towers_and_that_they_agree(capsys):
    bench_vision.main(["--quick"])
    out = capsys.readouterr().out
    assert all(f"| {way} " in out for way in bench_vision.WAYS)
    assert float(out.split("difference of the features: ")[1].split()[0].rstrip(".")) < 1e-5


def test_step_memory_sees_what_torch_takes():
    peak = benching.cpu_step_memory(lambda: torch.ones(48 * benching.MIB // 4))
    if peak is None:
        pytest.skip("no high-water mark on this system")
    assert 47 < benching.mib(peak) < 56


def test_one_command_runs_every_bench():
    there = {path.name for path in bench_all.HERE.glob("bench_*.py")}
    there -= {"bench_all.py", "bench_trl_curves.py"}  # the latter: whole runs, half an hour
    on_a_gpu = {f"bench_{x}.py" for x in ("paths", "vision", "rollout", "train", "reward")}
    named = {name for name, *_ in bench_all.benches(quick=False)}
    assert named == (on_a_gpu if torch.cuda.is_available() else there)


def test_a_bench_that_fails_is_named_and_the_others_run(monkeypatch, tmp_path, capsys):
    commands = [["missing.py"], ["bench_train.py", "--help"]]
    monkeypatch.setattr(bench_all, "benches", lambda quick: commands)
    assert bench_all.main(["--out", str(tmp_path / "tables.md")]) == 1
    assert "failed: python bench/missing.py" in capsys.readouterr().err
    written = (tmp_path / "tables.md").read_text()
    assert "failed with exit status 2" in written and "--gradient_checkpointing" in written


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_without_trl_the_bench_says_how_to_install_it(capsys):
    bench_trl.main([])
    assert "pip install trl" in capsys.readouterr().out


def test_curves_are_compared_seed_by_seed(tmp_path, capsys):
    for seed in (0, 1):
        rows = [
            {
                "seed": seed,
                "loop": loop,
                "step": 2 * i,
                "accuracy": accuracy + gap,
                "tokens": 9,
                "seconds": i * pace,
            }
            for loop, gap, pace in (("TRL", 0.0, 6.0), ("ours", 0.01, 2.0))
            for i, accuracy in enumerate((0.4 + 0.2 * seed, 0.96))
        ]
        bench_trl_curves.write(tmp_path / f"seed-{seed}.csv", rows)
    bench_trl_curves.main(["--seeds", "", "--runs", str(tmp_path), "--results", str(tmp_path / "results")])
    out = capsys.readouterr().out
    assert "paired by seed: 0.010 ± 0.000" in out and "TRL / ours: 3.00 ± 0.00" in out
    assert len(bench_trl_curves.read(tmp_path / "results" / "trl_curves.csv")) == 8
    assert (tmp_path / "results" / "trl_curves.svg").read_text().count("<polygon") == 4
