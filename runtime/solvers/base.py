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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint

__all__ = ["GaussSeidel", "Solver", "sweep_layers"]

_WORTHWHILE = 2 / (1 + math.sqrt(0.9))
"""ω for a contraction of 0.1. A lower one saves no sweep at a loose tolerance, and costs a pass over each layer."""
_FAR_ABOVE = 8
"""Up to so many times the largest relative change that is measured, a bound by it is taken for all layers."""
_HARDLY = 0.02
"""A relative error up to which the norm of a state is taken for that of later sweeps, less twice that error."""
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
        if self.rtol is not None and not (isinstance(self.rtol, float | int) and 0 < self.rtol < 1):
            raise InputError(f"rtol is {self.rtol!r}; expected a number between 0 and 1, or None for the default")
        if self.late not in (None, True, False):
            raise InputError(f"late is {self.late!r}; expected True, False or None")
        if not isinstance(self.max_sweeps, int) or self.max_sweeps < 1:
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


def _plain(value: Any) -> Any:
    """A value without its gradient history."""
    return value.detach() if value is not None and value.requires_grad else value


def _norm(value: Tensor, per_sample: bool) -> Tensor:
    return torch.linalg.vector_norm(value, dim=tuple(range(1, value.dim())) if per_sample else None)


def _change(problem: FixedPoint, old: Tensor | None, new: Tensor, per_sample: bool) -> Tensor:
    """‖new − old‖. A value that was not reached before has changed as a whole."""
    if old is None:
        return _norm(new, per_sample)
    return _norm(problem.subtracted(old, new), per_sample)


def _deciding(problem: FixedPoint, order: Sequence[int], per_sample: bool) -> list[int] | None:
    """The layers whose changes bound the errors of all, by `shares`; None if no such bound holds, or if all are needed.

    The others are measured only if the bound says too little.
    """
    shares = problem.shares
    if shares is None or per_sample or not problem.decided or list(order) != problem.order():
        return None
    if any(value is None or value.device.type != "cpu" for value in problem.values):
        return None
    if problem.relaxation != 1 and not (problem.training or problem.provisional):
        return None
    if problem.deciding is None:
        problem.deciding = [index for index, column in enumerate(shares.t().tolist()) if any(column)]
    return problem.deciding if 0 < len(problem.deciding) < len(shares) else None


def _decided(problem: FixedPoint, moved: dict[int, Tensor], norms: dict[int, Tensor]) -> float:
    """What the largest relative change of a layer amounts to, by the layers whose changes bound all errors.

    A layer that is almost zero has a large relative bound, but may not change at all. So if a bound is far above the
    changes that were measured, the next sweeps measure all.
    """
    assert problem.shares is not None
    assert problem.contraction is not None
    changes = {index: change.item() for index, change in moved.items()}
    sizes = {index: norm.item() + torch.finfo(norm.dtype).tiny for index, norm in norms.items()}
    if not all(map(math.isfinite, (*changes.values(), *sizes.values()))):
        return math.nan if any(map(math.isnan, (*changes.values(), *sizes.values()))) else math.inf
    sizes = {**problem.sizes, **sizes}
    bound = max(
        sum(row[k] * change for k, change in changes.items()) / sizes[index]
        for index, row in enumerate(problem.shares.tolist())
    )
    problem.decided = bound <= _FAR_ABOVE * max(change / sizes[k] for k, change in changes.items())
    left = bound * problem.contraction / (1 - problem.contraction)
    if not problem.sizes and left <= _HARDLY:  # no later state is farther away than twice the error that is left
        problem.sizes = {index: size * (1 - 2 * left) for index, size in sizes.items()}
    return bound


def _largest_change(problem: FixedPoint, ordered: bool, changes: list[Tensor], sizes: list[Tensor]) -> Tensor:
    """The largest relative change of a layer, or what it amounts to by the bounds of the layers (`shares`)."""
    too_far = 0.0
    rate = problem.expected
    if problem.relaxation != 1 and rate and not (problem.training or problem.provisional):
        too_far = (problem.relaxation - 1) * (1 - rate) / rate
    shares = problem.shares
    if shares is not None and not (ordered and len(changes) == len(shares)):
        shares = None
    if changes[0].dim() == 0 and changes[0].device.type == "cpu":  # numbers are faster than operations on scalars
        tiny = torch.finfo(changes[0].dtype).tiny
        moves, norms = [change.item() for change in changes], [size.item() + tiny for size in sizes]
        value = _largest_number(moves, norms, None if shares is None else shares.tolist(), too_far)
        return torch.tensor(value, dtype=torch.float64)
    moved = torch.stack(changes)
    size = torch.stack(sizes) + torch.finfo(moved.dtype).tiny
    largest = (1 + too_far) * (moved / size).amax(0)
    if shares is None or (moved.device.type != "cpu" and problem.training):  # a captured graph can't read the host
        return largest
    shares = shares.to(moved)
    shared = (shares.reshape(*shares.shape, *[1] * (moved.dim() - 1)) * moved).sum(1)
    # A layer that is almost zero has a large relative bound, but may not change at all.
    return torch.minimum(largest, ((shared + too_far * moved) / size).amax(0))


