"""Blocks whose feedback has weights of its own: states, gradients and certificate, against the equations."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import CASES, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import EquilibriumPropagation, FeedbackWeights, ImplicitDifferentiation

_LOCAL = EquilibriumPropagation(1e-4, variant="centered")


def _own(case: str, activation: type[nn.Module] = nn.Tanh, feedback: float = 0.4) -> tuple[ffebm.HybridModel, Tensor]:
    """A case in float64 whose feedback weights are some way from the forward ones."""
    model, x = CASES[case].make(activation)
    options = {**CASES[case].options, "feedback_weights": "free", "feedback": feedback}
    hybrid = ffebm.convert(model.double(), x.double(), **options)
    _perturbed(hybrid, 0.5)
    return hybrid, x.double()


def _perturbed(hybrid: ffebm.HybridModel, asymmetry: float) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name in hybrid.feedback_names:
            weight = hybrid.get_parameter(name)
            drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.add_(drawn * asymmetry * weight.norm() / math.sqrt(weight.numel()))
    hybrid.recertify()


def _gradients(hybrid: ffebm.HybridModel, x: Tensor, loss: Any) -> dict[str, Tensor]:
    hybrid.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    loss(hybrid(x)).backward()
    found = {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return found | {"x": x.grad.clone()}


def _squares(output: Tensor) -> Tensor:
    return (output - noise(*output.shape, seed=9).to(output)).square().sum()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(_relative(found[name], value) for name, value in expected.items())


# -- an implementation written from the equations ----------------------------------------------


class _Field:
    """s_l = σ(d_l + Σ_m γ_{l,m} B_{ml}ᵀ s_m) of a small DAG, by fixed-point iteration and literal differences.

    A layer is the list of its edges (source, name, function of value and weight); source 0 is the input, l + 1 state l.
    """

    def __init__(self, layers: list[list[tuple[int, str, Any]]], linear: set[int], weights: dict[str, Tensor]) -> None:
        self.layers, self.linear, self.weights = layers, linear, weights
        self.depth = [0] * len(layers)
        for index, edges in enumerate(layers):
            self.depth[index] = max([self.depth[source - 1] + 1 for source, _, _ in edges if source], default=0)

    def settle(self, x: Tensor, g: float, nudge: Tensor | None = None) -> list[Tensor]:
        values: list[Tensor] = []
        for edges, index in zip(self.layers, range(len(self.layers)), strict=True):
            values.append(self._state(index, sum(self._drive(edges, [x, *values]))))
        for _ in range(400):
            for index in range(len(self.layers)):
                values[index] = self._state(index, self.field(index, x, values, g, nudge))
        return values

    def _state(self, index: int, field: Tensor) -> Tensor:
        return field if index in self.linear else torch.tanh(field)

    def _drive(self, edges: list[tuple[int, str, Any]], values: list[Tensor]) -> list[Tensor]:
        return [
            apply(values[source], self.weights[name], self.weights[f"{name[0]}.bias"]) for source, name, apply in edges
        ]

    def field(self, index: int, x: Tensor, values: list[Tensor], g: float, nudge: Tensor | None) -> Tensor:
        total = sum(self._drive(self.layers[index], [x, *values]))
        for later, edges in enumerate(self.layers):
            for source, name, apply in edges:
                if source == index + 1:  # Bᵀ s_m is the gradient of ⟨s_m, B s⟩ by s
                    gamma = g ** (self.depth[later] - self.depth[index])
                    total = total + gamma * self._back(
                        apply, values[index], self.weights[f"{name}_feedback"], values[later]
                    )
        if nudge is not None and index == len(self.layers) - 1:
            total = total - nudge
        return total

    @staticmethod
    def _back(apply: Any, at: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        at = at.detach().clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad((apply(at, weight, None) * value).sum(), at)[0]

    def gradients(self, x: Tensor, g: float, loss: Any, beta: float) -> dict[str, Tensor]:
        """e_l s_kᵀ for the forward weights, γ e_l s_mᵀ for the feedback weights, and Σ Wᵀ e_l for the input."""
        states = self.settle(x, g)
        output = states[-1].detach().clone().requires_grad_()
        (delta,) = torch.autograd.grad(loss(output), output)
        each = tuple(range(1, delta.dim()))
        size = (states[-1].square().mean(each, keepdim=True) / delta.square().mean(each, keepdim=True)).sqrt()
        plus, minus = (self.settle(x, g, sign * beta * size * delta) for sign in (1, -1))
        deepest = max(self.depth)
        e = [
            -(g ** (depth - deepest)) * (a - b) / (2 * beta * size.reshape(-1, *[1] * (a.dim() - 1)))
            for depth, a, b in zip(self.depth, plus, minus, strict=True)
        ]
        found: dict[str, Tensor] = {"x": torch.zeros_like(x)}
        for index, edges in enumerate(self.layers):
            for source, name, apply in edges:
                here = x if not source else states[source - 1]
                weight = self.weights[name].detach().clone().requires_grad_()
                bias = self.weights[f"{name[0]}.bias"].detach().clone().requires_grad_()
                parts = torch.autograd.grad((apply(here, weight, bias) * e[index]).sum(), [weight, bias])
                found[name], found[f"{name[0]}.bias"] = parts
                if not source:
                    found["x"] = found["x"] + self._back(apply, x, self.weights[name], e[index])
                    continue
                gamma = g ** (self.depth[index] - self.depth[source - 1])
                own = self.weights[f"{name}_feedback"].detach().clone().requires_grad_()
                pulled = (apply(gamma * e[source - 1], own, None) * states[index]).sum()
                found[f"{name}_feedback"] = torch.autograd.grad(pulled, own)[0]
        return found


class _Joined(nn.Module):
    """Convolutions with a stride, and a second path that skips a state: cycles of odd length."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.c = nn.Conv2d(5, 3, 3, padding=1)
        self.d = nn.Conv2d(4, 3, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.tanh(self.a(x))
        return torch.tanh(self.c(torch.tanh(self.b(s))) + self.d(s))


def _joined() -> tuple[nn.Module, Tensor, list[list[tuple[int, str, Any]]], set[int]]:
    conv = {
        "a.weight": lambda s, w, b: F.conv2d(s, w, b, padding=1),
        "b.weight": lambda s, w, b: F.conv2d(s, w, b, stride=2, padding=1),
        "c.weight": lambda s, w, b: F.conv2d(s, w, b, padding=1),
        "d.weight": lambda s, w, b: F.conv2d(s, w, b, stride=2),
    }
    edges = [[(0, "a.weight")], [(1, "b.weight")], [(2, "c.weight"), (1, "d.weight")]]
    layers = [[(source, name, conv[name]) for source, name in layer] for layer in edges]
    return seeded(_Joined).double(), noise(3, 2, 6, 6).double(), layers, set()


def _chain() -> tuple[nn.Module, Tensor, list[list[tuple[int, str, Any]]], set[int]]:
    model = seeded(lambda: nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 5)))
    layers: list[list[tuple[int, str, Any]]] = [[(0, "0.weight", F.linear)], [(1, "2.weight", F.linear)]]
    return model.double(), noise(4, 9).double(), [*layers, [(2, "4.weight", F.linear)]], {2}


