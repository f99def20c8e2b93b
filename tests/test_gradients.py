"""Gradients and equilibria against references that share no code with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import torch
from finite_differences import squared_error
from networks import CASES, Branches, Residual, converted, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm

Loss = Callable[[Tensor], Tensor]
KAPPAS = (0.01, 0.1, 0.5)
every_case = pytest.mark.parametrize("case", CASES)


def double(case: str, activation: type[nn.Module], feedback: float | None = None) -> tuple[ffebm.HybridModel, Tensor]:
    """A copy of a converted case in float64, with new feedback."""
    hybrid, x = converted(case, activation)
    hybrid = copy.deepcopy(hybrid).double()
    if feedback is not None:
        hybrid.set_feedback(feedback)
    return hybrid, x.double()


def gradients(hybrid: ffebm.HybridModel, x: Tensor, loss: Loss = squared_error) -> dict[str, Tensor]:
    """The gradient of a loss by every parameter and by the input."""
    hybrid.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    loss(hybrid(x)).backward()
    found = {name: parameter.grad for name, parameter in hybrid.named_parameters()}
    assert x.grad is not None
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None} | {"x": x.grad}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient."""
    assert found.keys() == expected.keys()
    errors = {n: float((found[n] - g).norm() / g.norm().clamp_min(1e-300)) for n, g in expected.items()}
    return max(errors.values())


