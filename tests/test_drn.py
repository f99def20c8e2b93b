"""Deep resistive networks (`energy="drn"`) against the sum over their conductances, scipy and finite differences."""

from __future__ import annotations

import copy
import gc
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from drn_networks import Dense, made, split
from finite_differences import assert_finite_differences, squared_error
from networks import noise, seeded, warmed
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.onnx import verify
from ffebm_compiler.onnx.execute import run
from ffebm_compiler.runtime.energies.choice import energy_of
from ffebm_compiler.runtime.phases.free_phase import FreePhase
from ffebm_compiler.runtime.program.frame import Frame

EXACT = ffebm.GaussSeidel(rtol=1e-14, max_sweeps=5000, on_failure="warn")
KINDS = ("one hidden", "two hidden", "convolutional", "residual")


def strict(kind: str, **settings: Any) -> tuple[ffebm.HybridModel, nn.Module, Tensor]:
    model, x, options = made(kind)
    hybrid = ffebm.convert(model, x, energy="drn", **{"solver": EXACT, **options, **settings})
    assert len(hybrid.blocks) == 1
    return hybrid, model, x


def energy_by_hand(model: Dense, x: Tensor, states: list[Tensor]) -> Tensor:
    """½ Σ g (s_i − s_j)² − ⟨b, s⟩, written down resistor by resistor."""
    values = [model.gain * torch.cat((x, -x), -1), *states]
    total = torch.zeros((), dtype=x.dtype)
    for layer, before, after in zip(model.layers, values, values[1:], strict=False):
        total = total + 0.5 * (layer.weight * (before[:, None, :] - after[:, :, None]).square()).sum()
        total = total - (layer.bias * after).sum()
    return total


def bounds_of(states: tuple[Tensor, ...]) -> list[tuple[float | None, float | None]]:
    """Halves at or above 0 and at or below 0; the outputs are free."""
    found: list[tuple[float | None, float | None]] = []
    for index, state in enumerate(states):
        half = state.shape[-1] // 2
        row = [(0.0, None)] * half + [(None, 0.0)] * half if index < len(states) - 1 else [(None, None)] * 4
        found += row * len(state)
    return found


@pytest.mark.parametrize("kind", ["one hidden", "two hidden"])
def test_states_are_the_minimum_that_scipy_finds(kind: str) -> None:
    hybrid, model, x = strict(kind)
    assert isinstance(model, Dense)
    (block,) = hybrid.blocks
    hybrid(x)
    states = block.states
    shapes = [state.shape for state in states]

    def value(flat: Any) -> tuple[float, Any]:
        parts = torch.as_tensor(flat).split([math.prod(shape) for shape in shapes])
        free = [part.reshape(shape).requires_grad_() for part, shape in zip(parts, shapes, strict=True)]
        energy = energy_by_hand(model, x, free)
        slopes = torch.autograd.grad(energy, free)
        return float(energy.detach()), torch.cat([slope.flatten() for slope in slopes]).numpy()

    start = np.zeros(sum(math.prod(shape) for shape in shapes))
    best = scipy.optimize.minimize(
        value, start, jac=True, bounds=bounds_of(states), method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 50000, "ftol": 0, "gtol": 1e-11},
    )  # fmt: skip
    flat = torch.cat([state.flatten() for state in states])
    torch.testing.assert_close(flat, torch.as_tensor(best.x), rtol=1e-5, atol=1e-6)
    inputs = model.gain * torch.cat((x, -x), -1)
    mine = float(block.energy(inputs, states=states).detach())
    assert mine == pytest.approx(float(energy_by_hand(model, x, list(states)).detach()), rel=1e-12)
    assert mine <= best.fun + 1e-9 * abs(best.fun)
    assert block.residual(inputs, states=states) <= 1e-12


def movable(name: str, value: Tensor) -> Tensor:
    """Not a conductance of 0, which may only grow: it is left where it is, for central differences."""
    return value > 1e-3 if name.endswith("weight") else torch.ones_like(value, dtype=torch.bool)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind: str) -> None:
    hybrid, _, x = strict(kind)
    estimators = (ffebm.EquilibriumPropagation(1e-6, "centered"), "implicit", "unrolled", "recurrent")
    gradients, sizes = assert_finite_differences(estimators, hybrid, x, movable)
    for name, size in sizes.items():
        for found in gradients.values():
            torch.testing.assert_close(found[name], gradients["unrolled"][name], rtol=1e-7, atol=1e-9 * size)


