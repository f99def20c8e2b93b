"""No relaxation ends before a change could have reached every layer, in whatever order its sweeps go."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.onnx.manifest import settling_of
from ffebm_compiler.runtime.solvers.delay import delay_of_errors, delay_of_states

CHAIN = ((), (0,), (1,), (2,))
SKIP = ((), (0,), (0, 1))
"""The last layer reads both others."""


class Early(nn.Module):
    """An early output, and two layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x).tanh()
        return h, self.c(self.b(h).tanh())


def chain(layers: int) -> nn.Sequential:
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 3))


def of(model: nn.Module, x: Tensor, **options: Any) -> ffebm.HybridModel:
    hybrid = ffebm.convert(copy.deepcopy(model), x, hardware=ffebm.Hardware(layers_per_block=None), **options)
    assert len(hybrid.blocks) == 1
    return hybrid


def gradients(hybrid: ffebm.HybridModel, x: Tensor, loss: Any) -> dict[str, Tensor | None]:
    hybrid.zero_grad()
    loss(hybrid(x)).backward()
    return {name: None if p.grad is None else p.grad.double() for name, p in hybrid.named_parameters()}


def worst(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    errors = []
    for name, want in expected.items():
        got = found[name]
        assert want is not None
        assert got is not None, name
        errors.append(float((got - want).norm() / want.norm()))
    return max(errors)


@pytest.mark.parametrize(
    ("upstream", "order", "expected"),
    [
        (CHAIN, (0, 1, 2, 3), 0),
        (CHAIN, (3, 2, 1, 0), 3),
        (CHAIN, (0, 2, 1, 3), 1),
        (SKIP, (2, 1, 0), 2),
        (SKIP, (0, 2, 1), 1),
        (((), ()), (1, 0), 0),
    ],
)
def test_delay_of_states(upstream: Any, order: tuple[int, ...], expected: int) -> None:
    assert delay_of_states(upstream, order) == expected


@pytest.mark.parametrize(
    ("upstream", "depths", "driven", "order", "expected"),
    [
        (CHAIN, (0, 1, 2, 3), (3,), (3, 2, 1, 0), 0),
        (CHAIN, (0, 1, 2, 3), (3,), (0, 1, 2, 3), 3),
        (CHAIN, (0, 1, 2, 3), (1,), (3, 2, 1, 0), 2),
        (CHAIN, (0, 1, 2, 3), (0, 3), (3, 2, 1, 0), 0),
        (CHAIN, (0, 1, 2, 3), (), (3, 2, 1, 0), 0),
        (SKIP, (0, 1, 2), (2,), (0, 1, 2), 2),  # the longer of two ways counts as well
        (((), (0,), (0,)), (0, 1, 1), (2,), (2, 1, 0), 1),  # by layer 0 to its other reader
    ],
)
def test_delay_of_errors(upstream: Any, depths: Any, driven: Any, order: Any, expected: int) -> None:
    assert delay_of_errors(upstream, depths, driven, order) == expected


LOSSES = {
    "early output": lambda found: found[0].sin().sum(),
    "the other one times zero": lambda found: found[0].sin().sum() + 0 * found[1].sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("estimator", ["ep", "implicit", "recurrent", "unrolled"])
@pytest.mark.parametrize("feedback", [1e-4, 1e-2, 0.1])
def test_an_early_output_reaches_the_layers_behind_it(loss: Any, estimator: str, feedback: float) -> None:
    model, x = seeded(Early), noise(16, 6)
    exact = of(model.double(), x.double(), feedback=feedback, gradient="unrolled").eval()
    expected = gradients(exact, x.double(), loss)
    hybrid = of(model.float(), x, feedback=feedback, gradient=estimator).train()
    assert worst(gradients(hybrid, x, loss), expected) <= 1e-2


@pytest.mark.parametrize(
    "solver",
    [
        ffebm.Anderson(),
        ffebm.NewtonCG(),
        ffebm.GaussSeidel(termination="sample"),
        ffebm.GaussSeidel(start="last"),
        ffebm.GaussSeidel(precision="bfloat16"),
        ffebm.GaussSeidel(late=True),
    ],
    ids=["anderson", "newton", "by sample", "warm", "bfloat16", "late"],
)
def test_so_it_does_with_every_solver(solver: ffebm.Solver) -> None:
    model, x = seeded(Early), noise(16, 6)
    expected = gradients(of(model.double(), x.double(), feedback=1e-4).eval(), x.double(), LOSSES["early output"])
    hybrid = of(model.float(), x, feedback=1e-4, solver=solver).train()
    gradients(hybrid, x, lambda found: found[1].sum())  # a number of sweeps that is kept belongs to its outputs
    assert worst(gradients(hybrid, x, LOSSES["early output"]), expected) <= 2e-2


def test_nudged_arrays_sweep_until_an_early_output_has_reached_all() -> None:
    model, x = seeded(Early).double(), noise(16, 6).double()
    nudge = ffebm.EquilibriumPropagation(beta=0.5, variant="centered")
    options: dict[str, Any] = {"feedback": 1e-4, "solver": ffebm.GaussSeidel(rtol=1e-3), "gradient": nudge}
    found = gradients(of(model, x, devices=ffebm.Devices(read_noise=1e-12), **options), x, LOSSES["early output"])
    expected = gradients(of(model, x, **options), x, LOSSES["early output"])
    for name, want in expected.items():
        got = found[name]
        assert want is not None
        assert got is not None
        assert float(torch.cosine_similarity(got.flatten(), want.flatten(), 0)) > 0.99, name


@pytest.mark.parametrize("schedule", ["forward", "backward", "even_odd"])
@pytest.mark.parametrize("feedback", [1e-6, 1e-2, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_every_schedule_gives_every_layer_its_gradient(schedule: Any, feedback: float, training: bool) -> None:
    model, x = seeded(lambda: chain(4)), noise(16, 8)

    def loss(y: Tensor) -> Tensor:
        return y.sin().sum()

    exact = of(model.double(), x.double(), feedback=feedback).eval()
    hybrid = of(model.float(), x, feedback=feedback, solver=ffebm.GaussSeidel(schedule=schedule)).train(training)
    assert worst(gradients(hybrid, x, loss), gradients(exact, x.double(), loss)) <= 2e-2


@pytest.mark.parametrize("schedule", ["forward", "backward", "even_odd"])
@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("feedback", [1e-3, 1e-2, 0.1, 0.9])
def test_states_are_as_exact_as_told_by_every_schedule(schedule: Any, layers: int, feedback: float) -> None:
    model, x = seeded(lambda: chain(layers)), noise(16, 8)
    hybrid = of(model, x, feedback=feedback, solver=ffebm.GaussSeidel(schedule=schedule)).eval()
    with torch.no_grad():
        hybrid(x)
        told, states = hybrid.blocks[0].module.last, hybrid.blocks[0].states
        exact = of(model.double(), x.double(), feedback=feedback).eval()
        exact(x.double())
    assert told is not None
    assert told.converged
    for found, want in zip(states, exact.blocks[0].states, strict=True):
        assert float((found.double() - want).norm() / want.norm()) <= told.residual + 1e-6


def test_a_file_sweeps_as_often() -> None:
    model, x = chain(3), noise(2, 8)
    for schedule, least in (("auto", 1), ("backward", 4), ("even_odd", 2)):
        solver = ffebm.GaussSeidel(schedule=schedule)  # type: ignore[arg-type]
        block = of(model, x, feedback=1e-4, solver=solver).blocks[0].module
        assert settling_of(block, "float32")["min_sweeps"] == least