def joint(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative error of all gradients as one vector."""
    difference = sum(float((found[name] - g).square().sum()) for name, g in expected.items())
    return math.sqrt(difference / sum(float(g.square().sum()) for g in expected.values()))


# -- estimators against each other ---------------------------------------------------------------


@every_case
def test_a_case_settles_the_states_it_is_meant_to(case: str) -> None:
    hybrid, _ = converted(case, nn.Tanh)
    assert max(len(block.module.program.layers) for block in hybrid.blocks) == CASES[case].layers
    assert any(block.module.program.coupled for block in hybrid.blocks)


@every_case
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_implicit_is_unrolled_in_float64(case: str, activation: type[nn.Module], kappa: float) -> None:
    hybrid, x = double(case, activation, kappa)
    hybrid.set_gradient("unrolled")
    expected = gradients(hybrid, x)
    assert all(block.module.last.sweeps > 1 for block in hybrid.blocks if block.module.program.coupled)
    hybrid.set_gradient("implicit")
    assert worst(gradients(hybrid, x), expected) <= 1e-8


@every_case
def test_ep_error_falls_with_the_square_of_beta_centered_and_linearly_one_sided(case: str) -> None:
    hybrid, x = double(case, nn.Tanh)
    hybrid.set_gradient("implicit")
    exact = gradients(hybrid, x)
    betas = (0.04, 0.02, 0.01, 0.005)
    for variant, order in (("centered", 2), ("positive", 1), ("negative", 1)):
        errors = []
        for beta in betas:
            hybrid.set_gradient(ffebm.EquilibriumPropagation(beta=beta, variant=variant))
            errors.append(joint(gradients(hybrid, x), exact))
        slope = np.polyfit(np.log(betas), np.log(errors), 1)[0]
        assert slope == pytest.approx(order, abs=0.2), f"{variant}: errors {errors}"


@every_case
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
def test_default_settings_in_float32(case: str, activation: type[nn.Module]) -> None:
    hybrid, x = converted(case, activation)
    assert all(block.module.estimator == ffebm.EquilibriumPropagation() for block in hybrid.blocks)
    report = ffebm.check_gradients(hybrid, x, squared_error)
    assert set(report.agreements) == {name for name, _ in hybrid.named_parameters()}
    for estimator in ("ep", "implicit", "unrolled"):
        name, agreement = report.worst(estimator)
        assert agreement.cosine >= 0.999, f"{estimator}: {name} has cosine {agreement.cosine:.6f}"
        assert agreement.relative_error <= 0.02, f"{estimator}: {name}"


def test_a_gradient_that_is_zero_has_no_direction() -> None:
    # Batch norm takes the bias before it out again in train mode: its gradient is zero but for rounding.
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)))
    x = noise(9, 6)
    hybrid = ffebm.convert(model, x).train()
    for report in (ffebm.check_gradients(hybrid, x, squared_error), _under_autocast(hybrid, x)):
        agreement = report["0.bias"]["ep"]
        assert (agreement.cosine, agreement.relative_error < 1e-2) == (1.0, True)
    assert ffebm.check_gradients(hybrid, x, squared_error).worst("ep")[1].cosine > 0.999
    # A gradient that is not zero where the reference is stays a disagreement.
    assert ffebm.check_gradients(hybrid.eval(), x, _zero_in_float64).worst("ep")[1].cosine == 0.0


def _under_autocast(hybrid: ffebm.HybridModel, x: Tensor) -> ffebm.GradientReport:
    with torch.autocast("cpu", torch.bfloat16):
        return ffebm.check_gradients(hybrid, x, squared_error)


def _zero_in_float64(output: Tensor) -> Tensor:
    return output.square().sum() * (0.0 if output.dtype == torch.float64 else 1.0)


def test_deviation_coordinates_hold_where_the_feedback_is_tiny() -> None:
    # Differences of float32 states lose every digit here: the nudge of the first layer is κ^1.5 β of its state.
    hybrid, x = converted("mlp", nn.Tanh)
    hybrid = copy.deepcopy(hybrid)
    hybrid.set_feedback(1e-3)
    report = ffebm.check_gradients(hybrid, x, squared_error)
    assert report.worst("ep")[1].cosine >= 0.9999


# -- finite differences --------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("kappa", [0.1, 0.5])
def test_implicit_is_the_finite_difference_of_the_equilibrium_loss(case: str, kappa: float) -> None:
    hybrid, x = double(case, nn.Tanh, kappa)
    hybrid.set_gradient("implicit")
    found = gradients(hybrid, x)
    step = 1e-4
    with torch.no_grad():
        for name, parameter in [*hybrid.named_parameters(), ("x", x)]:
            direction = noise(*parameter.shape, seed=11).double()
            losses = []
            for factor in (-2, -1, 1, 2):  # fourth order
                parameter.add_(direction, alpha=factor * step)
                losses.append(float(squared_error(hybrid(x))))
                parameter.sub_(direction, alpha=factor * step)
            expected = (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)
            slope = float((found[name] * direction).sum())
            scale = float(found[name].norm() * direction.norm())
            assert slope == pytest.approx(expected, rel=1e-6, abs=1e-8 * scale + 1e-11), name


# -- scale of the loss, samples ------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp", "branches", "cnn"])
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**40])
@pytest.mark.parametrize("variant", ["positive", "centered"])
def test_gradients_do_not_depend_on_the_scale_of_the_loss(case: str, scale: float, variant: str) -> None:
    hybrid, x = converted(case, nn.ReLU)
    hybrid = copy.deepcopy(hybrid)
    hybrid.set_gradient(ffebm.EquilibriumPropagation(beta=0.1, variant=variant))
    plain = gradients(hybrid, x)
    scaled = gradients(hybrid, x, lambda y: squared_error(y) * scale)
    assert worst({name: g / scale for name, g in scaled.items()}, plain) <= 1e-6


@pytest.mark.parametrize("estimator", ["ep", "coupled", "implicit", "recurrent"])
@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float16, (1e-5, 1e3)),
        (torch.bfloat16, (1e-37, 1e37)),
        (torch.float32, (1e-40, 1e20, 1e37)),
        (torch.float64, (1e-310, 1e-200, 1e160, 1e307)),
    ],
)
def test_errors_near_the_ends_of_their_dtype(estimator: str, dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    """Squares of such errors are 0 or infinite, and the gradient was 0 without a word."""
    hybrid, x = converted("mlp", nn.Tanh)
    hybrid = copy.deepcopy(hybrid).to(dtype)
    hybrid.set_gradient(estimator)
    direction = noise(*hybrid(x.to(dtype)).shape, seed=5).to(dtype)
    plain = gradients(hybrid, x.to(dtype), lambda y: (y * direction).sum())
    for scale in scales:
        found = gradients(hybrid, x.to(dtype), lambda y, scale=scale: (y * (direction * scale)).sum())
        parts = {name: g.double() / scale for name, g in found.items()}
        assert worst(parts, {name: g.double() for name, g in plain.items()}) <= 0.05


def test_errors_of_many_outputs_in_half_precision() -> None:
    """Their norm is above 65504, the largest number of the dtype, while no gradient is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4096)).half()
    hybrid = ffebm.convert(model, noise(2, 4).half())
    hybrid(noise(2, 4).half()).backward(torch.full((2, 4096), 1100.0).half())
    found = next(hybrid.parameters()).grad
    assert found is not None
    assert found.isfinite().all()
    assert float(found.float().norm()) > 1e3


