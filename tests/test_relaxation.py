"""How relaxations end: samples that settle, diverge, oscillate or crawl, each for itself."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from networks import CASES, converted, noise, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.phases.free_phase import FreePhase
from ffebm_compiler.runtime.program.frame import Frame

WIDTH = 5


class Loop(nn.Module):
    """σ(W₂ σ(x + b)) with W₂ diagonal: at symmetric feedback every unit is a loop of gain w² of its own."""

    def __init__(self, gains: list[float], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.activation = activation or nn.ReLU()
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(WIDTH))
            self.first.bias.zero_()
            self.second.weight.copy_(torch.diag(torch.tensor(gains)))
            self.second.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.second(self.activation(self.first(x))))


def looped(first: float, **options: Any) -> ffebm.HybridModel:
    """A hybrid whose unit 0 has gain `first`, at symmetric feedback; the others settle fast."""
    activation = options.pop("activation", None)
    model = Loop([first, 0.6, 0.5, 0.4, 0.3], activation).double()
    return ffebm.convert(model, torch.ones(2, WIDTH).double(), feedback="symmetric", **options)


def own(case: str, activation: type[nn.Module]) -> tuple[ffebm.HybridModel, Tensor]:
    """A case of `networks` to configure: what is shared with other tests stays as it is."""
    hybrid, x = converted(case, activation)
    return copy.deepcopy(hybrid), x


def samples(count: int, sick: set[int]) -> Tensor:
    """Inputs whose unit 0 is active in the `sick` samples alone."""
    x = noise(count, WIDTH, seed=3).abs().double() + 0.1
    x[:, 0] = torch.tensor([1.0 if row in sick else -1.0 for row in range(count)])
    return x


def gradients(hybrid: ffebm.HybridModel, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs, gradient by the input, and by every parameter, of a sum over samples."""
    hybrid.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = hybrid(x)
    (y * torch.linspace(1, 2, WIDTH, dtype=y.dtype)).square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, [p.grad.clone() for p in hybrid.parameters() if p.grad is not None]


ESTIMATORS = [
    ffebm.EquilibriumPropagation(),
    ffebm.EquilibriumPropagation(beta=1e-3, variant="centered"),
    ffebm.EquilibriumPropagation(beta=1e-3, variant="centered", together=True),
    ffebm.CostNudge(1e-3),
    ffebm.ImplicitDifferentiation("sweeps"),
    ffebm.ImplicitDifferentiation("cg"),
    ffebm.Unrolled(),
]
SOLVERS = [
    ffebm.GaussSeidel(),
    ffebm.GaussSeidel(schedule="even_odd"),
    ffebm.GaussSeidel(termination="sample"),
    ffebm.Anderson(),
    ffebm.NewtonCG(),
]


# -- one sample that diverges --------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator", ESTIMATORS, ids=lambda e: f"{e.name}-{getattr(e, 'variant', '')}{getattr(e, 'method', '')}"
)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{s.termination}")
def test_a_diverging_sample_leaves_the_others_unharmed(estimator: Any, solver: Any) -> None:
    hybrid = looped(1.3, gradient=estimator, solver=solver)
    x = samples(6, {2})
    rest = [0, 1, 3, 4, 5]
    expected, expected_x, expected_weights = gradients(hybrid, x[rest])
    with pytest.warns(
        ffebm.ConvergenceWarning, match=r"free phase of block_1: sample 2 of the 6 .* diverged"
    ) as record:
        output, found_x, found_weights = gradients(hybrid, x)
    assert len(record) == 1
    last = hybrid.blocks[0].module.last
    assert last is not None
    assert (last.unsettled, last.lost, last.converged) == ((2,), (2,), False)
    assert "feedback=0.1" in str(record[0].message)
    torch.testing.assert_close(output[rest], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_x[rest], expected_x, rtol=1e-7, atol=1e-9)
    for found, want in zip(found_weights, expected_weights, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-7, atol=1e-9)
    # The lost sample keeps its feedforward values and gives no gradient.
    with torch.no_grad(), hybrid.feedforward_mode():
        torch.testing.assert_close(output[2:3], hybrid(x[2:3]))
    assert not found_x[2].any()


