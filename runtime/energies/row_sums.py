"""The gauge of resistive blocks: the amplifiers' gains from row sums, and how fast the whole block contracts.

At the steepest slopes S of its states a sweep of a chain contracts by ρ², ρ the largest |eigenvalue| of the symmetric
matrix (c S)^½ B (S/c)^½ with B the coupling of all layers. It is below 1 wherever no amplifier's gain is below its row
sum. Norms of single edges bound it badly, since loads differ from unit to unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.runtime.activation_base import Activation
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.base import Energy, Evaluated, Gauge, Setting
from ffebm_compiler.runtime.energies.loaded import Loaded
from ffebm_compiler.runtime.energies.loads import row_sums_of
from ffebm_compiler.runtime.energies.loop_gain import MARGIN, scales_for
from ffebm_compiler.runtime.error_phases import AdjointPhase
from ffebm_compiler.runtime.frame import Frame
from ffebm_compiler.runtime.program import BlockProgram

__all__ = ["RowSums"]

_SLACK = 0.01
"""Relative distance of an amplifier's gain from its row sum at which a block that does not settle is set anew."""
_STEPS = 60
_TOLERANCE = 1e-3
_PATIENCE = 6
_SWEEPS = 30


class RowSums(Gauge):
    """A_m exactly, and ρ of the whole block. Nothing is kept: both depend on the weights and γ alone."""

    def __init__(self, energy: Energy, program: BlockProgram) -> None:
        self.energy = energy
        self.program = program

    def certify(self, frame: Frame, states: Sequence[Tensor], feedback: float | str) -> Certificate:
        """A from the row sums, c from γ."""
        return self._certificate(frame, states, scales_for(self.program, _gamma(feedback)), row_sums_of(frame))

    def at(self, frame: Frame, states: Sequence[Tensor], present: Certificate) -> Certificate:
        """ρ of these weights at the present γ and A."""
        return self._certificate(frame, states, present.scales, present.amplifiers)

    def needed(self, evaluated: Evaluated, present: Certificate, feedback: float | str) -> Certificate | None:
        """Where an amplifier's gain is not the row sum of its layer."""
        frame, states = evaluated()
        sums = row_sums_of(frame)
        if all(abs(gain - held) <= _SLACK * held for gain, held in zip(sums, present.amplifiers, strict=True)):
            return None
        return self.certify(frame, states, feedback)

    def follow(
        self, frame: Frame, evaluated: Evaluated, present: Certificate, feedback: float | str, converge: bool
    ) -> Certificate:
        """The same as `certify`: row sums are exact at once."""
        like = next(weight for weight in frame.weights if weight is not None)
        states = [like.new_empty(frame.shapes[layer.drive]) for layer in self.program.layers]
        return self.certify(frame, states, feedback)

    def with_feedback(self, found: Certificate, feedback: float | str) -> Certificate | None:
        """ρ depends on γ in every unit."""
        return None

    def with_setting(self, found: Certificate, present: Certificate) -> Certificate | None:
        """ρ depends on γ in every unit."""
        return None

    def state(self) -> dict[str, dict[str, Any]]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing."""

    def _certificate(
        self, frame: Frame, states: Sequence[Tensor], scales: tuple[float, ...], amplifiers: tuple[float, ...]
    ) -> Certificate:
        if not all(math.isfinite(gain) for gain in amplifiers):
            return Certificate((), scales, math.inf, None, amplifiers)
        setting = Setting(self.energy, scales, amplifiers)
        slopes = [_steepest(sigma, s) for sigma, s in zip(setting.activations(frame), states, strict=True)]
        phase = AdjointPhase(frame, setting, states, [None] * len(slopes), slopes)
        radius = _below_one(_radius(phase))
        sweep = max(radius**2, _below_one(self._sweep_radius(phase)))
        return Certificate((), scales, radius, sweep, amplifiers)

    def _sweep_radius(self, phase: AdjointPhase) -> float:
        """Factor by which a sweep contracts where edges close odd cycles; 0 on two colours, where it is ρ²."""
        edges = [(k, m) for m, above in enumerate(self.program.upstream) for k in above]
        if nx.is_bipartite(nx.Graph(edges)):
            return 0.0
        for index, value in enumerate(_random(phase)):
            phase.store(index, value)
        sizes = []
        for _ in range(_SWEEPS):
            for index in phase.order():
                phase.store(index, phase.update(index))
            size = math.sqrt(sum(float(v.double().square().sum()) for v in phase.values if v is not None))
            if not 0 < size < math.inf:
                return size
            for index, present in enumerate(phase.values):
                phase.store(index, None if present is None else present / size)
            sizes.append(size)
        late = sizes[_SWEEPS // 2 :]
        return float(np.exp(np.mean(np.log(late))))


def _gamma(feedback: float | str) -> float:
    return 1.0 if isinstance(feedback, str) else feedback


def _steepest(activation: Activation, like: Tensor) -> Tensor:
    """The largest slope of a state, by unit."""
    slope = activation.steepest if isinstance(activation, Loaded) else torch.full_like(like, activation.lipschitz)
    return slope.expand(like.shape)


def _below_one(measured: float) -> float:
    """A measured radius with the margin of its measurement, which takes none that is below one to one."""
    return min(measured * MARGIN, (1 + measured) / 2) if measured < 1 else measured * MARGIN


def _random(phase: AdjointPhase) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s.shape, generator=generator, dtype=torch.float32).to(s) for s in phase.slopes]


def _radius(phase: AdjointPhase) -> float:
    """The largest |eigenvalue| of (c S)^½ B (S/c)^½ by Lanczos, from below."""
    outer = [torch.sqrt(slope * scale) for slope, scale in zip(phase.slopes, phase.scales, strict=True)]
    inner = [root / scale for root, scale in zip(outer, phase.scales, strict=True)]

    def matrix(vector: list[Tensor]) -> list[Tensor]:
        for index, (root, part) in enumerate(zip(outer, vector, strict=True)):
            phase.store(index, root * part)
        forces = [phase.force(index) for index in range(len(vector))]
        return [
            torch.zeros_like(root) if force is None else root * force for root, force in zip(inner, forces, strict=True)
        ]

    vector = _random(phase)
    size = _norm(vector)
    vector = [part / size for part in vector]
    before = [torch.zeros_like(part) for part in vector]
    diagonal: list[float] = []
    beside: list[float] = []
    history: list[float] = []
    beta = 0.0
    for _ in range(_STEPS):
        image = matrix(vector)
        alpha = sum(float((a * b).sum()) for a, b in zip(image, vector, strict=True))
        diagonal.append(alpha)
        tridiagonal = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        if not np.isfinite(tridiagonal).all():
            return math.inf
        history.append(float(np.abs(np.linalg.eigvalsh(tridiagonal)).max()))
        if len(history) > _PATIENCE and history[-1] - history[-1 - _PATIENCE] <= _TOLERANCE * history[-1]:
            break
        image = [i - alpha * v - beta * b for i, v, b in zip(image, vector, before, strict=True)]
        beta = _norm(image)
        if beta <= 1e-7 * history[-1] or beta == 0:
            break
        beside.append(beta)
        before, vector = vector, [part / beta for part in image]
    return history[-1]


def _norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))