@pytest.mark.parametrize("case", CASES)
def test_mean_and_sum_over_the_batch_agree(case: str) -> None:
    hybrid, x = double(case, nn.Tanh)
    hybrid.set_gradient(ffebm.EquilibriumPropagation(beta=0.1))
    count = len(x)
    mean = gradients(hybrid, x, lambda y: y.square().flatten(1).sum(1).mean())
    total = gradients(hybrid, x, lambda y: y.square().flatten(1).sum(1).sum())
    assert worst({name: g / count for name, g in total.items()}, mean) <= 1e-9


@pytest.mark.parametrize("case", [name for name in CASES if name != "transformer"])
@pytest.mark.parametrize("estimator", ["ep", "implicit", "unrolled"])
def test_a_batch_is_the_sum_of_its_samples(case: str, estimator: str) -> None:
    hybrid, x = double(case, nn.Tanh)
    # β of the size of the state: a nudge that were relative to the batch would show.
    hybrid.set_gradient(ffebm.EquilibriumPropagation(beta=0.5) if estimator == "ep" else estimator)
    weight = noise(*hybrid(x).shape, seed=9).double() * torch.logspace(0, -6, len(x)).view(-1, 1)
    whole = gradients(hybrid, x, lambda y: (y.sin() * weight).sum())
    singles = [
        gradients(hybrid, x[i : i + 1], lambda y, i=i: (y.sin() * weight[i : i + 1]).sum()) for i in range(len(x))
    ]
    for name, gradient in whole.items():
        parts = [single[name] for single in singles]
        expected = torch.cat(parts) if name == "x" else torch.stack(parts).sum(0)
        assert (gradient - expected).norm() <= 1e-8 * expected.norm(), name


@pytest.mark.parametrize("case", ["mlp", "branches", "convolutions", "cnn"])
@pytest.mark.parametrize("estimator", ["ep", "implicit", "unrolled"])
def test_samples_without_error_change_nothing(case: str, estimator: str) -> None:
    hybrid, x = double(case, nn.ReLU)
    hybrid.set_gradient(estimator)
    keep = [0, 2]
    some = gradients(hybrid, x, lambda y: y[keep].square().sum())
    alone = gradients(hybrid, x[keep], lambda y: y.square().sum())
    for name, gradient in some.items():
        found = gradient[keep] if name == "x" else gradient
        assert (found - alone[name]).norm() <= 1e-6 * alone[name].norm(), name
    rest = [i for i in range(len(x)) if i not in keep]
    assert not some["x"][rest].any()


@every_case
@pytest.mark.parametrize("estimator", ["ep", "implicit", "unrolled"])
def test_no_error_is_no_gradient(case: str, estimator: str) -> None:
    hybrid, x = converted(case, nn.ReLU)
    hybrid = copy.deepcopy(hybrid)
    hybrid.set_gradient(estimator)
    for gradient in gradients(hybrid, x, lambda y: (0 * y).sum()).values():
        assert not gradient.any()  # NaN is true


