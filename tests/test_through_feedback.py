"""The gradient through γ, against finite differences in which γ is measured anew at every weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import BY_HAND, ByHand, relative
from finite_differences import squared_error
from networks import CASES, MLP, converted, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.energies.through_gain import leading_pair
from ffebm_compiler.runtime.program.frame import Frame

EXACT = ffebm.GaussSeidel(rtol=1e-14)
DEPTHS = {"two": (0, 1), "mlp": (0, 1, 2, 3), "residual": (0, 1, 2), "branches": (0, 1, 2, 3)}
ESTIMATORS = (
    ffebm.EquilibriumPropagation(1e-5, "centered", through_feedback=True),
    ffebm.EquilibriumPropagation(0.05, "holomorphic", 8, through_feedback=True),
    ffebm.CostNudge(1e-5, through_feedback=True),
    ffebm.Implicit(through_feedback=True),
    ffebm.Implicit("cg", through_feedback=True),
    ffebm.Unrolled(through_feedback=True),
    ffebm.TruncatedBackprop(40, through_feedback=True),
    ffebm.RecurrentBackprop(through_feedback=True),
)


def make(case: str, kappa: float, **options: Any) -> tuple[ffebm.HybridModel, Any, Tensor]:
    if case == "two":
        model, x = seeded(lambda: MLP((6, 7, 4), nn.Tanh)).double(), noise(5, 6).double()
    else:
        model, x = CASES[case].make(nn.Tanh)
        model, x = model.double(), x.double()
        options = {**CASES[case].options, **options}
    return ffebm.convert(model, x, feedback=kappa, solver=EXACT, **options), model, x


def gradients(hybrid: ffebm.HybridModel, x: Tensor, gradient: Any) -> dict[str, Tensor]:
    hybrid.set_gradient(gradient)
    hybrid.zero_grad()
    squared_error(hybrid(x).double()).backward()
    return {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}


def layers_of(case: str, model: Any) -> Any:
    return BY_HAND["mlp" if case == "two" else case](model)


def radius(layers: Any, depths: Sequence[int], gain: float) -> float:
    """ρ(A) of layers with slopes of at most 1, with numpy's singular values."""
    matrix = np.zeros((len(layers), len(layers)))
    for later, (sources, _, _) in enumerate(layers):
        for earlier, weights in sources.items():
            if earlier >= 0:
                norm = np.linalg.norm(sum(w.detach().numpy() for w in weights), 2)
                matrix[earlier, later] = matrix[later, earlier] = gain ** ((depths[later] - depths[earlier]) / 2) * norm
    return float(np.linalg.eigvalsh(matrix)[-1])


def scales_holding(layers: Any, depths: Sequence[int], wanted: float) -> list[float]:
    """c_l = g^depth with the g for which ρ(A) is what is wanted, by bisection."""
    lo, hi = -20.0, 10.0
    for _ in range(200):
        middle = (lo + hi) / 2
        lo, hi = (middle, hi) if radius(layers, depths, np.exp(middle)) < wanted else (lo, middle)
    return [float(np.exp(lo) ** (depth - max(depths))) for depth in depths]


@pytest.mark.parametrize("case", DEPTHS)
@pytest.mark.parametrize("kappa", [0.1, 0.6])
def test_the_total_gradient_is_the_finite_difference_with_the_loop_gain_held(case: str, kappa: float) -> None:
    hybrid, model, x = make(case, kappa)
    depths = DEPTHS[case]
    held = hybrid.blocks[0].module.scales
    gain = held[depths.index(max(depths) - 1)] ** -1
    wanted = radius(layers_of(case, model), depths, gain)
    assert wanted == pytest.approx(np.sqrt(kappa) / 1.005, rel=1e-3)  # the margin of the measurement
    np.testing.assert_allclose(scales_holding(layers_of(case, model), depths, wanted), held, rtol=1e-9)
    found = gradients(hybrid, x, ffebm.Implicit(through_feedback=True))
    partial = gradients(hybrid, x, ffebm.Implicit())
    away, step = 0.0, 1e-4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            direction = noise(*parameter.shape, seed=11).double()
            losses = []
            for factor in (-2, -1, 1, 2):
                parameter.add_(direction, alpha=factor * step)
                layers = layers_of(case, model)
                block = ByHand(layers, scales_holding(layers, depths, wanted))
                losses.append(float(squared_error(block.settle(x)[-1])))
                parameter.sub_(direction, alpha=factor * step)
            expected = (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)
            slope = float((found[name] * direction).sum())
            scale = float(found[name].norm() * direction.norm())
            assert slope == pytest.approx(expected, rel=1e-6, abs=1e-7 * scale), name
            away = max(away, abs(float((partial[name] * direction).sum()) - expected) / scale)
    assert away > 1e-4  # without the term it is another gradient


