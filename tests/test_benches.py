"""The benches run, on shapes that take a second or two. What they measure is not tested."""

import bench_paths
import bench_rollout
import bench_train
import bench_trl_curves
import bench_vision
import benching
import pytest
import torch


@pytest.mark.parametrize("bench", [bench_train, bench_rollout])
def test_a_quick_bench_prints_a_row_for_each_way_and_says_where(bench, capsys):
    bench.main(["--quick", "--no_memory"])
    out = capsys.readouterr().out
    lengths = benching.SHAPES["quick"].lengths
    assert all(out.count(f"| {way} ") == len(lengths) for way in bench.WAYS)
    assert torch.__version__ in out


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


def test_the_vision_bench_shows_both_towers_and_that_they_agree(capsys):
    bench_vision.main(["--quick"])
    out = capsys.readouterr().out
    assert all(f"| {way} " in out for way in bench_vision.WAYS)
    assert float(out.split("difference of the features: ")[1].split()[0].rstrip(".")) < 1e-5


def test_curves_are_compared_seed_by_seed(tmp_path, capsys):
    for seed in (0, 1):
        rows = [
            dict(zip(bench_trl_curves.COLUMNS, (seed, loop, 2 * i, accuracy + gap, 9, i * pace)))
            for loop, gap, pace in (("TRL", 0.0, 6.0), ("ours", 0.01, 2.0))
            for i, accuracy in enumerate((0.4 + 0.2 * seed, 0.96))
        ]
        bench_trl_curves.write(tmp_path / f"seed-{seed}.csv", rows)
    bench_trl_curves.main(["--seeds", "", "--runs", str(tmp_path), "--results", str(tmp_path / "results")])
    out = capsys.readouterr().out
    assert "paired by seed: 0.010 ± 0.000" in out and "TRL / ours: 3.00 ± 0.00" in out
    assert len(bench_trl_curves.read(tmp_path / "results" / "trl_curves.csv")) == 8
    assert (tmp_path / "results" / "trl_curves.svg").read_text().count("<polygon") == 4