def test_frozen_parameters_and_inputs_get_no_gradient() -> None:
    hybrid, x = double("branches", nn.Tanh)
    expected = gradients(hybrid, x)
    hybrid.get_parameter("b.weight").requires_grad_(False)
    hybrid.get_parameter("a.bias").requires_grad_(False)
    found = gradients(hybrid, x)
    assert set(expected) - set(found) == {"b.weight", "a.bias"}
    assert worst(found, {name: expected[name] for name in found}) <= 1e-12


def test_gradients_accumulate() -> None:
    hybrid, x = double("mlp", nn.Tanh)
    once = gradients(hybrid, x)
    squared_error(hybrid(x)).backward()
    for name, parameter in hybrid.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    hybrid, x = double("mlp", nn.Tanh)
    loss = squared_error(hybrid(x))
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}
    loss.backward()
    for name, parameter in hybrid.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * first[name])


# -- the energy ----------------------------------------------------------------------------------


def interior(activation: nn.Module, state: Tensor) -> Tensor:
    """Where the state is inside the range of the activation, so that ∂E/∂s must vanish."""
    if isinstance(activation, nn.ReLU):
        return state > 0
    return torch.ones_like(state, dtype=torch.bool)


@every_case
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_energy_is_stationary_at_the_equilibrium(case: str, activation: type[nn.Module], kappa: float) -> None:
    hybrid, x = double(case, activation, kappa)
    with hybrid.recording() as record:
        hybrid(x)
    for block in hybrid.blocks:
        inputs = record[block.name][0][: block.module.program.inputs]
        slots = hybrid.operands_of(block.name)[0]
        given = [v for v, slot in zip(inputs, slots, strict=True) if slot is None]
        states = [state.clone().requires_grad_() for state in block.settle(*given).states]
        energy = block.energy(*given, states=states)
        assert energy.isfinite()
        slopes = torch.autograd.grad(energy, states)
        for scale, layer, state, slope in zip(
            block.module.scales, block.module.program.layers, states, slopes, strict=True
        ):
            inside = interior(activation(), state) if layer.activation.name != "identity" else torch.ones(())
            assert (slope / scale * inside).abs().max() <= 1e-9, f"{block.name}: {layer.name}"
            if layer.activation.name == "relu":  # a bound state: the energy must not fall inwards
                assert (slope[state == 0] >= -1e-9).all()
        moved = [state.detach() * 1.01 for state in states]
        assert block.energy(*given, states=moved) > energy


@pytest.mark.parametrize("case", ["mlp", "branches", "skip"])
def test_energy_of_a_non_monotone_activation_is_stationary_in_the_preactivations(case: str) -> None:
    hybrid, x = double(case, nn.GELU, 0.3)
    (block,) = hybrid.blocks
    settled = block.settle(x)
    preactivations = [h.clone().requires_grad_() for h in settled.preactivations]
    states = [layer.activation.value(h) for layer, h in zip(block.module.program.layers, preactivations, strict=True)]
    energy = block.energy(x, states=states, preactivations=preactivations)
    for scale, slope in zip(block.module.scales, torch.autograd.grad(energy, preactivations), strict=True):
        assert (slope / scale).abs().max() <= 1e-9
    with pytest.raises(ffebm.UnsupportedError, match="not monotone"):
        block.energy(x, states=[state.detach() for state in states])


# -- hand-written energies, minimised by scipy ---------------------------------------------------


def potential(state: Tensor) -> Tensor:
    """G of tanh: ∫ atanh."""
    return (state * torch.atanh(state) + 0.5 * torch.log1p(-state.square())).sum()


