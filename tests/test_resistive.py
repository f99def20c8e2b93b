"""The resistive energy against formulas that are written down here once more, and against scipy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from finite_differences import assert_finite_differences, squared_error
from networks import CASES, MLP, Branches, Projections, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.onnx import verify
from ffebm_compiler.onnx.execute import run
from ffebm_compiler.runtime.activations.table import (
    ALL,
    Clamp,
    Hardsigmoid,
    Hardtanh,
    Identity,
    LeakyReLU,
    ReLU,
    Softshrink,
)
from ffebm_compiler.runtime.energies.base import Energy
from ffebm_compiler.runtime.energies.loaded import Loaded
from ffebm_compiler.runtime.energies.resistive import _NEAREST, Resistive
from ffebm_compiler.runtime.program.frame import Frame

ADMITTED = (
    Identity(),
    ReLU(),
    Hardtanh(),
    Hardtanh(-0.5, 2.0),
    Clamp(lo=-0.75),
    Clamp(hi=1.25),
    Clamp(0.25, 1.0),
    LeakyReLU(),
    LeakyReLU(0.3),
    Softshrink(),
    Hardsigmoid(),
)
EXACT = ffebm.GaussSeidel(rtol=1e-14, on_failure="warn")


class Sloped(nn.Module):
    """The papers' hard sigmoid: a clamp of half the field."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(0.5 * x, 0, 1)


# -- a state and its load ------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ADMITTED, ids=repr)
@pytest.mark.parametrize("load", [0.0, 0.4, 7.0])
def test_a_loaded_state_solves_its_equation(activation: Any, load: float) -> None:
    h = torch.linspace(-6, 6, 41, dtype=torch.float64)
    found = Loaded(activation, torch.tensor(1 + load, dtype=torch.float64)).value(h)
    for field, state in zip(h.tolist(), found.tolist(), strict=True):

        def excess(inner: float, field: float = field) -> float:  # ∂G(s) = inner at s = σ(inner)
            return inner + load * float(activation.value(torch.tensor(inner, dtype=torch.float64))) - field

        inner = scipy.optimize.brentq(excess, -80, 80, xtol=1e-14)
        assert state == pytest.approx(float(activation.value(torch.tensor(inner, dtype=torch.float64))), abs=1e-12)


@pytest.mark.parametrize("activation", ADMITTED, ids=repr)
@pytest.mark.parametrize("t", [1.7, -1.7, 1e-2, -1e-2])
def test_the_quotient_of_a_loaded_state(activation: Any, t: float) -> None:
    load = torch.tensor([0.0, 0.3, 2.0], dtype=torch.float64)
    sigma = Loaded(activation, 1 + load)
    h, k = 3 * noise(200, 3, seed=1).double(), 2 * noise(200, 3, seed=2).double()
    expected = (sigma.value(h + t * k) - sigma.value(h)) / t
    torch.testing.assert_close(sigma.quotient(h, k, t), expected, rtol=1e-9, atol=1e-11)
    # In float32 nothing may cancel at a tiny step: the same points in float64 are the reference.
    small = torch.tensor(1e-6 if t > 0 else -1e-6)
    single = Loaded(activation, 1 + load.float()).quotient(h.float(), k.float(), float(small))
    double = sigma.quotient(h.float().double(), k.float().double(), float(small))
    away = (double - sigma.derivative(h.float().double()) * k.float().double()).abs() <= 1e-9  # no kink is crossed
    assert away.double().mean() > 0.99
    torch.testing.assert_close(single[away].double(), double[away], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ADMITTED, ids=repr)
def test_slope_and_potential_of_a_loaded_state(activation: Any) -> None:
    load = torch.tensor([0.2, 1.5], dtype=torch.float64)
    sigma = Loaded(activation, 1 + load)
    h = (4 * noise(50, 2, seed=3)).double().requires_grad_()
    value = sigma.value(h)
    (slope,) = torch.autograd.grad(value.sum(), h)
    torch.testing.assert_close(sigma.derivative(h.detach()), slope)
    assert (slope <= sigma.steepest + 1e-12).all()
    torch.testing.assert_close(value.detach(), sigma.value(h.detach()), rtol=1e-14, atol=1e-14)
    for knot in [0.0] if activation.cone else [place for place, _ in sigma._knots]:  # the same one of two slopes there
        at = torch.as_tensor(knot, dtype=torch.float64).expand(2).clone().requires_grad_()
        (slope,) = torch.autograd.grad(sigma.value(at).sum(), at)
        torch.testing.assert_close(sigma.derivative(at.detach()), slope)
    # F(s) = G(s) + ½ e s², and Λ' = σ.
    torch.testing.assert_close(sigma.potential(value), activation.potential(value) + 0.5 * load * value**2)
    (again,) = torch.autograd.grad(sigma.primitive(h).sum(), h)
    torch.testing.assert_close(again, value, rtol=1e-9, atol=1e-9)


