"""The resistive energy without amplifiers, against the sum over its resistors and finite differences."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from finite_differences import assert_finite_differences, squared_error
from networks import CASES, MLP, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.onnx import verify

EXACT = ffebm.GaussSeidel(rtol=1e-14, max_sweeps=5000, on_failure="warn")


def made(case: str, kind: Any = nn.ReLU, gamma: float = 0.4) -> tuple[ffebm.HybridModel, Any, Tensor]:
    model, x = CASES[case].make(kind)
    model, x = model.double(), x.double()
    options = {"block_ops": ("add", "reshape", "scale"), **CASES[case].options}
    return ffebm.convert(model, x, energy="unamplified", feedback=gamma, solver=EXACT, **options), model, x


def by_hand(model: MLP, x: Tensor, states: list[Tensor], gamma: float) -> Tensor:
    """Σ_m γ^depth [½ Σ |w| (± source − s)² − ⟨b, s⟩] of a chain."""
    total, values = torch.zeros((), dtype=x.dtype), [x, *states]
    for depth, layer in enumerate(model.layers):
        before, after = values[depth], values[depth + 1]
        drops = layer.weight.sign() * before[:, None, :] - after[:, :, None]
        scale = gamma ** (depth - len(model.layers) + 1)
        total = total + scale * (0.5 * (layer.weight.abs() * drops.square()).sum() - (layer.bias * after).sum())
    return total


@pytest.mark.parametrize("gamma", [1e-3, 0.4, 3.0])
@pytest.mark.parametrize("kind", [nn.ReLU, lambda: nn.Hardtanh(-0.05, 0.08)], ids=["relu", "clamp"])
def test_states_minimise_the_sum_over_the_resistors(gamma: float, kind: Any) -> None:
    hybrid, model, x = made("mlp", kind, gamma)
    (block,) = hybrid.blocks
    states = [state.requires_grad_() for state in block.settle(x).states]
    energy = by_hand(model, x, states, gamma)
    assert float(block.energy(x, states=states).detach()) == pytest.approx(float(energy.detach()), rel=1e-11)
    low, high = (0.0, math.inf) if isinstance(kind(), nn.ReLU) else (-0.05, 0.08)
    clamped = 0
    for index, (state, slope) in enumerate(zip(states, torch.autograd.grad(energy, states), strict=True)):
        slope = slope / block.module.scales[index]
        if index == len(states) - 1:
            low, high = -math.inf, math.inf
        assert slope[(state > low) & (state < high)].abs().max() <= 1e-9
        assert (slope[state == low] >= -1e-9).all()  # the energy must not fall inwards
        assert (slope[state == high] <= 1e-9).all()
        clamped += int(((state == low) | (state == high)).sum())
    assert clamped > 0


@pytest.mark.parametrize("case", ["mlp", "branches", "projections", "tied", "gains", "convolutions", "residual"])
def test_gradients_are_finite_differences(case: str) -> None:
    hybrid, _, x = made(case)
    assert any(block.module.program.coupled for block in hybrid.blocks)
    estimators = (ffebm.EquilibriumPropagation(1e-6, "centered"), "implicit", "unrolled")
    assert_finite_differences(estimators, hybrid, x)


def test_nothing_is_set_so_that_weights_may_move_without_measuring() -> None:
    hybrid, model, x = made("mlp")
    (block,) = hybrid.blocks
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            parameter.mul_(3)
            model.get_parameter(name).mul_(3)
    again = ffebm.convert(model, x, energy="unamplified", feedback=0.4, solver=EXACT, **CASES["mlp"].options)
    torch.testing.assert_close(hybrid.eval()(x), again(x))
    assert block.module.setting.amplifiers == ()
    assert "without amplifiers, γ = 0.4" in hybrid.summary()
    assert "lower `feedback`" in block.module.hint()


@pytest.mark.parametrize("feedback", [0, -1.0, math.inf, math.nan, "weak", None, True])
def test_feedback_outside_its_range(feedback: Any) -> None:
    with pytest.raises(ffebm.InputError, match=r"expected the feedback gain γ of an unamplified resistive energy"):
        ffebm.convert(nn.Linear(3, 2), noise(2, 3), energy="unamplified", feedback=feedback)


@pytest.mark.parametrize("case", ["mlp", "branches", "convolutions"])
def test_files(tmp_path: Path, case: str) -> None:
    model, x = CASES[case].make(nn.ReLU)
    hybrid = ffebm.convert(
        model, x, energy="unamplified", feedback=0.7, solver=ffebm.GaussSeidel(rtol=1e-6), **CASES[case].options
    )
    hybrid.export_onnx(tmp_path / "whole.onnx")
    assert max(verify(hybrid, tmp_path / "whole.onnx", (x,)).values()) <= 1e-5
    hybrid.save(tmp_path / "saved")
    model, _ = CASES[case].make(nn.ReLU)
    assert torch.equal(ffebm.load(tmp_path / "saved", model)(x), hybrid(x))


def test_softshrink_and_other_seeds() -> None:
    """Any γ settles, whatever the weights are."""
    for seed in range(4):
        model = seeded(lambda: MLP((6, 9, 8, 4)), seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10.0 ** (seed - 1))
        for gamma in (1e-3, 1.0, 30.0):
            hybrid = ffebm.convert(model, noise(3, 6), energy="unamplified", feedback=gamma)
            assert hybrid.blocks[0].settle(noise(3, 6)).converged
    with pytest.raises(ffebm.UnsupportedError, match=r"activation softshrink of layer 'layers.0' is not made by ideal"):
        ffebm.convert(MLP(activation=lambda: nn.Softshrink(0.1)), noise(3, 8), energy="unamplified")


class WithSilentUnits(nn.Module):
    """Two hidden layers, and units beside them that no conductance reaches."""

    def __init__(self, silent: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.unreached = nn.Linear(8, 5), nn.Linear(5, 3, bias=False), nn.Linear(8, 2)
        self.silent = silent
        with torch.no_grad():
            self.unreached.weight.zero_()
            for weight in (self.first.weight, self.second.weight):
                weight.abs_()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).clamp(-0.5, 0.7)
        return torch.cat((self.second(hidden).clamp(-0.5, 0.7), self.silent(self.unreached(x))), -1)


@pytest.mark.parametrize("energy", ["unamplified", "drn"])
@pytest.mark.parametrize(
    "silent",
    [nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.Hardtanh(0.2, 0.7), nn.Hardtanh(-0.7, -0.2)],
    ids=str,
)
def test_no_gradient_moves_a_unit_that_no_conductance_reaches(energy: str, silent: nn.Module) -> None:
    """Its response would be the reciprocal of what a step made of its conductances: 1e30 after one of 1e-30."""
    model, x = seeded(lambda: WithSilentUnits(silent)), noise(4, 8)
    gamma: Any = "symmetric" if energy == "drn" else 0.1
    hybrid = ffebm.convert(model, x, energy=energy, feedback=gamma)
    exact = ffebm.convert(model, x, energy=energy, feedback=gamma).double()
    exact.set_solver(EXACT)
    exact.set_gradient("unrolled")
    held = silent(torch.zeros(4, 2, dtype=torch.float64))
    optimizer = torch.optim.Adam(hybrid.parameters(), 0.01)
    for _ in range(3):
        exact.load_state_dict({name: value.double() for name, value in hybrid.state_dict().items()})
        for one, data in ((exact, x.double()), (hybrid, x)):
            one.zero_grad()
            output = one(data)
            assert torch.equal(output[:, 3:], held.to(output.dtype))
            squared_error(output).backward()
        for name, parameter in hybrid.named_parameters():
            expected = exact.get_parameter(name).grad
            assert parameter.grad is not None
            assert expected is not None
            if name.startswith("unreached"):
                assert float(parameter.grad.abs().max()) == float(expected.abs().max()) == 0
            else:
                torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-3, atol=1e-5)
        optimizer.step()
    block = hybrid.blocks[0]
    assert math.isfinite(float(block.energy(x, states=block.settle(x).states).detach()))


class Island(nn.Module):
    """Two layers with resistors between them, and none to the inputs. An activation holds their potentials, or not."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.activation = activation
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.abs_()
            self.layers[1].weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


