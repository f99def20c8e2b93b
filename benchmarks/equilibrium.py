"""What an equilibrium and its gradient cost, beside two peers, in one run.

    python benchmarks/equilibrium.py [--steps 5] [--width 0.25] [--out benchmarks/results/equilibrium.json]

1. A training step of the deep convolutional Hopfield network 3-128-256-512-512-10 (times `--width`),
   batch 16: ours against a plain enactment of the schedule of the public EP code (60 free, then 20 and
   20 nudged asynchronous sweeps, classical difference of states, every drive recomputed), which had
   cosines of 0.17 to 0.99 with the exact gradient where ours are above 0.9999.
2. A converted residual block of two convolutions against torchdeq's Anderson solver with implicit
   gradients on the same equations, weights and tolerance, where torchdeq is installed
   (`pip install --no-deps torchdeq==0.1.0`).

One thread; the contestants take turns; CPU seconds of forward and backward, medians and ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.hardware import Hardware

SWEEPS = (60, 20, 20)


class DCHN(nn.Module):
    """Convolutions with 2 x 2 average pooling and a clamp to [0, 1], and a linear readout."""

    def __init__(self, width: float) -> None:
        super().__init__()
        sizes = [3, *(round(width * size) for size in (128, 256, 512, 512))]
        pairs = itertools.pairwise(sizes)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairs)
        self.head = nn.Linear(4 * sizes[-1], 10)
        with torch.no_grad():  # small enough for symmetric feedback, as trained Hopfield networks are
            for layer in (*self.convs, self.head):
                layer.weight.mul_(0.7)

    def forward(self, x: Tensor) -> Tensor:
        """The feedforward network that is converted."""
        for conv in self.convs:
            x = F.hardtanh(F.avg_pool2d(conv(x), 2), 0, 1)
        return self.head(x.flatten(1))


def plain_step(model: DCHN, x: Tensor, labels: Tensor, beta: float = 0.2) -> list[Tensor]:
    """Equilibrium propagation as the public code schedules it: nothing cached, classical difference."""
    convs, head = list(model.convs), model.head
    target = F.one_hot(labels, 10).to(x)

    def up(states: list[Tensor], index: int) -> Tensor:
        below = x if index == 0 else states[index - 1]
        return F.avg_pool2d(convs[index](below), 2)

    def down(states: list[Tensor], index: int) -> Tensor:
        if index == len(convs) - 1:
            return (states[-1] @ head.weight).view_as(states[index])
        spread = F.interpolate(states[index + 1], scale_factor=2, mode="nearest") / 4
        return F.conv_transpose2d(spread, convs[index + 1].weight, padding=1)

    def settle(states: list[Tensor], sweeps: int, nudge: float) -> list[Tensor]:
        states = list(states)
        for _ in range(sweeps):
            for parity in (0, 1):
                for index in range(parity, len(states), 2):
                    if index == len(states) - 1:
                        free = head(states[index - 1].flatten(1))
                        states[index] = (free + nudge * target) / (1 + nudge)
                    else:
                        states[index] = (up(states, index) + down(states, index)).clamp(0, 1)
        return states

    with torch.no_grad():
        shapes = list(_shapes(model, x))
        free = settle([x.new_zeros(shape) for shape in shapes], SWEEPS[0], 0.0)
        plus, minus = settle(free, SWEEPS[1], beta), settle(free, SWEEPS[2], -beta)
    parameters = list(model.parameters())
    gradients = []
    for states in (plus, minus):
        energy = sum(-(states[i] * up(states, i)).sum() for i in range(len(convs)))
        energy = energy - (states[-1] * head(states[-2].flatten(1))).sum()
        gradients.append(torch.autograd.grad(energy, parameters))
    return [(p - m) / (2 * beta * len(x)) for p, m in zip(*gradients, strict=True)]


def _shapes(model: DCHN, x: Tensor) -> list[torch.Size]:
    shapes, side = [], x.shape[-1]
    for conv in model.convs:
        side //= 2
        shapes.append(torch.Size((len(x), conv.out_channels, side, side)))
    return [*shapes, torch.Size((len(x), 10))]


def in_turn(contestants: dict[str, Callable[[], object]], steps: int) -> dict[str, float]:
    """Median CPU seconds of each contestant, which take turns after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(steps + 1):
        for name, run in contestants.items():
            started = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def hopfield(width: float, steps: int) -> dict[str, Any]:
    """Section 1."""
    torch.manual_seed(0)
    model, x, labels = DCHN(width), torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))
    big = Hardware(tile_rows=None, tile_cols=None, tiles_per_core=None, layers_per_block=5)
    hybrid = ffebm.convert(model, x, hardware=big, feedback="symmetric", block_ops=("add", "reshape", "avg_pool"))

    def ours() -> None:
        hybrid.zero_grad()
        (0.5 * (hybrid(x) - F.one_hot(labels, 10)).square().sum(1).mean()).backward()

    seconds = in_turn({"plain EP": lambda: plain_step(model, x, labels), "ours": ours}, steps)
    report = ffebm.check_gradients(
        hybrid, x, lambda output: 0.5 * (output - F.one_hot(labels, 10)).square().sum(1).mean()
    )
    last = hybrid.blocks[0].module.last
    return {
        "what": f"DCHN at {width:g} width, batch 16, one training step",
        "seconds": seconds,
        "ratio": seconds["ours"] / seconds["plain EP"],
        "free_sweeps": last.sweeps if last else 0,
        "worst_cosine": report.worst("ep")[1].cosine,
    }


