"""The nudged phase with held visible states, which contrastive and coupled learning settle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase, NudgedPhase
from ffebm_compiler.runtime.program.frame import Frame, take_rows
from ffebm_compiler.runtime.solvers.fabric import Question

__all__ = ["ClampedPhase"]


class ClampedPhase(NudgedPhase):
    """Equation (2) of `runtime/phases/base.py` without a drive, with given error currents of the held layers.

    A state that is held at s* + β v has u = c v under any force. The others follow from K_l.
    """

    def __init__(
        self,
        frame: Frame,
        setting: Setting,
        preactivations: Sequence[Tensor],
        held: Sequence[Sequence[Tensor] | None],
        betas: Sequence[float],
    ) -> None:
        self._held = tuple(held)
        """For each layer, its currents at every β; None if it is free."""
        super().__init__(frame, setting, preactivations, [None] * len(preactivations), betas)
        self._fixed = [
            None if parts is None else torch.cat(list(parts)) if len(parts) > 1 else parts[0] for parts in held
        ]

    @property
    def sources(self) -> tuple[int, ...]:
        """The held layers."""
        return tuple(index for index, parts in enumerate(self._held) if parts is not None)

    def update(self, index: int) -> Tensor | None:
        """The held current of a layer, or u_l from the finite difference of σ_l."""
        fixed = self._fixed[index]
        return super().update(index) if fixed is None else fixed

    def _question(self, place: int, beta: complex) -> Question:
        """The equilibrium with some layers held at s* + (β/c_l) u_l."""
        held = tuple(
            None if parts is None else free + parts[place].to(free) * (beta.real / scale)
            for parts, free, scale in zip(self._held, self.rest, self.scales, strict=True)
        )
        return Question(self._single, self.setting, held=held)

    def narrowed(self, rows: Tensor) -> ClampedPhase:
        """The phase of some of the samples, at their present error currents."""
        fields = [take_rows(value, rows) for value in self.preactivations]
        held = [None if parts is None else [take_rows(part, rows) for part in parts] for parts in self._held]
        betas = [beta.real for beta in self.betas]
        phase = ClampedPhase(self._single.narrowed(rows), self.setting, fields, held, betas)
        phase.values = [
            None if value is None else take_rows(value, self._rows_at_every_place(rows)) for value in self.values
        ]
        return phase

    def response(self) -> AdjointPhase:
        """The linear response of the free layers, since a held one does not respond."""
        response = super().response()
        response.slopes = [
            slope if fixed is None else torch.zeros_like(slope)
            for slope, fixed in zip(response.slopes, self._fixed, strict=True)
        ]
        return response
