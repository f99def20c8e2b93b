"""Solvers bring the states of a block to a fixed point.

A problem is x_l = f_l(x) for l = 1..L (`FixedPoint`). A solver has three methods, `init`, `step`
and `finished`. One loop, `relax` (`runtime/solvers/relaxation.py`), serves them all. A step returns
the largest relative change of a layer,

    max_l ‖Δx_l‖/‖x_l‖ ,

over the whole batch or of each sample (‖·‖ the Euclidean norm of all entries, or of a sample's).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.plain_numbers import plain_fields
from ffebm_compiler.runtime.solvers.changes import (
    change_of,
    decided_change,
    deciding_layers,
    largest_change,
    no_change,
    norm_of,
    plain,
)
from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint

__all__ = ["GaussSeidel", "Solver", "evaluation_omega", "order_of", "sweep_layers", "update_order"]

_WORTHWHILE = 2 / (1 + math.sqrt(0.9))
"""ω for a contraction of 0.1. A lower one saves no sweep at a loose tolerance, and costs a pass over each layer."""
_LEAST = 1.005
"""The smallest ω that is worth a pass over each layer in evaluation."""


@dataclass(frozen=True)
class Solver(ABC):
    """A method to settle. It has frozen settings and no state."""

    steady: ClassVar[bool] = False
    """Whether its steps contract at a steady rate, so that the measured rate tells how much error is left."""
    at_once: ClassVar[bool] = False
    """Whether one step is the whole solution, as where a circuit settles by itself."""

    rtol: float | None = None
    """Largest relative error of a layer at which it stops, in both phases and both modes.

    None chooses it by dtype, certificate and mode. In float32 a certified block settles its states to 1e-4 in
    evaluation. In train mode it settles states to an estimated 5e-4, or 5e-5 if an activation has a kink, and error
    currents to 3e-3. This keeps gradients within a cosine of 0.9999.
    """
    max_sweeps: int = 2000
    on_failure: Literal["isolate", "error", "warn"] = "isolate"
    """What happens if samples do not settle.

    With `"isolate"` the other samples settle undisturbed, and a `ConvergenceWarning` names those that do not. A
    diverged sample keeps its feedforward values and gives no gradient. If no sample settles, it is an error. With
    `"error"` it is always an error. With `"warn"` it is an error only if no value is finite.
    """
    termination: Literal["batch", "sample"] = "batch"
    """Whether the norms that end a relaxation cover the whole batch or each sample.

    With `"sample"` each sample stops by itself, so that its result does not depend on the others in its batch.
    """
    start: Literal["feedforward", "last"] = "feedforward"
    """Where a free phase starts.

    `"last"` starts from the states of the block's last forward if their shapes fit. This is a warm start, for inputs or
    weights that have changed little.
    """
    precision: Literal["auto", "full", "bfloat16"] = "auto"
    """`"bfloat16"` computes the products of the first sweeps of certified blocks in bfloat16.

    States and sums stay in full precision, and a free phase ends with sweeps in full precision. `"auto"` does so on
    processors that multiply bfloat16, and only with products whose rounding cannot be seen in the gradient, or in
    evaluation takes at most a quarter of the tolerance (`runtime/program/light.py`). `"full"` never does.
    """
    late: bool | None = None
    """Whether a training step reads one step later whether it settled (`runtime/solvers/pace.py`).

    The number of sweeps is then known in advance, and the host never waits for a GPU. None does so on a GPU. Only
    certified blocks do it, with a solver whose steps contract at a steady rate, and with `on_failure="isolate"` or
    `"warn"` and `termination="batch"`.
    """

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        if self.rtol is not None and not (isinstance(self.rtol, float | int) and 0 < self.rtol < 1):
            raise InputError(f"rtol is {self.rtol!r}; expected a number between 0 and 1, or None for the default")
        if self.late not in (None, True, False):
            raise InputError(f"late is {self.late!r}; expected True, False or None")
        if isinstance(self.max_sweeps, bool) or not isinstance(self.max_sweeps, int) or self.max_sweeps < 1:
            raise InputError(f"max_sweeps is {self.max_sweeps!r}; expected a positive integer")
        for name, allowed in (
            ("on_failure", ("isolate", "error", "warn")),
            ("termination", ("batch", "sample")),
            ("start", ("feedforward", "last")),
            ("precision", ("auto", "full", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                *rest, last = map(repr, allowed)
                raise InputError(f"{name} is {getattr(self, name)!r}; expected {', '.join(rest)} or {last}")

    @abstractmethod
    def init(self, problem: FixedPoint) -> object:
        """The solver's memory at the start."""

    @abstractmethod
    def step(
        self, problem: FixedPoint, memory: object, measure: bool = True, per_sample: bool = False
    ) -> Tensor | None:
        """Do one sweep. If `measure`, return the largest relative change of a layer.

        The change is a scalar tensor, or with `per_sample` one number for each sample.
        """

    def finished(self, residual: float, rtol: float) -> bool:
        """Whether this residual ends the relaxation."""
        return residual <= rtol