def residual_energy(model: Residual, x: Tensor, states: list[Tensor], scales: tuple[float, ...]) -> Tensor:
    """E of `Residual` with tanh, written down from the network."""
    s1, s2, s3 = states
    weights = {name: getattr(model, name).weight for name in ("a", "b", "c", "side")}
    biases = {name: getattr(model, name).bias for name in ("a", "b", "c", "side")}
    d1 = x @ weights["a"].T + biases["a"]
    d2 = s1 @ weights["b"].T + biases["b"] + x @ weights["side"].T + biases["side"]
    d3 = s2 @ weights["c"].T + biases["c"]
    terms = (
        potential(s1) - (s1 * d1).sum(),
        potential(s2) - (s2 * d2).sum(),
        0.5 * s3.square().sum() - (s3 * d3).sum(),
    )
    return sum((c * term for c, term in zip(scales, terms, strict=True)), torch.zeros((), dtype=x.dtype))


def branches_energy(model: Branches, x: Tensor, states: list[Tensor], scales: tuple[float, ...]) -> Tensor:
    """E of `Branches` with tanh: states σ(a), σ(c), σ(sum), e."""
    s1, s2, s3, s4 = states
    d1 = x @ model.a.weight.T + model.a.bias
    d2 = s1 @ model.c.weight.T + model.c.bias
    d3 = s1 @ model.b.weight.T + model.b.bias + s2 @ model.d.weight.T + model.d.bias + s1
    d4 = s3 @ model.e.weight.T + model.e.bias
    terms = (
        potential(s1) - (s1 * d1).sum(),
        potential(s2) - (s2 * d2).sum(),
        potential(s3) - (s3 * d3).sum(),
        0.5 * s4.square().sum() - (s4 * d4).sum(),
    )
    return sum((c * term for c, term in zip(scales, terms, strict=True)), torch.zeros((), dtype=x.dtype))


HAND_WRITTEN = {
    "residual": (Residual, residual_energy, (7, 7, 4)),
    "branches": (Branches, branches_energy, (7, 5, 7, 4)),
}


def minimum(energy: Callable[[list[Tensor]], Tensor], sizes: tuple[int, ...], batch: int) -> list[Tensor]:
    """The root of ∂E/∂s = 0, by scipy from a random start; states between −1 and 1 are written as tanh(z)."""

    def unpack(flat: np.ndarray) -> list[Tensor]:
        vector = torch.from_numpy(flat.copy())
        parts = [part.view(batch, -1) for part in vector.split([batch * size for size in sizes])]
        return [*(part.tanh() for part in parts[:-1]), parts[-1]]

    def slope(flat: np.ndarray) -> np.ndarray:
        states = [state.requires_grad_() for state in unpack(flat)]
        found = torch.autograd.grad(energy(states), states)
        return torch.cat([g.flatten() for g in found]).numpy()

    start = 0.3 * noise(batch * sum(sizes), seed=21).double().numpy()
    solution = scipy.optimize.root(slope, start, method="hybr", options={"xtol": 1e-14})
    assert np.abs(slope(solution.x)).max() < 1e-10, solution.message
    return unpack(solution.x)