class Block(nn.Module):
    """relu(x + conv(relu(conv(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """One residual block."""
        return F.relu(x + self.b(F.relu(self.a(x))))


def deep_equilibrium(steps: int, rtol: float = 1e-4) -> dict[str, Any]:
    """Section 2."""
    from torchdeq import get_deq

    torch.manual_seed(0)
    model, x = Block(32), torch.randn(16, 32, 16, 16)
    hybrid = ffebm.convert(model, x, gradient="implicit", solver=ffebm.GaussSeidel(rtol=rtol))
    block = hybrid.blocks[0].module
    gamma = block.scales[1] / block.scales[0]
    deq = get_deq(f_solver="anderson", b_solver="anderson", f_max_iter=60, b_max_iter=60, f_tol=rtol, b_tol=rtol)

    def function(state: Tensor) -> Tensor:
        first, second = state.chunk(2, 1)
        feedback = F.conv_transpose2d(second, model.b.weight, padding=1)
        return torch.cat([F.relu(drive + gamma * feedback), F.relu(x + model.b(first))], 1)

    drive = model.a(x)

    def theirs() -> Tensor:
        nonlocal drive
        model.zero_grad()
        drive = model.a(x)
        start = torch.cat([F.relu(drive), F.relu(x + model.b(F.relu(drive)))], 1).detach()
        output: Tensor = deq(function, start)[0][-1].chunk(2, 1)[1]
        output.square().mean().backward()
        return output.detach()

    def ours() -> Tensor:
        hybrid.zero_grad()
        output: Tensor = hybrid(x)
        output.square().mean().backward()
        return output.detach()

    difference = float((ours() - theirs()).norm() / theirs().norm())
    seconds = in_turn({"torchdeq": theirs, "ours": ours}, steps)
    return {
        "what": f"a residual block of two convolutions, implicit gradients, tolerance {rtol:g}",
        "seconds": seconds,
        "ratio": seconds["ours"] / seconds["torchdeq"],
        "difference": difference,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [hopfield(options.width, options.steps)]
    if importlib.util.find_spec("torchdeq"):
        results.append(deep_equilibrium(max(options.steps, 9)))
    else:
        print("torchdeq is not installed: its comparison is left out")
    for result in results:
        print(f"\n{result['what']}")
        for name, seconds in result["seconds"].items():
            print(f"  {name:12} {1e3 * seconds:10.1f} CPU ms")
        rest = {k: v for k, v in result.items() if k not in ("what", "seconds", "ratio")}
        print(f"  ratio        {result['ratio']:10.3f}    " + ", ".join(f"{k} {v:.6g}" for k, v in rest.items()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