@pytest.mark.parametrize("gradient", ["ep", "implicit", "unrolled", "recurrent"])
@pytest.mark.parametrize("energy", ["unamplified", "drn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_units_that_no_source_reaches_have_no_gradient(energy: str, gradient: str, dtype: torch.dtype) -> None:
    """Any potentials of the two layers that agree are an equilibrium."""
    model, x = seeded(lambda: Island(nn.Identity()).to(dtype)), noise(3, 4).to(dtype)
    gamma: Any = "symmetric" if energy == "drn" else 0.1
    hybrid = ffebm.convert(model, x, energy=energy, feedback=gamma, gradient=gradient)
    assert hybrid.blocks[0].loop_gain == pytest.approx(1, abs=1e-6)
    assert not hybrid(x).detach().any()
    told = r"block_1: nothing sets the potentials of units of layers\.1, layers\.2, since no path of conductances leads"
    with pytest.raises(ffebm.ConvergenceError, match=told):
        squared_error(hybrid(x)).backward()
    with torch.no_grad():
        hybrid.get_parameter("layers.1.weight").fill_(0.1)
    squared_error(hybrid(x)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in hybrid.parameters())


@pytest.mark.parametrize("energy", ["unamplified", "drn"])
def test_diodes_hold_units_that_no_source_reaches(energy: str) -> None:
    """At 0 the diodes of ReLUs block, so that no potential can move, although the loop gain is 1 where they conduct.

    A nudge may turn them on, and then nothing holds the potentials.
    """
    model, x = seeded(lambda: Island(nn.ReLU()).double()), noise(3, 4).double()
    gamma: Any = "symmetric" if energy == "drn" else 0.1
    found = []
    for gradient in ("implicit", "unrolled"):
        hybrid = ffebm.convert(model, x, energy=energy, feedback=gamma, gradient=gradient)
        squared_error(hybrid(x)).backward()
        found.append([p.grad for p in hybrid.parameters()])
    assert hybrid.blocks[0].loop_gain == pytest.approx(1, abs=1e-9)
    for mine, other in zip(*found, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    hybrid.set_gradient("ep")
    with pytest.raises(ffebm.ConvergenceError, match=r"nothing sets the potentials of units of layers\.1, layers\.2"):
        squared_error(hybrid(x)).backward()


@pytest.mark.parametrize("energy", ["unamplified", "drn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_units_that_no_source_reaches(energy: str, dtype: torch.dtype) -> None:
    """Their potentials take many sweeps to agree, and their loop gain is measured as hardly below 1."""
    widths = (8, 40, 40, 6)
    model = seeded(lambda: nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))))
    with torch.no_grad():
        model[0].weight.zero_()
        for layer in model[1:]:
            layer.weight.pow_(8).div_(layer.weight.max())
            layer.bias.abs_()
    gamma: Any = "symmetric" if energy == "drn" else 0.1
    hybrid = ffebm.convert(model.to(dtype), noise(3, 8).to(dtype), energy=energy, feedback=gamma)
    assert 0.99 < hybrid.blocks[0].loop_gain <= 1
    with pytest.raises(ffebm.ConvergenceError, match=r"nothing sets the potentials of units of 0, 1, 2, since"):
        hybrid(noise(3, 8).to(dtype))
    with torch.no_grad():  # one path to an input, far from most units
        hybrid.get_parameter("0.weight")[3, 2] = 0.1
    assert bool(hybrid(noise(3, 8).to(dtype)).isfinite().all())


@pytest.mark.parametrize("energy", ["unamplified", "drn"])
def test_a_potential_that_overflows_is_told_by_its_conductances(energy: str) -> None:
    """A current of 1 into conductances of 1e-30 makes a potential whose square float32 does not hold."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.abs_()
        model[0].weight[1], model[2].weight[:, 1], model[0].bias[1] = 1e-30, 1e-30, 1
    x, gamma = noise(2, 4), "symmetric" if energy == "drn" else 0.1
    told = r"block_1: the conductances at a unit of 0 sum to \d(\.\d)?e-30.*give this unit larger weights"
    with pytest.raises(ffebm.InputError, match=told):
        ffebm.convert(model, x, energy=energy, feedback=gamma)(x)
    wide = ffebm.convert(model.double(), x.double(), energy=energy, feedback=gamma)
    assert bool(wide(x.double()).isfinite().all())


def two_groups(link: float, bias: bool) -> nn.Sequential:
    """No input reaches any unit, and one weak weight connects two groups of three units each."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 6, bias=bias), nn.Linear(6, 2)))
    with torch.no_grad():
        for layer in model:
            layer.weight.abs_()
        model[0].weight.zero_()
        for part in (model[1].weight[:3, 3:], model[1].weight[3:, :3], model[2].weight[0, 3:], model[2].weight[1, :3]):
            part.zero_()
        model[1].weight[0, 5] = link
        model[2].bias.zero_()
        if bias:
            model[1].bias.abs_()
    return model


@pytest.mark.parametrize("energy", ["unamplified", "drn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("link", [1e-2, 1e-4])
def test_units_without_a_source_whose_potentials_agree_slowly(energy: str, dtype: torch.dtype, link: float) -> None:
    """Sweeps make the potentials of both groups equal far more slowly than those within a group."""
    gamma: Any = "symmetric" if energy == "drn" else 0.3
    told = r"block_1: nothing sets the potentials of units of 0, 1, 2, since no path of conductances leads"
    for bias in (True, False):
        x = noise(3, 4).to(dtype)
        hybrid = ffebm.convert(two_groups(link, bias).to(dtype), x, energy=energy, feedback=gamma, gradient="implicit")
        with pytest.raises(ffebm.ConvergenceError, match=told):
            hybrid(x).sum().backward()


@pytest.mark.parametrize("link", [1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_signs_that_disagree_hold_units_that_no_source_reaches(link: float, dtype: torch.dtype) -> None:
    """One weight below 0 connects lines of both signs, so that the first group stays at 0, and the second by the link.

    The circuit is linear, so that its states and gradients are those of one system of equations.
    """
    model, x = two_groups(link, True).double(), noise(3, 4).double()
    with torch.no_grad():
        model[1].weight[1, 1].neg_()
    weights = [layer.weight for layer in model]
    biases = [torch.zeros(6).double(), model[1].bias, model[2].bias]

    def energy(states: Tensor) -> Tensor:
        values = [torch.zeros(4).double(), *states.split([6, 6, 2])]
        parts = (
            (0.5 * w.abs() @ above.square()).sum() + (0.5 * w.abs().sum(1) * own.square()).sum() - own @ (w @ above + b)
            for w, b, above, own in zip(weights, biases, values[:-1], values[1:], strict=True)
        )
        return sum(part / 0.3 ** (2 - place) for place, part in enumerate(parts))  # type: ignore[return-value]

    rest = torch.zeros(14).double().requires_grad_()
    current = torch.autograd.grad(energy(rest), rest, create_graph=True)[0]
    hessian = torch.autograd.functional.hessian(energy, rest, create_graph=True)
    found = torch.linalg.solve(hessian, -current)[-2:]
    exact = torch.autograd.grad(3 * found.sum(), [*weights[1:], model[1].bias])
    hybrid = ffebm.convert(model.to(dtype), x.to(dtype), energy="unamplified", feedback=0.3, gradient="implicit")
    output = hybrid(x.to(dtype))
    output.sum().backward()
    limit = 1e-2 if dtype is torch.float32 else 1e-8
    torch.testing.assert_close(output[0].double(), found, rtol=limit, atol=0)
    for name, right in zip(("1.weight", "2.weight", "1.bias"), exact, strict=True):
        gradient = hybrid.get_parameter(name).grad
        assert gradient is not None
        assert float((gradient.double() - right).norm()) < limit * float(right.norm())


@pytest.mark.parametrize("energy", ["unamplified", "drn"])
def test_currents_into_units_that_no_source_reaches(energy: str) -> None:
    """Nothing takes the bias of the second layer's first unit away. Its other unit settles, if slowly."""
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)))
    with torch.no_grad():
        for layer, weights in zip(model, ([0.0, 0.9], [0.1, 57.3], [0.0, 0.6]), strict=True):
            layer.weight.copy_(torch.diag(torch.tensor(weights)))
        model[1].bias.copy_(torch.tensor([2.0, -5.0]))
    gamma: Any = "symmetric" if energy == "drn" else 0.1
    hybrid = ffebm.convert(model, noise(3, 2), energy=energy, feedback=gamma)
    with pytest.raises(ffebm.ConvergenceError, match=r"nothing sets the potentials of units of 0, 1, since"):
        hybrid(noise(3, 2))