# -- blocks, written down by hand ----------------------------------------------------------------

# By layer: the weights from each state (−1 is the input; a wire is a matrix too), and the bias.


def chain(model: MLP) -> list[tuple[dict[int, Tensor], Tensor]]:
    """(weights by source, bias) of every layer of an MLP."""
    return [({index - 1: layer.weight}, layer.bias) for index, layer in enumerate(model.layers)]


def branches(model: Branches) -> list[tuple[dict[int, Any], Tensor]]:
    """States σ(a), σ(c), σ(b + d + wire), e: two weights on one edge are two conductances."""
    wire = torch.eye(7, dtype=torch.float64)
    return [
        ({-1: model.a.weight}, model.a.bias),
        ({0: model.c.weight}, model.c.bias),
        ({0: [model.b.weight, wire], 1: model.d.weight}, model.b.bias + model.d.bias),
        ({2: model.e.weight}, model.e.bias),
    ]


def projections(model: Projections) -> list[tuple[dict[int, Any], Tensor]]:
    """States σ(q), σ(k), σ(v) and out(q + k − v)."""
    w = model.out.weight
    return [
        ({-1: model.q.weight}, torch.zeros(5, dtype=torch.float64)),
        ({-1: model.k.weight}, model.k.bias),
        ({-1: model.v.weight}, model.v.bias),
        ({0: w, 1: w, 2: -w}, model.out.bias),
    ]


BLOCKS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "mlp": (chain, (0, 1, 2, 3)),
    "branches": (branches, (0, 1, 2, 3)),
    "projections": (projections, (0, 0, 0, 1)),
}
"""Layers of a block and their depths."""


def pieces(weights: Any) -> list[Tensor]:
    return weights if isinstance(weights, list) else [weights]


def by_hand(layers: Any, depths: tuple[int, ...], gamma: float) -> tuple[list[float], list[Tensor], list[float]]:
    """(A_m, D^l, c_l) from the definition."""
    amplifiers = [
        float(sum(w.detach().abs().sum(1) for ws in sources.values() for w in pieces(ws)).max())
        for sources, _ in layers
    ]
    loads = [torch.ones_like(bias) for _, bias in layers]
    for m, (sources, _) in enumerate(layers):
        for k, ws in sources.items():
            for w in pieces(ws) if k >= 0 else ():
                loads[k] = loads[k] + gamma ** (depths[m] - depths[k]) * amplifiers[m] * w.abs().sum(0)
    return amplifiers, loads, [gamma ** (depth - max(depths)) for depth in depths]


def plain(activation: nn.Module) -> tuple[Callable[[Tensor], Tensor], tuple[float | None, float | None]]:
    """(potential of s, bounds of s) of an activation, from its definition."""
    if isinstance(activation, nn.ReLU):
        return (lambda s: 0.5 * s**2), (0.0, None)
    if isinstance(activation, nn.LeakyReLU):
        return (lambda s: 0.5 * torch.where(s > 0, s**2, s**2 / activation.negative_slope)), (None, None)
    assert isinstance(activation, nn.Hardsigmoid)
    return (lambda s: 3 * s**2 - 3 * s), (0.0, 1.0)


def energy_by_hand(case: str, model: Any, activation: nn.Module, gamma: float, x: Tensor, states: list[Tensor]) -> Any:
    make, depths = BLOCKS[case]
    layers = make(model)
    _, loads, scales = by_hand(layers, depths, gamma)
    potential, _ = plain(activation)
    total = torch.zeros((), dtype=torch.float64)
    for index, (sources, bias) in enumerate(layers):
        s = states[index]
        drive = bias + sum((x if k < 0 else states[k]) @ w.T for k, ws in sources.items() for w in pieces(ws))
        g = potential(s) if index < len(layers) - 1 else 0.5 * s**2
        total = total + scales[index] * (g + 0.5 * (loads[index] - 1) * s**2 - s * drive).sum()
    return total


def resistive(case: str, activation: Callable[[], nn.Module], gamma: float) -> tuple[ffebm.HybridModel, Any, Tensor]:
    model, x = CASES[case].make(activation)
    model, x = model.double(), x.double()
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=gamma, solver=EXACT, **CASES[case].options)
    assert len(hybrid.blocks) == 1
    return hybrid, model, x


