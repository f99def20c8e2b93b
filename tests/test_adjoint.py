"""Conjugate gradients and sweeps solve the same adjoint system; certificates follow training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Residual(nn.Module):
    """A block that is a graph: two branches, and a skip over one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return torch.sigmoid(h + self.b(h) + self.c(x))


COUNTS: dict[str, list[int]] = {}


class Counted(ffebm.ImplicitDifferentiation):
    """Implicit differentiation that notes its steps."""

    def gradients(self, at: Any, errors: Any) -> Any:
        result = super().gradients(at, errors)
        COUNTS.setdefault(self.method, []).append(result.sweeps)
        return result


def _gradients(hybrid: ffebm.HybridModel, x: Tensor) -> list[Tensor]:
    hybrid.zero_grad()
    hybrid(x).square().mean().backward()
    return [p.grad.clone() for p in hybrid.parameters() if p.grad is not None]


@pytest.mark.parametrize("feedback", [0.1, 0.6, 0.95])
def test_both_methods_agree_with_unrolled(feedback: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    hybrid = ffebm.convert(Residual().double(), x, feedback=feedback, gradient="unrolled")
    expected = _gradients(hybrid, x)
    for method in ("auto", "sweeps", "cg"):
        hybrid.set_gradient(ffebm.ImplicitDifferentiation(method=method))
        for found, want in zip(_gradients(hybrid, x), expected, strict=True):
            assert float((found - want).norm() / want.norm()) < 1e-8, method


def at_rest() -> nn.Module:
    """States of 0, which is where they begin: only their derivatives need sweeps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        for layer in model[::2]:
            layer.bias.zero_()
    return model


@pytest.mark.parametrize("feedback", [0.1, 0.8])
@pytest.mark.parametrize("solver", [None, ffebm.Anderson()], ids=["sweeps", "anderson"])
def test_derivatives_of_states_that_are_settled_from_the_start(feedback: float, solver: Any) -> None:
    model = at_rest()
    x = torch.randn(3, 4, dtype=torch.float64)
    hybrid = ffebm.convert(model, x, feedback=feedback, solver=solver, gradient="unrolled")
    found = {}
    for gradient in ("unrolled", "implicit"):
        hybrid.set_gradient(gradient)
        hybrid.zero_grad()
        (hybrid(x) - 1).square().mean().backward()
        found[gradient] = torch.cat([p.grad.flatten() for p in hybrid.parameters() if p.grad is not None])
    assert hybrid.blocks[0].module.last.sweeps <= 4
    assert float((found["unrolled"] - found["implicit"]).norm() / found["implicit"].norm()) < 1e-7


def test_unrolled_gradients_that_need_more_sweeps_than_allowed() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    message = r"unrolled gradient of block_1 did not settle in 6 sweeps \(the states at the start make up .* of it"
    kinds = {"error": ffebm.ConvergenceError, "isolate": ffebm.ConvergenceError, "warn": ffebm.ConvergenceWarning}
    for failure, kind in kinds.items():
        solver = ffebm.GaussSeidel(max_sweeps=6, on_failure=failure)  # type: ignore[arg-type]
        hybrid = ffebm.convert(at_rest(), x, feedback=0.9, solver=solver, gradient="unrolled")
        expected = pytest.raises(kind, match=message) if failure != "warn" else pytest.warns(kind, match=message)
        with expected:
            (hybrid(x) - 1).square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("depth", "feedback"), [(2, 0.01), (4, 1e-6), (8, 0.1), (4, 1e-8)])
def test_conjugate_gradients_reach_the_first_layers(dtype: torch.dtype, depth: int, feedback: float) -> None:
    """In their coordinates an error is smaller by √γ for each layer that it passes."""
    torch.manual_seed(0)
    layers = [part for _ in range(depth) for part in (nn.Linear(8, 8), nn.Tanh())]
    model, x = nn.Sequential(*layers, nn.Linear(8, 3)).to(dtype), torch.randn(4, 8, dtype=dtype)
    hybrid = ffebm.convert(model, x, feedback=feedback, hardware=ffebm.Hardware(layers_per_block=None)).eval()
    found = {}
    for method in ("sweeps", "cg"):
        hybrid.set_gradient(ffebm.Implicit(method))  # type: ignore[arg-type]
        found[method] = _gradients(hybrid, x)
    for other, sweeps in zip(found["cg"], found["sweeps"], strict=True):
        assert float((other - sweeps).norm()) <= (1e-2 if dtype is torch.float32 else 1e-9) * float(sweeps.norm())


def test_conjugate_gradients_need_fewer_steps_at_high_gain() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    plain = ffebm.GaussSeidel(relaxation=1.0)
    hybrid = ffebm.convert(Residual().double(), x, feedback=0.95, solver=plain).eval()
    steps = {}
    for method in ("sweeps", "cg"):
        estimator = Counted(method=method)
        hybrid.set_gradient(estimator)
        _gradients(hybrid, x)
        (steps[method],) = COUNTS.pop(method)
    assert steps["cg"] < steps["sweeps"]


def test_guards() -> None:
    with pytest.raises(ffebm.InputError, match="expected 'auto', 'sweeps' or 'cg'"):
        ffebm.ImplicitDifferentiation(method="magic")
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    hybrid = ffebm.convert(model, torch.randn(3, 4), gradient=ffebm.ImplicitDifferentiation(method="cg"))
    with pytest.raises(ffebm.InputError, match="block_1 has an activation that is not monotone"):
        hybrid(torch.randn(3, 4)).sum().backward()


def test_certificates_follow_training() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    hybrid = ffebm.convert(model, torch.randn(3, 4)).train()
    before = hybrid.blocks[0].certificate
    hybrid(torch.randn(3, 4))
    assert hybrid.blocks[0].certificate == before
    with torch.no_grad():
        hybrid.get_parameter("2.weight").mul_(5)
    hybrid(torch.randn(3, 4))
    after = hybrid.blocks[0].certificate
    assert after is not None
    assert before is not None
    assert after.norms[0][2] == pytest.approx(5 * before.norms[0][2], rel=1e-3)
    assert after.loop_gain == pytest.approx(0.1, rel=1e-3)
    hybrid.recertify_every = None
    for _ in range(4):
        hybrid(torch.randn(3, 4))
    assert hybrid.blocks[0].certificate == after
