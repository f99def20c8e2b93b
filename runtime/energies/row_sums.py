"""The gauge of resistive blocks: it finds the amplifiers' gains from row sums, and how fast the whole block contracts.

Let S be the steepest slopes of the block's states, and B the coupling of all layers. A sweep of a chain contracts by
ρ², where ρ is the largest |eigenvalue| of the symmetric matrix (c S)^½ B (S/c)^½. ρ is below 1 as long as no gain of an
amplifier is below its row sum. Norms of single edges bound ρ badly, since loads differ from unit to unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.base import Change, Evaluated, Gauge, Setting
from ffebm_compiler.runtime.energies.conductive import Conductive, gain_of
from ffebm_compiler.runtime.energies.edge_norms import MARGIN
from ffebm_compiler.runtime.energies.followed_norm import Track, drawn_probe, followed
from ffebm_compiler.runtime.energies.loaded import Loaded
from ffebm_compiler.runtime.energies.loop_gain import scales_for
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["RowSums"]

_SLACK = 0.01
"""Relative distance of an amplifier's gain from its row sum at which a block that does not settle is set again."""
_STEPS = 60
_TOLERANCE = 1e-3
_PATIENCE = 6
_SWEEPS = 30


class RowSums(Gauge):
    """Measures A_m exactly, if there are any, and follows ρ of the whole block as in `tracked_norms.py`."""

    def __init__(self, energy: Conductive, program: BlockProgram) -> None:
        self.energy = energy
        self.program = program
        self._track: Track | None = None
        self._probe: Tensor | None = None

    def certify(self, frame: Frame, states: Sequence[Tensor], feedback: float | str) -> Certificate:
        """The certificate with A from the row sums and c from γ."""
        return self._certificate(frame, states, scales_for(self.program, gain_of(feedback)), self.energy.gains(frame))

    def at(self, frame: Frame, states: Sequence[Tensor], present: Certificate) -> Certificate:
        """The certificate with ρ of these weights at the present γ and A."""
        return self._certificate(frame, states, present.scales, present.amplifiers)

    def needed(self, evaluated: Evaluated, present: Certificate, feedback: float | str) -> Certificate | None:
        """A new certificate if an amplifier's gain differs from the one that is needed; else None."""
        frame, states = evaluated()
        sums = self.energy.gains(frame)
        if all(abs(gain - held) <= _SLACK * held for gain, held in zip(sums, present.amplifiers, strict=True)):
            return None
        return self.certify(frame, states, feedback)

    def follow(self, change: Change) -> Certificate:
        """The certificate with A from the row sums, which is exact, and ρ followed from step to step."""
        if change.converge:
            return self.certify(*change.evaluated(), change.feedback)
        frame, present = change.frame, change.present
        amplifiers = self.energy.gains(frame)
        if not all(math.isfinite(gain) for gain in amplifiers):
            return replace(present, radius=math.inf, sweep_radius=None, amplifiers=amplifiers)
        block = _ScaledCoupling(frame, Setting(self.energy, present.scales, amplifiers))
        if self._probe is None or self._probe.shape[1] != block.size:
            self._probe = block.probe(seed=0)
        self._probe = block.here(self._probe)
        self._track = followed(block, self._probe, self._track)
        radius = 0.0 if self._track is None else self._below_one(self._track.norm)
        # On odd cycles the factor of a sweep is larger than ρ². The ratio was measured to convergence.
        longer = present.contraction / present.loop_gain if present.loop_gain else 1.0
        sweep = max(radius**2, min(longer * radius**2, radius))
        return Certificate((), present.scales, radius, sweep, amplifiers)

    def with_feedback(self, found: Certificate, feedback: float | str) -> Certificate | None:
        """None, since ρ depends on γ in every unit."""
        return None

    def with_setting(self, found: Certificate, present: Certificate) -> Certificate | None:
        """None, since ρ depends on γ in every unit."""
        return None

    def state(self) -> dict[str, dict[str, Any]]:
        """The kept vectors of the whole block, under the name of its first edge."""
        if self._track is None:
            return {}
        norm, vectors, image = self._track.norm, self._track.vectors, self._track.image
        return {self._first_edge: {"norm": norm, "vectors": vectors, "image": image}}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the kept vectors of the whole block."""
        kept = state.get(self._first_edge)
        self._track = None if kept is None else Track(float(kept["norm"]), kept["vectors"], kept["image"])

    @property
    def _first_edge(self) -> str:
        """Empty where no layer reads another one."""
        return next((f"{above[0]}-{later}" for later, above in enumerate(self.program.upstream) if above), "")

    def _below_one(self, measured: float) -> float:
        """A measured radius with a margin for the measurement. A radius below one stays below one.

        Without amplifiers it is never above one. Round-off alone says so where units hardly reach an input.
        """
        if measured < 1:
            return min(measured * MARGIN, (1 + measured) / 2)
        return measured * MARGIN if self.energy.amplified or not math.isfinite(measured) else 1.0

    def _certificate(
        self, frame: Frame, states: Sequence[Tensor], scales: tuple[float, ...], amplifiers: tuple[float, ...]
    ) -> Certificate:
        if not all(math.isfinite(gain) for gain in amplifiers):
            return Certificate((), scales, math.inf, None, amplifiers)
        block = _ScaledCoupling(frame, Setting(self.energy, scales, amplifiers))
        radius = self._below_one(_spectral_radius(block))
        sweep = max(radius**2, self._below_one(self._sweep_radius(block.phase(1))))
        return Certificate((), scales, radius, sweep, amplifiers)

    def _sweep_radius(self, phase: AdjointPhase) -> float:
        """Factor by which a sweep contracts if edges close odd cycles; 0 without such cycles, where it is ρ²."""
        edges = [(k, m) for m, above in enumerate(self.program.upstream) for k in above]
        if nx.is_bipartite(nx.Graph(edges)):
            return 0.0
        for index, value in enumerate(_random_states(phase)):
            phase.store(index, value)
        sizes = []
        for _ in range(_SWEEPS):
            phase.sweep()
            size = math.sqrt(sum(float(v.double().square().sum()) for v in phase.values if v is not None))
            if not 0 < size < math.inf:
                return size
            for index, present in enumerate(phase.values):
                phase.store(index, None if present is None else present / size)
            sizes.append(size)
        late = sizes[_SWEEPS // 2 :]
        return float(np.exp(np.mean(np.log(late))))


def _random_states(phase: AdjointPhase) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s.shape, generator=generator, dtype=torch.float32, device="cpu").to(s) for s in phase.slopes]


class _ScaledCoupling:
    """The symmetric map M = (c S)^½ B (S/c)^½. Each row that it is applied to holds the states of one sample."""

    def __init__(self, frame: Frame, setting: Setting) -> None:
        self.frame = frame
        self.setting = setting
        shapes = [frame.shapes[layer.drive] for layer in frame.program.layers]
        like = next(weight for weight in frame.weights if weight is not None)
        self.slopes = [
            (sigma.steepest if isinstance(sigma, Loaded) else like.new_full((), sigma.lipschitz)).expand(shape)
            for sigma, shape in zip(setting.activations(frame), shapes, strict=True)
        ]
        self.outer = [(slope * scale).sqrt() for slope, scale in zip(self.slopes, setting.scales, strict=True)]
        self.inner = [root / scale for root, scale in zip(self.outer, setting.scales, strict=True)]
        self.sizes = [slope.numel() for slope in self.slopes]
        self.size = sum(self.sizes)

    def phase(self, copies: int) -> AdjointPhase:
        """The linear response of a number of copies of the sample, at the steepest slopes."""
        nothing: list[Tensor | None] = [None] * len(self.slopes)
        return AdjointPhase(self.frame.repeated(copies), self.setting, self.slopes, nothing, self.slopes)

    def forward(self, rows: Tensor) -> Tensor:
        """M x for every row x."""
        if len(rows) > 1 and not self.frame.program.resizable:
            return torch.cat([self.forward(row[None]) for row in rows])
        phase, count = self.phase(len(rows)), len(rows)
        for index, (part, root) in enumerate(zip(rows.split(self.sizes, 1), self.outer, strict=True)):
            shape = root.shape if count == 1 else (count, *root.shape[1:])
            phase.store(index, part.reshape(shape) * root)
        forces = [phase.force(index) for index in range(len(self.sizes))]
        return torch.cat(
            [
                rows.new_zeros((count, size)) if force is None else (force * root).reshape(count, size)
                for force, root, size in zip(forces, self.inner, self.sizes, strict=True)
            ],
            1,
        )

    def transpose(self, rows: Tensor) -> Tensor:
        """M x for every row x, since M is symmetric."""
        return self.forward(rows)

    def probe(self, seed: int) -> Tensor:
        """A random row whose mean squared length is one."""
        return self.here(drawn_probe(self.size, seed))

    def here(self, rows: Tensor) -> Tensor:
        """Rows moved to the device and dtype of the weights."""
        return rows.to(self.outer[0])


def _spectral_radius(block: _ScaledCoupling) -> float:
    """The largest |eigenvalue| of a block's matrix by Lanczos, from below."""
    vector = block.probe(seed=0)
    vector = vector / torch.linalg.vector_norm(vector)
    before = torch.zeros_like(vector)
    diagonal: list[float] = []
    beside: list[float] = []
    history: list[float] = []
    beta = 0.0
    for _ in range(_STEPS):
        image = block.forward(vector)
        alpha = float((image * vector).sum())
        diagonal.append(alpha)
        tridiagonal = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        if not np.isfinite(tridiagonal).all():
            return math.inf
        history.append(float(np.abs(np.linalg.eigvalsh(tridiagonal)).max()))
        if len(history) > _PATIENCE and history[-1] - history[-1 - _PATIENCE] <= _TOLERANCE * history[-1]:
            break
        image = image - alpha * vector - beta * before
        beta = float(torch.linalg.vector_norm(image))
        if beta <= 1e-7 * history[-1] or beta == 0:
            break
        beside.append(beta)
        before, vector = vector, image / beta
    return history[-1]