def test_the_derivative_by_a_conductance_of_0_is_that_from_above() -> None:
    hybrid, _, x = strict("two hidden")
    weight = hybrid.get_parameter("layers.1.weight")
    hybrid.set_gradient(ffebm.EquilibriumPropagation(1e-6, "centered"))
    squared_error(hybrid(x)).backward()
    place = tuple((weight == 0).nonzero()[0].tolist())
    before, step = float(squared_error(hybrid(x)).detach()), 1e-5
    ends = []
    for factor in (1, 2):
        with torch.no_grad():
            weight[place] = factor * step
        ends.append(float(squared_error(hybrid(x)).detach()))
    slope = (4 * ends[0] - 3 * before - ends[1]) / (2 * step)
    assert weight.grad is not None
    assert abs(slope) > 1e-5
    assert float(weight.grad[place]) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("beta", [1.0, 1e-2])
def test_the_gradient_is_the_contrast_of_two_equilibria(beta: float) -> None:
    """∂E/∂g = ½(s_i − s_j)² at nudges of any size, with the nudged states found by another program."""
    hybrid, model, x = strict("two hidden")
    assert isinstance(model, Dense)
    hybrid.set_gradient(ffebm.EquilibriumPropagation(beta, "centered"))
    output = hybrid(x)
    output.retain_grad()
    (0.5 * output.square()).sum().backward()
    delta = output.grad
    assert delta is not None
    amplitude = output.detach().square().mean(-1).sqrt() / delta.square().mean(-1).sqrt()
    inputs = model.gain * torch.cat((x, -x), -1)
    found = []
    for sign in (1, -1):
        states = [torch.zeros(len(x), layer.out_features, dtype=x.dtype) for layer in model.layers]
        with torch.no_grad():
            for _ in range(600):
                for index, layer in enumerate(model.layers):
                    before = inputs if index == 0 else states[index - 1]
                    current, total = before @ layer.weight.T + layer.bias, layer.weight.sum(1)
                    if index < 2:
                        later = model.layers[index + 1].weight
                        current, total = current + states[index + 1] @ later, total + later.sum(0)
                    else:
                        current = current - sign * beta * amplitude[:, None] * delta
                    states[index] = split(current / total) if index < 2 else current / total
        found.append([inputs, *states])
    for index in range(3):
        parts = [
            0.5 * (states[index][:, None, :] - states[index + 1][:, :, None]).square() / amplitude[:, None, None]
            for states in found
        ]
        contrast = (parts[0] - parts[1]).sum(0) / (2 * beta)
        torch.testing.assert_close(hybrid.get_parameter(f"layers.{index}.weight").grad, contrast, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("variant", ["positive", "negative", "centered"])
def test_coupled_learning_is_the_contrast_with_held_outputs(variant: Any) -> None:
    hybrid, model, x = strict("two hidden")
    assert isinstance(model, Dense)
    beta = 0.1
    hybrid.set_gradient(ffebm.CoupledLearning(beta, variant))
    output = hybrid(x)
    output.retain_grad()
    output.square().sum().backward()
    delta = output.grad
    assert delta is not None
    amplitude = output.detach().square().mean(-1, keepdim=True).sqrt() / delta.square().mean(-1, keepdim=True).sqrt()
    inputs = model.gain * torch.cat((x, -x), -1)

    def energies(sign: int) -> list[Tensor]:
        held = output.detach() - sign * beta * amplitude * delta
        states = [torch.zeros(len(x), layer.out_features, dtype=x.dtype) for layer in model.layers[:-1]]
        with torch.no_grad():
            for _ in range(600):
                for index, layer in enumerate(model.layers[:-1]):
                    before = inputs if index == 0 else states[index - 1]
                    after = held if index == 1 else states[index + 1]
                    later = model.layers[index + 1].weight
                    current = before @ layer.weight.T + layer.bias + after @ later
                    states[index] = split(current / (layer.weight.sum(1) + later.sum(0)))
        values = [inputs, *states, held]
        return [
            0.5 * (values[i][:, None, :] - values[i + 1][:, :, None]).square() / amplitude[:, None] for i in range(3)
        ]

    first, last = {"positive": (1, 0), "negative": (0, -1), "centered": (1, -1)}[variant]
    width = (first - last) * beta
    for index, (a, b) in enumerate(zip(energies(first), energies(last), strict=True)):
        gradient = hybrid.get_parameter(f"layers.{index}.weight").grad
        torch.testing.assert_close(gradient, ((a - b) / width).sum(0), rtol=1e-6, atol=1e-8)


def test_contrastive_learning_works() -> None:
    hybrid, _, x = strict("two hidden", gradient="contrastive")
    squared_error(hybrid(x)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in hybrid.parameters())


def test_in_float32_with_default_settings() -> None:
    model, x, options = made("two hidden")
    hybrid = ffebm.convert(model.float(), x.float(), energy="drn", **options)
    report = ffebm.check_gradients(hybrid, x.float(), squared_error)
    assert report.worst("ep")[1].cosine > 0.9999
    assert report.worst("implicit")[1].cosine > 0.9999
    assert hybrid.blocks[0].certificate is not None
    assert hybrid.blocks[0].certificate.certified


def test_small_conductances_lose_no_digits() -> None:
    """D is a sum of conductances and not 1 + something: in siemens a network is the same as in units of 1."""
    model, x, options = made("two hidden")
    hybrid = ffebm.convert(model.float(), x.float(), energy="drn", solver=ffebm.GaussSeidel(rtol=1e-7), **options)
    expected = hybrid(x.float())
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(1e-6)
    torch.testing.assert_close(hybrid(x.float()), expected, rtol=1e-5, atol=1e-6)


def test_a_unit_that_nothing_reaches_is_held_at_0() -> None:
    hybrid, _, x = strict("two hidden")
    with torch.no_grad():
        hybrid.get_parameter("layers.1.weight")[2] = 0
        hybrid.get_parameter("layers.2.weight")[:, 2] = 0
    squared_error(hybrid(x)).backward()
    assert float(hybrid.blocks[0].states[1][:, 2].abs().max()) <= 1e-20
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in hybrid.parameters())


