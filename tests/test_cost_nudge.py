"""`CostNudge`: equilibrium propagation nudged by β ∂C/∂s of the nudged states, against its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import BY_HAND, ByHand, relative
from networks import CASES, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm

EXACT = ffebm.GaussSeidel(rtol=1e-14)
VARIANTS = ("positive", "negative", "centered")


class Ends(nn.Module):
    """Two layers whose output has an activation."""

    def __init__(self, last: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 7), nn.Linear(7, 4), last()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.b(self.a(x).tanh()))
        return out


def squared(s: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (s - y).square().sum(1).mean()


PREDICTIONS: dict[str, Callable[[Tensor], Tensor]] = {"squared": lambda s: s, "cross-entropy": lambda s: s.softmax(1)}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"squared": squared, "cross-entropy": F.cross_entropy}


def nudged(block: ByHand, x: Tensor, y: Tensor, beta: float, cost: str) -> list[Tensor]:
    """s = σ(h − (β/c)(φ(s) − y)) at the output, by damped plain iteration."""
    last = len(block.layers) - 1
    with torch.no_grad():
        s = block.settle(x)[-1]
        for _ in range(300):
            states = block.settle(x, nudge={last: beta * (PREDICTIONS[cost](s) - y)})
            if float((states[-1] - s).abs().max()) < 1e-13:
                break
            s = s + (states[-1] - s) / (1 + beta / 2 if cost == "cross-entropy" else 1 + beta)
    torch.testing.assert_close(states[-1], s, rtol=1e-11, atol=1e-12)
    return states


def agrees(model: Any, layers: Any, x: Tensor, variant: Any, cost: Any, **options: Any) -> None:
    """The runtime's gradients are the contrast of the energies at these states."""
    hybrid = ffebm.convert(model, x, feedback=0.3, solver=EXACT, **options)
    block, beta = ByHand(layers, hybrid.blocks[0].module.scales), 0.4
    x = x.clone().requires_grad_()
    with torch.no_grad():
        free = block.settle(x)
    y = noise(*free[-1].shape, seed=9).double()
    y = y.softmax(1) if cost == "cross-entropy" else y
    up = free if variant == "negative" else nudged(block, x, y, beta, cost)
    down = free if variant == "positive" else nudged(block, x, y, -beta, cost)
    divisor = x.new_full((len(x),), beta * (2 if variant == "centered" else 1) * len(x))
    expected = block.contrast(up, down, divisor, x, [*model.parameters(), x])
    hybrid.set_gradient(ffebm.CostNudge(beta, variant, cost, scale=float(len(x))))
    given = x.detach().clone().requires_grad_()
    LOSSES[cost](hybrid(given), y).backward()
    for one, other in zip([*(p.grad for p in hybrid.parameters()), given.grad], expected, strict=True):
        assert one is not None
        assert relative(one, other) <= 1e-6


