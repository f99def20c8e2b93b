"""Training settles as far as its gradients need, evaluation as far as its states do."""

from __future__ import annotations

import copy

import pytest
import torch
from finite_differences import cosine, parameter_gradients
from networks import CASES, converted, noise, seeded, warmed
from torch import Tensor, nn

import ffebm_compiler as ffebm


def assert_gradients_at(
    hybrid: ffebm.HybridModel, exact: ffebm.HybridModel, x: Tensor, feedbacks: tuple[float, ...]
) -> None:
    """Every parameter's gradient has a cosine of at least 0.9999 with the exact one, at each loop gain."""
    for kappa in feedbacks:
        hybrid.set_feedback(kappa)
        exact.set_feedback(kappa)
        found, expected = parameter_gradients(hybrid, x), parameter_gradients(exact, x.double())
        for name, gradient in expected.items():
            assert cosine(found[name], gradient) >= 0.9999, f"κ = {kappa}: {name}"


def sweeps(hybrid: ffebm.HybridModel) -> list[int]:
    """Free sweeps of the last forward, of the blocks that have feedback."""
    blocks = [block.module for block in hybrid.blocks if block.module.program.coupled]
    return [block.last.sweeps for block in blocks if block.last is not None]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, nn.Tanh, nn.GELU])
def test_gradients_in_training_at_the_default_tolerances(case: str, activation: type[nn.Module]) -> None:
    """More activations and loop gains: `benchmarks/training_tolerance.py`."""
    hybrid, x = converted(case, activation)
    hybrid = copy.deepcopy(hybrid).train()
    exact = copy.deepcopy(hybrid).double()
    exact.set_gradient("implicit")
    assert_gradients_at(hybrid, exact, x, (0.1, 0.5, 0.9))


@pytest.mark.parametrize("case", ["mlp", "residual", "cnn"])
@pytest.mark.parametrize(("energy", "feedback"), [("resistive", 1.0), ("unamplified", 0.1), ("drn", "symmetric")])
def test_gradients_of_conductances_in_training(case: str, energy: str, feedback: float | str) -> None:
    """Weights of one sign, where errors have one sign too, and batch norm that subtracts most of them."""
    made = CASES[case]
    model, x = made.make(nn.ReLU)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.abs_()
    options = {"digital_drive": True} if case == "cnn" else made.options
    hybrid = ffebm.convert(model, x, energy=energy, feedback=feedback, gradient="implicit", **options).train()
    assert any(block.module.program.coupled for block in hybrid.blocks)
    exact = copy.deepcopy(hybrid).double()
    found, expected = parameter_gradients(hybrid, x), parameter_gradients(exact, x.double())
    size = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient.norm() > 1e-9 * size:
            assert cosine(found[name], gradient) >= 0.9999, name


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("estimator", ["ep", "implicit"])
def test_gradients_of_nonnegative_weights_in_training(seed: int, estimator: str) -> None:
    """Errors add up, a sweep contracts by κ itself, and batch norm subtracts most of an error."""
    case = CASES["cnn"]
    x = noise(*case.shape, seed=20 + seed)
    model = warmed(seeded(lambda: case.build(nn.ReLU), seed), x)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.abs_()
    hybrid = ffebm.convert(model, x, digital_drive=True, gradient=estimator).train()
    assert all(block.module.gain.setting.coherent for block in hybrid.blocks if block.module.program.coupled)
    exact = copy.deepcopy(hybrid).double()
    exact.set_gradient("implicit")
    assert_gradients_at(hybrid, exact, x, (0.1, 0.5, 0.9))


@pytest.mark.parametrize("kappa", [0.5, 0.9])
def test_training_takes_no_more_sweeps_than_evaluation(kappa: float) -> None:
    hybrid, x = converted("mlp", nn.ReLU)
    hybrid = copy.deepcopy(hybrid)
    hybrid.set_feedback(kappa)
    exact = copy.deepcopy(hybrid).double().eval()(x.double())
    outputs, taken = [], []
    for training in (False, True):
        outputs.append(hybrid.train(training)(x))
        taken.append(sweeps(hybrid)[0])
    assert taken[1] <= taken[0]
    assert (outputs[0] - exact).norm() <= 1e-4 * exact.norm()
    assert (outputs[1] - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("training", [False, True])
def test_blocks_are_in_the_mode_of_the_model_that_was_converted(training: bool) -> None:
    model, x = CASES["mlp"].make(nn.Tanh)
    hybrid = ffebm.convert(model.train(training), x)
    assert [block.module.training for block in hybrid.blocks] == [training]


def test_rtol_holds_for_both_purposes() -> None:
    hybrid, x = converted("mlp", nn.Tanh)
    hybrid = copy.deepcopy(hybrid)
    exact = copy.deepcopy(hybrid).double().eval()(x.double())
    hybrid.set_solver(ffebm.GaussSeidel(rtol=1e-6))
    for training in (False, True):
        assert (hybrid.train(training)(x) - exact).norm() <= 3e-6 * exact.norm()


@pytest.mark.parametrize("case", ["mlp", "residual", "branches", "cnn"])
@pytest.mark.parametrize("estimator", ["ep", "implicit", "unrolled"])
def test_over_relaxed_sweeps_end_at_the_same_equilibrium_sooner(case: str, estimator: str) -> None:
    hybrid, x = converted(case, nn.ReLU)
    hybrid = copy.deepcopy(hybrid).double()
    hybrid.set_feedback(0.9)
    hybrid.set_gradient(estimator)
    found, taken = [], []
    for relaxation in (1.0, 1.15):
        hybrid.set_solver(ffebm.GaussSeidel(rtol=1e-10, relaxation=relaxation))
        found.append(parameter_gradients(hybrid, x.double()))
        taken.append(sum(sweeps(hybrid)))
    assert taken[1] <= taken[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-7, atol=1e-8 * float(gradient.abs().max()))


def test_over_relaxation_that_does_not_pay_is_given_up() -> None:
    hybrid, x = converted("projections", nn.GELU)
    hybrid = copy.deepcopy(hybrid)
    hybrid.set_feedback(0.9)
    exact = copy.deepcopy(hybrid).double()
    state = exact(x.double())
    exact.set_gradient("implicit")
    expected = parameter_gradients(exact, x.double())
    hybrid.set_solver(ffebm.GaussSeidel(relaxation=1.999))
    assert (hybrid(x) - state).norm() <= 1e-3 * state.norm()
    exact.set_solver(ffebm.GaussSeidel(relaxation=1.999))
    exact.set_gradient("unrolled")  # it has to give up where the phase did
    for name, gradient in parameter_gradients(exact, x.double()).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-8 * float(gradient.abs().max()))


@pytest.mark.parametrize("estimator", ["ep", "implicit"])
def test_a_block_that_contracts_less_than_blocks_are_expected_to(estimator: str) -> None:
    """Its errors fall by 0.7 a sweep, where 0.54 is expected at κ = 0.9, and batch norm behind it subtracts a mean."""
    case = CASES["cnn"]
    model, x = case.make(nn.Hardsigmoid)
    hybrid = ffebm.convert(model, x, gradient=estimator, digital_drive=True).train()
    exact = copy.deepcopy(hybrid).double()
    exact.set_gradient("implicit")
    assert_gradients_at(hybrid, exact, x, (0.9,))