# -- conductances are never negative -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["two hidden", "convolutional", "residual"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_step_leaves_no_conductance_below_0(kind: str, optimizer: Any) -> None:
    hybrid, _, x = strict(kind, solver=None)
    hybrid.train()
    steps = optimizer(hybrid.parameters(), 0.3)
    losses = []
    for _ in range(4):
        steps.zero_grad()
        loss = squared_error(hybrid(x))
        loss.backward()
        before = {name: p.detach() - 0.3 * p.grad for name, p in hybrid.named_parameters() if p.grad is not None}
        steps.step()
        losses.append(float(loss.detach()))
        for name, parameter in hybrid.named_parameters():
            if optimizer is torch.optim.SGD:
                limit = 0.0 if name.endswith("weight") else -math.inf
                torch.testing.assert_close(parameter.detach(), before[name].clamp(min=limit))
            if name.endswith("weight"):
                assert float(parameter.detach().min()) >= 0
    hybrid.eval()(x)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_within_a_step_finds_no_conductance_below_0(search: str | None, by_name: bool) -> None:
    """LBFGS moves weights between two evaluations of one step. A copy has run no forward before its first step."""
    hybrid = copy.deepcopy(strict("one hidden", solver=None)[0]).train()
    x = strict("one hidden")[2]
    steps = torch.optim.LBFGS(hybrid.parameters(), max_iter=6, line_search_fn=search)
    losses = []

    def closure() -> Tensor:
        steps.zero_grad()
        loss = squared_error(hybrid(x))
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(2):
        assert float((steps.step(closure=closure) if by_name else steps.step(closure)).detach()) in losses
    assert len(losses) > 4
    assert min(losses) < losses[0]
    weights = [parameter for name, parameter in hybrid.named_parameters() if name.endswith("weight")]
    assert all(float(weight.detach().min()) >= 0 for weight in weights)
    with torch.no_grad():
        weights[0][0, 0] = -0.5
    with pytest.raises(ffebm.InputError, match="holds negative values"):
        steps.step(closure)  # given, and not moved by the step
    assert weights[0][0, 0].tolist() == -0.5


