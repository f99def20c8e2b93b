"""The situation in which a gradient estimator is asked: a settled block and what is wanted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ffebm_compiler.runtime.program import Frame
from ffebm_compiler.runtime.solvers import Solver

__all__ = ["Situation"]


@dataclass(frozen=True)
class Situation:
    """A settled block at which a gradient is asked for."""

    frame: Frame
    scales: tuple[float, ...]
    states: tuple[Tensor, ...]
    preactivations: tuple[Tensor, ...]
    solver: Solver
    rtol: float
    contraction: float | None
    """Factor by which a sweep contracts, where certified."""
    hint: str
    """What to change where a phase does not settle."""
    free_sweeps: int
    inputs_needed: tuple[bool, ...]
    weights_needed: tuple[bool, ...]

    @property
    def name(self) -> str:
        """The block's name."""
        return self.frame.program.name
