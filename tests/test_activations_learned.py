"""PReLU: learned slopes, negative ones too, as states of a block, with gradients of their own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.activations.table import LeakyReLU, PReLU, from_aten
from ffebm_compiler.runtime.program.frame import Frame

SLOPES = {"one": [0.25], "each": [0.3, -0.6, 0.0, 1.7, -1.4, 0.9]}
ESTIMATORS = {
    "positive": ffebm.EquilibriumPropagation(),
    "negative": ffebm.EquilibriumPropagation(variant="negative"),
    "centered": ffebm.EquilibriumPropagation(variant="centered", beta=1e-3),
    "implicit": ffebm.ImplicitDifferentiation(),
}


class Net(nn.Module):
    """Three layers that settle together, a PReLU behind two of them, a skip over the middle one."""

    def __init__(self, slopes: list[float], convolutional: bool = True) -> None:
        super().__init__()
        made = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if convolutional else nn.Linear
        self.a, self.b, self.c = made(3, 6), made(6, 6), made(6, 2)
        self.first, self.second = nn.PReLU(len(slopes)), nn.PReLU(len(slopes))
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor(slopes))
            self.second.weight.copy_(torch.tensor(slopes).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.a(x))
        return self.c(self.second(self.b(h) + h))


def net(slopes: str, convolutional: bool = True) -> tuple[Net, Tensor]:
    return seeded(lambda: Net(SLOPES[slopes], convolutional)), noise(4, 3, 5, 5) if convolutional else noise(5, 3)


@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("convolutional", [True, False])
def test_gradients_of_slopes_against_float64_unrolled(slopes: str, estimator: str, convolutional: bool) -> None:
    model, x = net(slopes, convolutional)
    solver = ffebm.GaussSeidel(rtol=1e-6, max_sweeps=200)
    hybrid = ffebm.convert(model.eval(), x, feedback=0.3, gradient=ESTIMATORS[estimator], solver=solver)
    assert len(hybrid.blocks) == 1
    reference = copy.deepcopy(hybrid).double()
    reference.set_gradient("unrolled")
    reference.set_solver(ffebm.GaussSeidel(rtol=1e-12, max_sweeps=400))
    direction = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(1))
    for each in (hybrid, reference):
        each.zero_grad()
    (hybrid(x) * direction).sum().backward()
    (reference(x.double()) * direction.double()).sum().backward()
    for name, parameter in hybrid.named_parameters():
        got, want = parameter.grad, dict(reference.named_parameters())[name].grad
        assert got is not None
        assert want is not None
        assert float((got - want).norm() / want.norm()) < 1e-3, name
        assert float(F.cosine_similarity(got.double().flatten(), want.flatten(), dim=0)) > 0.999999, name


@pytest.mark.parametrize("slopes", SLOPES)
def test_one_layer_is_the_source_exactly(slopes: str) -> None:
    model, x = net(slopes)
    source = copy.deepcopy(model)
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1))
    assert torch.equal(hybrid(x), source(x))
    hybrid(x).square().sum().backward()
    source(x).square().sum().backward()
    for name, parameter in source.named_parameters():
        torch.testing.assert_close(dict(hybrid.named_parameters())[name].grad, parameter.grad)
    assert hybrid.plan.explain("first") == "analog, block_1: prelu has an energy potential"


def test_the_energy_is_stationary_in_the_preactivations() -> None:
    """E written in h: ∂E/∂h = c σ'(h) (h − field) = 0 at the equilibrium, by autograd of the energy."""
    model, x = net("each", convolutional=False)
    hybrid = ffebm.convert(model.double(), x.double(), feedback=0.3, solver=ffebm.GaussSeidel(rtol=1e-13))
    block, inputs, weights = hybrid.blocks[0].module, [x.double()], hybrid.blocks[0].weights
    settled = block.settle(inputs, weights)
    fields = [field.clone().requires_grad_() for field in settled.preactivations]
    frame = Frame(block.program, inputs, weights)
    states = [sigma.value(field) for sigma, field in zip(frame.activations, fields, strict=True)]
    energy = block.energy(inputs, weights, states, fields)
    for gradient in torch.autograd.grad(energy, fields):
        assert float(gradient.abs().max()) < 1e-9