@settings(max_examples=40, deadline=None)
@given(sick=st.sets(st.integers(0, 7), max_size=8), termination=st.sampled_from(["batch", "sample"]))
def test_any_set_of_samples_may_diverge(sick: set[int], termination: Any) -> None:
    hybrid = looped(1.2, solver=ffebm.GaussSeidel(termination=termination))
    x = samples(8, sick)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ffebm.ConvergenceWarning)
        if len(sick) == 8:
            with pytest.raises(ffebm.ConvergenceError, match="free phase of block_1 diverged"):
                hybrid(x)
            return
        output = hybrid(x)
    healthy = [row for row in range(8) if row not in sick]
    torch.testing.assert_close(output[healthy], hybrid(x[healthy]), rtol=1e-9, atol=1e-9)
    if sick:
        hybrid.blocks[0].module.solver = ffebm.GaussSeidel(on_failure="error")
        with pytest.raises(ffebm.ConvergenceError, match=r"block_1: samples? [\d, ]+ of the 8 of the batch diverged"):
            hybrid(x)


@pytest.mark.parametrize("together", [False, True])
def test_a_sample_that_diverges_only_when_nudged_gives_no_gradient(together: bool) -> None:
    # Unit 0 of sample 1 is just below its kink: the nudge towards larger outputs sets it off.
    estimator = ffebm.EquilibriumPropagation(
        beta=0.5, variant="centered" if together else "positive", together=together
    )
    hybrid = looped(1.3, gradient=estimator)
    hybrid.blocks[0].module.solver = ffebm.GaussSeidel()
    x = samples(4, set())
    x[1, 0] = -1e-3

    def run(rows: list[int]) -> tuple[Tensor, list[Tensor]]:
        hybrid.zero_grad(set_to_none=True)
        inputs = x[rows].clone().requires_grad_()
        (-hybrid(inputs).sum()).backward()
        assert inputs.grad is not None
        return inputs.grad, [p.grad.clone() for p in hybrid.parameters() if p.grad is not None]

    rest = [0, 2, 3]
    expected_x, expected = run(rest)
    with pytest.warns(ffebm.ConvergenceWarning, match=r"nudged phase \(β = \+0\.5.*\) of block_1: sample 1 of the 4"):
        found_x, found = run([0, 1, 2, 3])
    assert not found_x[1].any()
    torch.testing.assert_close(found_x[rest], expected_x, rtol=1e-9, atol=1e-12)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-12)


# -- slow samples, oscillation ---------------------------------------------------------------------


def test_a_slow_sample_is_named_with_its_residual() -> None:
    hybrid = looped(0.999, solver=ffebm.GaussSeidel(max_sweeps=60))
    x = samples(5, {3})
    with pytest.warns(ffebm.ConvergenceWarning, match=r"sample 3 of the 5 of the batch did not settle in 60 sweeps \("):
        output = hybrid(x)
    last = hybrid.blocks[0].module.last
    assert last is not None
    assert (last.unsettled, last.lost) == ((3,), ())
    assert 1e-12 < last.residual < 1
    healthy = [0, 1, 2, 4]
    torch.testing.assert_close(output[healthy], hybrid(x[healthy]), rtol=1e-9, atol=1e-9)
    assert output[3, 0] > 1  # on its way to 1/(1 − w²)
    # Patience grows with the limit: a sweep leaves 0.998 of this error, and is waited for.
    hybrid.set_solver(ffebm.GaussSeidel(max_sweeps=100_000, rtol=1e-9))
    gain = hybrid.get_parameter("second.weight").detach()[0, 0]
    torch.testing.assert_close(hybrid(x).detach()[3, 0], gain / (1 - gain**2), rtol=1e-5, atol=0)


