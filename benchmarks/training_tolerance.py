"""How exact the gradients of training are at the default tolerances.

    python benchmarks/training_tolerance.py [--estimator implicit] [--rtol 1e-2]

For every kind of block that the tests know (`tests/networks.py`), fourteen activations and six loop gains: the
smallest cosine of a parameter's gradient in train mode, float32, with implicit differentiation in float64 converged
to 1e-12, and the most sweeps of a free phase. `--rtol` measures another tolerance than the defaults.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from networks import CASES, noise

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

import ffebm_compiler as ffebm

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.ELU),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.GELU, nn.SiLU, nn.Mish),
)
KAPPAS = (0.03, 0.1, 0.3, 0.5, 0.7, 0.9)


def gradients(hybrid: ffebm.HybridModel, x: Tensor) -> dict[str, Tensor]:
    """Of the mean squared distance to a fixed target, by every parameter, in float64."""
    hybrid.zero_grad(set_to_none=True)
    output = hybrid(x)
    (output - noise(*output.shape, seed=9).to(output.dtype)).square().mean().backward()
    return {name: p.grad.double() for name, p in hybrid.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """The smallest cosine and its parameter; a gradient that is zero has none."""
    size = max(float(gradient.norm()) for gradient in exact.values())
    pairs = [(found[name], gradient, name) for name, gradient in exact.items() if gradient.norm() > 1e-9 * size]
    return min((float((a * b).sum() / (a.norm() * b.norm())), name) for a, b, name in pairs)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimator", default="ep", choices=("ep", "implicit"))
    parser.add_argument("--rtol", type=float, help="of both phases; left out: the defaults")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[float, list[tuple[float, str, int]]] = {kappa: [] for kappa in KAPPAS}
    for name, case in CASES.items():
        for activation in ACTIVATIONS:
            model, x = case.make(activation)
            solver = None if options.rtol is None else ffebm.GaussSeidel(rtol=options.rtol)
            hybrid = ffebm.convert(model, x, solver=solver, gradient=options.estimator, **case.options).train()
            exact = copy.deepcopy(hybrid).double()
            exact.set_gradient("implicit")
            exact.set_solver(None)
            for kappa in KAPPAS:
                hybrid.set_feedback(kappa)
                exact.set_feedback(kappa)
                cosine, parameter = worst(gradients(hybrid, x), gradients(exact, x.double()))
                sweeps = max(block.module.last.sweeps for block in hybrid.blocks if block.module.last)
                rows[kappa].append((cosine, f"{name}, {activation.__name__}, {parameter}", sweeps))
    kept: list[dict[str, Any]] = []
    print("loop gain  1 − worst cosine  most sweeps   below 0.9999  where the worst is")
    for kappa, found in rows.items():
        cosine, where, _ = min(found)
        below = sum(row[0] < 0.9999 for row in found)
        kept.append({"feedback": kappa, "cosine": cosine, "where": where, "below": below, "blocks": len(found)})
        print(f"{kappa:9}{1 - cosine:18.1e}{max(r[2] for r in found):13}{below:8} of {len(found)}  {where}")
    keep(kept, options.out)


if __name__ == "__main__":
    main()
