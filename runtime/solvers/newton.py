"""Semismooth Newton's method with conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.solvers.base import Solver, sweep_layers
from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint

__all__ = ["NewtonCG"]


@dataclass(frozen=True)
class NewtonCG(Solver):
    """Semismooth Newton's method on top of Gauss–Seidel sweeps (Qi & Sun, 1993).

    If a sweep leaves more than `slow` of the residual, the next step first solves (1 − D B) Δ = f(s) − s
    for a correction Δ of the states, with D = σ'(h) and the coupling B, and ends with a sweep. At a minimum the system
    is symmetric positive definite, and conjugate gradients solve it. With clamp-like activations D is 0 or 1. An
    equilibrium is then found in finitely many steps, once the clamped units are known. A step that
    does not make the residual smaller is undone. The method is faster if sweeps contract slowly. A block with an
    activation that is not monotone has no such system, and only sweeps.
    """

    slow: float = 0.6
    """A correction follows if a sweep leaves more than this share of the residual."""

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if isinstance(self.slow, bool) or not isinstance(self.slow, int | float) or not 0 <= self.slow < 1:
            raise InputError(f"slow is {self.slow!r}; expected a number from 0 (always correct) to below 1")

    def init(self, problem: FixedPoint) -> object:
        """An empty memory."""
        return _Progress()

    def step(
        self, problem: FixedPoint, memory: object, measure: bool = True, per_sample: bool = False
    ) -> Tensor | None:
        """Do a correction, if one is due, and a sweep."""
        assert isinstance(memory, _Progress)
        memory.sweeps += 1
        before = list(problem.values)
        corrected = memory.sweeps > memory.pause and memory.rate >= self.slow and self._correct(problem, memory)
        change = sweep_layers(problem, problem.order(), True, per_sample)
        assert change is not None
        size = float(change.max())
        if corrected and not size < memory.change:
            for index, value in enumerate(before):
                problem.store(index, value)
            memory.pause = 2 * memory.sweeps  # a failed correction makes the next one rarer
            change = sweep_layers(problem, problem.order(), True, per_sample)
            assert change is not None
            size = float(change.max())
        memory.rate = size / memory.change if memory.change else 0.0
        memory.change = size
        return change

    def _correct(self, problem: FixedPoint, memory: _Progress) -> bool:
        """Add Newton's step to the values; False if there is none."""
        if problem.corrected(min(0.1, memory.change)):
            return True
        memory.pause = 2 * memory.sweeps
        return False


@dataclass
class _Progress:
    """The memory of a relaxation by Newton's method."""

    sweeps: int = 0
    change: float = math.inf
    rate: float = 0.0
    """The share of the change that the last sweep left."""
    pause: int = 0
    """No correction up to this sweep."""
