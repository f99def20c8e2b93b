"""Every learning algorithm against its own equations, written down in float64 (`by_hand.py`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import BY_HAND, ByHand, relative
from finite_differences import squared_error
from networks import CASES, TwoBlocks, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.activations.learned import PReLU
from ffebm_compiler.runtime.activations.table import ALL

EXACT = ffebm.GaussSeidel(rtol=1e-14)
every_case = pytest.mark.parametrize("case", BY_HAND)
activations = pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])


def both(case: str, activation: Callable[[], nn.Module], kappa: float = 0.3) -> tuple[ffebm.HybridModel, Any, Tensor]:
    """A case as a hybrid of one block, its source, and inputs, in float64."""
    model, x = CASES[case].make(activation)
    model, x = model.double(), x.double()
    hybrid = ffebm.convert(model, x, feedback=kappa, solver=EXACT, **CASES[case].options)
    assert [block.name for block in hybrid.blocks if block.loop_gain > 0] == [hybrid.blocks[0].name]
    return hybrid, model, x


def of_runtime(hybrid: ffebm.HybridModel, x: Tensor, gradient: Any) -> dict[str, Tensor]:
    hybrid.set_gradient(gradient)
    hybrid.zero_grad()
    x = x.clone().requires_grad_()
    squared_error(hybrid(x)).backward()
    assert x.grad is not None
    return {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None} | {"x": x.grad}


class Reference:
    """A case from its equations: free states, δ, and a, all of it without the runtime."""

    def __init__(self, hybrid: ffebm.HybridModel, model: Any, case: str, x: Tensor) -> None:
        self.x = x.clone().requires_grad_()
        self.model = model
        self.block = ByHand(BY_HAND[case](model), hybrid.blocks[0].module.scales)
        self.last = len(self.block.layers) - 1
        with torch.no_grad():
            self.free = self.block.settle(x)
        output = self.free[-1].detach().requires_grad_()
        (self.delta,) = torch.autograd.grad(squared_error(output), output)
        self.a = self.free[-1].norm(dim=1) / self.delta.norm(dim=1)
        self.by = [*model.parameters(), self.x]
        self.names = [*(name for name, _ in model.named_parameters()), "x"]

    def named(self, gradients: Any) -> dict[str, Tensor]:
        return dict(zip(self.names, gradients, strict=True))

    def contrast(self, first: Any, second: Any, divisor: Tensor) -> dict[str, Tensor]:
        return self.named(self.block.contrast(first, second, divisor, self.x, self.by))

    def held(self, target: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return self.block.settle(self.x, held={self.last: target})

    def nudged(self, strength: float) -> list[Tensor]:
        with torch.no_grad():
            return self.block.settle(self.x, nudge={self.last: strength * self.a[:, None] * self.delta})


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative(found[name], gradient) <= tolerance, name


# -- nudged and held states ----------------------------------------------------------------------


@every_case
@activations
@pytest.mark.parametrize("variant", ["positive", "negative", "centered"])
def test_equilibrium_propagation_is_its_definition(case: str, activation: Any, variant: Any) -> None:
    hybrid, model, x = both(case, activation)
    beta, at = 0.05, Reference(hybrid, model, case, x)
    up = at.free if variant == "negative" else at.nudged(beta)
    down = at.free if variant == "positive" else at.nudged(-beta)
    steps = 2 if variant == "centered" else 1
    found = of_runtime(hybrid, x, ffebm.EquilibriumPropagation(beta, variant))
    agree(found, at.contrast(up, down, steps * beta * at.a))


@every_case
@activations
@pytest.mark.parametrize("variant", ["positive", "negative", "centered"])
def test_coupled_learning_is_its_definition(case: str, activation: Any, variant: Any) -> None:
    hybrid, model, x = both(case, activation)
    beta, at = 0.05, Reference(hybrid, model, case, x)

    def held(strength: float) -> list[Tensor]:
        return at.held(at.free[-1] - strength * at.a[:, None] * at.delta)

    up = at.free if variant == "negative" else held(beta)
    down = at.free if variant == "positive" else held(-beta)
    steps = 2 if variant == "centered" else 1
    found = of_runtime(hybrid, x, ffebm.CoupledLearning(beta, variant))
    agree(found, at.contrast(up, down, steps * beta * at.a))


@every_case
@activations
def test_contrastive_learning_is_its_definition(case: str, activation: Any) -> None:
    hybrid, model, x = both(case, activation)
    at = Reference(hybrid, model, case, x)
    scale = 0.5 * at.delta.new_tensor(at.delta.numel())  # of a mean over all entries: it lands on the target
    target = at.free[-1] - scale * at.delta
    torch.testing.assert_close(target, noise(*target.shape, seed=9).double())
    found = of_runtime(hybrid, x, ffebm.ContrastiveLearning(float(scale)))
    agree(found, at.contrast(at.held(target), at.free, scale.expand(len(x))))


class Clamped(nn.Module):
    """A visible state with a range: a clamp reads the last product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).clamp(0, 1)