def _largest_number(
    moved: Sequence[float], size: Sequence[float], shares: Sequence[Sequence[float]] | None, too_far: float
) -> float:
    """`_largest_change` of numbers that the host has. It is NaN if one of them is."""
    if not all(map(math.isfinite, (*moved, *size))):
        return math.nan if any(map(math.isnan, (*moved, *size))) else math.inf
    largest = (1 + too_far) * max(m / n for m, n in zip(moved, size, strict=True))
    if shares is None:
        return largest
    bounds = (
        (sum(w * m for w, m in zip(row, moved, strict=True)) + too_far * own) / n
        for row, own, n in zip(shares, moved, size, strict=True)
    )
    return min(largest, max(bounds))


def sweep_layers(problem: FixedPoint, order: Sequence[int], measure: bool, per_sample: bool = False) -> Tensor | None:
    """Do one Gauss–Seidel sweep in this order. If `measure`, return the largest relative change of a layer.

    An over-relaxed layer goes (ω − 1) times its change too far. Where the error has to be bounded, that is added as
    the change that a bound of κ/(1 − κ) would give it, with κ no larger than blocks are expected to contract by.
    """
    deciding = _deciding(problem, order, per_sample) if measure else None
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
                changes[index] = _change(problem, _plain(problem.values[index]), _plain(new), per_sample)
            if deciding is None or index not in problem.sizes:
                sizes[index] = _norm(_plain(new), per_sample)
        problem.store(index, new)
    if not measure:
        return None
    if not reached:
        return torch.zeros(problem.samples or 1) if per_sample else torch.zeros(())
    if deciding is not None:
        return torch.tensor(_decided(problem, changes, sizes), dtype=torch.float64)
    layers = sorted(changes)
    found_changes, found_sizes = [changes[index] for index in layers], [sizes[index] for index in layers]
    return _largest_change(problem, list(order) == problem.order(), found_changes, found_sizes)


@dataclass(frozen=True)
class GaussSeidel(Solver):
    """Sweeps over the layers, in which each update uses the newest values of its neighbours.

    Over-relaxed sweeps go ω times as far as a plain one. If a plain sweep contracts by r, the best
    ω is 2/(1 + √(1 − r)), and a sweep then contracts by ω − 1 (Young 1954).

    `order="auto"` is the problem's own order: forward in a free phase, backward in a nudged one. (Forward
    sweeps would need L sweeps to carry the nudge to the first layer.) `"even_odd"` is
    the asynchronous schedule of Nest & Ernoult (2024, arXiv 2409.03306).
    """

    schedule: Literal["auto", "forward", "backward", "even_odd"] = "auto"
    relaxation: float | None = None
    """ω, from 1 to below 2. None: the best ω for what a certified block is expected to contract by
    (`Energy.typical`), and 1 without a certificate."""
    steady = True

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.relaxation is not None and not (isinstance(self.relaxation, float | int) and 1 <= self.relaxation < 2):
            raise InputError(f"relaxation is {self.relaxation!r}; expected a number from 1 to below 2, or None")

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
        problem.relaxation = self.omega(problem.expected)
        little = self.relaxation is None and problem.relaxation < _WORTHWHILE
        if little and problem.training and problem.loose:
            problem.relaxation = 1.0
        problem.provisional = little and not problem.training and not problem.tight and problem.relaxation > 1
        if problem.provisional and problem.relaxation < _LEAST:
            problem.provisional, problem.relaxation = False, 1.0
        return orders[self.schedule]

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


def checked_solver(solver: object) -> Solver | None:
    """A solver, or None.

    Raises:
        InputError: it is neither.
    """
    if solver is None or isinstance(solver, Solver):
        return solver
    given = f"the class {solver.__name__} itself" if isinstance(solver, type) else f"a {type(solver).__name__}"
    raise InputError(f"solver is {given}; expected a Solver such as GaussSeidel(), or None")
