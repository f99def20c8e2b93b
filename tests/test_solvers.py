"""Solvers against each other, against an independent one, and the choice between them."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from networks import converted, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm

SOLVERS: list[Any] = [
    ffebm.GaussSeidel(),
    ffebm.Anderson(),
    ffebm.Anderson(memory=2),
    ffebm.NewtonCG(),
    ffebm.NewtonCG(slow=0.0),
]


def layers(norms: list[float], activation: nn.Module, sizes: tuple[int, ...] = (8, 10, 9, 7)) -> nn.Sequential:
    """Linear layers of given norms with an activation between them, in float64."""
    parts: list[nn.Module] = []
    for (a, b), norm in zip(pairwise(sizes), norms, strict=True):
        layer = nn.Linear(a, b)
        with torch.no_grad():
            layer.weight.mul_(norm / torch.linalg.matrix_norm(layer.weight, 2))
        parts += [layer, activation]
    return nn.Sequential(*parts).double()


def minimum(model: nn.Sequential, x: Tensor, bounds: tuple[float, float]) -> np.ndarray:
    """The states that minimise E = Σ ½|s|² − ⟨s, d⟩ within bounds, by scipy's bounded quasi-Newton method."""
    linears = [part for part in model if isinstance(part, nn.Linear)]
    widths = [layer.out_features for layer in linears]

    def energy(flat: np.ndarray) -> tuple[float, np.ndarray]:
        states = torch.tensor(flat).requires_grad_()
        total, before = torch.zeros((), dtype=torch.float64), x
        for layer, state in zip(linears, states.split(widths), strict=True):
            total = total + 0.5 * state.square().sum() - (state * layer(before)).sum()
            before = state
        (gradient,) = torch.autograd.grad(total, states)
        return float(total.detach()), gradient.numpy()

    start = np.full(sum(widths), np.clip(0.5, *bounds))
    options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-12}
    found = scipy.optimize.minimize(
        energy, start, jac=True, method="L-BFGS-B", bounds=[bounds] * len(start), options=options
    )
    return np.asarray(found.x)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("norms", [[1.0, 0.5, 0.4], [1.0, 0.9, 0.8]])
def test_clamped_blocks_settle_at_the_minimum_of_their_energy(solver: Any, norms: list[float]) -> None:
    """Slow blocks too: at symmetric feedback a certificate of κ > 1 says nothing."""
    model = seeded(lambda: layers(norms, nn.Hardtanh(0.0, 1.0)))
    x = noise(4, 8).double()
    hybrid = ffebm.convert(model, x, feedback="symmetric", solver=solver)
    states = torch.cat(hybrid.blocks[0].settle(x).states, 1)
    for row in range(4):
        torch.testing.assert_close(states[row].numpy(), minimum(model, x[row], (0.0, 1.0)), rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", ["mlp", "branches", "convolutions", "joined", "cnn"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("estimator", ["ep", "implicit"])
def test_newton_agrees_with_sweeps(case: str, activation: type[nn.Module], estimator: str) -> None:
    shared, x = converted(case, activation)
    hybrid = copy.deepcopy(shared).double()
    x = x.double()
    found = {}
    for solver in (ffebm.GaussSeidel(), ffebm.NewtonCG(slow=0.0)):
        hybrid.configure(feedback=0.6, estimator=ffebm.EquilibriumPropagation(1e-6), solver=solver)
        hybrid.set_gradient(ffebm.EquilibriumPropagation(1e-6) if estimator == "ep" else estimator)
        hybrid.set_feedback(0.6)
        hybrid.zero_grad()
        output = hybrid(x)
        output.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in hybrid.parameters() if p.grad is not None])
        found[type(solver).__name__] = (output.detach(), gradients)
    torch.testing.assert_close(found["NewtonCG"][0], found["GaussSeidel"][0], rtol=1e-9, atol=1e-10)
    difference = (found["NewtonCG"][1] - found["GaussSeidel"][1]).norm()
    assert float(difference) <= 1e-7 * float(found["GaussSeidel"][1].norm())


def test_newton_needs_few_steps_where_sweeps_crawl() -> None:
    """One loop of gain 0.99 that the clamp never reaches: a sweep leaves 0.98 of the error."""
    model = seeded(lambda: layers([1.0, 0.99], nn.Hardtanh(-50.0, 50.0), (8, 8, 8)))
    x = noise(4, 8).double()
    sweeps = {}
    for solver in (ffebm.GaussSeidel(), ffebm.Anderson(), ffebm.NewtonCG()):
        hybrid = ffebm.convert(model, x, feedback="symmetric", solver=solver)
        sweeps[type(solver).__name__] = hybrid.blocks[0].settle(x).sweeps
    assert sweeps["NewtonCG"] <= 12 < sweeps["Anderson"] + 12 < sweeps["GaussSeidel"]


