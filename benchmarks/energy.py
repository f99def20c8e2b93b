"""The modelled energy of a training step of the papers' networks, beside a GPU's: what remains of the analog gain.

    python benchmarks/energy.py [--width 1.0] [--rtol 1e-3] [--phases 2] [--out benchmarks/results/energy.json]

Nothing here is measured. For each network of `examples/papers_networks.py`, block size, loop gain κ and fabric it
prints how many times less a training step takes than backpropagation on a V100 at its peak: 19 pJ a FLOP, three times
the multiply-accumulates of a forward pass. No GPU reaches its peak, so that the true factor is larger. The first column
counts the crossbars alone, and each column after it one thing more:

    crossbars    the reads of all sweeps of one free and P nudged phases (at chip level: with the tiles' converters)
    converters   DACs and ADCs, those of partial sums included
    memory       every value that a converter takes or gives
    digital      batch norm, pooling between blocks, ...: arithmetic and memory, three times that of an inference
    gradients    outer products in digital arithmetic from the states of two phases
    in place     in their stead, devices that update in place: two updates for each multiply-accumulate

A range goes from the worst constants to the best. Fabrics have no limit on a core, so that the papers' blocks fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from papers_networks import FeedforwardTied, fifteen_layers, papers_plan, six_layers, twelve_layers

import ffebm_compiler as ffebm
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.hardware.costs import Quantity

FABRICS = ("crossbar-256", "pcm-64", "pcm-64-one-phase", "neurram", "isaac")
KAPPAS = (0.1, 0.5, 0.9)


def networks(width: float) -> Iterator[tuple[str, int, FeedforwardTied]]:
    """(name, layers of a block, network) at a share of its width."""
    wide = max(2, round(128 * width))
    for size in (2, 3, 6):
        yield "L = 6", size, six_layers(size, wide)
    for size in (2, 3, 4):
        yield "L = 12", size, twelve_layers(size, wide)
    yield "L = 15", 2, fifteen_layers(max(2, round(64 * width)))


def stages(report: ffebm.CostReport | Any, phases: int) -> dict[str, Quantity]:
    """Energy of a training step as one thing after the other is counted."""
    zero = Quantity(0.0, 0.0, "pJ")
    constants = report.constants
    update = constants["update_pj"].value
    macs = sum(cost.macs for cost in report.blocks)
    crossbars = sum((cost.analog for cost in report.blocks), zero) * (1 + phases)
    memory = sum((cost.traffic for cost in report.blocks), zero) * (1 + phases)
    found = {"crossbars": crossbars}
    step = report.training
    if report.chip_training.known:
        step = report.chip_training
        found = {"crossbars": minus(minus(step, report.digital_parts * 3), memory)}
        found["converters"] = found["crossbars"]
    else:
        found["converters"] = minus(minus(step, report.digital_parts * 3), memory)
    found["memory"] = found["converters"] + memory
    found["digital"] = step
    found["gradients"] = step + report.gradients
    found["in place"] = step + update * (2 * macs)
    return found


def minus(whole: Quantity, part: Quantity) -> Quantity:
    """What is left of a sum without one of its terms."""
    assert whole.low is not None
    assert whole.high is not None
    assert part.low is not None
    assert part.high is not None
    return Quantity(whole.low - part.low, whole.high - part.high, whole.unit)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each network, block size, fabric and κ."""
    x = torch.randn(2, 3, 32, 32)
    for name, size, network in networks(options.width):
        fresh = papers_plan(network, x)
        for fabric in FABRICS:
            hardware = replace(
                ffebm.hardware_presets()[fabric], tiles_per_core=None, layers_per_block=None, cores_per_chip=None
            )
            plan = papers_plan(network, x, hardware=hardware)
            assert [block.layers for block in plan.blocks] == [block.layers for block in fresh.blocks]
            for kappa in KAPPAS:
                report = plan.cost_report(feedback=kappa, rtol=options.rtol, nudged_phases=options.phases)
                gpu = report.gpu_training
                factors = {stage: gpu.ratio(energy) for stage, energy in stages(report, options.phases).items()}
                yield {
                    "network": name,
                    "block": size,
                    "fabric": fabric,
                    "kappa": kappa,
                    "sweeps": max(cost.sweeps or 0 for cost in report.blocks),
                    "macs": plan.total_macs,
                    "gpu_uj": (gpu.low or 0.0) / 1e6,
                    "inference_uj": [end / 1e6 for end in ends(report)],
                    "inference_gpu": report.gpu_inference.ratio(chosen(report)),
                    "factors": factors,
                }


def chosen(report: Any) -> Quantity:
    """An inference at chip level, or bottom-up where there is no chip."""
    return report.chip_inference if report.chip_inference.known else report.inference


def ends(report: Any) -> tuple[float, float]:
    """Both ends of an inference."""
    return chosen(report).low, chosen(report).high


def span(ends: tuple[float, float] | None) -> str:
    """A range with two digits."""
    return "unknown" if ends is None else "–".join(f"{end:.2g}" if end < 100 else f"{end:.0f}" for end in ends)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=float, default=1.0, help="share of the papers' width")
    parser.add_argument("--rtol", type=float, default=1e-3, help="relative change at which a phase stops")
    parser.add_argument("--phases", type=int, default=2, help="nudged phases of a step")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = list(rows(options))
    names = list(found[0]["factors"])
    print("| network | layers a block | fabric | κ | sweeps | inference | ", " | ".join(names), " |", sep="")
    print("| " + " | ".join(["---"] * (6 + len(names))) + " |")
    for row in found:
        cells = [row["network"], row["block"], row["fabric"], row["kappa"], row["sweeps"], span(row["inference_gpu"])]
        print("|", " | ".join(map(str, [*cells, *(span(row["factors"][name]) for name in names)])), "|")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"width": options.width, "rtol": options.rtol, "phases": options.phases, "rows": found})
        write_whole(options.out, text.encode())


if __name__ == "__main__":
    main()
