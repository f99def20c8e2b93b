"""Energy, solver and estimator are independent values, and nothing outside `runtime/energies/` knows an energy."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch
from networks import Branches, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.energies.choice import ENERGIES, energy_of, name_of

ROOT = Path(__file__).parents[1]
SOLVERS = (ffebm.GaussSeidel(), ffebm.Anderson(), ffebm.NewtonCG(slow=0.0))
ESTIMATORS = (
    ffebm.EquilibriumPropagation(1e-6),
    ffebm.EquilibriumPropagation(1e-6, "centered"),
    ffebm.CostNudge(1e-6),
    ffebm.CostNudge(1e-7, "positive"),
    ffebm.ImplicitDifferentiation(),
    ffebm.ImplicitDifferentiation("cg"),
    ffebm.Unrolled(),
    ffebm.TruncatedBackprop(200),
    ffebm.RecurrentBackprop(),
)


def gradients(hybrid: ffebm.HybridModel, x: Tensor) -> dict[str, Tensor]:
    hybrid.zero_grad()
    output = hybrid(x)
    (output - noise(*output.shape, seed=9).double()).square().mean().backward()
    return {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}


PAIRS = [(energy, kind) for energy in ("hopfield", "resistive") for kind in (nn.ReLU, nn.Hardsigmoid, nn.LeakyReLU)]
PAIRS += [(energy, kind) for energy in ("unamplified", "drn") for kind in (nn.ReLU, nn.Hardtanh)]


@pytest.mark.parametrize(("energy", "activation"), PAIRS)
def test_any_energy_with_any_solver_and_any_estimator(energy: str, activation: type[nn.Module]) -> None:
    model, x = seeded(lambda: Branches(activation)).double(), noise(5, 6).double()
    feedback = 0.3 if isinstance(energy_of(energy).default_feedback, float) else "symmetric"
    if energy_of(energy).nonnegative:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.abs_()
    hybrid = ffebm.convert(model, x, energy=energy, feedback=feedback, hardware=ffebm.Hardware(layers_per_block=8))
    hybrid.set_gradient("unrolled")
    expected = gradients(hybrid, x)
    for solver, estimator in itertools.product(SOLVERS, ESTIMATORS):
        hybrid.set_solver(solver)
        hybrid.set_gradient(estimator)
        for name, gradient in gradients(hybrid, x).items():
            assert (gradient - expected[name]).norm() <= 2e-6 * expected[name].norm(), (solver, estimator, name)


@pytest.mark.parametrize("energy", ENERGIES)
def test_an_energy_has_one_name(energy: str) -> None:
    assert name_of(energy_of(energy)) == energy_of(energy).name == energy
    assert energy_of(energy) == energy_of(energy)  # a value: it has no state
    assert energy_of(energy).check_feedback(energy_of(energy).default_feedback) in (0.1, 0.01, "symmetric")
    assert energy in {pair[0] for pair in PAIRS}


def identifiers(tree: ast.AST) -> set[str]:
    """Every name in the code of a file: strings, comments and docstrings are texts."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found.update((node.module or "").split("."), (alias.name for alias in node.names))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.arg | ast.keyword):
            found.add(str(getattr(node, "name", getattr(node, "arg", ""))))
    return {name.lower() for name in found}


def test_no_code_outside_the_energies_names_one() -> None:
    files = [
        path
        for folder in ("runtime", "passes", "ffebm_compiler")
        for path in (ROOT / folder).rglob("*.py")
        if "energies" not in path.parts
    ]
    assert len(files) > 100
    for path in files:
        named = [n for n in identifiers(ast.parse(path.read_text())) if any(energy in n for energy in ENERGIES)]
        assert not named, f"{path.relative_to(ROOT)} knows {named}"
    inside = identifiers(ast.parse((ROOT / "runtime" / "energies" / "choice.py").read_text()))
    assert set(ENERGIES) <= inside  # so that the test would find one
