"""Loop gain: norms against dense Jacobians, sweeps against the certificate."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CASES, converted, mlp, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.energies.edge_norms import COHERENT, MARGIN, edge_norms, edge_norms_of_each
from ffebm_compiler.runtime.energies.loop_gain import certify, gain_for, scales_for
from ffebm_compiler.runtime.phases.free_phase import FreePhase
from ffebm_compiler.runtime.program.frame import Frame

aten = torch.ops.aten


def frame_of(hybrid: ffebm.HybridModel, index: int, *inputs: Tensor) -> tuple[Frame, list[Tensor]]:
    """A block's frame at a batch of one, and its feedforward states."""
    block = hybrid.blocks[index]
    with hybrid.recording() as record, torch.no_grad():
        hybrid(*inputs)
    operands = record[block.name][0]
    program = block.module.program
    frame = Frame(program, operands[: program.inputs], operands[program.inputs :])
    with torch.no_grad():
        return frame, frame.feedforward()


def dense(frame: Frame, states: list[Tensor], earlier: int, later: int) -> np.ndarray:
    """The Jacobian of a drive by a state."""

    def drive(state: Tensor) -> Tensor:
        return frame.drive(later, [state if i == earlier else s for i, s in enumerate(states)]).flatten()

    jacobian: np.ndarray = torch.autograd.functional.jacobian(drive, states[earlier]).flatten(1).detach().numpy()
    return jacobian


def dense_norm(frame: Frame, states: list[Tensor], earlier: int, later: int) -> float:
    """The largest singular value of the dense Jacobian of a drive by a state, by numpy."""
    return float(np.linalg.norm(dense(frame, states, earlier, later), 2))


def exact_cosine(matrix: np.ndarray) -> tuple[float, float]:
    """(cosine between the leading left singular vector and equal entries, second over largest singular value)."""
    left, sizes, _ = np.linalg.svd(matrix)
    return abs(left[:, 0].sum()) / math.sqrt(len(left)), sizes[1] / sizes[0] if len(sizes) > 1 else 0.0


@pytest.mark.parametrize("case", CASES)
def test_edge_norms_are_those_of_the_dense_jacobian(case: str) -> None:
    hybrid, x = converted(case, nn.Tanh)
    hybrid = copy.deepcopy(hybrid).double()
    for index, block in enumerate(hybrid.blocks):
        if not block.module.program.coupled:
            continue
        frame, states = frame_of(hybrid, index, x[:1].double())
        norms = edge_norms(frame, states).norms
        assert {(k, m) for k, m, _ in norms} == {
            (k, m) for m, above in enumerate(block.module.program.upstream) for k in above
        }
        for earlier, later, norm in norms:
            exact = dense_norm(frame, states, earlier, later)
            assert exact <= norm <= exact * MARGIN * (1 + 1e-6), f"{block.name} {earlier}->{later}"
        measured = block.module.certificate.norms
        for (_, _, norm), (_, _, stored) in zip(norms, measured, strict=True):
            assert stored == pytest.approx(norm, rel=3e-3)  # measured in float32 by `convert`


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 2), st.integers(3, 7))
def test_norm_of_random_convolutions(seed: int, kernel: int, stride: int, size: int) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 1), nn.Tanh(), nn.Conv2d(3, 4, kernel, stride, kernel // 2), nn.Tanh()
        ).double(),
        seed,
    )
    x = noise(1, 1, size, size).double()
    hybrid = ffebm.convert(model, x)
    frame, states = frame_of(hybrid, 0, x)
    ((earlier, later, norm),) = edge_norms(frame, states).norms
    exact = dense_norm(frame, states, earlier, later)
    assert exact <= norm <= exact * MARGIN * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["linear", "convolution"]), st.floats(0, 3))
def test_errors_add_up_where_the_leading_direction_has_one_sign(seed: int, kind: str, mean: float) -> None:
    """From weights of random signs to weights above 0, as their mean grows beside their spread."""
    first, second, x = (
        (nn.Linear(6, 24), nn.Linear(24, 30), noise(1, 6).double())
        if kind == "linear"
        else (nn.Conv2d(2, 5, 1), nn.Conv2d(5, 6, 3, padding=1), noise(1, 2, 5, 5).double())
    )
    model = seeded(lambda: nn.Sequential(first, nn.Tanh(), second, nn.Tanh()).double(), seed)
    with torch.no_grad():
        second.weight.normal_(mean, 1, generator=torch.Generator().manual_seed(seed))
    hybrid = ffebm.convert(model, x).train()
    frame, states = frame_of(hybrid, 0, x)
    cosine, gap = exact_cosine(dense(frame, states, 0, 1))
    if abs(cosine - COHERENT) < 0.05 or gap > 0.9:
        return
    expected = cosine > COHERENT
    assert edge_norms(frame, states).coherent == expected
    block = hybrid.blocks[0].module
    assert block.gain.setting.coherent == expected
    assert block.gain.setting.typical == (1.0 if expected else 0.6)
    hybrid(x)
    with torch.no_grad():  # beyond the slack of the amplifiers
        hybrid.get_parameter("2.weight").mul_(1.05)
    hybrid(x)
    assert block.gain.setting.coherent == expected