@pytest.mark.parametrize("build", [_chain, _joined])
@pytest.mark.parametrize("kappa", [0.1, 0.6])
def test_states_and_local_gradients_are_those_of_the_equations(build: Any, kappa: float) -> None:
    model, x, layers, linear = build()
    hybrid = ffebm.convert(model, x, feedback_weights="free", feedback=kappa, gradient=_LOCAL)
    _perturbed(hybrid, 0.7)
    hybrid.set_solver(ffebm.GaussSeidel(rtol=1e-13))
    found = _gradients(hybrid, x, _squares)
    field = _Field(layers, linear, {name: p.detach() for name, p in hybrid.named_parameters()})
    block = hybrid.blocks[0]
    g = block.module.scales[-1] / block.module.scales[-2]
    for state, expected in zip(block.states, field.settle(x, g), strict=True):
        assert _relative(state, expected) <= 1e-10
    expected = field.gradients(x, g, _squares, _LOCAL.beta)
    assert found.keys() == expected.keys()
    assert {
        name: _relative(found[name], value) for name, value in expected.items() if _relative(found[name], value) > 1e-6
    } == {}
    assert block.residual(x, states=block.states) <= 1e-12


@pytest.mark.parametrize("asymmetry", [0.0, 0.1, 0.3])
def test_the_angle_to_the_exact_gradient_at_a_given_asymmetry(asymmetry: float) -> None:
    """64-64-32-10 on digits, as in the prototype: the first layer's cosine for ‖B − W‖/‖W‖."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    kept = torch.arange(len(images)) % 4 != 0
    x, y = (torch.tensor(images) / 16 - 0.3)[kept][:64], torch.tensor(labels)[kept][:64]
    sizes = (64, 64, 32, 10)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    with torch.no_grad():
        for layer, inner in zip(list(model)[::2], sizes, strict=False):
            layer.weight.copy_(normal(*layer.weight.shape) / math.sqrt(inner))
            layer.bias.zero_()
    hybrid = ffebm.convert(model, x, feedback=0.5, feedback_weights="free")
    with torch.no_grad():
        for index in (2, 4):
            weight = hybrid.get_parameter(f"{index}.weight")
            own = hybrid.get_parameter(f"{index}.weight_feedback")
            own.copy_(weight + asymmetry * weight.norm() / math.sqrt(weight.numel()) * normal(*weight.shape))
    hybrid.recertify()
    report = ffebm.check_gradients(hybrid, x, lambda output: F.cross_entropy(output, y, reduction="sum"))
    expected = {0.0: 1.0, 0.1: 0.990, 0.3: 0.912}[asymmetry]
    assert report["0.weight"]["ep"].cosine == pytest.approx(expected, abs=1e-6 if asymmetry == 0 else 2e-3)
    assert math.cos(math.radians(report["0.weight"]["ep"].angle)) == pytest.approx(report["0.weight"]["ep"].cosine)
    assert report.worst("implicit")[1].relative_error <= 1e-9


# -- every kind of block -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_copies_of_the_weights_are_tied_feedback(case: str) -> None:
    """The same states; and both local gradients together are the tied one."""
    model, x = CASES[case].make(nn.Tanh)
    model, x, options = model.double(), x.double(), CASES[case].options
    plain = ffebm.GaussSeidel(relaxation=1.0)  # ω may differ: errors do not add up through weights of their own
    tied = ffebm.convert(model, x, gradient=_LOCAL, solver=plain, **options)
    own = ffebm.convert(model, x, gradient=_LOCAL, feedback_weights="free", solver=plain, **options)
    assert torch.equal(tied(x), own(x))
    assert [b.loop_gain for b in own.blocks] == pytest.approx([b.loop_gain for b in tied.blocks], rel=1e-12)
    expected, found = _gradients(tied, x, _squares), _gradients(own, x, _squares)
    for name, place in own.feedback_names.items():
        forward = next(n for n in expected if name.startswith(f"{n}_feedback"))
        if case == "cnn":  # folded batch norm: its feedback weight is of the folded weight
            continue
        found[forward] = found[forward] + found[name]
        assert place.block in {block.name for block in own.blocks}
    if case != "cnn":
        assert _worst({name: found[name] for name in expected}, expected) <= 1e-9


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_implicit_gradients_are_exact(case: str, activation: type[nn.Module]) -> None:
    hybrid, x = _own(case, activation)
    hybrid.set_gradient("unrolled")
    expected = _gradients(hybrid, x, _squares)
    hybrid.set_gradient("implicit")
    assert any("feedback" in name for name in expected)
    assert _worst(_gradients(hybrid, x, _squares), expected) <= 1e-8


@pytest.mark.parametrize("case", ["mlp", "branches"])
def test_exact_gradients_are_finite_differences(case: str) -> None:
    hybrid, x = _own(case)
    hybrid.set_gradient("implicit")
    found = _gradients(hybrid, x, _squares)
    generator, step = torch.Generator().manual_seed(3), 1e-5
    parameters = dict(hybrid.named_parameters())
    with hybrid.held_feedback(), torch.no_grad():
        for name, parameter in parameters.items():
            way = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            losses = []
            for sign in (1, -1):
                parameter.add_(sign * step * way)
                losses.append(float(_squares(hybrid(x))))
                parameter.sub_(sign * step * way)
            slope = (losses[0] - losses[1]) / (2 * step)
            assert float((found[name] * way).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-7), name


def test_learned_slopes_and_gelu_follow_the_linear_response() -> None:
    """In the limit β → 0 the local rule is the currents of the linear response, contracted."""
    for case in ("gains", "skip"):
        hybrid, x = _own(case, nn.GELU, 0.2)
        small = {}
        for beta in (1e-4, 2e-4):
            hybrid.set_gradient(EquilibriumPropagation(beta, variant="centered"))
            small[beta] = _gradients(hybrid, x, _squares)
        assert _worst(small[2e-4], small[1e-4]) <= 1e-6


@pytest.mark.parametrize(("points", "order"), [(2, 2), (4, 4)])
def test_the_holomorphic_variant_approaches_the_local_gradient(points: int, order: int) -> None:
    hybrid, x = _own("mlp")
    hybrid.set_gradient(EquilibriumPropagation(1e-5, variant="centered"))
    limit = _gradients(hybrid, x, _squares)
    errors = []
    for beta in (0.2, 0.1):
        hybrid.set_gradient(EquilibriumPropagation(beta, variant="holomorphic", points=points))
        errors.append(_worst(_gradients(hybrid, x, _squares), limit))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_a_state_driven_by_a_digital_value_has_feedback_weights() -> None:
    """Its error goes back to batch norm, through the feedback of the layer that reads it."""

    def build() -> nn.Module:
        first = nn.Conv2d(2, 4, 3, padding=1, bias=False)  # a bias before batch norm has no gradient
        return nn.Sequential(first, nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1), nn.Tanh())

    x = noise(3, 2, 6, 6).double()
    hybrid = ffebm.convert(seeded(build).double(), x, digital_drive=True, feedback_weights="free", feedback=0.5)
    assert tuple(hybrid.feedback_names) == ("3.weight_feedback",)
    _perturbed(hybrid, 0.8)
    hybrid.train()
    hybrid.set_gradient("unrolled")
    with hybrid.held_feedback():
        expected = _gradients(hybrid, x, _squares)
        hybrid.set_gradient("implicit")
        assert _worst(_gradients(hybrid, x, _squares), expected) <= 1e-8
        hybrid.set_gradient("ep")
        local = _gradients(hybrid, x, _squares)
    assert 0.5 < float(F.cosine_similarity(local["0.weight"].flatten(), expected["0.weight"].flatten(), dim=0)) < 0.9999


# -- the certificate ---------------------------------------------------------------------------


def test_the_certificate_is_that_of_forward_and_feedback_norms() -> None:
    model, x, _, _ = _joined()
    hybrid = ffebm.convert(model, x, feedback_weights="free", feedback=0.3)
    _perturbed(hybrid, 1.0)
    certificate = hybrid.blocks[0].certificate
    assert [edge[:2] for edge in certificate.norms] == [(0, 1), (0, 2), (1, 2), (1, 0), (2, 0), (2, 1)]
    scales = certificate.scales
    shapes = {0: (1, 4, 6, 6), 1: (1, 5, 3, 3), 2: (1, 3, 3, 3)}
    matrix = np.zeros((3, 3))
    names = {(0, 1): ("b", 2, 1), (0, 2): ("d", 2, 0), (1, 2): ("c", 1, 1)}
    for (earlier, later), (name, stride, padding) in names.items():
        for own in ("", "_feedback"):
            weight = hybrid.get_parameter(f"{name}.weight{own}").detach()

            def conv(s: Tensor, w: Tensor = weight, by: int = stride, pad: int = padding) -> Tensor:
                return F.conv2d(s.reshape(shapes[earlier]), w, stride=by, padding=pad).flatten()  # noqa: B023

            dense = torch.autograd.functional.jacobian(conv, torch.zeros(math.prod(shapes[earlier])).double())
            norm = float(torch.linalg.matrix_norm(dense, 2))
            gamma = scales[later] / scales[earlier]
            place = (earlier, later) if own else (later, earlier)
            matrix[place] = (gamma if own else 1.0) * norm
    radius = float(np.abs(np.linalg.eigvals(matrix)).max())  # the field's own comparison matrix, not scaled
    assert certificate.radius == pytest.approx(radius, rel=1e-2)
    assert certificate.radius >= radius
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.3, rel=1e-6)


def test_sweeps_contract_as_certified_and_feedback_of_zero_is_feedforward() -> None:
    hybrid, x = _own("branches", feedback=0.8)
    diagnosis = hybrid.diagnose(x)["block_1"]
    assert diagnosis.rate <= hybrid.blocks[0].certificate.contraction
    hybrid, x = _own("mlp")
    with torch.no_grad():
        for name in hybrid.feedback_names:
            hybrid.get_parameter(name).zero_()
    hybrid.recertify()
    assert hybrid.blocks[0].loop_gain == 0
    with hybrid.feedforward_mode():
        expected = hybrid(x)
    assert torch.equal(hybrid(x), expected)


@pytest.mark.parametrize("update", ["free", "aligned"])
def test_the_loop_gain_is_held_while_both_weights_move(update: str) -> None:
    model, x, _, _ = _joined()
    own = FeedbackWeights(update=update, start="random")  # type: ignore[arg-type]
    hybrid = ffebm.convert(model.float(), x.float(), feedback_weights=own, feedback=0.4)
    optimizer = torch.optim.AdamW(hybrid.parameters(), 2e-2)
    for _ in range(25):
        optimizer.zero_grad()
        _squares(hybrid(x.float())).backward()
        optimizer.step()
    hybrid(x.float())
    assert hybrid.blocks[0].module.loop_gain == pytest.approx(0.4, rel=0.011)
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.4, rel=0.03)


def test_symmetric_gain_and_projection() -> None:
    model, x, _, _ = _chain()
    with torch.no_grad():
        model[2].weight.mul_(6)
    hybrid = ffebm.convert(model, x, feedback="symmetric", feedback_weights="free")
    assert hybrid.blocks[0].loop_gain > 1
    hybrid.project(0.7)
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.7, rel=2e-2)
    ffebm.init.scale_to_loop_gain(hybrid, 0.3)
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.3, rel=2e-3)


# -- solvers and refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("solver", [ffebm.GaussSeidel(), ffebm.Anderson(), ffebm.NewtonCG()])
def test_every_solver_finds_the_equilibrium(solver: Any) -> None:
    hybrid, x = _own("residual")
    expected = hybrid(x)
    hybrid.set_solver(solver)
    torch.testing.assert_close(hybrid(x), expected, rtol=1e-9, atol=1e-10)
    if isinstance(solver, ffebm.NewtonCG):
        assert "sweeps only, the feedback has weights of its own" in hybrid.summary()


def test_there_is_no_energy() -> None:
    hybrid, x = _own("mlp")
    hybrid(x)
    block = hybrid.blocks[0]
    with pytest.raises(ffebm.UnsupportedError, match="block_1 has no energy, since its feedback goes through weights"):
        block.energy(x, states=block.states)
    diagnosis = hybrid.diagnose(x)
    assert diagnosis["block_1"].energies == ()
    assert "no energy" in str(diagnosis)
    assert "vector field without energy, feedback through weights of its own, loop gain κ = 0.4" in hybrid.summary()


def test_conjugate_gradients_are_refused() -> None:
    hybrid, x = _own("mlp")
    hybrid.set_gradient(ImplicitDifferentiation("cg"))
    with pytest.raises(
        ffebm.InputError, match="feedback of block_1 has weights of its own, so that its adjoint system"
    ):
        hybrid(x).sum().backward()


def test_a_resistive_energy_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(
        ffebm.UnsupportedError, match=r"block_1: a resistive energy is a circuit .* use feedback_weights='t"
    ):
        ffebm.convert(model, noise(2, 4), energy="resistive", feedback_weights="free")


# -- Jacobian homeostasis ----------------------------------------------------------------------


def _dense(hybrid: ffebm.HybridModel, x: Tensor) -> Tensor:
    """‖J − Jᵀ‖²_F of a chain, averaged over the batch, from dense matrices."""
    with torch.no_grad():
        hybrid(x)
    states, scales = hybrid.blocks[0].states, hybrid.blocks[0].module.scales
    total = torch.zeros((), dtype=torch.float64)
    for earlier, later, name in ((0, 1, "2.weight"), (1, 2, "4.weight")):
        weight, own = hybrid.get_parameter(name), hybrid.get_parameter(f"{name}_feedback")
        slopes = [1 - s**2 if index < 2 else torch.ones_like(s) for index, s in enumerate(states)]
        both = slopes[later][:, :, None] * slopes[earlier][:, None, :] * scales[later] / scales[earlier]
        total = total + 2 * (both * (weight - own) ** 2).sum((1, 2)).mean()
    return total


def test_homeostasis_measures_the_asymmetry_of_the_jacobian() -> None:
    model, x, _, _ = _chain()
    hybrid = ffebm.convert(model, x, feedback_weights="free", feedback=0.6)
    hybrid(x)
    assert float(ffebm.jacobian_homeostasis(hybrid).detach()) == pytest.approx(0, abs=1e-13)  # B = W
    _perturbed(hybrid, 0.6)
    expected = _dense(hybrid, x)
    exact = torch.autograd.grad(expected, [hybrid.get_parameter(n) for n in ("2.weight", "2.weight_feedback")])
    found = ffebm.jacobian_homeostasis(hybrid, 1500, torch.Generator().manual_seed(0))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=0.05)
    measured = torch.autograd.grad(found, [hybrid.get_parameter(n) for n in ("2.weight", "2.weight_feedback")])
    for gradient, wanted in zip(measured, exact, strict=True):
        assert F.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0) > 0.97
        assert float(gradient.norm() / wanted.norm()) == pytest.approx(1, abs=0.1)


def test_homeostasis_brings_convolutions_together() -> None:
    model, x, _, _ = _joined()
    own = FeedbackWeights(start="random")
    hybrid = ffebm.convert(model, x, feedback_weights=own, feedback=0.5)
    hybrid(x)

    def distance() -> float:
        pairs = [(hybrid.get_parameter(name), hybrid.get_parameter(name[:-9])) for name in hybrid.feedback_names]
        return sum(float((own - forward).detach().norm()) for own, forward in pairs)

    start = distance()
    optimizer = torch.optim.Adam(hybrid.parameters(), 2e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        ffebm.jacobian_homeostasis(hybrid, 2, generator).backward()
        optimizer.step()
    assert distance() < 0.4 * start


def test_homeostasis_refuses() -> None:
    model, x, _, _ = _chain()
    hybrid = ffebm.convert(model, x, feedback_weights="free")
    with pytest.raises(ffebm.InputError, match="block_1 has no states yet: call the hybrid"):
        ffebm.jacobian_homeostasis(copy.deepcopy(hybrid))
    hybrid(x)
    with pytest.raises(ffebm.InputError, match="samples is 0; expected a number of noise vectors"):
        ffebm.jacobian_homeostasis(hybrid, 0)
    with pytest.raises(ffebm.InputError, match=r"a hybrid is expected, .* got a Sequential"):
        ffebm.jacobian_homeostasis(model)  # type: ignore[arg-type]
    tied = ffebm.convert(model, x)
    assert float(ffebm.jacobian_homeostasis(tied)) == 0
    curved, other = _own("mlp", nn.GELU)
    curved(other)
    with pytest.raises(ffebm.UnsupportedError, match=r"activation gelu of layer layers\.0 is not monotone"):
        ffebm.jacobian_homeostasis(curved)


@pytest.mark.parametrize("training", [False, True])
def test_unrelated_feedback_weights_of_one_sign(training: bool) -> None:
    """Errors do not add up through unrelated weights, and far over-relaxed sweeps would diverge."""
    model, x = CASES["mlp"].make(nn.Tanh)
    model, x = model.double(), x.double()
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.abs_()
    for seed in range(3):
        own = ffebm.FeedbackWeights(start="random", seed=seed)
        hybrid = ffebm.convert(model, x, feedback=0.9, feedback_weights=own).train(training)
        assert not hybrid.blocks[0].module.gain.setting.coherent
        report = ffebm.check_gradients(hybrid, x, lambda output: output.square().sum())
        assert report.worst("implicit")[1].relative_error <= 1e-9