def test_newton_takes_back_what_makes_it_worse() -> None:
    """Far above a loop gain of one the system is indefinite, and a correction may point anywhere."""
    model = seeded(lambda: layers([2.0, 4.0, 4.0], nn.Hardtanh(-1.0, 1.0)))
    x = noise(6, 8).double()
    for solver in (ffebm.NewtonCG(slow=0.0), ffebm.Anderson()):
        hybrid = ffebm.convert(model, x, feedback="symmetric", solver=solver)
        assert hybrid.blocks[0].loop_gain > 10
        settled = hybrid.blocks[0].settle(x)
        assert settled.converged
        assert hybrid.blocks[0].residual(x, states=settled.states) <= 1e-10


def test_newton_sweeps_where_there_is_no_minimum() -> None:
    model = seeded(lambda: layers([1.0, 1.0, 1.0], nn.GELU()))
    x = noise(4, 8).double()
    plain = ffebm.convert(model, x, feedback=0.5, solver=ffebm.GaussSeidel())
    newton = ffebm.convert(model, x, feedback=0.5, solver=ffebm.NewtonCG(slow=0.0))
    torch.testing.assert_close(newton(x), plain(x), rtol=1e-10, atol=1e-12)
    assert "block_1: NewtonCG: as given; sweeps only, gelu is not monotone" in newton.summary()


# -- the choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feedback", "solver", "reason"),
    [
        (0.1, "GaussSeidel", r"a sweep is certified to leave 0\.1 of the error"),
        (0.95, "GaussSeidel", r"a sweep is certified to leave 0\.95 of the error"),
        ("symmetric", "Anderson", "how fast sweeps contract is not certified"),
    ],
)
def test_the_summary_says_which_solver_and_why(feedback: Any, solver: str, reason: str) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.LayerNorm(7), nn.Linear(7, 3)))
    hybrid = ffebm.convert(model, noise(2, 6), feedback=feedback)
    summary = hybrid.summary()
    assert re.search(rf"^block_1: {solver}: {reason}$", summary, re.MULTILINE), summary
    assert "block_2:" not in summary  # one layer: nothing settles
    assert type(hybrid.blocks[0].module.active_solver).__name__ == solver
    given = ffebm.convert(model, noise(2, 6), feedback=feedback, solver=ffebm.GaussSeidel(schedule="even_odd"))
    assert "block_1: GaussSeidel: as given" in given.summary()


def test_the_choice_follows_the_feedback() -> None:
    plain = ffebm.convert(seeded(lambda: layers([1.0, 1.0, 1.0], nn.Tanh())), noise(2, 8).double())
    assert isinstance(plain.blocks[0].module.active_solver, ffebm.GaussSeidel)
    plain.set_feedback("symmetric")
    assert isinstance(plain.blocks[0].module.active_solver, ffebm.Anderson)
    plain.set_solver(ffebm.NewtonCG())
    assert isinstance(plain.blocks[0].module.active_solver, ffebm.NewtonCG)
    plain.set_solver(None)
    assert isinstance(plain.blocks[0].module.active_solver, ffebm.Anderson)
    with pytest.raises(ffebm.InputError, match="solver is a str; expected a Solver such as GaussSeidel"):
        plain.set_solver("anderson")  # type: ignore[arg-type]


def test_settings_are_checked() -> None:
    for kind, options, message in (
        (ffebm.NewtonCG, {"slow": 1.0}, r"slow is 1\.0; expected a number from 0 \(always correct\) to below 1"),
        (ffebm.GaussSeidel, {"termination": "layer"}, "termination is 'layer'; expected 'batch' or 'sample'"),
        (ffebm.GaussSeidel, {"relaxation": 2.0}, r"relaxation is 2\.0; expected a number from 1 to below 2, or None"),
        (ffebm.GaussSeidel, {"start": "zero"}, "start is 'zero'; expected 'feedforward' or 'last'"),
        (ffebm.Anderson, {"precision": "int8"}, "precision is 'int8'; expected 'auto', 'full' or 'bfloat16'"),
    ):
        with pytest.raises(ffebm.InputError, match=message):
            kind(**options)  # type: ignore[operator]


@pytest.mark.parametrize(
    "solver",
    [ffebm.NewtonCG(slow=0.3), ffebm.GaussSeidel(relaxation=1.2), ffebm.Anderson(precision="bfloat16", start="last")],
    ids=str,
)
def test_solvers_are_saved_and_loaded(tmp_path: Any, solver: Any) -> None:
    model = seeded(lambda: layers([1.0, 1.0, 1.0], nn.Tanh()))
    hybrid = ffebm.convert(model, noise(2, 8).double(), solver=solver)
    hybrid.save(tmp_path / "saved")
    assert ffebm.load(tmp_path / "saved", model).blocks[0].module.solver == solver
