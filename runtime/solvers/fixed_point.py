"""`FixedPoint`: the problem x_l = f_l(x) over the layers of a block, which solvers solve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.runtime.solvers.fabric import Question
from ffebm_compiler.runtime.solvers.pace import Pace

__all__ = ["MOST", "FixedPoint", "expected_contraction"]

MOST = 0.9
"""The largest factor that a sweep is expected to contract by.

A part of a circuit that hardly reaches an input is certified to contract by nearly 1. ω would then be 2, with which
nothing settles, and no measured change would be small enough.
"""


def expected_contraction(certified: float, typical: float) -> float:
    """What a sweep is expected to contract by where it is certified to contract by κ: `typical` κ, and at most 0.9."""
    return min(typical * certified, MOST)


class FixedPoint(ABC):
    """A fixed-point problem over the layers of a block."""

    values: list[Tensor | None]
    """Present value of each layer. None stands for zero, before a value is reached."""
    scratch: dict[tuple[torch.Size, tuple[int, ...]], Tensor]
    """Buffers for differences, kept over the sweeps."""
    difference: tuple[Tensor, Tensor, Tensor] | None = None
    """(before, after, after − before) of the change that was measured last. The next measurement writes over it."""
    samples: int | None = None
    """Number of independent samples along the leading dimension of every value; None if they are not independent."""

    training: bool = False
    """Whether the result only serves a gradient, so that an estimate of the remaining error is enough."""
    loose: bool = False
    """Whether its tolerance in training is reached in as many plain sweeps, if they contract well."""
    direct: bool = False
    """Whether its relative error in training is one of the gradient, and not of the states that it is taken at."""
    contraction: float | None = None
    """κ, a factor by which a plain sweep is certified to contract; None without a certificate."""
    typical: float = 1.0
    """What a plain sweep is expected to contract by, in units of κ. It is the energy's."""
    shares: Tensor | None = None
    """W, where κ/(1 − κ) Σ_k W_lk ‖Δx_k‖ bounds the error that a plain forward sweep leaves in layer l; or None."""
    rounding: float = 0.0
    """Relative error of the products that carry changes on, where the error that they leave has to be bounded too."""
    full_sweeps: int = 1
    """Number of sweeps before the first whose products may be rounded."""
    tight: bool = False
    """Whether the tolerance is so small that many sweeps are expected."""
    sizes: Mapping[int, float] = MappingProxyType({})
    """Lower bounds of the norms of all layers from here on; empty as long as none are known."""
    deciding: list[int] | None = None
    """The layers whose changes bound the errors of all, by `shares`, once they are looked for."""
    decided: bool = True
    """Whether those layers are measured alone."""
    provisional: bool = False
    """Whether the next sweep is over-relaxed to prepare plain ones, so that its change bounds no error."""
    relaxation: float = 1.0
    """ω of over-relaxed sweeps, the factor on the change of a layer."""
    pace: Pace | None = None
    """Where the block keeps the number of sweeps of this phase from step to step; None: it keeps none."""

    parts: int = 1
    """Number of rows of a value for each of those samples. The rows come in parts, each with all samples."""

    @property
    def expected(self) -> float | None:
        """What a plain sweep is expected to contract by; None without a certificate."""
        return None if self.contraction is None else expected_contraction(self.contraction, self.typical)

    @abstractmethod
    def update(self, index: int) -> Tensor | None:
        """f_l at the present values, without storing it."""

    def advance(self, index: int) -> Tensor | None:
        """The next value of a layer in a sweep: f_l, over-relaxed by ω."""
        return self.update(index)

    def moved(self, before: Tensor, after: Tensor, alone: bool = False) -> Tensor:
        """after − before, which may be known from a measurement. It must not be changed.

        With `alone` it is written to the buffer of measurements, which the next one writes over.
        """
        known = self.difference
        if known is not None and known[0] is before and known[1] is after:
            return known[2]
        return self.subtracted(before, after) if alone else after - before

    def subtracted(self, before: Tensor, after: Tensor) -> Tensor:
        """after − before, in a buffer that is used again, so that no memory has to be fetched from the system."""
        key = (after.shape, after.stride())
        if key not in self.scratch:
            self.scratch[key] = torch.empty_like(after)
        difference = torch.sub(after, before, out=self.scratch[key])
        self.difference = before, after, difference
        return difference

    def store(self, index: int, value: Tensor | None) -> None:
        """Make `value` the present one of a layer."""
        self.values[index] = value

    def order(self) -> list[int]:
        """The order in which a sweep carries information fastest."""
        return list(range(len(self.values)))

    def delay(self, order: Sequence[int], by_sample: bool = False) -> int:
        """Number of sweeps in this order, after the first, until a change has reached every layer (`delay.py`).

        With `by_sample` it is enough for each sample alone.
        """
        return 0

    def carried(self) -> list[int]:
        """The layers whose values a sweep in that order reads before it updates them. The others follow from these."""
        return list(range(len(self.values)))

    @abstractmethod
    def narrowed(self, rows: Tensor) -> FixedPoint:
        """The same problem at its present values for some of the samples (a tensor of indices)."""

    @abstractmethod
    def adopt(self, other: FixedPoint, rows: Tensor) -> None:
        """Copy the values of another problem that has these samples alone."""

    @abstractmethod
    def give_up(self, rows: Tensor) -> None:
        """Reset these samples to the start of the relaxation, since their states have no meaning."""

    def refine(self) -> None:
        """Compute products in full precision from here on."""
        return

    reads: int = 1
    """How often a measurement is repeated. The states are the means."""

    def questions(self) -> list[Question]:
        """The equilibria that answer this problem, for a solver that has them measured.

        Raises:
            UnsupportedError: no equilibrium of the block does.
        """
        raise UnsupportedError(
            "what is solved here is no equilibrium of the block, so that it cannot be measured: use 'ep', or "
            "hybrid.set_solver(None) to compute equilibria"
        )

    def answered(self, answers: Sequence[Sequence[Tensor]]) -> None:
        """Take over measured states: for each question, one tensor in float64 for each layer."""
        raise NotImplementedError

    def correction(self, rtol: float) -> list[Tensor] | None:
        """Newton's step Δ, (1 − ∂f) Δ = f(x) − x, with an inner residual of `rtol`; None if there is none."""
        return None

    def corrected(self, rtol: float) -> bool:
        """Add Newton's step to the values; False if there is none."""
        correction = self.correction(rtol)
        if correction is None:
            return False
        for index, (value, part) in enumerate(zip(list(self.values), correction, strict=True)):
            self.store(index, part if value is None else value + part)
        return True
