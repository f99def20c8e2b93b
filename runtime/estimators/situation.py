"""The situation in which a gradient estimator is asked: a settled block and what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.program.frame import Frame, take_rows
from ffebm_compiler.runtime.solvers.base import Solver

__all__ = ["Situation"]


@dataclass(frozen=True)
class Situation:
    """A settled block at which a gradient is asked for."""

    frame: Frame
    setting: Setting
    states: tuple[Tensor, ...]
    preactivations: tuple[Tensor, ...]
    solver: Solver
    rtol: float
    """Relative error of the error currents at which their phase stops."""
    contraction: float | None
    """Factor by which a sweep contracts, where certified."""
    hint: Callable[[], str]
    """What to change where a phase does not settle."""
    free_sweeps: int
    free_rtol: float
    feedback: float | str
    """What the amplifiers hold."""
    measured: Callable[[], Frame | None]
    """The block as its amplifiers were measured: one sample, without random masks; None where they are constant."""
    inputs_needed: tuple[bool, ...]
    weights_needed: tuple[bool, ...]

    @property
    def scales(self) -> tuple[float, ...]:
        """c_l."""
        return self.setting.scales

    @property
    def name(self) -> str:
        """The block's name."""
        return self.frame.program.name

    def without(self, lost: Sequence[int], errors: Sequence[Tensor | None]) -> tuple[Situation, list[Tensor | None]]:
        """The situation and the errors of the other samples: those that diverged have no part in the gradient."""
        rows = self._others(lost)
        kept = replace(
            self,
            frame=self.frame.narrowed(rows),
            states=tuple(take_rows(state, rows) for state in self.states),
            preactivations=tuple(take_rows(field, rows) for field in self.preactivations),
        )
        return kept, [None if error is None else take_rows(error, rows) for error in errors]

    def spread(self, gradients: Sequence[Tensor | None], lost: Sequence[int]) -> list[Tensor | None]:
        """Gradients of the other samples' inputs among zeros for those that diverged."""
        rows = self._others(lost)
        return [
            None
            if gradient is None
            else gradient.new_zeros(value.shape).index_copy_(0, rows.to(gradient.device), gradient)
            for value, gradient in zip(self.frame.inputs, gradients, strict=True)
        ]

    def _others(self, lost: Sequence[int]) -> Tensor:
        samples = self.frame.samples
        assert samples is not None
        return torch.tensor([row for row in range(samples) if row not in set(lost)])