ACTIVATIONS = {"relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.3), "hardsigmoid": nn.Hardsigmoid}
every_block = pytest.mark.parametrize("case", BLOCKS)
every_kind = pytest.mark.parametrize("kind", ACTIVATIONS)


@every_block
@every_kind
@pytest.mark.parametrize("gamma", [0.2, 4.0])
def test_states_are_the_minimum_that_scipy_finds(case: str, kind: str, gamma: float) -> None:
    hybrid, model, x = resistive(case, ACTIVATIONS[kind], gamma)
    (block,) = hybrid.blocks
    settled = block.settle(x)
    amplifiers, loads, scales = by_hand(BLOCKS[case][0](model), BLOCKS[case][1], gamma)
    assert block.module.scales == pytest.approx(scales)
    certificate = block.certificate
    assert certificate is not None
    assert certificate.amplifiers == pytest.approx(amplifiers)
    activation = ACTIVATIONS[kind]()
    _, bounds = plain(activation)
    shapes = [state.shape for state in settled.states]

    def split(flat: Any) -> list[Tensor]:
        parts = torch.as_tensor(flat).split([math.prod(shape) for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    weight = torch.cat([(c * d).expand(shape).flatten() for c, d, shape in zip(scales, loads, shapes, strict=True)])
    root = weight.sqrt().detach()  # in s √(c D) the problem is well scaled

    def value(flat: Any) -> tuple[float, Any]:
        states = [s.requires_grad_() for s in split(torch.as_tensor(flat) / root)]
        energy = energy_by_hand(case, model, activation, gamma, x, states)
        found = torch.cat([g.flatten() for g in torch.autograd.grad(energy, states)])
        return float(energy.detach()), (found / root).numpy()

    limits = [bounds] * (len(shapes) - 1) + [(None, None)]
    scaled = iter(root.tolist())
    box = [
        tuple(None if edge is None else edge * r for edge in limit)
        for limit, state in zip(limits, settled.states, strict=True)
        for r in (next(scaled) for _ in range(state.numel()))
    ]
    start = np.concatenate([np.full(math.prod(shape), 0.5) for shape in shapes])
    best = scipy.optimize.minimize(
        value, start, jac=True, bounds=box, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 0, "gtol": 1e-11}
    )
    for found, expected in zip(settled.states, split(torch.as_tensor(best.x) / root), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    mine = block.energy(x, states=settled.states).detach()
    by_definition = energy_by_hand(case, model, activation, gamma, x, list(settled.states)).detach()
    assert float(mine) == pytest.approx(float(by_definition), rel=1e-12)
    assert float(mine) <= best.fun + 1e-9 * abs(best.fun)


@every_block
@every_kind
@pytest.mark.parametrize("gamma", [1e-4, 0.6, 50.0])
def test_states_are_stationary_in_the_energy_by_hand(case: str, kind: str, gamma: float) -> None:
    hybrid, model, x = resistive(case, ACTIVATIONS[kind], gamma)
    states = [state.requires_grad_() for state in hybrid.blocks[0].settle(x).states]
    activation = ACTIVATIONS[kind]()
    _, _, scales = by_hand(BLOCKS[case][0](model), BLOCKS[case][1], gamma)
    slopes = torch.autograd.grad(energy_by_hand(case, model, activation, gamma, x, states), states)
    _, (low, high) = plain(activation)
    for index, (scale, state, slope) in enumerate(zip(scales, states, slopes, strict=True)):
        bounded = index < len(states) - 1
        at_low = (state == low) if bounded and low is not None else torch.zeros_like(state, dtype=torch.bool)
        at_high = (state == high) if bounded and high is not None else torch.zeros_like(state, dtype=torch.bool)
        assert (slope / scale)[~(at_low | at_high)].abs().max() <= 1e-10
        assert (slope[at_low] >= -1e-10).all()  # the energy must not fall inwards
        assert (slope[at_high] <= 1e-10).all()


GRADIENTS = [(case, kind) for case in [*BLOCKS, "tied", "gains"] for kind in [*ACTIVATIONS, "sloped"]]
GRADIENTS += [(case, "leaky") for case in ("cnn", "convolutions", "residual", "skip", "joined", "experts")]
GRADIENTS += [("cnn", "relu"), ("convolutions", "hardsigmoid")]


@pytest.mark.parametrize(("case", "kind"), GRADIENTS)
def test_gradients_are_finite_differences_with_gamma_and_amplifiers_held(case: str, kind: str) -> None:
    activation = Sloped if kind == "sloped" else ACTIVATIONS[kind]
    model, x = CASES[case].make(activation)
    options = {"block_ops": ("add", "reshape", "scale"), **CASES[case].options}
    hybrid = ffebm.convert(model.double(), x.double(), energy="resistive", feedback=0.4, solver=EXACT, **options)
    before = [block.module.setting for block in hybrid.blocks]
    assert any(setting.amplifiers for setting in before)
    x = x.double()
    # β so small that no unit crosses a kink; the midpoint makes the quadratic part exact at any β.
    estimators = (ffebm.EquilibriumPropagation(1e-6, "centered"), "implicit", "unrolled")
    assert_finite_differences(estimators, hybrid, x)
    assert [block.module.setting for block in hybrid.blocks] == before


def test_a_gradient_without_the_loads_or_with_free_amplifiers_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the extra term is worth, and why A is held: both were measured in the prototype as well."""
    hybrid, _, x = resistive("mlp", nn.ReLU, 0.4)
    hybrid.set_gradient("implicit")
    squared_error(hybrid(x)).backward()
    weight = hybrid.get_parameter("layers.2.weight")
    assert weight.grad is not None
    found, direction = weight.grad.clone(), noise(*weight.shape, seed=5).double()
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(hybrid)
        with torch.no_grad():
            moved.get_parameter("layers.2.weight").add_(sign * 1e-5 * direction)
        moved.recertify()
        ends.append(float(squared_error(moved(x)).detach()))
    free = (ends[0] - ends[1]) / 2e-5
    assert abs(float((found * direction).sum()) / free - 1) > 1e-3
    monkeypatch.setattr(Resistive, "add_weight_terms", lambda *_, **__: None)
    hybrid.zero_grad()
    squared_error(hybrid(x)).backward()
    assert (weight.grad - found).norm() > 0.01 * found.norm()


# -- the certificate -----------------------------------------------------------------------------


def dense(layers: Any, loads: list[Tensor], scales: list[float], lip: float) -> np.ndarray:
    """(c S)^½ B (S/c)^½ of a block by hand, S the steepest slopes."""
    sizes = [len(bias) for _, bias in layers]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    coupling, diagonal = np.zeros((starts[-1], starts[-1])), np.zeros(starts[-1])
    for m, (sources, _) in enumerate(layers):
        own = lip if m < len(layers) - 1 else 1.0
        diagonal[starts[m] : starts[m + 1]] = (scales[m] * (1 / own + loads[m] - 1)).detach().numpy()
        for k, ws in sources.items():
            if k < 0:
                continue
            part = scales[m] * sum(pieces(ws)).detach().numpy()
            coupling[starts[m] : starts[m + 1], starts[k] : starts[k + 1]] += part
            coupling[starts[k] : starts[k + 1], starts[m] : starts[m + 1]] += part.T
    root = np.sqrt(diagonal)
    return coupling / root[:, None] / root[None]


@every_block
@pytest.mark.parametrize(("kind", "lip"), [("relu", 1.0), ("hardsigmoid", 1 / 6)])
@pytest.mark.parametrize("gamma", [0.01, 1.0, 30.0])
def test_the_certificate_is_the_spectral_radius_of_the_whole_block(
    case: str, kind: str, lip: float, gamma: float
) -> None:
    hybrid, model, _ = resistive(case, ACTIVATIONS[kind], gamma)
    layers = BLOCKS[case][0](model)
    _, loads, scales = by_hand(layers, BLOCKS[case][1], gamma)
    matrix = dense(layers, loads, scales, lip)
    certificate = hybrid.blocks[0].certificate
    assert certificate is not None
    expected = float(np.abs(np.linalg.eigvalsh(matrix)).max())
    assert expected <= certificate.radius <= 1.006 * expected
    lower, upper = np.tril(matrix, -1), np.triu(matrix, 1)
    sweep = float(np.abs(np.linalg.eigvals(np.linalg.solve(np.eye(len(matrix)) - lower, upper))).max())
    assert 0.99 * sweep <= certificate.contraction <= 1.15 * max(sweep, expected**2)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("gamma", [1e-3, 1.0, 50.0])
def test_every_gamma_settles_whatever_the_weights_are(seed: int, gamma: float) -> None:
    model = seeded(lambda: Branches(nn.ReLU), seed).double()
    scale = 10.0 ** (seed - 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
            if seed % 2:
                parameter.abs_()  # nothing cancels: the slowest
    x = noise(5, 6).double()
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=gamma, hardware=ffebm.Hardware(layers_per_block=8))
    (block,) = hybrid.blocks
    settled = block.settle(x)
    assert settled.converged
    assert block.certificate is not None
    assert block.certificate.certified
    assert block.residual(x, states=settled.states) <= 1e-10
    # It starts at the feedforward values, which may be far away: the certificate counts from there.
    with hybrid.feedforward_mode(), hybrid.recording() as record:
        hybrid(x)
    frame = Frame(block.module.program, *(record["block_1"][0][:1], record["block_1"][0][1:]))
    with torch.no_grad():
        starts = frame.feedforward()
    far = max(float((a - b).norm() / b.norm()) for a, b in zip(starts, settled.states, strict=True))
    assert settled.sweeps <= math.log(1e-13 / max(far, 1)) / math.log(block.certificate.contraction) + 3


# -- a setting that training measures again ------------------------------------------------------


def small() -> tuple[ffebm.HybridModel, Tensor]:
    model, x = CASES["mlp"].make(nn.ReLU)
    return ffebm.convert(model, x, energy="resistive"), x


def row_sums(hybrid: ffebm.HybridModel) -> list[float]:
    return [float(layer.weight.detach().abs().sum(1).max()) for layer in hybrid.to_digital().layers]  # type: ignore[union-attr]


def test_training_measures_the_amplifiers_and_evaluation_leaves_them() -> None:
    hybrid, x = small()
    (block,) = hybrid.blocks
    assert block.module.feedback == 0.01
    assert block.module.setting.amplifiers == pytest.approx(row_sums(hybrid))
    optimizer = torch.optim.SGD(hybrid.parameters(), 0.5)
    hybrid.train()
    for _ in range(3):
        optimizer.zero_grad()
        squared_error(hybrid(x)).backward()
        optimizer.step()
    held = block.module.setting
    assert held.amplifiers != pytest.approx(row_sums(hybrid), rel=1e-4)  # of the weights before the last step
    hybrid.eval()
    hybrid(x)
    with hybrid.held_feedback():
        hybrid.train()(x)
    assert block.module.setting == held
    before = block.certificate
    hybrid(x)
    assert block.module.setting.amplifiers == pytest.approx(row_sums(hybrid))
    assert block.module.setting.scales == held.scales
    assert before is not None
    assert before.amplifiers == held.amplifiers


def test_a_stale_amplifier_is_told_by_the_certificate_and_settled_anew() -> None:
    hybrid, x = small()
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(40)
    hybrid.set_solver(ffebm.GaussSeidel(max_sweeps=50))
    hybrid.set_feedback(0.5)  # measures: the amplifiers fit
    (block,) = hybrid.blocks
    assert block.certificate is not None
    assert block.certificate.certified
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(40)
    assert not block.certificate.certified  # pads would be negative
    settled = block.settle(x)  # once more at the amplifiers that these weights need
    assert settled.converged
    hybrid.recertify()
    assert block.certificate.certified
    assert block.module.setting.amplifiers == pytest.approx(row_sums(hybrid))


@pytest.mark.parametrize("case", ["mlp", "branches"])
@pytest.mark.parametrize("rate", [1e-3, 3e-2])
def test_told_and_true_contraction_agree_after_any_step(case: str, rate: float) -> None:
    make, depths = BLOCKS[case]
    model, x = CASES[case].make(nn.ReLU)
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=0.5, **CASES[case].options).train()
    (block,) = hybrid.blocks
    optimizer = torch.optim.Adam(hybrid.parameters(), rate)
    for _ in range(40):
        optimizer.zero_grad()
        squared_error(hybrid(x)).backward()
        layers = make(hybrid.to_digital().double())
        amplifiers, loads, scales = by_hand(layers, depths, 0.5)
        true = float(np.abs(np.linalg.eigvalsh(dense(layers, loads, scales, 1.0))).max())
        told = block.module.certificate
        assert told is not None
        assert told.amplifiers == pytest.approx(amplifiers, rel=1e-5)
        assert told.loop_gain == pytest.approx(true**2, rel=0.05)
        assert told.certified
        optimizer.step()


def test_resumed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def steps(hybrid: ffebm.HybridModel, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            squared_error(hybrid(x)).backward()
            optimizer.step()

    hybrid, x = small()
    hybrid.train()
    optimizer = torch.optim.SGD(hybrid.parameters(), 0.2)
    steps(hybrid, optimizer, 4)
    hybrid.save(tmp_path / "saved")
    model, _ = CASES["mlp"].make(nn.ReLU)
    again = ffebm.load(tmp_path / "saved", model)
    steps(hybrid, optimizer, 3)
    steps(again, torch.optim.SGD(again.parameters(), 0.2), 3)
    assert again.blocks[0].module.certificate == hybrid.blocks[0].module.certificate
    for (name, ours), (_, theirs) in zip(hybrid.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_training_moves_downhill() -> None:
    hybrid, x = small()
    hybrid.train()
    optimizer = torch.optim.Adam(hybrid.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = squared_error(hybrid(x))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


# -- what knows it -------------------------------------------------------------------------------


def test_files_copies_and_state_dicts_keep_it(tmp_path: Path) -> None:
    hybrid, x = small()
    hybrid.set_feedback(2.5)
    hybrid.train()
    squared_error(hybrid(x)).backward()
    torch.optim.SGD(hybrid.parameters(), 0.1).step()
    hybrid.eval()  # the amplifiers are of the weights before
    (block,) = hybrid.blocks
    expected = hybrid(x)
    hybrid.save(tmp_path / "saved")
    model, _ = CASES["mlp"].make(nn.ReLU)
    other = ffebm.convert(model, x, energy="resistive")
    other.load_state_dict(hybrid.state_dict())
    for again in (ffebm.load(tmp_path / "saved", model).eval(), copy.deepcopy(hybrid), other.eval()):
        assert again.blocks[0].module.setting == block.module.setting
        assert again.blocks[0].module.feedback == 2.5
        assert torch.equal(again(x), expected)
        assert torch.equal(again.blocks[0].states[0], block.states[0])
    # A Hopfield hybrid takes the weights alone.
    hopfield = ffebm.convert(model, x)
    with torch.no_grad():
        hybrid.get_parameter("layers.1.weight").mul_(1.5)
    hopfield.load_state_dict(hybrid.state_dict())
    assert hopfield.blocks[0].module.feedback == 0.1
    assert hopfield.blocks[0].module.setting.amplifiers == ()
    assert hopfield.blocks[0].loop_gain == pytest.approx(0.1)
    other.load_state_dict(hopfield.state_dict())
    assert other.blocks[0].module.setting.amplifiers == pytest.approx(row_sums(hybrid))


def test_a_malformed_file_is_refused(tmp_path: Path) -> None:
    hybrid, _ = small()
    hybrid.save(tmp_path / "saved")
    model, _ = CASES["mlp"].make(nn.ReLU)
    path = tmp_path / "saved" / "hybrid.json"
    text = path.read_text()
    gains = text[text.index('"amplifiers"') : text.index("]", text.index('"amplifiers"')) + 1]
    path.write_text(text.replace(gains, '"amplifiers": [1.0]'))
    with pytest.raises(ffebm.InputError, match=r"amplifiers: expected 4 numbers, one a layer"):
        ffebm.load(tmp_path / "saved", model)
    path.write_text(text.replace('"energy": "resistive"', '"energy": "hopfield"'))
    with pytest.raises(ffebm.InputError, match="of another energy"):
        ffebm.load(tmp_path / "saved", model)
    path.write_text(text.replace('"feedback": 0.01', '"feedback": 1e-30'))
    with pytest.raises(ffebm.InputError, match="expected the gain γ"):
        ffebm.load(tmp_path / "saved", model)


def test_reports_know_it() -> None:
    hybrid, x = small()
    hybrid.set_feedback(0.7)
    summary = hybrid.summary()
    assert "resistive energy with amplifiers, γ = 0.7" in summary
    diagnosis = hybrid.diagnose(x)["block_1"]
    assert diagnosis.monotone
    energies = np.array(diagnosis.energies)
    assert (np.diff(energies) <= 1e-6 * abs(energies).max()).all()  # convex, and a sweep minimises layer by layer
    assert energies[-1] < energies[0]
    comparison = hybrid.compare(x)
    assert comparison.blocks["block_1"] > 1e-3
    hybrid.set_feedback(1e-9)
    assert hybrid.compare(x).output < 1e-5  # the source, where nothing feeds back
    hybrid.set_feedback("symmetric")
    assert hybrid.blocks[0].module.scales == (1.0,) * 4
    assert hybrid.project() == {}
    report = ffebm.check_gradients(hybrid, x, squared_error)
    assert report.worst("ep")[1].cosine > 0.9999
    assert report.worst("implicit")[1].cosine > 0.9999
    assert "block_1" in str(hybrid.cost_report())
    assert "loop gain" in hybrid._repr_html_()


def test_the_manifest_holds_it(tmp_path: Path) -> None:
    hybrid, x = small()
    hybrid.set_feedback(0.7)
    hybrid.export_onnx(tmp_path / "parts", parts="digital")
    (found,) = run(tmp_path / "parts", [x])
    torch.testing.assert_close(found, hybrid(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("mlp", "relu"),
        ("branches", "leaky"),
        ("projections", "hardsigmoid"),
        ("gains", "softshrink"),
        ("tied", "hardtanh"),
        ("branches", "softshrink"),
        ("cnn", "relu"),
        ("convolutions", "leaky"),
        ("experts", "hardsigmoid"),
    ],
)
def test_one_onnx_file_settles_to_the_same_states(tmp_path: Path, case: str, kind: str) -> None:
    others = {"hardtanh": lambda: nn.Hardtanh(-0.2, 0.3), "softshrink": lambda: nn.Softshrink(0.1)}
    model, x = CASES[case].make({**ACTIVATIONS, **others}[kind])
    tight = ffebm.GaussSeidel(rtol=1e-6)
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=0.7, solver=tight, **CASES[case].options)
    hybrid.export_onnx(tmp_path / "whole.onnx")
    assert max(verify(hybrid, tmp_path / "whole.onnx", (x,)).values()) <= 1e-5


SOLVERS = {
    "anderson": ffebm.Anderson(),
    "newton": ffebm.NewtonCG(slow=0.0),
    "even_odd": ffebm.GaussSeidel(schedule="even_odd"),
    "by sample": ffebm.GaussSeidel(termination="sample"),
    "bfloat16": ffebm.GaussSeidel(precision="bfloat16"),
    "warm": ffebm.GaussSeidel(start="last"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_finds_the_same_states_and_gradients(name: str) -> None:
    model, x = CASES["branches"].make(lambda: nn.LeakyReLU(0.3))
    options = CASES["branches"].options
    found = []
    for solver in (ffebm.GaussSeidel(rtol=1e-7), SOLVERS[name]):
        hybrid = ffebm.convert(model, x, energy="resistive", feedback=2.0, solver=solver, **options).eval()
        if name == "warm":
            hybrid(1.01 * x)
        squared_error(hybrid(x)).backward()
        gradients = {key: p.grad for key, p in hybrid.named_parameters() if p.grad is not None}
        found.append((hybrid.blocks[0].states, gradients))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert (ours - theirs).norm() <= 2e-4 * ours.norm()
    for key, gradient in found[0][1].items():
        other = found[1][1][key]
        assert float((gradient * other).sum() / gradient.norm() / other.norm()) > 0.9999, key


class Tokens(nn.Module):
    """An MLP on tokens, with dropout between its layers."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 9), nn.Linear(9, 4)
        self.drop = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.a(x))))