def test_oscillation_is_recognised_before_the_last_sweep() -> None:
    # silu falls by up to a tenth: in a loop of gain 225 unit 0 changes between two values for ever.
    hybrid = looped(15.0, activation=nn.SiLU(), solver=ffebm.GaussSeidel())
    x = samples(4, set())
    x[:, 0] = -30.0
    x[2, 0] = -2.0
    with pytest.warns(ffebm.ConvergenceWarning, match=r"sample 2 of the 4 of the batch oscillated") as record:
        output = hybrid(x)
    last = hybrid.blocks[0].module.last
    assert last is not None
    assert last.sweeps < 500
    assert "feedback" in str(record[0].message)
    torch.testing.assert_close(output[[0, 1, 3]], hybrid(x[[0, 1, 3]]), rtol=1e-9, atol=1e-9)
    with pytest.raises(ffebm.ConvergenceError, match="free phase of block_1 oscillated"):
        hybrid(x[2:3])


# -- termination by sample -------------------------------------------------------------------------


def test_by_sample_a_result_does_not_depend_on_the_batch() -> None:
    x = samples(6, {0, 3})
    apart = {}
    for termination in ("batch", "sample"):
        hybrid = looped(0.97, solver=ffebm.GaussSeidel(rtol=1e-2, termination=termination))
        with torch.no_grad():
            alone = torch.cat([hybrid(x[row : row + 1]) for row in range(6)])
            apart[termination] = float((hybrid(x) - alone).abs().max())
    assert apart["sample"] < 1e-12
    assert apart["batch"] > 1e-6