def test_errors_add_up_once_training_has_made_the_weights_nonnegative() -> None:
    hybrid, x = converted("mlp", nn.ReLU)
    hybrid = copy.deepcopy(hybrid).train()
    block = hybrid.blocks[0].module
    hybrid(x)
    assert not block.gain.setting.coherent
    with torch.no_grad():
        for weight in (p for p in hybrid.parameters() if p.dim() > 1):
            weight.abs_()
    hybrid(x)
    assert block.gain.setting.coherent
    again = ffebm.convert(CASES["mlp"].make(nn.ReLU)[0], x)
    again.load_state_dict(hybrid.state_dict())
    assert again.blocks[0].module.gain.setting.coherent


def test_norms_of_blocks_that_are_alike_are_those_of_each_alone() -> None:
    layers = lambda: [part for _ in range(16) for part in (nn.Linear(8, 8), nn.Tanh())]  # noqa: E731
    x = noise(2, 3, 8).double()
    hybrid = ffebm.convert(seeded(lambda: nn.Sequential(*layers()).double()), x)
    frames = [frame_of(hybrid, index, x[:1]) for index, _ in enumerate(hybrid.blocks)]
    assert len(frames) == 4
    second, third = (next(w for w in reversed(frame.weights) if w.dim() == 2) for frame, _ in frames[1:3])
    with torch.no_grad():
        second.zero_()
        third[0, 0] = math.inf
        for weight in (w for w in frames[3][0].weights if w.dim() == 2):
            weight.abs_()
        together = edge_norms_of_each(frames)
        for number, ((frame, states), (found, coherent)) in enumerate(zip(frames, together, strict=True)):
            assert [edge[:2] for edge in found] == [(0, 1), (1, 2), (2, 3)]
            alone = edge_norms(frame, states)
            assert [edge[2] for edge in found] == pytest.approx([edge[2] for edge in alone.norms], rel=1e-9)
            assert coherent == alone.coherent
            for earlier, later, norm in found[: 2 if number in (1, 2) else 3]:
                exact = dense_norm(frame, states, earlier, later)  # of all three tokens
                assert exact <= norm <= exact * MARGIN * (1 + 1e-6)
    assert together[1].norms[2][2] == 0
    assert together[2].norms[2][2] == math.inf
    assert together[3].coherent


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kappa", [1e-6, 0.01, 0.1, 0.5, 0.99])
def test_feedback_is_the_loop_gain(case: str, kappa: float) -> None:
    hybrid, _ = converted(case, nn.Tanh)
    for block in hybrid.blocks:
        program = block.module.program
        if not program.coupled:
            assert block.certificate is None
            assert block.loop_gain == 0
            continue
        certificate = certify(program, block.certificate.norms, kappa)
        assert certificate.loop_gain == pytest.approx(kappa, rel=1e-6)
        assert certificate.certified
        assert certificate.radius == pytest.approx(comparison_radius(block.module, certificate.scales), rel=1e-9)
        assert max(certificate.scales) / min(certificate.scales) >= 1
        gain = gain_for(program, block.certificate.norms, kappa)
        assert scales_for(program, gain) == certificate.scales
        assert all(
            math.isclose(scale, gain ** (depth - max(program.depths)), rel_tol=1e-9)
            for scale, depth in zip(certificate.scales, program.depths, strict=True)
        )


def comparison(block: Any, scales: Sequence[float]) -> np.ndarray:
    """A of DESIGN: a_lm = √(c_m/c_l) ‖J_ml‖ √(Lip_l Lip_m), written down once more."""
    layers = block.program.layers
    matrix = np.zeros((len(layers), len(layers)))
    for earlier, later, norm in block.certificate.norms:
        lips = layers[earlier].activation.lipschitz * layers[later].activation.lipschitz
        entry = math.sqrt(scales[later] / scales[earlier]) * norm * math.sqrt(lips)
        matrix[earlier, later] += entry
        matrix[later, earlier] += entry
    return matrix