def test_biases_and_what_others_move_stay() -> None:
    hybrid, _, x = strict("one hidden", solver=None)
    squared_error(hybrid(x)).backward()
    bystander = nn.Parameter(torch.tensor([-1.0]))
    bystander.grad = torch.ones(1)
    torch.optim.SGD([bystander], 1.0).step()
    assert bystander.tolist() == [-2.0]
    weight = hybrid.get_parameter("layers.0.weight")
    with torch.no_grad():
        weight[0, 0] = -1
    torch.optim.SGD([bystander], 1.0).step()  # of another model: nothing of this one is touched
    assert weight[0, 0].tolist() == -1


def test_negative_conductances_are_refused_by_name() -> None:
    model, x, options = made("two hidden")
    with torch.no_grad():
        model.get_parameter("layers.1.weight")[0, 0] = -0.25
    message = r"'layers.1.weight' holds negative values \(the least is -0.25\).*ffebm.init.conductances_"
    with pytest.raises(ffebm.InputError, match=message):
        ffebm.convert(model, x, energy="drn", **options)
    assert float(model.get_parameter("layers.1.weight").detach().min()) == -0.25  # the source is not touched
    hybrid, _, _ = strict("two hidden")
    weight = hybrid.get_parameter("layers.1.weight")
    with torch.no_grad():
        weight.fill_(-0.25)
    for mode in (True, False):
        with pytest.raises(ffebm.InputError, match=message):
            hybrid.train(mode)(x)
    assert float(weight.detach().max()) == -0.25  # evaluation changes nothing
    with pytest.raises(ffebm.InputError, match=message):
        hybrid.recertify()
    assert hybrid.clamp_conductances() == ("layers.1.weight",)
    assert hybrid.clamp_conductances() == ()
    hybrid(x)
    with pytest.raises(ffebm.InputError, match=message):
        hybrid.load_state_dict(model.state_dict())