@pytest.mark.parametrize("case", ["mlp", "branches", "convolutions", "cnn"])
def test_by_sample_gradients_are_those_of_the_batch(case: str) -> None:
    hybrid, x = own(case, nn.Tanh)
    report = {}
    for termination in ("batch", "sample"):
        hybrid.configure(
            feedback=0.3,
            estimator=ffebm.EquilibriumPropagation(),
            solver=ffebm.GaussSeidel(rtol=1e-6, termination=termination),
        )
        hybrid.zero_grad()
        hybrid(x).square().mean().backward()
        report[termination] = [p.grad.clone() for p in hybrid.parameters() if p.grad is not None]
    for found, want in zip(report["sample"], report["batch"], strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


# -- measuring -------------------------------------------------------------------------------------


class Watched(ffebm.GaussSeidel):
    """Sweeps that note which of them were measured."""

    seen: ClassVar[list[bool]] = []

    def step(self, problem: Any, memory: Any, measure: bool = True, per_sample: bool = False) -> Any:
        self.seen.append(measure)
        return super().step(problem, memory, measure, per_sample)


def test_not_every_sweep_is_measured() -> None:
    """A measured sweep is a synchronisation with the device."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)))
    for feedback, training, spared in ((0.1, False, 0), (0.5, False, 1), (0.98, False, 2), (0.5, True, 1)):
        hybrid = ffebm.convert(model, noise(3, 8), feedback=feedback, solver=Watched()).train(training)
        Watched.seen.clear()
        hybrid(noise(3, 8))
        assert Watched.seen[-1]
        assert Watched.seen.count(False) >= spared


# -- the error that is told ------------------------------------------------------------------------


def settled_exactly(frame: Frame, setting: Setting) -> list[Tensor]:
    """The states of a block in float64, swept until nothing changes."""
    weights = [weight if weight is None else weight.double() for weight in frame.weights]
    phase = FreePhase(Frame(frame.program, [value.double() for value in frame.inputs], weights), setting)
    for _ in range(1000):
        before = list(phase.values)
        for index in range(len(before)):
            phase.store(index, phase.update(index))
        if all(torch.allclose(a, b, rtol=1e-13, atol=1e-300) for a, b in zip(before, phase.values, strict=True)):
            break
    return [value for value in phase.values if value is not None]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardsigmoid, nn.GELU])
@pytest.mark.parametrize("case", sorted(CASES))
def test_the_error_left_in_evaluation_is_at_most_what_is_told(
    case: str, activation: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured rate of over-relaxed sweeps is no bound, so that this is checked against the equilibrium itself."""
    hybrid, x = converted(case, activation)
    hybrid = copy.deepcopy(hybrid).eval()
    found: list[tuple[Frame, FreePhase, Any]] = []
    settle = EnergyBlock._settled

    def watched(block: EnergyBlock, frame: Frame) -> Any:
        result = settle(block, frame)
        found.append((frame, *result))
        return result

    monkeypatch.setattr(EnergyBlock, "_settled", watched)
    with torch.no_grad():
        for kappa in (0.1, 0.5, 0.9):
            hybrid.set_feedback(kappa)
            hybrid(x)
        for frame, phase, settled in found:
            assert settled.residual <= 1e-4
            for value, exact in zip(phase.values, settled_exactly(frame, phase.setting), strict=True):
                assert value is not None
                error = float((value.double() - exact).norm() / exact.norm().clamp(min=1e-30))
                assert error <= settled.residual + 1e-6


@pytest.mark.parametrize("kappa", [0.1, 0.7])
@pytest.mark.parametrize("case", sorted(CASES))
def test_changes_of_a_sweep_bound_the_errors_it_leaves(case: str, kappa: float) -> None:
    """‖e_l‖ ≤ κ/(1 − κ) Σ_k W_lk ‖Δs_k‖ for plain sweeps, layer by layer, in float64."""
    hybrid, x = converted(case, nn.LeakyReLU)
    hybrid = copy.deepcopy(hybrid).double().eval()
    hybrid.set_feedback(kappa)
    with torch.no_grad():
        hybrid(x.double())
        for found in hybrid.blocks:
            block = found.module
            shares, rate = block.gain.error_shares, block.contraction
            if shares is None:
                continue
            frame = Frame(block.program, *operands_of(hybrid, block, x.double()))
            exact, phase = settled_exactly(frame, block.setting), FreePhase(frame, block.setting)
            for _ in range(3):
                before = [value for value in phase.values if value is not None]
                for index in range(len(before)):
                    phase.store(index, phase.update(index))
                after = [value for value in phase.values if value is not None]
                changes = torch.stack([(a - b).norm() for a, b in zip(after, before, strict=True)])
                errors = torch.stack([(a - b).norm() for a, b in zip(after, exact, strict=True)])
                bound = rate / (1 - rate) * shares @ changes
                assert (errors <= bound * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("kappa", [0.1, 0.7])
@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.Hardsigmoid, nn.Tanh])
def test_the_change_of_the_first_layer_bounds_the_errors_of_a_backward_sweep(
    activation: type[nn.Module], kappa: float
) -> None:
    """‖e_l‖ ≤ κ/(1 − κ) Σ_k W_lk ‖Δu_k‖ for error currents in two layers, in float64."""
    model = seeded(lambda: nn.Sequential(nn.Linear(12, 16), activation(), nn.Linear(16, 9), activation()))
    x = noise(6, 12).double()
    hybrid = ffebm.convert(model.double(), x, feedback=kappa).eval()
    (found,) = hybrid.blocks
    block = found.module
    frame = Frame(block.program, *operands_of(hybrid, block, x))
    with torch.no_grad():
        _, fields = FreePhase(frame, block.setting).settled()
        phases = [AdjointPhase(frame, block.setting, fields, [None, noise(6, 9, seed=5).double()]) for _ in range(2)]
        phase, exact = phases
        for _ in range(400):
            for index in exact.order():
                exact.store(index, exact.update(index))
        phase.contraction = rate = block.contraction
        assert rate is not None
        for _ in range(4):
            before = list(phase.values)
            for index in phase.order():
                phase.store(index, phase.update(index))
            after = [value for value in phase.values if value is not None]
            changes = [a if b is None else a - b for a, b in zip(after, before, strict=True)]
            errors = torch.stack([(a - b).norm() for a, b in zip(after, exact.values, strict=True) if b is not None])
            assert phase.shares is not None
            assert float(phase.shares[:, 1].abs().max()) == 0
            bound = rate / (1 - rate) * phase.shares @ torch.stack([change.norm() for change in changes])
            assert (errors <= bound * (1 + 1e-9) + 1e-12).all()