@pytest.mark.parametrize("case", DEPTHS)
def test_every_estimator_has_the_option(case: str) -> None:
    hybrid, _, x = make(case, 0.4)
    expected = gradients(hybrid, x, ffebm.Implicit(through_feedback=True))
    for estimator in ESTIMATORS:
        for name, gradient in gradients(hybrid, x, estimator).items():
            assert relative(gradient, expected[name]) <= 1e-6, (estimator, name)
    hybrid.set_solver(ffebm.Anderson(rtol=1e-13))
    for name, gradient in gradients(hybrid, x, ffebm.Unrolled(through_feedback=True)).items():
        assert relative(gradient, expected[name]) <= 1e-6, name


def test_in_a_two_layer_block_it_is_the_rank_one_term_of_the_top_singular_pair() -> None:
    hybrid, model, x = make("two", 0.5)
    total = gradients(hybrid, x, ffebm.Implicit(through_feedback=True))
    partial = gradients(hybrid, x, ffebm.Implicit())
    second = model.layers[1]
    gamma = 1 / hybrid.blocks[0].module.scales[0]
    block = ByHand(layers_of("two", model), hybrid.blocks[0].module.scales)
    with torch.no_grad():
        states = block.settle(x)
    given = [s.detach() for s in states]
    # e_1, by implicit differentiation of the two states.
    shift = torch.zeros_like(given[0]).requires_grad_()
    shifted = [(block.drive(0, given, x) + shift + gamma * given[1] @ second.weight).tanh(), given[1]]
    for _ in range(200):
        shifted[1] = block.drive(1, shifted, x)
        shifted[0] = (block.drive(0, shifted, x) + shift + gamma * shifted[1] @ second.weight).tanh()
    shifted[1] = block.drive(1, shifted, x)
    (current,) = torch.autograd.grad(squared_error(shifted[1]), shift)
    u, sigma, vt = torch.linalg.svd(second.weight.detach())
    slope = (current * (given[1] @ second.weight.detach())).sum()
    term = slope * (-2 * gamma / sigma[0]) * torch.outer(u[:, 0], vt[0])
    torch.testing.assert_close(total["layers.1.weight"] - partial["layers.1.weight"], term, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(total["layers.0.weight"], partial["layers.0.weight"], rtol=1e-12, atol=0)


def by_recertifying(hybrid: ffebm.HybridModel, x: Tensor, found: dict[str, Tensor], names: Sequence[str]) -> None:
    """Finite differences in which the runtime itself sets the amplifiers anew."""
    step = 1e-5
    with torch.no_grad():
        for name in names:
            parameter = hybrid.get_parameter(name)
            direction = noise(*parameter.shape, seed=11).double().reshape(parameter.shape)
            losses = []
            for factor in (-2, -1, 1, 2):
                parameter.add_(direction, alpha=factor * step)
                hybrid.recertify()
                losses.append(float(squared_error(hybrid(x))))
                parameter.sub_(direction, alpha=factor * step)
            hybrid.recertify()
            expected = (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * step)
            scale = float(found[name].norm() * direction.norm())
            assert float((found[name] * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-6 * scale), name


@pytest.mark.parametrize("case", ["two", "mlp", "projections", "branches"])
def test_a_resistive_block_follows_its_amplifiers_gains(case: str) -> None:
    options = {}
    if case == "two":
        model, x = seeded(lambda: MLP((6, 7, 4), nn.Hardsigmoid)), noise(5, 6).double()
    else:
        model, x = CASES[case].make(nn.Hardsigmoid)
        options = CASES[case].options
    model, x = model.double(), x.double()
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=0.3, solver=EXACT, **options)
    found = gradients(hybrid, x, ffebm.Implicit(through_feedback=True))
    partial = gradients(hybrid, x, ffebm.Implicit())
    assert max(relative(partial[name], gradient) for name, gradient in found.items()) > 1e-3
    by_recertifying(hybrid, x, found, list(found))
    unrolled = gradients(hybrid, x, ffebm.Unrolled(through_feedback=True))
    assert max(relative(unrolled[name], gradient) for name, gradient in found.items()) <= 1e-8


def test_learned_slopes_above_one_count_in_the_norms() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.3, -0.7, 1.4, 0.0, -1.9, 0.2]))
    x = noise(7, 5).double()
    hybrid = ffebm.convert(model, x, feedback=0.4, solver=EXACT)
    found = gradients(hybrid, x, ffebm.Implicit(through_feedback=True))
    by_recertifying(hybrid, x, found, list(found))


