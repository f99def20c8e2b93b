"""`Situation`: everything that a gradient estimator needs, namely a settled block and the gradients that are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ffebm_compiler.runtime.devices.analog import Analog
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.program.frame import Frame, take_rows
from ffebm_compiler.runtime.solvers.base import Solver

__all__ = ["Situation"]


@dataclass(frozen=True)
class Situation:
    """A settled block whose gradients are needed."""

    frame: Frame
    setting: Setting
    states: tuple[Tensor, ...]
    literal: tuple[Tensor, ...]
    """The states as a fabric measured them, in float64; empty where they are computed."""
    preactivations: tuple[Tensor, ...]
    solver: Solver
    rtol: float
    """Relative error of the error currents at which their phase stops."""
    contraction: float | None
    """Factor by which a sweep contracts; None without a certificate."""
    hint: Callable[[], str]
    """Gives advice for a phase that does not settle."""
    free_sweeps: int
    free_rtol: float
    feedback: float | str
    """The feedback that the amplifiers hold."""
    measured: Callable[[], Frame | None]
    """The block as it is measured, for one sample and without random masks; None if the amplifiers are constant."""
    inputs_needed: tuple[bool, ...]
    weights_needed: tuple[bool, ...]
    analog: Analog | None = None
    """How devices read the states; None if states are known exactly."""

    @property
    def scales(self) -> tuple[float, ...]:
        """c_l."""
        return self.setting.scales

    @property
    def name(self) -> str:
        """The block's name."""
        return self.frame.program.name

    def without(self, lost: Sequence[int], errors: Sequence[Tensor | None]) -> tuple[Situation, list[Tensor | None]]:
        """The situation and the errors without the diverged samples `lost`, which have no part in the gradient."""
        rows = self._remaining(lost)
        kept = replace(
            self,
            frame=self.frame.narrowed(rows),
            states=tuple(take_rows(state, rows) for state in self.states),
            preactivations=tuple(take_rows(field, rows) for field in self.preactivations),
        )
        return kept, [None if error is None else take_rows(error, rows) for error in errors]

    def spread(self, gradients: Sequence[Tensor | None], lost: Sequence[int]) -> list[Tensor | None]:
        """Gradients of the inputs, with zeros for the diverged samples `lost`."""
        rows = self._remaining(lost)
        return [
            None
            if gradient is None
            else gradient.new_zeros(value.shape).index_copy_(0, rows.to(gradient.device), gradient)
            for value, gradient in zip(self.frame.inputs, gradients, strict=True)
        ]

    def _remaining(self, lost: Sequence[int]) -> Tensor:
        samples = self.frame.samples
        assert samples is not None
        return torch.tensor([row for row in range(samples) if row not in set(lost)], device="cpu")