@pytest.mark.parametrize("variant", ["positive", "negative", "centered"])
def test_held_states_stay_in_the_range_of_their_activation(variant: Any) -> None:
    model, x = seeded(Clamped).double(), noise(7, 5).double()
    hybrid = ffebm.convert(model, x, feedback=0.3, solver=EXACT)
    layers = [
        ({-1: [model.first.weight]}, model.first.bias, torch.tanh),
        ({0: [model.second.weight]}, model.second.bias, lambda h: h.clamp(0, 1)),
    ]
    BY_HAND["clamped"] = lambda model: layers  # type: ignore[assignment]
    try:
        at = Reference(hybrid, model, "clamped", x)
    finally:
        del BY_HAND["clamped"]
    beta = 0.8
    raw = {sign: at.free[-1] - sign * beta * at.a[:, None] * at.delta for sign in (1, -1)}
    assert all(((target < 0) | (target > 1)).any() for target in raw.values())  # the projection is there to be seen
    held = {sign: at.held(target.clamp(0, 1)) for sign, target in raw.items()}
    up = at.free if variant == "negative" else held[1]
    down = at.free if variant == "positive" else held[-1]
    steps = 2 if variant == "centered" else 1
    found = of_runtime(hybrid, x, ffebm.CoupledLearning(beta, variant))
    agree(found, at.contrast(up, down, steps * beta * at.a))


@every_case
def test_the_limit_of_coupled_learning_is_the_gradient_at_a_transformed_error(case: str) -> None:
    # δ becomes S δ with S the Schur complement of H on the visible states: not the loss gradient.
    hybrid, model, x = both(case, nn.Tanh)
    at = Reference(hybrid, model, case, x)
    c = at.block.scales

    def energy(flat: Tensor, row: Tensor) -> Tensor:
        states = [part[None] for part in flat.split([s.shape[1] for s in at.free])]
        potentials = [
            scale * (0.5 * s.square().sum() if i == at.last else (s * s.atanh() + 0.5 * (1 - s * s).log()).sum())
            for i, (s, scale) in enumerate(zip(states, c, strict=True))
        ]
        return torch.stack(potentials).sum() + at.block.energy(states, row)

    visible = at.free[-1].shape[1]
    moved = []
    for row in range(len(x)):
        flat = torch.cat([s[row] for s in at.free])
        hessian = torch.autograd.functional.hessian(lambda f, row=row: energy(f, x[row : row + 1]), flat)
        vv, vh, hh = hessian[-visible:, -visible:], hessian[-visible:, :-visible], hessian[:-visible, :-visible]
        moved.append((vv - vh @ torch.linalg.solve(hh, vh.T)) @ at.delta[row])
    transformed = torch.stack(moved)
    found = of_runtime(hybrid, x, ffebm.CoupledLearning(1e-4, "centered"))
    hybrid.set_gradient("implicit")
    hybrid.zero_grad()
    given = x.clone().requires_grad_()
    hybrid(given).backward(transformed)
    expected = {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}
    assert given.grad is not None
    agree(found, expected | {"x": given.grad})
    exact = of_runtime(hybrid, x, "implicit")
    assert max(relative(found[name], gradient) for name, gradient in exact.items()) > 0.01


# -- through the sweeps ---------------------------------------------------------------------------


@every_case
@activations
@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_truncated_backprop_is_autograd_through_the_last_sweeps(case: str, activation: Any, sweeps: int) -> None:
    hybrid, model, x = both(case, activation, 0.5)
    at = Reference(hybrid, model, case, x)
    states = [s.detach() for s in at.free]
    for _ in range(sweeps):
        for index in range(len(states)):
            states[index] = at.block.update(index, states, at.x)
    expected = at.named(torch.autograd.grad(squared_error(states[-1]), at.by))
    agree(of_runtime(hybrid, x, ffebm.TruncatedBackprop(sweeps)), expected)


