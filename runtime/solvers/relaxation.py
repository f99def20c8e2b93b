"""The loop in which every solver brings every problem to its fixed point.

If a sweep is certified to contract by κ, the error after it is at most κ/(1 − κ)
times its change, and this bound is compared with `rtol`. Otherwise the change itself is compared. If two sweeps have
been measured and contracted better than certified, the measured contraction takes the place of κ (Hairer & Wanner 1996,
section IV.8, stop Newton's method in this way).

Samples of a batch are independent, so that one that does not settle does not stop the
others. It is set apart, and the status names it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ffebm_compiler.errors import ConvergenceError, ConvergenceWarning
from ffebm_compiler.runtime.solvers.base import Solver, order_of, sweep_layers
from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint, expected_contraction
from ffebm_compiler.runtime.solvers.pace import Pace

__all__ = ["LOST", "SAFETY", "TIGHT", "Settled", "concluded", "may_be_late", "relax", "run", "stopping_rule"]

_STALL = 100
"""A relaxation ends if its changes fall by less than a tenth in so many sweeps (more for large `max_sweeps`, and where
the certified contraction takes more)."""

SAFETY = 4 / 3
"""Factor on the contraction between two measured sweeps, so that it is not taken for too good."""

LOST = (
    "a state of the step before is not finite, so that its gradient has no meaning: lower the learning rate, or "
    "go back to a checkpoint. This step waits for its result, and names the block if it happens again"
)
TIGHT = 1e-5
"""Largest relative error that counts as a tight tolerance, one that takes many sweeps."""
_COARSE = 4e-3
"""Largest relative error of a product in bfloat16: 2⁻⁹ for the rounding of each factor, times two."""


@dataclass(frozen=True)
class Settled:
    """The result of a relaxation."""

    sweeps: int
    residual: float
    """Largest relative error of a layer.

    It is the change of the last sweep, times κ/(1 − κ) if the block is certified to contract by κ. It then bounds the
    distance to the equilibrium.
    """
    converged: bool
    reason: str
    """A sentence with a remedy if it did not converge."""
    unsettled: tuple[int, ...] = ()
    """Indices of the samples that did not settle, if samples are independent."""
    lost: tuple[int, ...] = ()
    """Indices of those that diverged. Their states are those of the start, and they give no gradient."""


def stopping_rule(
    rtol: float, contraction: float | None, training: bool = False, omega: float = 1.0, typical: float = 1.0
) -> tuple[int, float]:
    """(first sweep whose change is measured, factor from the change to the error that is left).

    If a sweep contracts by κ, the error after it is at most κ/(1 − κ) times its change. The certificate is
    a worst case, and blocks settle in about half of the sweeps that it predicts. A measurement long before
    that is wasted and waits for the device. One in the sweep before shows how fast the changes fall, and saves a sweep.
    In training an estimate is enough: `typical` times κ, what sweeps are expected to contract by, takes the place of κ.
    In evaluation to a tight tolerance, sweeps that are over-relaxed by ω > 1 are not measured before the last three
    that they are expected to take. At a loose one the first sweeps, which contract better, may be enough.
    """
    if training and contraction is not None:
        contraction = expected_contraction(contraction, typical)
    if contraction is None:
        return 1, 1.0
    if not contraction:
        return 1, 0.0
    predicted = math.log(rtol) / math.log(contraction)
    latest = 2
    if not training and omega > 1 and rtol <= TIGHT:  # sweeps that are over-relaxed by the best ω contract by ω − 1
        latest = max(latest, math.ceil(math.log(rtol) / math.log(omega - 1)) - 2)
    return max(1, min(math.floor(0.45 * predicted), latest)), contraction / (1 - contraction)


def relax(
    problem: FixedPoint,
    solver: Solver,
    rtol: float,
    subject: str,
    hint: Callable[[], str],
    contraction: float | None = None,
    check_operands: Callable[[], None] | None = None,
) -> Settled:
    """Run a solver on a problem until it is finished.

    Args:
        problem: the problem with its values, which are changed in place.
        solver: the method and its limits.
        rtol: largest relative error of a layer at which to stop.
        subject: the name of what settles, for messages, e.g. "free phase of block_1".
        hint: gives advice if it does not settle.
        contraction: factor κ < 1 by which a sweep is certified to contract, or None.
        check_operands: called if states are not finite. It raises an error if the operands were not finite either.

    Raises:
        ConvergenceError: as `solver.on_failure` says, and if no value is finite any more.
    """
    settled = run(problem, solver, rtol, contraction)
    return concluded(settled, problem, solver, rtol, subject, hint, check_operands)


def run(problem: FixedPoint, solver: Solver, rtol: float, contraction: float | None = None) -> Settled:
    """Run a solver on a problem, without warnings or errors about the result. `concluded` issues them."""
    if problem.samples == 0:  # one sweep gives values of the right shapes, and there is nothing to measure in them
        sweep_layers(problem, problem.order(), measure=False)
        return Settled(1, 0.0, True, "")
    pace = problem.pace
    if pace is None or contraction is None or not problem.training or not may_be_late(solver):
        return _Relaxation(problem, solver, rtol, contraction).run()
    if not pace.capturing and not pace.read():
        warnings.warn(LOST, ConvergenceWarning, stacklevel=2)
    if pace.sweeps is None:
        relaxation = _Relaxation(problem, solver, rtol, contraction)
        settled = relaxation.run()
        if settled.converged:
            pace.found(settled.sweeps, settled.residual, relaxation.factor)
        return settled
    return _paced(problem, solver, rtol, contraction, pace, pace.sweeps)


def may_be_late(solver: Solver) -> bool:
    """Whether a phase with this solver can do a known number of sweeps without waiting for the result."""
    return (
        solver.steady
        and solver.late is not False
        and solver.on_failure != "error"
        and solver.termination == "batch"
        and solver.precision != "bfloat16"
    )


def _paced(problem: FixedPoint, solver: Solver, rtol: float, contraction: float, pace: Pace, sweeps: int) -> Settled:
    """Do a known number of sweeps. The next step reads how they ended."""
    problem.contraction = contraction
    memory = solver.init(problem)
    sweeps = min(sweeps, solver.max_sweeps)
    for sweep in range(1, sweeps + 1):
        change = solver.step(problem, memory, measure=sweep == sweeps)
    assert change is not None
    pace.post(change, rtol, expected_contraction(contraction, problem.typical))
    return Settled(sweeps, pace.residual, True, "")


def concluded(
    settled: Settled,
    problem: FixedPoint,
    solver: Solver,
    rtol: float,
    subject: str,
    hint: Callable[[], str],
    check_operands: Callable[[], None] | None = None,
) -> Settled:
    """Warn or raise an error if samples did not settle, as the solver says. The arguments are those of `relax`.

    Raises:
        ConvergenceError: as `solver.on_failure` says, and if no value is finite any more.
    """
    if settled.converged:
        return settled
    if settled.lost and check_operands is not None:
        check_operands()
    samples = problem.samples or 1
    reason = f"{_failure_text(settled, samples, subject, rtol)}; {hint()}"
    hopeless = len(settled.lost) == samples
    if (
        hopeless
        or solver.on_failure == "error"
        or (solver.on_failure == "isolate" and len(settled.unsettled) == samples)
    ):
        raise ConvergenceError(reason)
    warnings.warn(reason, ConvergenceWarning, stacklevel=2)
    return replace(settled, reason=reason)


def _failure_text(settled: Settled, samples: int, subject: str, rtol: float) -> str:
    if len(settled.lost) == samples:
        why = settled.reason or f"its states are not finite after {settled.sweeps} sweeps"
        return f"{subject} diverged: {why}"
    measured = f"(relative residual {settled.residual:.2e}, asked for {rtol:.0e})"
    how = settled.reason or f"did not settle in {settled.sweeps} sweeps"
    if len(settled.unsettled) == samples:
        return f"{subject} {how} {measured}"
    parts = []
    bounded = [row for row in settled.unsettled if row not in settled.lost]
    if bounded:
        parts.append(f"{_listed(bounded)} of the {samples} of the batch {how} {measured}")
    if settled.lost:
        parts.append(
            f"{_listed(settled.lost)} of the {samples} of the batch diverged (states as at the start, and no gradient)"
        )
    return f"{subject}: {' and '.join(parts)}, while the others settled"


def _listed(rows: list[int] | tuple[int, ...]) -> str:
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return f"sample {shown}" if len(rows) == 1 else f"samples {shown}"


def _patience(max_sweeps: int, contraction: float | None) -> int:
    """In how many sweeps the changes must fall by a tenth: twice as many as the certified contraction needs for it."""
    certified = 0.0 if contraction is None or not 0 < contraction < 1 else 2 * math.log(0.9) / math.log(contraction)
    return max(_STALL, max_sweeps // 20, math.ceil(min(certified, max_sweeps)))


class _Relaxation:
    """One relaxation: the problem, the samples that are still running, and the results of the others."""

    def __init__(self, problem: FixedPoint, solver: Solver, rtol: float, contraction: float | None) -> None:
        self.problem = problem
        self.solver = solver
        self.rtol = rtol
        self.contraction = contraction
        problem.contraction, problem.tight, problem.sizes = contraction, rtol <= TIGHT, {}
        self.rounding = 0.0 if contraction is None else problem.rounding * contraction / (1 - contraction)
        """From the changes so far to the error that rounding what they add has left."""
        self.moved = 0.0
        """Sum of the changes before this sweep's that rounded products have multiplied."""
        self.coarse = _coarse_goal(solver, rtol, contraction)
        """The error down to which products are in bfloat16; None if they are in full precision."""
        self.per_sample = solver.termination == "sample" and problem.samples is not None
        self.delay = 0 if solver.at_once else problem.delay(order_of(solver, problem), self.per_sample)
        """The last sweep in which a change has not reached every layer, so that none ends in it."""
        self.running = problem
        """The problem itself. Once some samples have ended, a narrowed copy with the others."""
        self.rows: Tensor | None = None
        """Indices of the samples that are still running; None if all are."""
        self.memory = solver.init(problem)
        self.omega, self.over, self.provisional = 1.0, False, False
        """ω of the present sweep, whether any was over-relaxed, and whether this one only prepares plain ones."""
        self.decided = True
        """Whether the changes of a few layers bound those of all so far."""
        self.ahead, self.slowest = 0.0, 0.0
        """By how much the last measured sweep contracted better than a plain one does, and the rate that follows."""
        self.earliest, self.left = stopping_rule(
            rtol, contraction, problem.training, problem.relaxation, problem.typical
        )
        self.sweep = 0
        late = self.coarse is None and not self.rounding and solver.start == "feedforward" and not solver.at_once
        unreached = all(value is None for value in problem.values)  # their first change says nothing
        self.next = max(self.earliest, self.delay + (2 if unreached else 1)) if late else 1
        self.measured, self.previous, self.rate = 0, math.inf, 0.0
        """The last measured sweep, its change, and the contraction per sweep between the last two (0 if unknown)."""
        self.worst = math.inf
        self.factor = 1.0
        """From the last measured change to the error that is left."""
        self.patience = _patience(solver.max_sweeps, contraction) + self.delay
        self.best, self.since = math.inf, 0
        self.halfway: Tensor | None = None
        self.settled = False
        self.residual = 0.0
        self.lost: list[int] = []
        self.reason = ""

    def run(self) -> Settled:
        """Sweep until every sample has ended."""
        while self.sweep < self.solver.max_sweeps:
            changes = self._step()
            if changes is not None and self._has_ended(changes):
                break
        return self._result()

    def _step(self) -> Tensor | None:
        """Do one sweep. Return its changes, for the batch or each sample, if they are measured."""
        self.sweep += 1
        last = self.sweep == self.solver.max_sweeps
        by_sample = self.per_sample or (last and self.problem.samples is not None)
        measure = last or self.per_sample or self.sweep >= self.next
        self.omega = omega = self.running.relaxation
        self.over, self.provisional = self.over or omega != 1, self.running.provisional
        change = self.solver.step(self.running, self.memory, measure, by_sample)
        return change if change is None or not by_sample else self._by_sample(change)

    def _by_sample(self, values: Tensor) -> Tensor:
        """The largest value of each sample, since a problem may hold several rows of each."""
        assert self.running.samples is not None
        return values.reshape(-1, self.running.samples).amax(0)

    def _error_left(self, change: float) -> float:
        """Factor from a change to the remaining error: κ/(1 − κ), with the measured contraction if it is better.

        The contraction rises slowly to its limit, so that the measured one is increased by a third. The changes of
        over-relaxed sweeps fall faster at first than they go on. So in evaluation, where the error has to be bounded,
        theirs is taken for no less than what blocks are expected to contract by. A sweep that is over-relaxed by a
        small ω − 1 contracts by 2(ω − 1) less than a plain one (Young 1954), which is added for the plain ones that
        follow it. In training κ is what blocks are expected to contract by, until a block is measured to contract no
        better than certified. Then it is κ itself for error currents, whose error is that of the gradient.
        """
        self.rate = 0.0
        omega = self.running.relaxation
        bounded = self.over and not self.problem.training
        left, seen = self.left, math.inf
        if self.measured and 0 < change < self.previous:
            self.rate = (change / self.previous) ** (1 / (self.sweep - self.measured))
            seen = SAFETY * (self.rate + self.ahead)
            if self.ahead:
                self.slowest = seen
            seen = max(seen, self.slowest)
            if bounded and self.running.expected is not None:
                seen = max(seen, self.running.expected)
        if self.measured and self.solver.steady and self.contraction is not None:
            if seen < self.contraction:
                left = seen / (1 - seen)
            elif self.problem.training and self.problem.direct:
                most = expected_contraction(self.contraction, 1.0)
                left = most / (1 - most)
        return left / omega if bounded else left

    def _has_ended(self, changes: Tensor) -> bool:
        """Evaluate a measured sweep. Returns whether nothing is left to run."""
        change = changes.max().item() if changes.dim() else changes.item()
        self.factor = self._error_left(change)
        rounded = self.rounding * self.moved
        if self.sweep >= self.problem.full_sweeps:
            self.moved += change
        worst = self.worst = change * self.factor + rounded
        ready = not self.provisional and self.sweep > self.delay
        if ready and self.solver.finished(worst, self.rtol if self.coarse is None else self.coarse):
            if self.coarse is None or self.coarse <= self.rtol:
                self.settled, self.residual = True, max(self.residual, worst)
                return True
            self.coarse = None
            self.running.refine()
            self._restart_solver()
            return False
        errors = changes * self.factor + rounded if changes.dim() else None
        if errors is None and not math.isfinite(worst):
            if self.problem.samples is None:
                self.lost = [0]
                return True
            errors = self._errors_of_diverged()
        if errors is not None and errors.dim() and self._retire(errors):
            return self.rows is not None and not len(self.rows)
        if self._has_stalled(change):
            if self.problem.samples is None or self.per_sample:
                self._give_up(worst)
                return True
            self.per_sample = True  # a single sample may be the cause
            self.best, self.since = math.inf, self.sweep
        if self.running.relaxation != 1 and change > self.previous:
            self.running.relaxation = 1.0  # not what this block needs
        self.next = self.sweep + self._stride(worst)
        self.measured, self.previous = self.sweep, change
        if self.decided and not self.running.decided:  # the next change is measured in another way
            self.decided, self.measured, self.previous = False, 0, math.inf
        self.ahead = 2 * (self.omega - 1) if self.provisional else 0.0
        return False

    def _restart_solver(self) -> None:
        self.memory = self.solver.init(self.running)
        self.next = self.sweep + 1
        self.measured, self.previous, self.rate = 0, math.inf, 0.0

    def _norms(self) -> Tensor:
        """The largest norm of a layer, for each sample if samples are independent."""
        values = [value.detach() for value in self.running.values if value is not None]
        if self.problem.samples is None:
            return torch.stack([torch.linalg.vector_norm(value) for value in values]).amax()
        return self._by_sample(torch.stack([torch.linalg.vector_norm(v.flatten(1), dim=1) for v in values]).amax(0))

    def _errors_of_diverged(self) -> Tensor:
        """The error of each sample if the batch's is not finite. It is infinite for diverged samples."""
        return torch.where(torch.isfinite(self._norms()), self.rtol + 1, math.inf)

    def _retire(self, errors: Tensor) -> bool:
        """Set the samples apart that have settled or diverged. Returns whether there were any."""
        gone = ~torch.isfinite(errors)
        ready = self.coarse is None and self.sweep > self.delay
        done = errors <= self.rtol if ready else torch.zeros_like(gone)
        if not bool((gone | done).any()):
            return False
        rows = torch.arange(len(errors), device=errors.device) if self.rows is None else self.rows
        if self.rows is not None:
            self.problem.adopt(self.running, self.rows)
        self.lost += rows[gone].tolist()
        if bool(done.any()):
            self.residual = max(self.residual, float(errors[done].max()))
        staying = (~(gone | done)).nonzero()[:, 0]
        self.rows = rows[staying]
        if len(staying):
            self.running = self.running.narrowed(staying)
            self.running.contraction, self.running.shares = self.contraction, self.problem.shares
            self.halfway = None
            self._restart_solver()
            self.worst = float(errors[staying].max())
        return True

    def _has_stalled(self, change: float) -> bool:
        """Whether the change of a sweep falls no further. What it says of the error is estimated anew at each."""
        if change < 0.9 * self.best:
            self.best, self.since, self.halfway = change, self.sweep, None
            return False
        if self.halfway is None and self.sweep - self.since >= self.patience // 2:
            self.halfway = self._norms()
        return self.sweep - self.since >= self.patience

    def _give_up(self, residual: float) -> None:
        """End the remaining samples. Those that have always grown count as diverged, the others as oscillating."""
        assert self.halfway is not None
        growing = self._norms() > 1.5 * self.halfway
        if growing.dim():
            rows = torch.arange(len(growing), device=growing.device) if self.rows is None else self.rows
            self.lost += rows[growing].tolist()
        elif bool(growing):
            self.lost = [0]
        self.residual = max(self.residual, residual)
        if bool(growing.all()):
            self.reason = f"its states grow without bound after {self.sweep} sweeps"
        else:
            self.reason = f"oscillated: the residual fell no further after {self.sweep} sweeps"

    def _stride(self, residual: float) -> int:
        """Number of sweeps until the next measurement, estimated from the contraction since the last one."""
        if not 0 < self.rate < 1 or not 0 < residual < math.inf or self.rounding:
            return 1
        goal = self.rtol if self.coarse is None else self.coarse
        return max(1, min(math.floor(0.7 * math.log(goal / residual) / math.log(self.rate)), 10))

    def _result(self) -> Settled:
        count = self.problem.samples or 1
        running = [] if self.settled else list(range(count)) if self.rows is None else self.rows.tolist()
        running = [row for row in running if row not in self.lost]
        if self.rows is not None and len(self.rows):
            self.problem.adopt(self.running, self.rows)
        if self.lost and len(self.lost) < count:
            self.problem.give_up(torch.tensor(sorted(self.lost), device="cpu"))
        if running and not self.reason:
            self.residual = max(self.residual, self.worst)
        unsettled = sorted([*self.lost, *running])
        return Settled(
            self.sweep, self.residual, not unsettled, self.reason, tuple(unsettled), tuple(sorted(self.lost))
        )


def _coarse_goal(solver: Solver, rtol: float, contraction: float | None) -> float | None:
    if solver.precision != "bfloat16" or contraction is None:
        return None
    floor = _COARSE / (1 - contraction)
    return rtol if rtol >= floor else min(2 * floor, 0.5)