@pytest.mark.parametrize("shapes", ["batch", None])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_tokens_masks_and_fixed_batches(shapes: Any, rate: float) -> None:
    x = noise(3, 6, 5).double()
    model = seeded(lambda: Tokens(rate)).double()
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=0.5, dynamic_shapes=shapes, solver=EXACT).train()
    (block,) = hybrid.blocks
    gain = 1 / (1 - rate)
    assert block.module.setting.amplifiers[1] == pytest.approx(gain * float(model.b.weight.detach().abs().sum(1).max()))
    found = {}
    for name in ("ep", "implicit", "unrolled"):
        hybrid.set_gradient(ffebm.EquilibriumPropagation(1e-6, "centered") if name == "ep" else name)
        hybrid.zero_grad()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            squared_error(hybrid(x)).backward()
        found[name] = {key: p.grad.clone() for key, p in hybrid.named_parameters() if p.grad is not None}
    for name, gradient in found["unrolled"].items():
        for other in ("ep", "implicit"):
            assert (found[other][name] - gradient).norm() <= 1e-8 * gradient.norm(), (other, name)


def test_complex_nudges_of_linear_layers() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))).double()
    x = noise(5, 4).double()
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=0.5, solver=EXACT)
    found = []
    for estimator in ("unrolled", ffebm.EquilibriumPropagation(0.3, "holomorphic", points=3)):
        hybrid.set_gradient(estimator)
        hybrid.zero_grad()
        squared_error(hybrid(x)).backward()
        found.append({name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


# -- refusals ------------------------------------------------------------------------------------


SELECTS = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(3, 2, 3))
GENTLE = r"leaky ReLU with a slope from 0 to 1\."


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (nn.Tanh(), r"activation tanh of layer '0' is not made of rising straight lines.* is hard tanh\."),
        (nn.GELU(), r"activation gelu of layer '0' is not .* The nearest that this energy has is ReLU\."),
        (nn.SiLU(), r"activation silu of layer '0' is not .* is ReLU\."),
        (nn.Hardswish(), r"activation hardswish of layer '0' is not .* is ReLU\."),
        (nn.Softplus(), r"activation softplus of layer '0' is not .* is ReLU\."),
        (nn.ELU(), r"activation elu of layer '0' is not .* is leaky ReLU\."),
        (nn.Sigmoid(), r"activation sigmoid of layer '0' is not .* is hard sigmoid\."),
        (nn.LogSigmoid(), r"activation log_sigmoid of layer '0' is not .* is clamp with an upper bound of 0\."),
        (nn.PReLU(), f"activation prelu of layer '0' is not .* is {GENTLE}"),
        (nn.LeakyReLU(-0.2), f"activation leaky_relu of layer '0' is not .* is {GENTLE}"),
        (nn.LeakyReLU(1.5), f"activation leaky_relu of layer '0' has a slope of 1.5 and not .* is {GENTLE}"),
    ],
)
def test_activations_that_no_diode_makes_are_refused_with_the_nearest(activation: nn.Module, message: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3)), noise(2, 4)
    with pytest.raises(ffebm.UnsupportedError, match=rf"block_1: .*{message}.*force_digital='0'.*energy='hopfield'"):
        ffebm.convert(model, x, energy="resistive")
    # Blocks of one layer have no feedback, and so no load: any layer will do, as the message says.
    hybrid = ffebm.convert(model, x, energy="resistive", hardware=ffebm.Hardware(layers_per_block=1))
    torch.testing.assert_close(hybrid(x), model(x))