@every_case
@activations
def test_recurrent_backprop_is_the_fixed_point_of_almeida_and_pineda(case: str, activation: Any) -> None:
    # z ← δ + (∂F/∂s)ᵀ z with F all updates at once, then zᵀ ∂F/∂θ.
    hybrid, model, x = both(case, activation, 0.5)
    at = Reference(hybrid, model, case, x)
    states = [s.detach().requires_grad_() for s in at.free]
    updates = [at.block.update(index, states, at.x) for index in range(len(states))]
    errors = [torch.zeros_like(s) for s in states[:-1]] + [at.delta]
    z = list(errors)
    for _ in range(300):
        pulled = torch.autograd.grad(updates, states, z, retain_graph=True, allow_unused=True)
        z = [e if p is None else e + p for e, p in zip(errors, pulled, strict=True)]
    expected = at.named(torch.autograd.grad(updates, at.by, z))
    for solver in (EXACT, ffebm.Anderson(rtol=1e-13)):
        hybrid.set_solver(solver)
        agree(of_runtime(hybrid, x, ffebm.RecurrentBackprop()), expected)
    agree(of_runtime(hybrid, x, ffebm.Implicit()), expected)


def test_truncated_backprop_has_the_gradients_of_learned_slopes() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 4)).double()
    x = noise(7, 5).double()
    hybrid = ffebm.convert(model, x, feedback=0.5, solver=EXACT)
    layers = [
        ({-1: [model[0].weight]}, model[0].bias, model[1]),
        ({0: [model[2].weight]}, model[2].bias, nn.Identity()),
    ]
    block = ByHand(layers, hybrid.blocks[0].module.scales)
    with torch.no_grad():
        states = block.settle(x)
    for _ in range(2):
        for index in range(2):
            states[index] = block.update(index, states, x)
    grads = torch.autograd.grad(squared_error(states[-1]), list(model.parameters()))
    expected = dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))
    found = of_runtime(hybrid, x, ffebm.TruncatedBackprop(2))
    agree({name: found[name] for name in expected}, expected)


# -- which block uses what -----------------------------------------------------------------------


def two_blocks(**options: Any) -> tuple[ffebm.HybridModel, Tensor]:
    x = noise(5, 6).double()
    hybrid = ffebm.convert(seeded(TwoBlocks).double(), x, feedback=0.3, **options)
    assert [block.layers for block in hybrid.blocks] == [("a", "b"), ("c", "d")]
    return hybrid, x


def test_inner_blocks_use_equilibrium_propagation_and_the_summary_says_so() -> None:
    hybrid, x = two_blocks(gradient=ffebm.CoupledLearning(1e-3, "centered"))
    inner, outer = (block.module.estimator for block in hybrid.blocks)
    assert inner == ffebm.EquilibriumPropagation(1e-3, "centered")
    assert outer == ffebm.CoupledLearning(1e-3, "centered")
    names = [block.name for block in hybrid.blocks]
    line = f"coupled learning in {names[1]}, whose outputs reach the loss through no other block; {names[0]} uses ep"
    assert line in hybrid.summary()
    # The inner block's gradient is the exact one for the error that the outer block hands back.
    found = of_runtime(hybrid, x, "contrastive")
    assert hybrid.blocks[0].module.estimator == ffebm.EquilibriumPropagation()
    hybrid.set_gradient(ffebm.CoupledLearning(variant="centered"))  # β is the default: that of each
    assert hybrid.blocks[0].module.estimator == ffebm.EquilibriumPropagation(variant="centered")
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    hybrid.set_gradient("ep")
    assert "learning in" not in hybrid.summary()


def test_coupled_learning_is_refused_in_an_inner_block_that_is_named() -> None:
    hybrid, _ = two_blocks()
    first, second = (block.name for block in hybrid.blocks)
    with pytest.raises(ffebm.UnsupportedError, match=f"coupled learning is not defined in {first}, whose outputs"):
        hybrid.set_gradient("coupled", blocks=[first])
    hybrid.set_gradient(ffebm.CoupledLearning(), blocks=[second])
    assert [block.module.estimator.name for block in hybrid.blocks] == ["ep", "coupled"]
    with pytest.raises(ffebm.InputError, match=r"blocks is \['other'\]; expected a list of names of energy blocks"):
        hybrid.set_gradient("ep", blocks=["other"])
    with pytest.raises(ffebm.InputError, match="blocks is 'block"):
        hybrid.set_gradient("ep", blocks=first)


