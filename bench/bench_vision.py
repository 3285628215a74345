"""The vision tower with packed windows against transformers' own, which calls attention for each window.

    python bench/bench_vision.py                 a small tower on a CPU, the 3B's on a GPU
    python bench/bench_vision.py --quick         a tiny tower, to see that it runs

Seconds of the tower alone, forward, and forward and backward, for pictures of 256, 640 and 1280
visual tokens (four patches each), and how often a forward pass calls attention. The features of the
two must agree.
"""

import argparse
from functools import partial
from unittest import mock

import benching  # first: it puts the repository on the path
import torch
from torch.nn import functional as F

from tree import pack_pictures, vision_layout

# Visual tokens of a picture and its sides in patches.
SIZES = {256: (32, 32), 640: (40, 64), 1280: (64, 80)}
WAYS = ["transformers", "packed"]


def make_ways(visual, grid: torch.Tensor) -> dict:
    """{name: () -> features [visual tokens, D]} of the same pictures."""
    device, config = next(visual.parameters()).device, visual.config
    width = 3 * config.temporal_patch_size * config.patch_size**2
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(int(grid.prod(-1).sum()), width, generator=generator).to(device)

    def transformers_own():
        for block in visual.blocks:
            block.attn.config = config
        return visual(pixels, grid_thw=grid.to(device)).pooler_output

    def packed():
        pack_pictures(visual)
        return visual(pixels, grid_thw=grid, **vision_layout(visual, grid, device)).pooler_output

    return dict(zip(WAYS, (transformers_own, packed)))


def run_forward(way) -> None:
    way()


def run_both(way) -> None:
    way().float().square().mean().backward()


def attention_calls(action) -> int:
    with torch.no_grad(), mock.patch.object(
        F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention
    ) as attend:  # fmt: skip
        action()
    return attend.call_count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--quick", action="store_true", help="a tiny tower, a small picture")
    parser.add_argument("--pictures", type=int, default=2 if cuda else 1, help="in one batch")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns of each way")
    args = parser.parse_args(argv)
    name = "quick" if args.quick else "3b" if cuda else "small"
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    visual = benching.random_policy(benching.SHAPES[name], device, dtype).model.model.visual
    rows, worst = [], 0.0
    for tokens, (height, width) in list(SIZES.items())[: 1 if args.quick else None]:
        ways = make_ways(visual, torch.tensor([[1, height, width]] * args.pictures))
        with torch.no_grad():
            first, other = (way().float() for way in ways.values())
        worst = max(worst, float((other - first).norm() / first.norm()))

        repeats = 1 if args.quick else args.repeats
        seconds = [
            benching.alternate({k: partial(run, way) for k, way in ways.items()}, repeats)
            for run in (torch.no_grad()(run_forward), run_both)
        ]
        for k, way in ways.items():
            rows.append([
                tokens, k, seconds[0][k], seconds[1][k],
                benching.times(seconds[1][WAYS[0]], seconds[1][k]), attention_calls(way),
            ])  # fmt: skip
    header = ["visual tokens", "tower", "forward, s", "forward and backward, s", "speed-up",
              "attention calls"]  # fmt: skip
    print(benching.table(header, rows))
    print(
        f"\n{args.pictures} pictures at once; {benching.parameters(visual) / 1e6:.1f}M parameters, "
        f"{len(visual.blocks)} layers, {dtype}; median of {repeats}. Largest relative difference of the "
        f"features: {worst:.1e}.\n{benching.machine()}"
    )


if __name__ == "__main__":
    main()