@pytest.mark.parametrize("slope", [[0.25], [-1.5], [0.0], [1.7, -0.4, 0.3]])
def test_the_bound_activation_against_torch(slope: list[float]) -> None:
    a = torch.tensor(slope, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(7, max(len(slope), 3), 2, dtype=torch.float64, generator=generator).requires_grad_()
    k = torch.randn(h.shape, dtype=torch.float64, generator=generator)
    sigma = PReLU().bound([a])
    assert torch.equal(sigma.value(h), F.prelu(h, a))
    assert sigma.lipschitz == max(1.0, float(a.detach().abs().max()))
    by_h, by_a = torch.autograd.grad(F.prelu(h, a), (h, a), k)
    torch.testing.assert_close(sigma.derivative(h.detach()) * k, by_h)
    torch.testing.assert_close(sigma.parameter_gradients(h.detach(), k)[0].detach(), by_a)
    (slope_of_primitive,) = torch.autograd.grad(sigma.primitive(h).sum(), h)
    torch.testing.assert_close(slope_of_primitive, sigma.value(h).detach())
    for t in (1e-8, -1e-3, 0.7):
        with torch.no_grad():
            exact = (sigma.value(h + t * k) - sigma.value(h)) / t
            torch.testing.assert_close(sigma.quotient(h, k, t), exact, rtol=1e-6, atol=2e-8 if abs(t) < 1e-6 else 1e-12)
    with pytest.raises(ffebm.UnsupportedError, match="is not monotone"):
        sigma.potential(h)


def test_slopes_are_given_by_a_frame() -> None:
    with pytest.raises(ffebm.FFEBMError, match=r"the slopes of a PReLU are weights of its block: take it from"):
        PReLU().value(torch.zeros(2, 2))
    assert PReLU() == PReLU()


def test_the_certificate_follows_the_slopes() -> None:
    """Slopes of 4 allow four times the gain: γ shrinks with them, and what is told stays κ."""
    model, x = net("one", convolutional=False)
    hybrid = ffebm.convert(model, x, feedback=0.2)
    scales = hybrid.blocks[0].module.scales
    with torch.no_grad():
        for name in ("first.weight", "second.weight"):
            hybrid.get_parameter(name).fill_(-4.0)
    hybrid.recertify()
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.2, rel=1e-2)
    assert hybrid.blocks[0].module.scales[-1] / hybrid.blocks[0].module.scales[0] < 0.3 * scales[-1] / scales[0]
    hybrid.train()
    hybrid(x).square().sum().backward()
    with torch.no_grad():
        hybrid.get_parameter("first.weight").fill_(-8.0)
    hybrid(x)
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.2, rel=0.05)


def test_states_are_those_of_the_forward_after_a_step() -> None:
    model, x = net("each", convolutional=False)
    hybrid = ffebm.convert(model, x)
    hybrid(x)
    before = [state.clone() for state in hybrid.blocks[0].states]
    with torch.no_grad():
        hybrid.get_parameter("first.weight").add_(1.0)
    for state, kept in zip(hybrid.blocks[0].states, before, strict=True):
        assert torch.equal(state, kept)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = net("each")
    hybrid = ffebm.convert(model, x)
    hybrid.save(tmp_path / "hybrid")
    again = ffebm.load(tmp_path / "hybrid", seeded(lambda: Net(SLOPES["each"])))
    assert torch.equal(again(x), hybrid(x))
    assert torch.equal(copy.deepcopy(hybrid)(x), hybrid(x))


def test_slopes_that_depend_on_the_input_are_digital() -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.prelu(self.a(x), x.mean().reshape(1)))

    plan = ffebm.plan(Dynamic(), torch.randn(3, 4))
    (op,) = [op for op in plan.graph.operations if "prelu" in op.target]
    assert op.reason == "a parameter of prelu depends on the input"


class Averaged(nn.Module):
    """A random leaky ReLU that never draws."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rrelu(x, -0.5, -0.1)


@pytest.mark.parametrize(("module", "slope"), [(nn.LeakyReLU(-0.7), -0.7), (Averaged(), -0.3)])
def test_leaky_relatives_have_an_energy(module: nn.Module, slope: float) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 7), module, nn.Linear(7, 3))).eval()
    hybrid = ffebm.convert(model, noise(4, 6), hardware="ideal")
    (block,) = hybrid.blocks
    activation = block.module.program.layers[0].activation
    assert isinstance(activation, LeakyReLU)
    assert activation.negative_slope == pytest.approx(slope)
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(noise(4, 6)), model(noise(4, 6)))


@pytest.mark.parametrize("train", [False, True])
def test_a_random_leaky_relu_is_the_sources_in_both_modes(train: bool) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 7), nn.RReLU(0.1, 0.5), nn.Linear(7, 3))).train(train)
    hybrid = ffebm.convert(copy.deepcopy(model), noise(4, 6)).train(train)
    torch.manual_seed(0)
    got = hybrid(noise(4, 6))
    torch.manual_seed(0)
    torch.testing.assert_close(got, model(noise(4, 6)))


def test_a_random_slope_is_no_activation() -> None:
    assert from_aten("rrelu", (0.1, 0.3, True)) is None
