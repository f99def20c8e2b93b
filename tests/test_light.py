"""Light products: bfloat16 where its rounding cannot be seen in a gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from finite_differences import cosine, parameter_gradients
from networks import CASES, converted, noise
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.phases.base import onto
from ffebm_compiler.runtime.program import light
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.program.light import full_sweeps, light_pays


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Light products on every processor, and in blocks of every size."""
    monkeypatch.setattr(light, "_SMALLEST", 0)
    monkeypatch.setattr(light, "_SMALLEST_OF_CONVOLUTIONS", 0)
    monkeypatch.setattr(light, "_multiplies_bfloat16", lambda: True)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("estimator", ["ep", "implicit"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Hardsigmoid])
@pytest.mark.parametrize("case", sorted(CASES))
def test_gradients_are_as_exact(case: str, activation: type[nn.Module], estimator: str) -> None:
    hybrid, x = converted(case, activation)
    hybrid = copy.deepcopy(hybrid).train()
    hybrid.set_gradient(estimator)
    exact = copy.deepcopy(hybrid).double()
    exact.set_gradient("implicit")
    exact.set_solver(ffebm.GaussSeidel(rtol=1e-10))
    for kappa in (0.1, 0.5):
        hybrid.set_feedback(kappa)
        exact.set_feedback(kappa)
        found, expected = parameter_gradients(hybrid, x), parameter_gradients(exact, x.double())
        largest = max(float(gradient.norm()) for gradient in expected.values())
        for name, gradient in expected.items():
            if gradient.norm() > 1e-9 * largest:
                assert cosine(found[name], gradient) >= 0.9999, f"κ = {kappa}: {name}"


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("case", sorted(CASES))
def test_states_in_evaluation_are_within_their_tolerance(
    case: str, activation: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid, x = converted(case, activation)
    hybrid = copy.deepcopy(hybrid).eval()
    exact = copy.deepcopy(hybrid).double()
    exact.set_solver(ffebm.GaussSeidel(rtol=1e-10))
    light_products: list[bool] = []
    lightly = Frame.lightly

    def watched(frame: Frame) -> object:
        light_products.append(frame.light)
        return lightly(frame)

    monkeypatch.setattr(Frame, "lightly", watched)
    for kappa in (0.03, 0.1, 0.3):
        hybrid.set_feedback(kappa)
        exact.set_feedback(kappa)
        with torch.no_grad():
            found, expected = hybrid(x).double(), exact(x.double())
        assert (found - expected).norm() <= 1e-4 * expected.norm()
        assert all(block.module.last is None or block.module.last.converged for block in hybrid.blocks)
    assert any(light_products)
    hybrid.set_feedback(0.03)
    hybrid.set_solver(ffebm.GaussSeidel(precision="full"))
    light_products.clear()
    hybrid(x)
    assert not any(light_products)


@pytest.mark.usefixtures("everywhere")
def test_only_certified_blocks_in_single_precision_are_light(monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid, x = converted("mlp", nn.ReLU)
    hybrid = copy.deepcopy(hybrid)
    hybrid.set_feedback(0.5)
    seen: list[bool] = []
    lightly = Frame.lightly

    def watched(frame: Frame) -> object:
        seen.append(frame.light)
        return lightly(frame)

    monkeypatch.setattr(Frame, "lightly", watched)

    def is_light(model: ffebm.HybridModel, value: torch.Tensor) -> bool:
        seen.clear()
        model(value).sum().backward()
        return any(seen)

    assert is_light(hybrid.train(), x)
    assert not is_light(hybrid.eval(), x)  # it settles before a product may be light
    assert not is_light(copy.deepcopy(hybrid).double().train(), x.double())
    hybrid.set_solver(ffebm.GaussSeidel(precision="full"))
    assert not is_light(hybrid.train(), x)
    hybrid.set_solver(None)
    hybrid.set_feedback("symmetric")  # nothing certifies how small changes are
    assert not is_light(hybrid, x)


def test_small_blocks_and_other_processors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid, _ = converted("mlp", nn.ReLU)
    program = hybrid.blocks[0].module.program
    monkeypatch.setattr(light, "_multiplies_bfloat16", lambda: True)
    small, large = (Frame(program, [torch.zeros(rows, 64)], [None] * program.weights) for rows in (2, 1024))
    assert not light_pays(small)
    assert light_pays(large)
    monkeypatch.setattr(light, "_multiplies_bfloat16", lambda: False)
    assert not light_pays(large)


@pytest.mark.parametrize(("rtol", "rate", "sweeps"), [(5e-5, 0.06, 1), (5e-4, 0.3, 2), (5e-5, 0.3, 4), (5e-4, 0.0, 1)])
def test_sweeps_are_full_until_roundings_are_a_quarter_of_the_tolerance(rtol: float, rate: float, sweeps: int) -> None:
    assert full_sweeps(rtol, rate) == sweeps
    assert rate ** (sweeps + 1) * 2**-9 <= rtol / 4
    assert sweeps == 1 or rate**sweeps * 2**-9 > rtol / 4


def test_a_sum_is_written_over_a_change_only_in_memory_of_its_own() -> None:
    moved, base = noise(3, 4), noise(3, 4, seed=1)
    own, shared = noise(3, 4, seed=2), moved.view(3, 4)
    expected = own + base, shared + base, noise(3, 1, seed=3).expand(3, 4) + base
    assert onto(own, base, moved) is own
    for change in (shared, noise(3, 1, seed=3).expand(3, 4)):
        assert onto(change, base, moved) is not change
    kept = own.clone()
    assert onto(kept, base, None) is not kept
    torch.testing.assert_close(moved, noise(3, 4))
    torch.testing.assert_close(own, expected[0])
    torch.testing.assert_close(onto(shared, base, moved), expected[1])
    torch.testing.assert_close(onto(noise(3, 1, seed=3).expand(3, 4), base, moved), expected[2])
