"""Which solver is fastest at which loop gain: what the default choice (`runtime/solvers/choice.py`) rests on.

    python benchmarks/solvers.py [--steps 5] [--network "DCHN*"] [--gradient ep] [--out benchmarks/results/solvers.json]

A training step (forward and backward) with each solver over the step with plain Gauss–Seidel sweeps, with the
sweeps of the free phase in brackets; "-" where it does not settle. One thread, CPU seconds, medians of
steps that take turns. Loop gains below one are certified; `"symmetric"` rows have γ = 1 and weights scaled to the
loop gain shown. With `--gradient implicit` the adjoint system is solved by the same solver, and in the last column by
conjugate gradients after plain sweeps.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep
from peers import DCHN
from training_step import MLPStack, ResidualCNN

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.fabric import Hardware

SOLVERS: dict[str, Any] = {
    "sweeps": ffebm.GaussSeidel(),
    "even-odd": ffebm.GaussSeidel(schedule="even_odd"),
    "by sample": ffebm.GaussSeidel(termination="sample"),
    "bfloat16": ffebm.GaussSeidel(precision="bfloat16"),
    "Anderson": ffebm.Anderson(),
    "Newton-CG": ffebm.NewtonCG(),
}
WHOLE = Hardware(tile_rows=None, tile_cols=None, tiles_per_core=None, layers_per_block=5)
PAIRS = Hardware(layers_per_block=2)


def hopfield(scale: float, pooling: str) -> nn.Module:
    """The deep convolutional Hopfield network of `peers.py` with its convolutions scaled."""
    model = DCHN(0.25, pooling)
    with torch.no_grad():
        for layer in model.convs:
            layer.weight.mul_(scale)
    return model


def resistors(scale: float) -> nn.Module:
    """A deep resistive network. The smaller its first layer's conductances, the nearer its gain is to one."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.abs_()
        model[0].weight.mul_(scale)
    return model


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, Any]]


def cases() -> dict[str, Case]:
    """Name -> network, input, options of `convert`."""
    found: dict[str, Case] = {}
    for gain in (0.1, 0.3, 0.7, 0.9, 0.95):
        options = {"hardware": PAIRS, "feedback": gain}
        found[f"residual CNN, {gain:g}"] = (ResidualCNN, lambda: torch.randn(32, 3, 16, 16), options)
        found[f"MLP stack, {gain:g}"] = (MLPStack, lambda: torch.randn(16, 64, 128), options)
    for pooling in ("avg", "max"):
        for scale in (1.0, 1.5, 2.2, 3.0, 4.5):
            options = {
                "hardware": WHOLE,
                "feedback": "symmetric",
                "block_ops": ("add", "reshape", "avg_pool", "max_pool"),
            }
            found[f"DCHN {pooling}, weights x{scale:g}"] = (
                lambda scale=scale, pooling=pooling: hopfield(scale, pooling),
                lambda: torch.rand(16, 3, 32, 32),
                options,
            )
    for scale in (1.0, 0.2, 0.05, 0.02):
        found[f"DRN, first layer x{scale:g}"] = (
            lambda scale=scale: resistors(scale),
            lambda: torch.randn(64, 32),
            {"hardware": WHOLE, "energy": "drn"},
        )
    return found


def measure(case: Case, gradient: str, steps: int) -> dict[str, Any]:
    """Medians and free sweeps of each solver."""
    build, draw, options = case
    torch.manual_seed(0)
    model, x = build(), draw()
    labels = torch.randint(0, 10, (len(x),))
    contestants = {
        name: ffebm.convert(model, x, gradient=gradient, solver=solver, **options) for name, solver in SOLVERS.items()
    }
    if gradient == "implicit":
        estimator = ffebm.ImplicitDifferentiation("cg")
        contestants["CG adjoint"] = ffebm.convert(model, x, gradient=estimator, solver=ffebm.GaussSeidel(), **options)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(steps + 1):
        for name, hybrid in contestants.items():
            started = time.process_time()
            try:
                hybrid.zero_grad(set_to_none=True)
                F.cross_entropy(hybrid(x), labels).backward()
            except ffebm.FFEBMError:
                continue
            if turn:
                times[name].append(time.process_time() - started)
    hybrid = contestants["sweeps"]
    result: dict[str, Any] = {"loop_gain": max(block.loop_gain for block in hybrid.blocks), "seconds": {}, "sweeps": {}}
    for name, hybrid in contestants.items():
        counts = [b.module.last.sweeps for b in hybrid.blocks if b.module.last and b.module.program.coupled]
        result["seconds"][name] = statistics.median(times[name]) if times[name] else None
        result["sweeps"][name] = max(counts)
    return result


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--network", default="*", help="only the rows that match a glob pattern")
    parser.add_argument("--gradient", choices=("ep", "implicit"), default="ep")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ffebm.ConvergenceWarning)
    names = [*SOLVERS, *(["CG adjoint"] if options.gradient == "implicit" else [])]
    print(f"{'network':26} {'gain':>6} {'ms':>7}  " + "  ".join(f"{name:>11}" for name in names))
    results = {}
    for name, case in cases().items():
        if not fnmatch.fnmatch(name, options.network):
            continue
        row = results[name] = measure(case, options.gradient, options.steps)
        base = row["seconds"]["sweeps"]
        cells = [
            f"{row['seconds'][n] / base:5.2f} ({row['sweeps'][n]:3d})" if base and row["seconds"][n] else f"{'-':>11}"
            for n in names
        ]
        print(f"{name:26} {row['loop_gain']:6.2f} {1e3 * (base or 0):7.0f}  " + "  ".join(cells), flush=True)
    keep(results, options.out)


if __name__ == "__main__":
    main()