class Factors(nn.Module):
    """Two layers whose weights are multiples of parameters, or other functions of them."""

    def __init__(self, weight: Callable[[Factors, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.rand(8, 6) / 6)
        self.second = nn.Parameter(torch.rand(3, 8) / 8)
        self.scale = nn.Parameter(torch.rand(3, 1) + 0.5)
        self.register_buffer("mask", (torch.arange(24).reshape(3, 8) % 3 > 0).float())
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        value = split(F.linear(torch.cat((x, -x), -1), self.first))
        return F.linear(value, self.weight(self, self.second))


MULTIPLES: dict[str, Callable[[Factors, Tensor], Tensor]] = {
    "a mask before it": lambda net, w: net.mask * w,
    "a mask behind it": lambda net, w: w * net.mask,
    "a trained scale": lambda net, w: w * net.scale,
    "a quotient": lambda net, w: w / net.scale / 2,
    "the negative of a view": lambda net, w: -(w.t() * -3.0).t(),
}


@pytest.mark.parametrize("kind", MULTIPLES)
def test_a_step_leaves_no_multiple_below_0(kind: str) -> None:
    model, x = seeded(lambda: Factors(MULTIPLES[kind])).double(), noise(5, 3).double()
    hybrid = ffebm.convert(model, x, energy="drn", solver=EXACT).train()
    weight, scale = hybrid.get_parameter("second"), hybrid.get_parameter("scale")
    steps = torch.optim.SGD(hybrid.parameters(), 3.0)
    below = 0
    for _ in range(3):
        steps.zero_grad()
        squared_error(hybrid(x)).backward()
        before = weight.detach() - 3.0 * weight.grad
        steps.step()
        negative = (before * scale.detach() < 0) if kind in ("a trained scale", "a quotient") else before < 0
        if kind.startswith("a mask"):
            negative = negative & (model.get_buffer("mask") > 0)
        torch.testing.assert_close(weight.detach(), before.masked_fill(negative, 0))
        below += int(negative.sum())
        (_, (_, product)) = hybrid.operands_of("block_1")
        assert float(product.detach().min()) >= 0
    assert below > 0
    with torch.no_grad():
        weight[1, 2] = -0.5 * scale.sign()[1, 0]
    with pytest.raises(
        ffebm.InputError, match=r"'second', multiplied by .* holds negative values .*clamp_conductances"
    ):
        hybrid(x)
    assert hybrid.clamp_conductances() == ("second",)
    hybrid(x)


@pytest.mark.parametrize("affine", [False, True])
def test_a_folded_batch_norm_leaves_no_conductance_below_0(affine: bool) -> None:
    def build() -> nn.Module:
        layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.Conv2d(4, 2, 3)
        for layer in layers[::3]:
            layer.weight.data.abs_()
        return nn.Sequential(*layers)

    x = noise(4, 2, 5, 5)
    model = warmed(seeded(build), x).double()
    x = x.double()
    hybrid = ffebm.convert(model, x, energy="drn", solver=EXACT, fold_batchnorm=True)
    steps = torch.optim.SGD(hybrid.parameters(), 20.0)
    for _ in range(2):
        squared_error(hybrid(x)).backward()
        steps.step()
        for weight in (w for w in hybrid.operands_of("block_1")[1] if w is not None and w.dim() == 4):
            assert float(weight.detach().min()) >= 0
    assert int((hybrid.get_parameter("0.weight") == 0).sum()) > 0
    if affine:
        with torch.no_grad():
            model.get_parameter("1.weight")[2] = -0.25
        message = r"'0.weight', multiplied by '1.running_var', '1.weight', holds negative values .*fold_batchnorm=False"
        with pytest.raises(ffebm.InputError, match=message):
            ffebm.convert(model, x, energy="drn", fold_batchnorm=True)


def test_a_computed_weight_is_0_or_more_or_refused() -> None:
    x = noise(5, 3).double()
    made_of = seeded(lambda: Factors(lambda net, w: F.softplus(w - 3) * net.scale.exp())).double()
    hybrid = ffebm.convert(made_of, x, energy="drn", solver=EXACT).train()
    assert_finite_differences(["implicit"], hybrid, x)
    with torch.no_grad():
        hybrid.get_parameter("second").fill_(-0.5)  # what it is computed from has any sign
    squared_error(hybrid(x)).backward()
    torch.optim.SGD(hybrid.parameters(), 0.1).step()
    assert float(hybrid.get_parameter("second").detach().max()) < 0
    assert hybrid.clamp_conductances() == ()
    message = r"the weight of layer .* is computed from 'second', holds negative values .* softplus"
    with pytest.raises(ffebm.InputError, match=message):
        ffebm.convert(seeded(lambda: Factors(lambda net, w: torch.tanh(w - 0.06))).double(), x, energy="drn")


def test_copies_clamp_their_own_conductances() -> None:
    hybrid, _, x = strict("one hidden", solver=None)
    hybrid(x)
    twin = copy.deepcopy(hybrid)
    squared_error(twin(x)).backward()
    torch.optim.SGD(twin.parameters(), 100.0).step()
    assert min(float(p.detach().min()) for name, p in twin.named_parameters() if name.endswith("weight")) == 0
    # The clamp goes with its hybrid.
    parameter = twin.get_parameter("layers.0.weight")
    del twin
    gc.collect()
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], 100.0).step()
    assert float(parameter.detach().min()) < 0


def test_a_block_of_one_layer_is_its_layer() -> None:
    """Nothing settles there, so that its weights may have any sign."""
    model, x = nn.Linear(4, 3), noise(5, 4)
    torch.testing.assert_close(ffebm.convert(model, x, energy="drn")(x), model(x))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [0.2, 1.0, 0.01, "weak", None, True])
def test_another_feedback_is_refused(feedback: Any) -> None:
    model, x, options = made("one hidden")
    with pytest.raises(ffebm.InputError, match=r"a deep resistive network \(energy='drn'\) has no amplifiers"):
        ffebm.convert(model, x, energy="drn", feedback=feedback, **options)
    hybrid = ffebm.convert(model, x, energy="drn", feedback="symmetric", **options)
    with pytest.raises(ffebm.InputError, match="leave `feedback` out, or use 'symmetric'"):
        hybrid.set_feedback(feedback)


