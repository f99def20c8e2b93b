"""How many sweeps random resistive graphs take to settle, and how many their certificates predict.

    python benchmarks/settling.py [--graphs 1000] [--energy resistive unamplified drn] [--first 0]

A graph is one block of two to five states. Each state has a linear layer from the one before, and up to three further
edges from earlier states or the input: linear layers, and wires that add or subtract. Four samples in float64 settle
to 1e-6, at γ from 1e-4 to 3 (log-uniform; deep resistive networks have γ = 1).

`any`: width 1 to 8, activations that the energy has, weights from 0.1 to 10 times torch's default, half of them
without negative values. `zero mean`: width 16 to 64, weights of zero mean. Deep resistive networks have none.

The prediction is 1 + ⌈ln(1e-6/d)/ln r⌉, with r the certified contraction of a sweep and d the distance of the source's
own states from the equilibrium, relative and at least 1. A graph fails if it does not settle, or takes more than twice
the predicted sweeps (`any`) or more than 30 (`zero mean`). Failures are named by their seeds. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.program.frame import Frame

RTOL = 1e-6
KINDS = ("any", "zero mean")
ACTIVATIONS = {
    "relu": nn.ReLU,
    "hardtanh": nn.Hardtanh,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "hardsigmoid": nn.Hardsigmoid,
}
PROJECTIONS = ("relu", "hardtanh")
"""The activations of energies without amplifiers."""


class Graph(nn.Module):
    """States of one width, each of a linear layer or a signed wire from some of the states before it."""

    def __init__(self, width: int, edges: list[list[tuple[int, str]]], activation: str) -> None:
        super().__init__()
        self.edges = edges
        self.activation = ACTIVATIONS[activation]()
        self.layers = nn.ModuleDict(
            {
                f"{k}_{m}": nn.Linear(width, width)
                for m, above in enumerate(edges)
                for k, how in above
                if how == "linear"
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """The last state, without an activation."""
        states = [x]
        for m, above in enumerate(self.edges):
            drive: Tensor | None = None
            for k, how in above:
                part = self.layers[f"{k}_{m}"](states[k]) if how == "linear" else states[k]
                drive = part if drive is None else drive - part if how == "minus" else drive + part
            assert drive is not None
            states.append(drive if m == len(self.edges) - 1 else self.activation(drive))
        return states[-1]


@dataclass(frozen=True)
class Found:
    """How a graph has settled."""

    sweeps: int
    predicted: int
    settled: bool
    certified: bool


def graph(seed: int, energy: str, kind: str) -> tuple[Graph, Tensor, float]:
    """A random graph, four samples and γ."""
    draw = random.Random(f"{seed} {energy} {kind}")
    torch.manual_seed(draw.getrandbits(40))
    strict, narrow = energy == "drn", kind == "any"
    wires = ["linear", "linear", "plus", "plus" if strict else "minus"]
    width = draw.randint(1, 8) if narrow else draw.randint(16, 64)
    edges = []
    for m in range(draw.randint(2, 5)):
        others = draw.sample(range(m), min(m, draw.randint(0, 3)))
        edges.append([(m, "linear"), *((k, draw.choice(wires)) for k in others)])
    model = Graph(width, edges, draw.choice(list(ACTIVATIONS) if energy == "resistive" else PROJECTIONS))
    scale, positive = 10 ** draw.uniform(-1, 1) if narrow else 1.0, narrow and draw.random() < 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
            if positive or (strict and parameter.dim() > 1):
                parameter.abs_()  # nothing cancels: the slowest
    return model.double(), torch.randn(4, width).double(), 10 ** draw.uniform(-4, math.log10(3))


def settled(model: Graph, x: Tensor, gamma: float, energy: str) -> Found:
    """The sweeps that a graph takes from the source's states, and those that its certificate predicts from there."""
    hybrid = ffebm.convert(
        model,
        x,
        energy=energy,
        feedback="symmetric" if energy == "drn" else gamma,
        solver=ffebm.GaussSeidel(rtol=RTOL, max_sweeps=20_000),
        hardware=ffebm.Hardware(layers_per_block=16),
    )
    (block,) = hybrid.blocks
    certificate = block.certificate
    assert certificate is not None
    found = block.settle(x)
    weights = [None if weight is None else weight.detach() for weight in block.weights]
    with torch.no_grad():
        starts = Frame(block.module.program, (x,), weights).feedforward()
    far = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(starts, found.states, strict=True))
    rate = min(max(certificate.contraction, 1e-12), 1 - 1e-12)
    predicted = 1 + math.ceil(math.log(RTOL / max(far, 1)) / math.log(rate))
    return Found(found.sweeps, predicted, found.converged, certificate.certified)


def failed(found: Found, kind: str) -> bool:
    """Whether a graph has missed its target."""
    limit = 2 * found.predicted if kind == "any" else 30
    return not found.settled or not found.certified or found.sweeps > limit


def measure(energy: str, kind: str, seeds: range) -> dict[str, Any]:
    """Settle graphs and print their line; the row has the seeds of those that failed."""
    runs, failures, started = [], [], time.monotonic()
    for seed in seeds:
        model, x, gamma = graph(seed, energy, kind)
        runs.append(settled(model, x, gamma, energy))
        if failed(runs[-1], kind):
            failures.append(seed)
        if sys.stderr.isatty():
            print(f"\r{energy}, {kind}: {len(runs)} of {len(seeds)}", end="", file=sys.stderr)
        elif len(runs) % 100 == 0:
            print(f"{energy}, {kind}: {len(runs)} in {time.monotonic() - started:.0f} s", file=sys.stderr)
    sweeps = [run.sweeps for run in runs]
    row = {
        "energy": energy,
        "kind": kind,
        "graphs": len(runs),
        "unsettled": sum(not run.settled for run in runs),
        "largest": max(sweeps),
        "ratio": max(run.sweeps / run.predicted for run in runs),
        "failures": failures,
    }
    print(
        f"{energy:>12} {kind:>10} {row['graphs']:7} {row['unsettled']:9} {statistics.median(sweeps):7.0f} "
        f"{row['largest']:8} {row['ratio']:16.2f} {len(failures):7}",
        flush=True,
    )
    if failures:
        print(f"{'':>12} seeds: {failures}", flush=True)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Exit status 1 where a graph has missed its target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=1000, help="of each kind and energy")
    parser.add_argument("--energy", nargs="+", default=["resistive", "unamplified", "drn"])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    add_out(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = range(options.first, options.first + options.graphs)
    print(f"{'energy':>12} {'graphs':>10} {'number':>7} {'unsettled':>9} {'median':>7} {'largest':>8} "
          f"{'sweeps/predicted':>16} {'failed':>7}")  # fmt: skip
    rows: list[dict[str, Any]] = []
    for energy in options.energy:
        for kind in KINDS[: 1 if energy == "drn" else 2]:
            rows.append(measure(energy, kind, seeds))
            keep(rows, options.out)
    return 1 if any(row["failures"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