def test_a_layer_that_is_almost_zero_is_measured_itself() -> None:
    """A bound by the other layers says nothing about it, since its norm is small. The phase ends all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 6))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].bias.fill_(-12.0)
    x = noise(5, 6)
    hybrid = ffebm.convert(model, x, feedback=0.1).eval()
    with torch.no_grad():
        hybrid(x)
    (block,) = hybrid.blocks
    assert block.module.last is not None
    assert block.module.last.converged
    assert block.module.last.sweeps <= 5
    first, second = (float(state.norm()) for state in block.module.states)
    assert first < 1e-3 * second


def operands_of(hybrid: ffebm.HybridModel, block: EnergyBlock, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """The inputs and weights with which a forward calls a block."""
    seen: list[tuple[Tensor | None, ...]] = []
    handle = block.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    hybrid(x)
    handle.remove()
    inputs = [value for value in seen[-1][: block.program.inputs] if value is not None]
    return inputs, list(seen[-1][block.program.inputs :])


# -- warm starts -----------------------------------------------------------------------------------


def test_a_warm_start_needs_fewer_sweeps_to_the_same_equilibrium() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)))
    x = noise(5, 8)
    cold = ffebm.convert(model, x, feedback=0.9, solver=ffebm.GaussSeidel(rtol=1e-5)).eval()
    warm = ffebm.convert(model, x, feedback=0.9, solver=ffebm.GaussSeidel(rtol=1e-5, start="last")).eval()
    sweeps = []
    for step in range(3):
        moved = x + 1e-4 * step
        torch.testing.assert_close(warm(moved), cold(moved), rtol=1e-3, atol=1e-4)
        sweeps.append((warm.blocks[0].module.last.sweeps, cold.blocks[0].module.last.sweeps))
    assert sweeps[0][0] == sweeps[0][1]
    assert all(few <= 2 / 3 * many for few, many in sweeps[1:])
    # Other shapes start afresh, and gradients do not see where it started.
    warm(noise(2, 8))
    for hybrid in (warm, cold):
        hybrid.zero_grad()
        for _ in range(2):
            loss = hybrid(x).square().sum()
        loss.backward()
    for found, want in zip(warm.parameters(), cold.parameters(), strict=True):
        torch.testing.assert_close(found.grad, want.grad, rtol=1e-2, atol=1e-3 * float(want.grad.abs().max()))


# -- products in bfloat16 --------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts products by the dtype of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in str(func) for part in ("convolution", "mm", "linear")):
            self.counts[args[-1].dtype if "addmm" in str(func) else args[0].dtype] = (
                self.counts.get(args[-1].dtype if "addmm" in str(func) else args[0].dtype, 0) + 1
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ["mlp", "cnn", "residual"])
@pytest.mark.parametrize("feedback", [0.1, 0.5])
def test_bfloat16_sweeps_end_at_the_same_equilibrium(case: str, feedback: float) -> None:
    hybrid, x = own(case, nn.ReLU)
    hybrid.eval()
    loss = lambda output: output.square().mean()  # noqa: E731
    counts = {}
    for precision in ("full", "bfloat16"):
        hybrid.configure(
            feedback=feedback, estimator=ffebm.EquilibriumPropagation(), solver=ffebm.GaussSeidel(precision=precision)
        )
        hybrid.set_feedback(feedback)
        with hybrid.recording() as record, Products() as products:
            loss(hybrid(x)).backward()
        counts[precision] = products.counts
        for block in hybrid.blocks:
            inputs = record[block.name][0][: block.module.program.inputs]
            states = block.module.states
            assert block.module.residual(inputs, block.weights, states) <= 1e-4
            assert all(state.dtype == torch.float32 for state in states)
    assert torch.bfloat16 not in counts["full"]
    assert counts["bfloat16"][torch.bfloat16] > 0
    assert ffebm.check_gradients(hybrid, x, loss).worst("ep")[1].cosine >= 0.999


def test_bfloat16_is_left_out_where_nothing_is_certified() -> None:
    hybrid = looped(0.8, solver=ffebm.GaussSeidel(precision="bfloat16"))
    with Products() as products:
        hybrid(samples(3, set()))
    assert torch.bfloat16 not in products.counts


# -- residuals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp", "cnn", "branches"])
def test_the_residual_of_an_equilibrium(case: str) -> None:
    hybrid, x = own(case, nn.Tanh)
    hybrid.set_feedback(0.3)
    with hybrid.recording() as record:
        hybrid(x)
    for block in hybrid.blocks:
        if block.certificate is None:
            continue
        operands = record[block.name][0]
        inputs, weights = operands[: block.module.program.inputs], operands[block.module.program.inputs :]
        settled = block.module.settle(inputs, weights)
        assert block.module.residual(inputs, weights, settled.states) <= 1e-4
        moved = [state + 0.1 for state in settled.states]
        assert block.module.residual(inputs, weights, moved) > 1e-3
    with pytest.raises(ffebm.InputError, match=r"block_1 has \d states, got 0"):
        hybrid.blocks[0].module.residual(inputs, weights, [])


# -- degenerate errors, NaN on the way -------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator", ESTIMATORS, ids=lambda e: f"{e.name}-{getattr(e, 'variant', '')}{getattr(e, 'method', '')}"
)
def test_samples_without_an_error_have_no_part_in_the_gradient(estimator: Any) -> None:
    hybrid = looped(0.7, gradient=estimator)
    x = samples(5, {0, 1, 2, 3, 4})
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()[:, None]

    def run(rows: list[int], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        hybrid.zero_grad(set_to_none=True)
        inputs = x[rows].clone().requires_grad_()
        (hybrid(inputs) * weights).square().sum().backward()
        assert inputs.grad is not None
        return inputs.grad, [p.grad.clone() for p in hybrid.parameters() if p.grad is not None]

    found_x, found = run([0, 1, 2, 3, 4], mask)
    expected_x, expected = run([0, 2, 4], mask[[0, 2, 4]])
    assert not found_x[[1, 3]].any()
    torch.testing.assert_close(found_x[[0, 2, 4]], expected_x, rtol=1e-6, atol=1e-10)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-10)
    nothing_x, nothing = run([0, 1, 2, 3, 4], 0 * mask)  # an error of exactly zero everywhere
    assert not nothing_x.any()
    assert not any(bool(gradient.any()) for gradient in nothing)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{s.termination}")
def test_nan_on_the_way_is_the_sample_s_own(solver: Any) -> None:
    """Overflow of unit 0 in float32 makes its sample's other units NaN: 0 · ∞ in a matrix product."""
    hybrid = ffebm.convert(Loop([1e9, 0.6, 0.5, 0.4, 0.3]), torch.ones(2, WIDTH), feedback="symmetric", solver=solver)
    x = samples(3, {1}).float()
    with pytest.warns(ffebm.ConvergenceWarning, match=r"block_1: sample 1 of the 3 .* diverged"):
        output = hybrid(x)
    last = hybrid.blocks[0].module.last
    assert last is not None
    assert last.sweeps < 100
    assert output.isfinite().all()
    torch.testing.assert_close(output[[0, 2]], hybrid(x[[0, 2]]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ffebm.ConvergenceError, match="free phase of block_1 diverged: its states are not finite"):
        hybrid(x[1:2])


@pytest.mark.parametrize("kind", [ffebm.GaussSeidel, ffebm.Anderson, ffebm.NewtonCG])
@pytest.mark.parametrize("termination", ["batch", "sample"])
@pytest.mark.parametrize("max_sweeps", [1, 2000])
def test_an_empty_batch_settles_and_has_no_gradient(kind: Any, termination: str, max_sweeps: int) -> None:
    hybrid, x = copy.deepcopy(converted("cnn", nn.ReLU))
    hybrid.set_solver(kind(termination=termination, max_sweeps=max_sweeps))
    for gradient in ("ep", "implicit", "unrolled"):
        hybrid.set_gradient(gradient)
        for training in (True, False):
            hybrid.train(training)
            hybrid.zero_grad()
            output = hybrid(x[:0])
            assert output.shape == (0, 10)
            output.sum().backward()
            gradients = [parameter.grad for parameter in hybrid.parameters() if parameter.grad is not None]
            assert gradients
            assert not any(bool(found.any()) for found in gradients)