def test_every_activation_has_a_nearest() -> None:
    for activation in ALL:
        admitted = activation.lines is not None and activation.monotone and activation.lipschitz <= 1
        assert admitted or activation.name in _NEAREST, activation.name


def test_max_pooling_is_refused() -> None:
    x = noise(2, 2, 12)
    with pytest.raises(ffebm.UnsupportedError, match=r"block_1: layer '3' holds max pooling.*nn\.AvgPool2d"):
        ffebm.convert(SELECTS, x, energy="resistive", block_ops=("add", "reshape", "max_pool"))
    assert ffebm.convert(SELECTS, x, energy="resistive")(x).shape == SELECTS(x).shape


@pytest.mark.parametrize("feedback", [0, -1.0, math.inf, math.nan, "weak", None, True])
def test_feedback_outside_its_range(feedback: Any) -> None:
    model, x = nn.Linear(3, 2), noise(2, 3)
    with pytest.raises(ffebm.InputError, match=r"expected the gain γ of the amplifiers .*'symmetric'"):
        ffebm.convert(model, x, energy="resistive", feedback=feedback)
    hybrid, _ = small()
    with pytest.raises(ffebm.InputError, match=r"expected the gain γ of the amplifiers .*'symmetric'"):
        hybrid.set_feedback(feedback)


