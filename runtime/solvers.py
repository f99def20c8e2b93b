"""Solvers: how the states of a block are brought to a fixed point.

A problem is x_l = f_l(x) for l = 1..L (`FixedPoint`); a solver is three methods, `init`, `step`
and `finished`, and one loop, `relax`, serves them all. A step returns the largest relative
change of a layer, max_l ‖Δx_l‖/‖x_l‖. Where a sweep is certified to contract by κ, the error that is left is at most
κ/(1 − κ) times that; it (else the change itself) is what is compared with `rtol`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.errors import ConvergenceError, ConvergenceWarning, InputError

__all__ = ["Anderson", "FixedPoint", "GaussSeidel", "Settled", "Solver", "relax", "stopping_rule"]

Order = Literal["forward", "backward", "even_odd"]


class FixedPoint(ABC):
    """A fixed-point problem over the layers of a block."""

    values: list[Tensor | None]
    """Present value of each layer; None is zero and not reached yet."""
    scratch: dict[object, Tensor]
    """Buffers for differences, kept over the sweeps."""

    @abstractmethod
    def update(self, index: int) -> Tensor | None:
        """f_l at the present values, without storing it."""

    def store(self, index: int, value: Tensor | None) -> None:
        """Make `value` the present one of a layer."""
        self.values[index] = value

    def order(self) -> list[int]:
        """The order in which a sweep carries information fastest."""
        return list(range(len(self.values)))


@dataclass(frozen=True)
class Settled:
    """How a relaxation ended."""

    sweeps: int
    residual: float
    """Largest relative error of a layer: the change of the last sweep, times κ/(1 − κ) where the
    block is certified to contract by κ, which bounds the distance to the equilibrium."""
    converged: bool
    reason: str
    """A sentence with a remedy where it did not converge."""


@dataclass(frozen=True)
class Solver(ABC):
    """A way to settle; frozen settings, no state of its own."""

    rtol: float | None = None
    """Largest relative error of a layer at which it stops; None: by dtype and certificate."""
    max_sweeps: int = 2000
    on_failure: Literal["error", "warn"] = "error"

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.rtol is not None and not (isinstance(self.rtol, float | int) and 0 < self.rtol < 1):
            raise InputError(f"rtol is {self.rtol!r}; expected a number between 0 and 1, or None for the default")
        if not isinstance(self.max_sweeps, int) or self.max_sweeps < 1:
            raise InputError(f"max_sweeps is {self.max_sweeps!r}; expected a positive integer")
        if self.on_failure not in ("error", "warn"):
            raise InputError(f"on_failure is {self.on_failure!r}; expected 'error' or 'warn'")

    @abstractmethod
    def init(self, problem: FixedPoint) -> object:
        """The solver's memory at the start."""

    @abstractmethod
    def step(self, problem: FixedPoint, memory: object, measure: bool = True) -> Tensor | None:
        """One sweep; returns the largest relative change of a layer (a scalar tensor) if asked to `measure`."""

    def finished(self, residual: float, rtol: float) -> bool:
        """Whether that residual ends the relaxation."""
        return residual <= rtol


def _change(problem: FixedPoint, old: Tensor | None, new: Tensor) -> Tensor:
    """‖new − old‖/‖new‖; a value that was not reached before has changed by all of it."""
    if old is None:
        return new.new_ones((), dtype=torch.float32)
    key = (new.shape, new.stride())
    if key not in problem.scratch:
        problem.scratch[key] = torch.empty_like(new)
    difference = torch.sub(new, old, out=problem.scratch[key])
    return torch.linalg.vector_norm(difference) / (torch.linalg.vector_norm(new) + torch.finfo(new.dtype).tiny)


def _sweep(problem: FixedPoint, order: Sequence[int], measure: bool) -> Tensor | None:
    changes = []
    for index in order:
        new = problem.update(index)
        if new is None:
            continue
        if measure:
            old = problem.values[index]
            changes.append(_change(problem, None if old is None else old.detach(), new.detach()))
        problem.store(index, new)
    if not measure:
        return None
    return torch.stack(changes).max() if changes else torch.zeros(())