@pytest.mark.parametrize("energy", ["drn", "unamplified"])
@pytest.mark.parametrize(
    ("activation", "nearest"),
    [
        (nn.LeakyReLU, "ReLU"),
        (nn.Hardsigmoid, "a clamp from 0"),
        (nn.Tanh, "hard tanh"),
        (nn.Softshrink, "none, since"),
    ],
)
def test_activations_that_ideal_diodes_do_not_make(energy: str, activation: Any, nearest: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 3)), noise(5, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    with pytest.raises(ffebm.UnsupportedError, match=rf"of layer '0' is not made by ideal diodes.* is {nearest}"):
        ffebm.convert(model, x, energy=energy)


def test_negative_coefficients_are_refused() -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            one = F.relu(self.a(x))
            return self.b(one) - one

    model, x = Difference(), noise(5, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    with pytest.raises(ffebm.UnsupportedError, match=r"layer 'b' subtracts a value .* no negative conductance"):
        ffebm.convert(model, x, energy="drn")
    ffebm.convert(model, x, energy="unamplified")(x)  # has differential lines


# -- files, exports, reports ---------------------------------------------------------------------


def test_files_copies_and_state_dicts_keep_it(tmp_path: Path) -> None:
    hybrid, model, x = strict("two hidden")
    hybrid.train()
    squared_error(hybrid(x)).backward()
    torch.optim.SGD(hybrid.parameters(), 0.1).step()
    hybrid.eval()
    expected = hybrid(x)
    hybrid.save(tmp_path / "saved")
    other = ffebm.convert(model, x, energy="drn", solver=EXACT)
    other.load_state_dict(hybrid.state_dict())
    for again in (ffebm.load(tmp_path / "saved", model).eval(), copy.deepcopy(hybrid), other.eval()):
        assert again.energy_function == energy_of("drn")
        assert again.blocks[0].module.feedback == "symmetric"
        assert torch.equal(again(x), expected)
    digital = hybrid.to_digital()
    for name, parameter in digital.named_parameters():
        assert torch.equal(parameter, hybrid.get_parameter(name))
    # The source's function divides nothing by the conductances of a node: another one, and `compare` says so.
    assert hybrid.compare(x).output > 0.1


def test_reports_know_it() -> None:
    hybrid, _, x = strict("two hidden")
    assert "deep resistive network of conductances and diodes, γ = 1" in hybrid.summary()
    diagnosis = hybrid.diagnose(x)["block_1"]
    energies = np.array(diagnosis.energies)
    assert diagnosis.monotone
    assert (np.diff(energies) <= 1e-9 * abs(energies).max()).all()  # exact block coordinate descent
    certificate = hybrid.blocks[0].certificate
    assert certificate is not None
    assert certificate.amplifiers == ()
    assert "block_1" in str(hybrid.cost_report())
    assert "split_relu" in hybrid._repr_html_()
    assert "more sweeps" in hybrid.blocks[0].module.hint()


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_files_settle_to_the_same_states(tmp_path: Path, kind: str) -> None:
    model, x, options = made(kind)
    model, x = model.float(), x.float()
    hybrid = ffebm.convert(model, x, energy="drn", solver=ffebm.GaussSeidel(rtol=1e-6), **options)
    hybrid.export_onnx(tmp_path / "whole.onnx")
    assert max(verify(hybrid, tmp_path / "whole.onnx", (x,)).values()) <= 1e-5
    hybrid.export_onnx(tmp_path / "parts", parts="digital")
    (found,) = run(tmp_path / "parts", [x])
    torch.testing.assert_close(found, hybrid(x), rtol=1e-4, atol=1e-5)


def test_a_free_phase_starts_at_states_that_are_divided_by_their_loads() -> None:
    """The source's own states are larger by D: from there, three hidden layers took 13 sweeps and not 5."""
    hybrid, model, x = strict("two hidden")
    assert isinstance(model, Dense)
    inputs = model.gain * torch.cat((x, -x), -1)
    (block,) = hybrid.blocks
    phase = FreePhase(Frame(block.module.program, (inputs,), block.weights), block.module.setting)
    below = [layer.weight.detach().sum(1) for layer in model.layers]
    above = [layer.weight.detach().sum(0) for layer in model.layers[1:]]
    expected = split(model.layers[0](inputs) / (below[0] + above[0]))
    torch.testing.assert_close(phase.values[0], expected)
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x))


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "resistive.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(code, "docs/resistive.md", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("training", [False, True])
def test_nodes_that_hardly_reach_a_source_settle(training: bool) -> None:
    """Such a part of a block is certified to contract by hardly less than 1. Sweeps are not over-relaxed for that."""
    model = nn.Sequential(
        *(nn.Linear(3, 1), nn.Hardtanh(-0.5, 0.7), nn.Linear(1, 4, bias=False), nn.Hardtanh(-0.5, 0.7)),
        *(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)),
    ).double()
    with torch.no_grad():
        model[0].weight.fill_(1e-9)
        model[0].bias.fill_(-0.0791)
        model[2].weight.copy_(torch.tensor([[0.4685], [0.8706], [0.7873], [0.4105]]))
        model[4].weight.copy_(torch.tensor([[0.0392, 0.4266, 0.1638, 0.4168], [0.3475, 0.2941, 0.2241, 0.0993]]))
        model[5].weight.copy_(torch.tensor([[0.3759, 0.5355], [0.1208, 0.0387], [0.5569, 0.0972]]))
    hybrid = ffebm.convert(model, noise(1, 3).double(), energy="drn").train(training)
    certificate = hybrid.blocks[0].certificate
    assert certificate is not None
    assert 0.999 < certificate.radius < 1
    states = hybrid.blocks[0].settle(noise(1, 3).double()).states
    assert all(float((state + 0.5).abs().max()) < 1e-6 for state in states)  # the current pulls all to the bound