def test_energies_by_name_and_as_objects() -> None:
    model, x = CASES["mlp"].make(nn.ReLU)
    by_name, by_object = (ffebm.convert(model, x, energy=energy) for energy in ("resistive", Resistive()))
    assert by_name.blocks[0].module.setting == by_object.blocks[0].module.setting
    for wrong in ("boltzmann", None, Resistive):
        with pytest.raises(ffebm.InputError, match="expected 'hopfield' or 'resistive'"):
            ffebm.convert(model, x, energy=wrong)


def test_an_energy_of_your_own_works_and_is_not_stored(tmp_path: Path) -> None:
    class Mine(Resistive):
        name = "mine"

    model, x = CASES["mlp"].make(nn.ReLU)
    energy: Energy = Mine()
    hybrid = ffebm.convert(model, x, energy=energy)
    assert torch.equal(hybrid(x), ffebm.convert(model, x, energy="resistive")(x))
    with pytest.raises(ffebm.ExportError, match="energy of the blocks is of a class of your own"):
        hybrid.save(tmp_path / "saved")
    for parts in ("digital", None):
        with pytest.raises(ffebm.ExportError, match="energy of block_1 is of a class of your own"):
            hybrid.export_onnx(tmp_path / "parts", parts=parts)


def test_samples_that_do_not_settle_are_named_with_a_remedy() -> None:
    model, x = CASES["mlp"].make(nn.ReLU)
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=2.0, solver=ffebm.GaussSeidel(max_sweeps=1))
    with pytest.raises(ffebm.ConvergenceError, match=r"block_1.*its energy is convex.*at γ = 2: lower `feedback`"):
        hybrid(x)