def comparison_radius(block: Any, scales: Sequence[float]) -> float:
    return float(max(abs(np.linalg.eigvals(comparison(block, scales)))))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
@pytest.mark.parametrize("kappa", [0.1, 0.9])
def test_every_sweep_contracts_as_the_certificate_says(case: str, activation: type[nn.Module], kappa: float) -> None:
    """With n_l = √(c_l/Lip_l) ‖s_l − s*_l‖, an update obeys n_l ≤ Σ_m a_lm n_m, whatever the start."""
    hybrid, x = converted(case, activation)
    hybrid = copy.deepcopy(hybrid).double()
    hybrid.set_feedback(kappa)
    for index, block in enumerate(hybrid.blocks):
        module = block.module
        if not module.program.coupled:
            continue
        frame, _ = frame_of(hybrid, index, x.double())
        scales = module.scales
        matrix = comparison(module, scales)
        assert comparison_radius(module, scales) ** 2 == pytest.approx(kappa, rel=1e-6)
        weights = [
            math.sqrt(scale / layer.activation.lipschitz)
            for scale, layer in zip(scales, module.program.layers, strict=True)
        ]
        with torch.no_grad():
            settled = module.settle(frame.inputs, frame.weights).states
            phase = FreePhase(frame, module.setting)
            for layer, state in enumerate(settled):
                phase.store(layer, state + noise(*state.shape, seed=60 + layer).double())

            def distance(
                layer: int, phase: FreePhase = phase, settled: Any = settled, weights: list[float] = weights
            ) -> float:
                return weights[layer] * float((phase.values[layer] - settled[layer]).norm())

            start = max(distance(layer) for layer in range(len(settled)))
            for _ in range(3):
                for layer in range(len(settled)):
                    bound = sum(matrix[layer, other] * distance(other) for other in range(len(settled)))
                    phase.store(layer, phase.update(layer))
                    assert distance(layer) <= bound * (1 + 1e-6) + 1e-9 * start
            # ρ < 1: it converges from here to the same equilibrium.
            for _ in range(module.certificate.sweeps(1e-9)):
                for layer in range(len(settled)):
                    phase.store(layer, phase.update(layer))
            assert max(distance(layer) for layer in range(len(settled))) <= 1e-6 * start


@pytest.mark.parametrize("kappa", [0.05, 0.3, 0.8])
def test_predicted_rate_is_met_where_the_bound_is_tight(kappa: float) -> None:
    # Two linears without an activation: the error contracts by γ ‖W‖² = κ a sweep, up to the margin of the norm.
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))).double()
    x = noise(3, 5).double()
    hybrid = ffebm.convert(model, x, feedback=kappa)
    (block,) = hybrid.blocks
    frame, _ = frame_of(hybrid, 0, x)
    phase = FreePhase(frame, block.module.setting)
    errors = []
    with torch.no_grad():
        settled = block.settle(x).states
        phase.store(1, phase.values[1] + 1)
        for _ in range(12):
            for layer in range(2):
                phase.store(layer, phase.update(layer))
            errors.append(float((phase.values[1] - settled[1]).norm()))
            if errors[-1] < 1e-9:
                break
    rate = errors[-1] / errors[-2]
    assert rate == pytest.approx(kappa / MARGIN**2, rel=0.02)
    sweeps = block.certificate.sweeps(1e-6)
    assert sweeps == math.ceil(math.log(1e-6) / math.log(block.loop_gain))
    hybrid.configure(feedback=kappa, estimator=block.module.estimator, solver=ffebm.GaussSeidel(rtol=1e-6))
    hybrid(x)
    assert block.module.last.sweeps <= sweeps + 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kappa", [0.1, 0.5])
def test_sweeps_stay_within_the_prediction(case: str, kappa: float) -> None:
    hybrid, x = converted(case, nn.Tanh)
    hybrid = copy.deepcopy(hybrid)
    hybrid.set_feedback(kappa)
    hybrid(x)
    for block in hybrid.blocks:
        if block.certificate is not None:
            predicted = block.certificate.sweeps(1e-5)
            assert predicted is not None
            assert 1 <= block.module.last.sweeps <= predicted + 2, block.name
    assert "predicted" in hybrid.summary()


def test_symmetric_feedback_is_measured_not_scaled() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x, feedback="symmetric")
    (block,) = hybrid.blocks
    assert block.module.scales == (1.0,) * 4
    assert block.loop_gain == pytest.approx(comparison_radius(block.module, (1.0,) * 4) ** 2, rel=1e-9)
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(10)
    hybrid.recertify()
    assert block.loop_gain > 1
    assert not block.certificate.certified
    assert block.certificate.sweeps(1e-5) is None