@pytest.mark.parametrize("case", HAND_WRITTEN)
@pytest.mark.parametrize("kappa", [0.05, 0.5])
def test_states_and_gradients_are_those_of_a_brute_force_equilibrium(case: str, kappa: float) -> None:
    build, energy, sizes = HAND_WRITTEN[case]
    model = seeded(lambda: build(nn.Tanh)).double()
    x = noise(2, 6).double()
    hybrid = ffebm.convert(model, x, feedback=kappa, gradient="implicit", **CASES[case].options)
    (block,) = hybrid.blocks
    scales = block.module.scales
    assert scales[-1] == 1
    assert min(a / b for a, b in pairwise(scales)) > 1  # weak feedback: c falls with depth

    def solve(m: nn.Module) -> list[Tensor]:
        frozen = copy.deepcopy(m).requires_grad_(False)
        return minimum(lambda states: energy(frozen, x, states, scales), sizes, len(x))

    expected = solve(model)
    output = hybrid(x)
    for state, want in zip(block.states, expected, strict=True):
        torch.testing.assert_close(state, want, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert float(block.energy(x, states=expected)) == pytest.approx(float(energy(model, x, expected, scales)))
        gap = max(float((a - b).abs().max()) for a, b in zip(block.states, _plain_states(model, x, case), strict=True))
    assert gap > 1e-3  # the equilibrium is not the feedforward pass

    squared_error(output).backward()
    step = 1e-4
    for name, parameter in model.named_parameters():
        direction = noise(*parameter.shape, seed=31).double()
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                moved.get_parameter(name).add_(direction, alpha=sign * step)
            losses.append(float(squared_error(solve(moved)[-1])))
        slope = float((hybrid.get_parameter(name).grad * direction).sum())
        assert slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("case", HAND_WRITTEN)
@pytest.mark.parametrize("variant", ["positive", "negative", "centered"])
def test_ep_at_finite_beta_is_the_difference_of_two_brute_force_equilibria(case: str, variant: str) -> None:
    """g = [∂E(s⁺) − ∂E(s⁻)]/Δβ as it is written in the literature, with a nudge of the size of hardware's."""
    build, energy, sizes = HAND_WRITTEN[case]
    model = seeded(lambda: build(nn.Tanh)).double()
    x = noise(1, 6).double().requires_grad_()
    beta = 0.3
    hybrid = ffebm.convert(
        model,
        x.detach(),
        feedback=0.4,
        gradient=ffebm.EquilibriumPropagation(beta=beta, variant=variant),
        **CASES[case].options,
    )
    found = gradients(hybrid, x)
    scales = hybrid.blocks[0].module.scales
    frozen = copy.deepcopy(model).requires_grad_(False)

    def settled(strength: float, force: Tensor) -> list[Tensor]:
        return minimum(
            lambda states: energy(frozen, x.detach(), states, scales) + strength * (force * states[-1]).sum(), sizes, 1
        )

    free = settled(0.0, torch.zeros(1, sizes[-1]).double())
    output = free[-1].clone().requires_grad_()
    (error,) = torch.autograd.grad(squared_error(output), output)
    amplitude = free[-1].norm() / error.norm()  # the nudge is relative to the state
    up, down = {"positive": (beta, 0.0), "negative": (0.0, -beta), "centered": (beta, -beta)}[variant]
    leaves = {**dict(model.named_parameters()), "x": x}

    def slopes(strength: float) -> tuple[Tensor, ...]:
        states = settled(strength, amplitude * error) if strength else free
        return torch.autograd.grad(energy(model, x, states, scales), list(leaves.values()))

    for name, high, low in zip(leaves, slopes(up), slopes(down), strict=True):
        expected = (high - low) / ((up - down) * amplitude)
        assert (found[name] - expected).norm() <= 1e-8 * expected.norm(), name


def _plain_states(model: nn.Module, x: Tensor, case: str) -> list[Tensor]:
    if case == "residual":
        s1 = torch.tanh(model.a(x))
        s2 = torch.tanh(model.b(s1) + model.side(x))
        return [s1, s2, model.c(s2)]
    s1 = torch.tanh(model.a(x))
    s2 = torch.tanh(model.c(s1))
    s3 = torch.tanh(model.b(s1) + model.d(s2) + s1)
    return [s1, s2, s3, model.e(s3)]


# -- solvers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp", "branches", "convolutions"])
@pytest.mark.parametrize(
    "solver",
    [
        ffebm.GaussSeidel(schedule="forward"),
        ffebm.GaussSeidel(schedule="backward"),
        ffebm.GaussSeidel(schedule="even_odd"),
        ffebm.Anderson(),
    ],
    ids=str,
)
def test_every_solver_finds_the_same_equilibrium_and_gradients(case: str, solver: ffebm.GaussSeidel) -> None:
    hybrid, x = double(case, nn.Tanh, 0.5)
    hybrid.set_gradient("implicit")
    expected, output = gradients(hybrid, x), hybrid(x)
    hybrid.configure(feedback=0.5, estimator=ffebm.EquilibriumPropagation(), solver=solver)
    torch.testing.assert_close(hybrid(x), output, rtol=0, atol=1e-10)
    hybrid.set_gradient("implicit")
    assert worst(gradients(hybrid, x), expected) <= 1e-8