def test_feedback_weights_of_their_own_count_in_both_directions() -> None:
    model, x = seeded(lambda: MLP((6, 7, 5, 4), nn.Tanh)).double(), noise(5, 6).double()
    hybrid = ffebm.convert(model, x, feedback=0.4, feedback_weights="free", solver=EXACT)
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if name not in dict(model.named_parameters()):
                parameter.add_(0.2 * noise(*parameter.shape, seed=3).double())
    hybrid.recertify()
    found = gradients(hybrid, x, ffebm.Implicit(through_feedback=True))
    assert len(found) > len(list(model.parameters()))
    by_recertifying(hybrid, x, found, list(found))
    for estimator in (ffebm.TruncatedBackprop(60, True), ffebm.RecurrentBackprop(True), ffebm.Unrolled(True)):
        for name, gradient in gradients(hybrid, x, estimator).items():
            assert relative(gradient, found[name]) <= 1e-8, (estimator, name)


def test_the_check_compares_total_gradients_with_each_other() -> None:
    hybrid, _, x = make("two", 0.6)
    held = ffebm.check_gradients(hybrid, x, squared_error)
    hybrid.set_gradient(ffebm.Implicit(through_feedback=True))
    total = ffebm.check_gradients(hybrid, x, squared_error)
    assert total.own == "implicit"
    for report in (held, total):
        assert report.worst("implicit")[1].relative_error <= 1e-8
        assert report.worst("ep")[1].cosine >= 0.999999


def test_symmetric_feedback_has_no_such_term() -> None:
    model, x = seeded(lambda: MLP((6, 7, 4), nn.Tanh)).double(), noise(5, 6).double()
    hybrid = ffebm.convert(model, x, feedback="symmetric", solver=EXACT)
    expected = gradients(hybrid, x, "implicit")
    for name, gradient in gradients(hybrid, x, ffebm.Implicit(through_feedback=True)).items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("case", ["convolutions", "transformer", "tied", "gains"])
def test_it_works_in_every_kind_of_block_in_float32(case: str) -> None:
    hybrid, x = converted(case, nn.Tanh)
    hybrid = copy.deepcopy(hybrid)
    hybrid.set_feedback(0.5)
    exact = copy.deepcopy(hybrid).double()
    expected = gradients(exact, x.double(), ffebm.Implicit(through_feedback=True))
    found = gradients(hybrid, x, ffebm.EquilibriumPropagation(through_feedback=True))
    for name, gradient in expected.items():
        if gradient.norm() > 1e-9:
            assert relative(found[name].double(), gradient) <= 0.02, name


@torch.no_grad()  # type: ignore[untyped-decorator]
def test_the_leading_pair_is_that_of_the_operator() -> None:
    hybrid = copy.deepcopy(converted("convolutions", nn.Tanh)[0]).double()
    module = hybrid.blocks[0].module
    frame = module.gain.measured(hybrid.operands_of(module.name)[1])
    assert isinstance(frame, Frame)
    edges = [(k, m) for m, above in enumerate(module.program.upstream) for k in above]
    for earlier, later in edges:
        with torch.no_grad():
            found = leading_pair(frame, earlier, later)
        assert found is not None
        sigma, left, right = found
        count = right.numel()
        slots: list[Tensor | None] = [None] * len(module.program.layers)
        columns = []
        for row in torch.eye(count, dtype=torch.float64):
            slots[earlier] = row.reshape(right.shape)
            columns.append(frame.tangent(later, slots).reshape(-1))  # type: ignore[union-attr]
        dense = torch.stack(columns, 1)
        expected = torch.linalg.svdvals(dense)[0]
        assert sigma == pytest.approx(float(expected), rel=1e-12)
        torch.testing.assert_close(dense @ right.reshape(-1), sigma * left.reshape(-1), rtol=1e-8, atol=1e-9)
    assert len(edges) == 3


@pytest.mark.parametrize(
    "kind",
    [
        ffebm.EquilibriumPropagation,
        ffebm.Implicit,
        ffebm.Unrolled,
        ffebm.CoupledLearning,
        ffebm.ContrastiveLearning,
        ffebm.CostNudge,
        ffebm.TruncatedBackprop,
        ffebm.RecurrentBackprop,
    ],
)
def test_the_option_is_true_or_false(kind: Callable[..., object]) -> None:
    with pytest.raises(ffebm.InputError, match="through_feedback is 'yes'; expected True or False"):
        kind(through_feedback="yes")