def test_coupled_learning_is_refused_where_no_block_has_it() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    hybrid = ffebm.convert(model, noise(4, 5))
    with pytest.raises(ffebm.UnsupportedError, match="contrastive learning applies to no block of this hybrid"):
        hybrid.set_gradient("contrastive")
    assert {block.module.estimator.name for block in hybrid.blocks} == {"ep"}
    digital = ffebm.convert(model, noise(4, 5), force_digital="4")
    digital.set_gradient("contrastive")


def test_a_held_state_with_learned_slopes_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.PReLU())
    hybrid = ffebm.convert(model, noise(4, 5), gradient="coupled")
    with pytest.raises(ffebm.UnsupportedError, match="layer 2 has an activation with learned parameters"):
        hybrid(noise(4, 5)).sum().backward()


@pytest.mark.parametrize("gradient", ["coupled", "contrastive"])
def test_a_vector_field_has_no_energies_to_compare(gradient: str) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    hybrid = ffebm.convert(model, noise(4, 5), gradient=gradient, feedback_weights="free")
    with pytest.raises(ffebm.UnsupportedError, match="has no energy, since its feedback goes through weights"):
        hybrid(noise(4, 5)).sum().backward()


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ffebm.CoupledLearning(beta=0), "beta is 0; expected a number in"),
        (lambda: ffebm.CoupledLearning(variant="both"), "variant is 'both'; expected 'positive'"),  # type: ignore[arg-type]
        (lambda: ffebm.ContrastiveLearning(scale=-1), "scale is -1; expected a positive number"),
        (lambda: ffebm.TruncatedBackprop(sweeps=0), "sweeps is 0; expected the number of sweeps"),
        (lambda: ffebm.TruncatedBackprop(sweeps=1.5), "sweeps is 1.5"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ffebm.InputError, match=message):
        make()


@pytest.mark.parametrize(
    "estimator",
    [
        ffebm.CoupledLearning(0.02, "centered"),
        ffebm.ContrastiveLearning(32.0),
        ffebm.CostNudge(0.3, "negative", "cross-entropy", 32.0),
        ffebm.TruncatedBackprop(7),
        ffebm.RecurrentBackprop(),
        ffebm.Implicit("cg"),
    ],
    ids=lambda estimator: estimator.name,
)
def test_settings_survive_saving(estimator: Any, tmp_path: Any) -> None:
    hybrid, _ = two_blocks(gradient=estimator)
    hybrid.save(tmp_path / "saved")
    again = ffebm.load(tmp_path / "saved", seeded(TwoBlocks).double())
    for ours, theirs in zip(again.blocks, hybrid.blocks, strict=True):
        assert ours.module.estimator == theirs.module.estimator
    assert copy.deepcopy(hybrid).blocks[1].module.estimator == estimator


def test_recurrent_backprop_that_diverges_stops_with_the_block_named() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).double()
    with torch.no_grad():
        model[0].bias.fill_(10.0)
        model[2].weight.mul_(8)
    x = noise(3, 6).double()
    hybrid = ffebm.convert(model, x, feedback=0.5, gradient="recurrent")
    y = hybrid(x)
    block = hybrid.blocks[0].module
    with torch.no_grad():  # what an amplifier would be that nobody certified
        model_weights = dict(hybrid.named_parameters())
        model_weights["2.weight"].data.mul_(50)
    with pytest.raises(ffebm.ConvergenceError, match=f"adjoint sweeps of {block.name}"):
        y.square().sum().backward()


# -- ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ALL, ids=repr)
def test_the_bounds_of_an_activation_hold_all_its_values(activation: Any) -> None:
    h = torch.linspace(-60, 60, 100_001, dtype=torch.float64)
    values = activation.value(h)
    lo, hi = activation.bounds(h)
    assert (values >= lo - 1e-15).all()
    assert (values <= hi + 1e-15).all()
    far = activation.value(torch.tensor([-1e12, 1e12], dtype=torch.float64))
    for bound, extreme in ((lo, min(values.min(), far.min())), (hi, max(values.max(), far.max()))):
        assert abs(float(extreme)) > 1e6 if bound in (-torch.inf, torch.inf) else abs(float(extreme) - bound) < 1e-6


def test_the_bounds_of_learned_slopes_are_by_channel() -> None:
    lo, hi = PReLU(torch.tensor([0.3, -0.7, 0.0])).bounds(torch.zeros(4, 3))
    assert lo.flatten().tolist() == [-torch.inf, 0.0, 0.0]  # type: ignore[union-attr]
    assert hi == torch.inf
