"""The gauge of resistive blocks: the amplifiers' gains from row sums, and how fast the whole block contracts.

At the steepest slopes S of its states a sweep of a chain contracts by ρ², ρ the largest |eigenvalue| of the symmetric
matrix (c S)^½ B (S/c)^½ with B the coupling of all layers. It is below 1 wherever no amplifier's gain is below its row
sum. Norms of single edges bound it badly, since loads differ from unit to unit.
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
from ffebm_compiler.runtime.energies.base import Energy, Evaluated, Gauge, Setting
from ffebm_compiler.runtime.energies.loaded import Loaded
from ffebm_compiler.runtime.energies.loads import row_sums_of
from ffebm_compiler.runtime.energies.loop_gain import MARGIN, scales_for
from ffebm_compiler.runtime.energies.tracked_norms import Track, drawn_probe, followed
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["RowSums"]

_SLACK = 0.01
"""Relative distance of an amplifier's gain from its row sum at which a block that does not settle is set anew."""
_STEPS = 60
_TOLERANCE = 1e-3
_PATIENCE = 6
_SWEEPS = 30


class RowSums(Gauge):
    """A_m exactly, and ρ of the whole block, followed from step to step as `tracked_norms.py` follows an operator."""

    def __init__(self, energy: Energy, program: BlockProgram) -> None:
        self.energy = energy
        self.program = program
        self._track: Track | None = None
        self._probe: Tensor | None = None

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
        """A from the row sums, exact at once; ρ followed."""
        if converge:
            return self.certify(*evaluated(), feedback)
        amplifiers = row_sums_of(frame)
        if not all(math.isfinite(gain) for gain in amplifiers):
            return replace(present, radius=math.inf, sweep_radius=None, amplifiers=amplifiers)
        block = _Block(frame, Setting(self.energy, present.scales, amplifiers))
        if self._probe is None or self._probe.shape[1] != block.size:
            self._probe = block.probe(seed=0)
        self._probe = block.here(self._probe)
        self._track = followed(block, self._probe, self._track)
        radius = 0.0 if self._track is None else _below_one(self._track.norm)
        # On odd cycles a sweep contracts by more than ρ²; how much more was measured to convergence.
        longer = present.contraction / present.loop_gain if present.loop_gain else 1.0
        sweep = max(radius**2, min(longer * radius**2, radius))
        return Certificate((), present.scales, radius, sweep, amplifiers)

    def with_feedback(self, found: Certificate, feedback: float | str) -> Certificate | None:
        """ρ depends on γ in every unit."""
        return None

    def with_setting(self, found: Certificate, present: Certificate) -> Certificate | None:
        """ρ depends on γ in every unit."""
        return None

    def state(self) -> dict[str, dict[str, Any]]:
        """What is kept of the whole block, under its first edge."""
        if self._track is None:
            return {}
        norm, vectors, image = self._track.norm, self._track.vectors, self._track.image
        return {self._key: {"norm": norm, "vectors": vectors, "image": image}}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """What is kept of the whole block."""
        kept = state.get(self._key)
        self._track = None if kept is None else Track(float(kept["norm"]), kept["vectors"], kept["image"])

    @property
    def _key(self) -> str:
        return next(f"{above[0]}-{later}" for later, above in enumerate(self.program.upstream) if above)

    def _certificate(
        self, frame: Frame, states: Sequence[Tensor], scales: tuple[float, ...], amplifiers: tuple[float, ...]
    ) -> Certificate:
        if not all(math.isfinite(gain) for gain in amplifiers):
            return Certificate((), scales, math.inf, None, amplifiers)
        block = _Block(frame, Setting(self.energy, scales, amplifiers))
        radius = _below_one(_radius(block))
        sweep = max(radius**2, _below_one(self._sweep_radius(block.phase(1))))
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


def _below_one(measured: float) -> float:
    """A measured radius with the margin of its measurement, which takes none that is below one to one."""
    return min(measured * MARGIN, (1 + measured) / 2) if measured < 1 else measured * MARGIN


def _random(phase: AdjointPhase) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s.shape, generator=generator, dtype=torch.float32).to(s) for s in phase.slopes]


class _Block:
    """(c S)^½ B (S/c)^½ on the rows of a matrix, each the states of one sample, layer after layer. It is symmetric."""

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
        """The linear response of so many copies of the sample, at the steepest slopes."""
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
        """The same."""
        return self.forward(rows)

    def probe(self, seed: int) -> Tensor:
        """A random row of unit length on average."""
        return self.here(drawn_probe(self.size, seed))

    def here(self, rows: Tensor) -> Tensor:
        """Rows on the device and in the dtype of the weights."""
        return rows.to(self.outer[0])


def _radius(block: _Block) -> float:
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