def hardly_driven() -> nn.Module:
    """κ = 0.999. The error of the outputs adds up to 0, so that next to nothing of it is in the slow direction."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 8), nn.LayerNorm(8), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(0.0063)
        model[1].weight.copy_(torch.tensor([0.62, 0.23, 0.23, 0.96, 0.03, 0.13, 0.39, 0.37])[:, None])
        model[1].bias.copy_(torch.tensor([0.66, -0.66, 0.78, -0.54, -0.24, -0.81, 0.89, -0.62]))
    return model


@pytest.mark.parametrize("gradient", ["ep", "implicit"])
@pytest.mark.parametrize("solver", [None, ffebm.GaussSeidel(max_sweeps=20000)], ids=["chosen", "sweeps"])
def test_a_block_that_is_hardly_driven_settles_in_float32(gradient: str, solver: Any) -> None:
    """What a change says of the error is estimated anew in each sweep. So only the changes themselves can stall."""
    found = {}
    for dtype, by in ((torch.float32, solver), (torch.float64, ffebm.NewtonCG())):
        x = noise(4, 1).to(dtype)
        hybrid = ffebm.convert(hardly_driven().to(dtype), x, energy="drn", gradient=gradient, solver=by).eval()
        assert 0.998 < hybrid.blocks[0].loop_gain < 1
        for seed in range(3):
            hybrid.zero_grad()
            (hybrid(x) * noise(4, 8, seed=seed).to(dtype)).sum().backward()
            found[dtype, seed] = torch.cat(
                [p.grad.double().flatten() for p in hybrid.parameters() if p.grad is not None]
            )
    for seed in range(3):
        exact = found[torch.float64, seed]
        assert float((found[torch.float32, seed] - exact).norm()) < 0.01 * float(exact.norm())


def test_slow_circuits_are_accelerated() -> None:
    hybrid = ffebm.convert(hardly_driven(), noise(4, 1), energy="drn")
    assert "Anderson: a sweep leaves up to 0.99" in str(hybrid.summary())
    hybrid(noise(4, 1))
    assert hybrid.blocks[0].module.last.sweeps < 20


def test_a_slow_circuit_settles_in_onnxruntime_too(tmp_path: Path) -> None:
    """A file has sweeps alone, as many as the certified contraction takes."""
    hybrid = ffebm.convert(hardly_driven(), noise(4, 1), energy="drn").eval()
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    assert max(verify(hybrid, tmp_path / "hybrid.onnx", (noise(4, 1),)).values()) < 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_diodes_that_conduct_into_units_that_no_source_reaches(training: bool) -> None:
    """The bias lifts the potentials of both layers without end, past what float32 holds."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 1, 2, groups=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, 1, 1)))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.abs_()
            layer.bias.abs_()
        model[0].weight.zero_()
    hybrid = ffebm.convert(model, noise(4, 2, 5, 2), energy="drn").train(training)
    with pytest.raises(ffebm.ConvergenceError, match=r"nothing sets the potentials of units of 0, 2, since"):
        hybrid(noise(4, 2, 5, 2))


def test_accelerated_blocks_without_any_coupling_are_exported(tmp_path: Path) -> None:
    """Their certified contraction is 0."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    nn.init.zeros_(model[2].weight)
    hybrid = ffebm.convert(model, noise(4, 3), solver=ffebm.Anderson()).eval()
    assert hybrid.blocks[0].module.contraction == 0
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    assert max(verify(hybrid, tmp_path / "hybrid.onnx", (noise(4, 3),)).values()) < 1e-6