def sweep_layers(problem: FixedPoint, order: Sequence[int], measure: bool, per_sample: bool = False) -> Tensor | None:
    """Do one Gauss–Seidel sweep in this order. If `measure`, return the largest relative change of a layer.

    An over-relaxed layer goes (ω − 1) times its change too far. Where the error has to be bounded, that is added as
    the change that a bound of κ/(1 − κ) would give it, with κ no larger than blocks are expected to contract by.
    """
    deciding = deciding_layers(problem, order, per_sample) if measure else None
    changes: dict[int, Tensor] = {}
    sizes: dict[int, Tensor] = {}
    reached = False
    for index in order:
        new = problem.advance(index)
        if new is None:
            continue
        reached = True
        if measure:
            if deciding is None or index in deciding:
                changes[index] = change_of(problem, plain(problem.values[index]), plain(new), per_sample)
            if deciding is None or index not in problem.sizes:
                sizes[index] = norm_of(plain(new), per_sample)
        problem.store(index, new)
    if not measure:
        return None
    if not reached:
        return no_change(problem, per_sample)
    if deciding is not None:
        return torch.tensor(decided_change(problem, changes, sizes), dtype=torch.float64, device="cpu")
    layers = sorted(changes)
    found_changes, found_sizes = [changes[index] for index in layers], [sizes[index] for index in layers]
    return largest_change(problem, list(order) == problem.order(), found_changes, found_sizes)


@dataclass(frozen=True)
class GaussSeidel(Solver):
    """Sweeps over the layers, in which each update uses the newest values of its neighbours.

    Over-relaxed sweeps go ω times as far as a plain one. If a plain sweep contracts by r, the best
    ω is 2/(1 + √(1 − r)), and a sweep then contracts by ω − 1 (Young 1954).

    `schedule="auto"` is the problem's own order: forward in a free phase, backward in a nudged one. (Forward
    sweeps would need L sweeps to carry the nudge to the first layer.) `"even_odd"` is
    the asynchronous schedule of Nest & Ernoult (2024, arXiv 2409.03306).
    """

    schedule: Literal["auto", "forward", "backward", "even_odd"] = "auto"
    relaxation: float | None = None
    """ω, from 1 to below 2. None: the best ω for what a certified block is expected to contract by
    (`Setting.typical`), and 1 without a certificate."""
    steady = True

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        number = isinstance(self.relaxation, float | int) and not isinstance(self.relaxation, bool)
        if self.relaxation is not None and not (number and 1 <= self.relaxation < 2):
            raise InputError(f"relaxation is {self.relaxation!r}; expected a number from 1 to below 2, or None")

    def init(self, problem: FixedPoint) -> object:
        """The order of the updates."""
        if problem.training:
            problem.relaxation, problem.provisional = self.omega(problem.expected), False
            if self.relaxation is None and problem.loose and problem.relaxation < _WORTHWHILE:
                problem.relaxation = 1.0
        else:
            problem.relaxation, problem.provisional = evaluation_omega(self, problem.expected, problem.tight)
        return order_of(self, problem)

    def omega(self, contraction: float | None) -> float:
        """ω at the start of a relaxation whose plain sweeps are expected to contract by so much (None: not known)."""
        if self.relaxation is not None:
            return self.relaxation
        return 2 / (1 + math.sqrt(1 - (contraction or 0.0)))

    def step(
        self, problem: FixedPoint, memory: object, measure: bool = True, per_sample: bool = False
    ) -> Tensor | None:
        """One sweep."""
        assert isinstance(memory, list)
        change = sweep_layers(problem, memory, measure, per_sample)
        if self.relaxation is None and problem.training and problem.relaxation < _WORTHWHILE:
            problem.relaxation = 1.0  # a first sweep that goes so little farther is worth a pass, later ones are not
        if problem.provisional:
            problem.provisional, problem.relaxation = False, 1.0
        return change


def order_of(solver: Solver, problem: FixedPoint) -> list[int]:
    """The order in which a solver's sweeps update the layers: its schedule's, or the problem's own."""
    schedule = solver.schedule if isinstance(solver, GaussSeidel) else "auto"
    return problem.order() if schedule == "auto" else update_order(schedule, len(problem.values))


def update_order(schedule: str, count: int) -> list[int]:
    """The order in which a sweep by this schedule updates so many layers.

    Raises:
        InputError: there is no such schedule.
    """
    orders = {
        "forward": list(range(count)),
        "backward": list(reversed(range(count))),
        "even_odd": [*range(0, count, 2), *range(1, count, 2)],
    }
    if schedule not in orders:
        raise InputError(f"schedule is {schedule!r}; expected one of {', '.join(map(repr, ('auto', *orders)))}")
    return orders[schedule]


def checked_solver(solver: object) -> Solver | None:
    """A solver, or None.

    Raises:
        InputError: it is neither.
    """
    if solver is None or isinstance(solver, Solver):
        return solver
    given = f"the class {solver.__name__} itself" if isinstance(solver, type) else f"a {type(solver).__name__}"
    raise InputError(f"solver is {given}; expected a Solver such as GaussSeidel(), or None")


def evaluation_omega(solver: GaussSeidel, contraction: float | None, tight: bool) -> tuple[float, bool]:
    """(ω, whether the first sweep alone is over-relaxed) in evaluation.

    Args:
        solver: the solver, whose own ω, if it has one, holds for every sweep.
        contraction: what plain sweeps are expected to contract by, None where it is not known.
        tight: whether the tolerance is so small that many sweeps are expected.
    """
    omega = solver.omega(contraction)
    if solver.relaxation is not None or tight or omega >= _WORTHWHILE:
        return omega, False
    return (omega, True) if omega >= _LEAST else (1.0, False)
