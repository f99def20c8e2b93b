"""How exact the gradients of training are at the default tolerances.

    python benchmarks/training_tolerance.py [--energy drn] [--nonnegative] [--estimator implicit] [--rtol 1e-2]
                                            [--only "driven cnn" --seeds 8]

For every kind of block that the tests know (`tests/networks.py`), a CNN with states driven by digital values, every of
fourteen activations that the energy admits, and several feedbacks: the smallest cosine of a parameter's gradient in
train mode, float32, with implicit differentiation in float64 converged to 1e-12, and the most sweeps of a free phase.
`--nonnegative` takes the magnitudes of all weights: errors of one sign are what settles last. Deep resistive networks
have no others. `--rtol` measures another tolerance than the defaults, `--seeds` networks with other weights and inputs
too, and `--only` some of the networks.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from networks import CASES, Case, noise, seeded, warmed

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.energies.choice import ENERGIES

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.ELU),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.GELU, nn.SiLU, nn.Mish),
)
FEEDBACKS: dict[str, tuple[float | str, ...]] = {
    "hopfield": (0.03, 0.1, 0.3, 0.5, 0.7, 0.9),
    "resistive": (0.001, 0.01, 0.1, 1.0),
    "unamplified": (0.001, 0.01, 0.1, 1.0),
    "drn": ("symmetric",),
}
NETWORKS = {**CASES, "driven cnn": replace(CASES["cnn"], options={"digital_drive": True})}


def gradients(hybrid: ffebm.HybridModel, x: Tensor) -> dict[str, Tensor]:
    """Of the mean squared distance to a fixed target, by every parameter, in float64."""
    hybrid.zero_grad(set_to_none=True)
    output = hybrid(x)
    (output - noise(*output.shape, seed=9).to(output.dtype)).square().mean().backward()
    return {name: p.grad.double() for name, p in hybrid.named_parameters() if p.grad is not None}


def made(case: Case, activation: type[nn.Module], seed: int) -> tuple[nn.Module, Tensor]:
    """The model of a case and a batch of inputs, drawn anew for every seed above 0."""
    if not seed:
        return case.make(activation)
    x = noise(*case.shape, seed=20 + seed)
    return warmed(seeded(lambda: case.build(activation), seed), x), x


def worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """The smallest cosine and its parameter; a gradient that is zero has none."""
    size = max(float(gradient.norm()) for gradient in exact.values())
    if not size:
        return 1.0, "no gradient"
    pairs = [(found[name], gradient, name) for name, gradient in exact.items() if gradient.norm() > 1e-9 * size]
    return min((float((a * b).sum() / (a.norm() * b.norm())), name) for a, b, name in pairs)


def measure(options: argparse.Namespace) -> dict[float | str, list[tuple[float, str, int]]]:
    """Feedback -> (smallest cosine, where, most sweeps) of every network and activation that the energy admits."""
    energy = ENERGIES[options.energy]()
    rows: dict[float | str, list[tuple[float, str, int]]] = {feedback: [] for feedback in FEEDBACKS[options.energy]}
    solver = None if options.rtol is None else ffebm.GaussSeidel(rtol=options.rtol)
    settings = {"energy": energy, "feedback": energy.default_feedback, "solver": solver, "gradient": options.estimator}
    names = [name for name in NETWORKS if options.only in (None, name)]
    for name, activation, seed in product(names, ACTIVATIONS, range(options.seeds)):
        case = NETWORKS[name]
        model, x = made(case, activation, seed)
        if options.nonnegative or energy.nonnegative:
            with torch.no_grad():
                for weight in (p for p in model.parameters() if p.dim() > 1):
                    weight.abs_()
        try:
            hybrid = ffebm.convert(model, x, **settings, **case.options).train()
        except ffebm.UnsupportedError:
            continue  # an activation or an operator that is no part of such a circuit
        exact = copy.deepcopy(hybrid).double()
        exact.set_gradient("implicit")
        exact.set_solver(None)
        for feedback, found in rows.items():
            hybrid.set_feedback(feedback)
            exact.set_feedback(feedback)
            cosine, parameter = worst(gradients(hybrid, x), gradients(exact, x.double()))
            sweeps = max((block.module.last.sweeps for block in hybrid.blocks if block.module.last), default=0)
            found.append(
                (cosine, f"{name}, {activation.__name__}, {parameter}{f', seed {seed}' if seed else ''}", sweeps)
            )
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--energy", default="hopfield", choices=tuple(ENERGIES))
    parser.add_argument("--nonnegative", action="store_true", help="the magnitudes of all weights")
    parser.add_argument("--estimator", default="ep", choices=("ep", "implicit"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", choices=tuple(NETWORKS), help="this network alone")
    parser.add_argument("--rtol", type=float, help="of both phases; left out: the defaults")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept: list[dict[str, Any]] = []
    print("feedback   1 − worst cosine  most sweeps   below 0.9999  where the worst is")
    for feedback, found in measure(options).items():
        cosine, where, _ = min(found)
        below = sum(row[0] < 0.9999 for row in found)
        kept.append({"feedback": feedback, "cosine": cosine, "where": where, "below": below, "blocks": len(found)})
        print(f"{feedback!s:>9}{1 - cosine:18.1e}{max(r[2] for r in found):13}{below:8} of {len(found)}  {where}")
    keep(kept, options.out)


if __name__ == "__main__":
    main()