@pytest.mark.parametrize("cost", PREDICTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", BY_HAND)
def test_it_is_its_definition(case: str, variant: str, cost: str) -> None:
    model, x = CASES[case].make(nn.Tanh)
    model, x = model.double(), x.double()
    agrees(model, BY_HAND[case](model), x, variant, cost, **CASES[case].options)


@pytest.mark.parametrize("cost", PREDICTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("last", [nn.Tanh, nn.ReLU, nn.Softplus])
def test_outputs_with_activations(last: Callable[[], nn.Module], variant: str, cost: str) -> None:
    """An output's own nudge is then on both sides of its equation, inside σ."""
    model, x = seeded(lambda: Ends(last)).double(), noise(5, 6).double()
    layers = [
        ({-1: [model.a.weight]}, model.a.bias, torch.tanh),
        ({0: [model.b.weight]}, model.b.bias, model.last),
    ]
    agrees(model, layers, x, variant, cost)


def gradients(hybrid: ffebm.HybridModel, x: Tensor, gradient: Any, cost: str = "squared") -> list[Tensor]:
    hybrid.set_gradient(gradient)
    hybrid.zero_grad()
    output = hybrid(x)
    y = noise(*output.shape, seed=9).to(output)
    LOSSES[cost](output, y.softmax(1) if cost == "cross-entropy" else y).backward()
    return [p.grad.clone() for p in hybrid.parameters() if p.grad is not None]


@pytest.mark.parametrize("cost", PREDICTIONS)
@pytest.mark.parametrize("weights", ["tied", "free"])
def test_a_small_nudge_is_equilibrium_propagation(weights: Any, cost: Any) -> None:
    """With feedback weights of its own too, where it is a local rule."""
    model, x = seeded(lambda: Ends(nn.Identity)).double(), noise(5, 6).double()
    hybrid = ffebm.convert(model, x, feedback=0.5, solver=EXACT, feedback_weights=weights)
    expected = gradients(hybrid, x, ffebm.EquilibriumPropagation(1e-6), cost)
    found = gradients(hybrid, x, ffebm.CostNudge(1e-6, "positive", cost, scale=5.0), cost)
    assert all(relative(one, other) <= 1e-5 for one, other in zip(found, expected, strict=True))


def test_it_settles_under_a_strong_negative_nudge() -> None:
    """An output answers ten times as strongly to β = −0.9, so that sweeps contract by ten times the certified gain."""
    model, x = seeded(lambda: Ends(nn.Identity)), noise(5, 6)
    for kappa in (0.05, 0.5):
        hybrid = ffebm.convert(model, x, feedback=kappa, solver=ffebm.GaussSeidel(rtol=1e-6, on_failure="error"))
        found = gradients(hybrid, x, ffebm.CostNudge(0.9, "negative", scale=5.0))
        exact = ffebm.convert(model.double(), x.double(), feedback=kappa, solver=EXACT)
        expected = gradients(exact, x.double(), ffebm.CostNudge(0.9, "negative", scale=5.0))
        assert all(relative(one.double(), other) <= 1e-4 for one, other in zip(found, expected, strict=True))
        model.float()


def test_a_negative_nudge_that_leaves_no_minimum_says_so() -> None:
    """At β = −0.9 an output answers ten times as strongly, so that a loop gain of 0.9 is one of about 9."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)))
    hybrid = ffebm.convert(model, noise(5, 6), feedback=0.9)
    with pytest.raises(ffebm.ConvergenceError, match=r"give CostNudge a beta below 0.9, or variant='positive'"):
        gradients(hybrid, noise(5, 6), ffebm.CostNudge(0.9, "negative", scale=5.0))
    assert gradients(hybrid, noise(5, 6), ffebm.CostNudge(0.9, "positive", scale=5.0))


def test_inner_blocks_use_equilibrium_propagation() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh())
    hybrid = ffebm.convert(model.append(nn.Linear(6, 3)), noise(4, 5), gradient=ffebm.CostNudge(0.2))
    inner, outer = (block.module.estimator for block in hybrid.blocks)
    assert (inner, outer) == (ffebm.EquilibriumPropagation(), ffebm.CostNudge(0.2))
    name = hybrid.blocks[1].name
    assert f"equilibrium propagation nudged by the cost in {name}, whose outputs reach the loss" in hybrid.summary()
    with pytest.raises(ffebm.UnsupportedError, match=r"nudged by the cost is not defined in block_1, whose outputs"):
        hybrid.set_gradient("cost-nudged", blocks=["block_1"])


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "holomorphic"}, "variant is 'holomorphic'; expected 'positive', 'negative' or 'centered'"),
        ({"beta": 1.0}, r"beta is 1.0; expected a positive number below 10, or below 1 if"),
        ({"beta": 10.0, "variant": "positive"}, "beta is 10.0; expected a positive number"),
        ({"beta": True}, "beta is True; expected a positive number"),
        ({"cost": "hinge"}, "cost is 'hinge'; expected 'squared' or 'cross-entropy'"),
        ({"scale": 0}, "scale is 0; expected a positive number, which is 1 for a loss summed over the batch"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ffebm.InputError, match=message):
        ffebm.CostNudge(**settings)


def refused(model: nn.Module, gradient: ffebm.CostNudge, **options: Any) -> None:
    x = noise(4, 6)
    ffebm.convert(model, x, gradient=gradient, **options).train()(x).square().mean().backward()


def test_outputs_that_are_refused() -> None:
    slopes = seeded(lambda: Ends(nn.PReLU))
    with pytest.raises(ffebm.UnsupportedError, match=r"block_1: the output b has an activation with learned param"):
        refused(slopes, ffebm.CostNudge(0.1))
    plain = seeded(lambda: Ends(nn.Identity))
    with pytest.raises(ffebm.UnsupportedError, match=r"block_1: its states are read from devices, which are nudged"):
        refused(plain, ffebm.CostNudge(0.1), devices=ffebm.Devices(read_noise=0.01))
    with pytest.raises(ffebm.InputError, match=r"output b, of shape \(4, 4\), is not that of a cross-entropy over dim"):
        refused(plain, ffebm.CostNudge(0.1, cost="cross-entropy"))


def test_a_scale_that_is_not_the_batch_s_is_told_by_a_cross_entropy() -> None:
    x = noise(4, 6)
    hybrid = ffebm.convert(seeded(lambda: Ends(nn.Identity)), x, gradient=ffebm.CostNudge(0.1, cost="cross-entropy"))
    labels = torch.tensor([0, 1, 2, 3])
    F.cross_entropy(hybrid(x), labels, reduction="sum").backward()
    F.cross_entropy(hybrid(x), labels).backward()  # a weaker target, of which no more can be known
    hybrid.set_gradient(ffebm.CostNudge(0.1, cost="cross-entropy", scale=8.0))
    with pytest.raises(
        ffebm.InputError, match=r"with scale 8: its targets would be as small as -.* The classes must be in dim"
    ):
        F.cross_entropy(hybrid(x), labels).backward()


class OneValue(nn.Module):
    """A sample's output is one number, without a dimension of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) @ self.last


def test_a_cross_entropy_needs_classes() -> None:
    hybrid = ffebm.convert(seeded(OneValue), noise(4, 6), gradient=ffebm.CostNudge(0.1, cost="cross-entropy"))
    with pytest.raises(ffebm.InputError, match=r"block_1: the output .*, of shape \(4,\), has no classes"):
        hybrid(noise(4, 6)).sum().backward()
