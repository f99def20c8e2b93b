"""The loop gain while weights move: what it costs to hold, and how far the told one is from the true one.

    python benchmarks/loop_gain.py [--steps 21] [--out benchmarks/results/loop_gain.json]

`cost`: an EP step that measures the loop gain before it settles against the same step with the feedback locked, in
turns, each after a step of AdamW; CPU seconds of forward and backward, one thread. `growth`: a weight that grows along
one of its own singular vectors, far from the largest; the largest ratio of the true to the told loop gain, beside that
of block power iteration with four kept and four fresh vectors, which is what one would do without probes of the change.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep
from training_step import NETWORKS

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.fabric import Hardware

WIDTHS = (64, 512, 1024)
GROWTHS = (0.01, 0.03, 0.1)


def cost(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of the two steps, and the median of their ratios in pairs."""
    torch.manual_seed(0)
    source, x = NETWORKS[network](options)
    labels = torch.randint(0, 10, (len(x),))
    hybrid = ffebm.convert(source, x, feedback=options.feedback, hardware=Hardware(layers_per_block=2)).train()
    optimizer = torch.optim.AdamW(hybrid.parameters(), 1e-4)

    def seconds(locked: bool) -> float:
        context = hybrid.held_feedback() if locked else contextlib.nullcontext()
        optimizer.zero_grad(set_to_none=True)
        started = time.process_time()
        with context:
            F.cross_entropy(hybrid(x), labels).backward()
        return time.process_time() - started

    pairs = []
    for turn in range(options.steps + 2):
        first = turn % 2 == 0  # each goes first in half of the turns
        times = dict.fromkeys((True, False), 0.0)
        for locked in (first, not first):
            times[locked] = seconds(locked)
            optimizer.step()
        pairs.append(times)
    pairs = pairs[2:]
    return {
        "network": network,
        "feedback": options.feedback,
        "locked_ms": 1e3 * statistics.median(pair[True] for pair in pairs),
        "held_ms": 1e3 * statistics.median(pair[False] for pair in pairs),
        "ratio": statistics.median(pair[False] / pair[True] for pair in pairs),
    }


def growth(width: int, rate: float, steps: int = 100) -> dict[str, Any]:
    """Largest true over told loop gain while one direction grows by `rate` a step."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(width, width, generator=generator) * (0.5 / math.sqrt(width)))
    x = torch.randn(2, width, generator=generator)
    hybrid = ffebm.convert(model, x, hardware="ideal").train()
    weight = hybrid.get_parameter("2.weight")
    left, _, right = torch.linalg.svd(weight.detach())
    direction = torch.outer(left[:, 40], right[40])
    plain = torch.linalg.svd(weight.detach())[2][:4].T
    worst, worst_plain = 1.0, 1.0
    for _ in range(steps):
        with torch.no_grad():
            weight.add_(direction, alpha=rate)
            hybrid(x)
            norm = float(torch.linalg.matrix_norm(weight.detach(), 2))
            certificate = hybrid.blocks[0].module.certificate
            told = certificate.norms[0][2]
            plain, estimate = power_iteration(weight.detach(), plain, generator)
        worst, worst_plain = max(worst, (norm / told) ** 2), max(worst_plain, (norm / estimate) ** 2)
    return {"width": width, "growth": rate, "true_over_told": worst, "power_iteration": worst_plain}


def power_iteration(weight: Tensor, kept: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """One step of block power iteration with four kept and four fresh vectors."""
    fresh = torch.randn(weight.shape[1], 4, generator=generator)
    basis = torch.linalg.qr(weight.T @ (weight @ torch.linalg.qr(torch.cat([kept, fresh], 1))[0]))[0]
    _, values, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    return basis @ right[:4].T, float(values[0])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=21, help="measured pairs of steps")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--side", type=int, default=16)
    parser.add_argument("--feedback", type=float, default=0.1)
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS), help="of the growing weights")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    costs = [cost(network, options) for network in NETWORKS]
    print(f"{'one EP step, CPU ms':28} {'locked':>9} {'held':>9} {'ratio':>7}")
    for row in costs:
        print(f"{row['network']:28} {row['locked_ms']:9.1f} {row['held_ms']:9.1f} {row['ratio']:7.3f}", flush=True)
    grown = [growth(width, rate) for width in options.widths for rate in GROWTHS]
    print(f"\n{'largest true / told κ':28} {'growth':>9} {'here':>9} {'4 kept + 4 fresh':>17}")
    for row in grown:
        told = f"{row['true_over_told']:9.3f} {row['power_iteration']:17.3f}"
        print(f"width {row['width']:<22} {row['growth']:9.2f} {told}", flush=True)
    keep({"cost": costs, "growth": grown}, options.out)


if __name__ == "__main__":
    main()