@dataclass(frozen=True)
class GaussSeidel(Solver):
    """Sweeps over the layers, each update using the newest neighbours.

    `order="auto"` is the problem's own: forward in a free phase, backward in a nudged one (a
    forward sweep would need L sweeps to carry the nudge to the first layer). `"even_odd"` is
    the asynchronous schedule of Nest & Ernoult (2024, arXiv 2409.03306).
    """

    schedule: Literal["auto", "forward", "backward", "even_odd"] = "auto"

    def init(self, problem: FixedPoint) -> object:
        """The order of the updates."""
        count = len(problem.values)
        orders = {
            "auto": problem.order(),
            "forward": list(range(count)),
            "backward": list(reversed(range(count))),
            "even_odd": [*range(0, count, 2), *range(1, count, 2)],
        }
        if self.schedule not in orders:
            raise InputError(f"schedule is {self.schedule!r}; expected one of {', '.join(map(repr, orders))}")
        return orders[self.schedule]

    def step(self, problem: FixedPoint, memory: object, measure: bool = True) -> Tensor | None:
        """One sweep."""
        assert isinstance(memory, list)
        return _sweep(problem, memory, measure)


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration of Gauss–Seidel sweeps (Walker & Ni, 2011).

    With x_i the last iterates, g_i what a sweep makes of them and f_i = g_i − x_i, the next
    iterate is Σ α_i g_i, α minimising ‖Σ α_i f_i‖ under Σ α_i = 1. It pays where the loop gain
    is near one; at small gain plain sweeps are cheaper.
    """

    memory: int = 5
    regularisation: float = 1e-10

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if not isinstance(self.memory, int) or self.memory < 2:
            raise InputError(f"memory is {self.memory!r}; expected an integer of at least 2")

    def init(self, problem: FixedPoint) -> object:
        """Empty history."""
        return _History(self.memory, self.regularisation)

    def step(self, problem: FixedPoint, memory: object, measure: bool = True) -> Tensor | None:
        """The mixing of what came before, and one sweep from there.

        A relaxation so ends with a sweep, whose states and pre-activations belong together.
        """
        assert isinstance(memory, _History)
        mixed = memory.mixed()
        if mixed is not None:
            for index, value in enumerate(problem.values):
                assert value is not None
                part, mixed = mixed[: value.numel()], mixed[value.numel() :]
                problem.store(index, part.view_as(value))
        before = list(problem.values)
        change = _sweep(problem, problem.order(), measure)
        if all(value is not None for value in before):
            memory.add(before, problem.values)
        return change


class _History:
    """The last sweeps of Anderson acceleration: g_i, f_i = g_i − x_i, and the products ⟨f_i, f_j⟩."""

    def __init__(self, size: int, regularisation: float) -> None:
        self.size = size
        self.regularisation = regularisation
        self.made: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.gram = np.zeros((0, 0))

    def add(self, before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> None:
        """Note a sweep."""
        new = torch.cat([value.detach().reshape(-1) for value in after if value is not None])
        residual = new - torch.cat([value.detach().reshape(-1) for value in before if value is not None])
        if len(self.made) == self.size:
            del self.made[0], self.residuals[0]
            self.gram = self.gram[1:, 1:]
        self.made.append(new)
        self.residuals.append(residual)
        row = [float(torch.dot(residual, other)) for other in self.residuals]
        grown = np.zeros((len(row), len(row)))
        grown[:-1, :-1] = self.gram
        grown[-1, :] = grown[:, -1] = row
        self.gram = grown

    def mixed(self) -> Tensor | None:
        """Σ α_i g_i; None before there are two sweeps to mix."""
        count = len(self.made)
        if count < 2 or not np.isfinite(self.gram).all() or not self.gram.diagonal().all():
            return None
        system = self.gram + self.regularisation * self.gram.diagonal().max() * np.eye(count)
        alpha = np.linalg.solve(system, np.ones(count))
        alpha /= alpha.sum()
        total = self.made[0] * float(alpha[0])
        for weight, made in zip(alpha[1:], self.made[1:], strict=True):
            total.add_(made, alpha=float(weight))
        return total


def stopping_rule(rtol: float, contraction: float | None) -> tuple[int, float]:
    """(first sweep whose change is measured, factor from the change to the error that is left).

    Where a sweep contracts by κ the error left is at most κ/(1 − κ) times its change. The certificate is
    a worst case: blocks settle in about 0.6 of the sweeps that it predicts. Measuring the change before
    that is wasted (and a device synchronisation), so that up to two sweeps go by without.
    """
    if contraction is None:
        return 1, 1.0
    if not contraction:
        return 1, 0.0
    predicted = math.log(rtol) / math.log(contraction)
    return min(math.floor(0.6 * predicted) + 1, 3), contraction / (1 - contraction)


def relax(
    problem: FixedPoint, solver: Solver, rtol: float, subject: str, hint: str, contraction: float | None = None
) -> Settled:
    """Run a solver on a problem until it is finished.

    Args:
        problem: holds its values, which are changed in place.
        solver: the method and its limits.
        rtol: largest relative error of a layer at which to stop.
        subject: what settles, for messages, e.g. "free phase of block_1".
        hint: what to change where it does not.
        contraction: factor κ < 1 by which a sweep contracts, where certified.

    Raises:
        ConvergenceError: after `max_sweeps`, or as soon as a value is not finite.
    """
    memory = solver.init(problem)
    residual = math.inf
    earliest, left = stopping_rule(rtol, contraction)
    for sweep in range(1, solver.max_sweeps + 1):
        change = solver.step(problem, memory, sweep >= earliest or sweep == solver.max_sweeps)
        if change is None:
            continue
        residual = float(change) * left
        if solver.finished(residual, rtol):
            return Settled(sweep, residual, True, "")
        if not math.isfinite(residual):
            break
    if math.isfinite(residual):
        reason = f"{subject} did not settle in {sweep} sweeps (relative residual {residual:.2e}, asked for {rtol:.0e})"
    else:
        reason = f"{subject} diverged: its states are not finite after {sweep} sweeps"
    reason = f"{reason}; {hint}"
    if solver.on_failure == "error" or not math.isfinite(residual):
        raise ConvergenceError(reason)
    warnings.warn(reason, ConvergenceWarning, stacklevel=2)
    return Settled(sweep, residual, False, reason)
