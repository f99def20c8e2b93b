"""When the loop of an energy block ends, as ONNX nodes: the rule of `runtime/solvers/relaxation.py` for evaluation.

A measured sweep gives the largest relative change c of a layer, or what it amounts to by the bounds of the layers. The
error that is left is at most κ/(1 − κ) c if a sweep is certified to contract by κ. It is taken to be r/(1 − r) c if
the changes since the sweep measured before show a better r, increased by a third, and for over-relaxed sweeps no less
than what blocks are expected to contract by. The next measurement is as late as r allows. A relaxation whose changes
grow goes on with ω = 1. Where the first sweep alone is over-relaxed, it ends nothing, and 2(ω − 1) is added to the
rate that is measured from it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffebm_compiler.onnx.emit import Writer
from ffebm_compiler.runtime.solvers.changes import FAR_ABOVE, bounding_layers
from ffebm_compiler.runtime.solvers.fixed_point import MOST, expected_contraction
from ffebm_compiler.runtime.solvers.relaxation import SAFETY

__all__ = ["Progress", "Stopping"]


@dataclass(frozen=True)
class Progress:
    """Names of what a loop knows of its progress. They are carried from sweep to sweep, in this order."""

    omega: str
    """ω."""
    previous: str
    """The change of the last measured sweep."""
    measured: str
    """That sweep, counted from 1; 0 before the first."""
    following: str
    """The sweep that is measured next."""
    slowest: str
    """What the sweeps contract by at best, by the one that was over-relaxed; 0 if none says so."""
    residual: str
    """The error that is left after the last measured sweep, in units of κ/(1 − κ)."""


@dataclass(frozen=True)
class Stopping:
    """The rule of one block. Its settings are attributes of the function that encloses the loop."""

    main: Writer
    contraction: float | None
    """κ if a sweep is certified to contract."""
    typical: float
    """What a sweep is expected to contract by, in units of κ (`Setting.typical`)."""
    shares: np.ndarray | None
    """W of `Energy.error_shares`."""
    relaxed: bool
    """Whether sweeps are over-relaxed."""
    first_alone: bool
    """Whether the first one alone is."""

    def structure(self) -> list[bool | list[int]]:
        """What the nodes depend on besides their inputs."""
        deciding = self._deciding()
        return [self.relaxed, self.first_alone, bool(self.contraction), self.shares is not None, deciding or []]

    def _deciding(self) -> list[int] | None:
        """The layers whose changes bound the errors of all; None if all are needed."""
        if self.shares is None or (self.relaxed and not self.first_alone):
            return None
        needed = bounding_layers(self.shares.tolist())
        return needed if 0 < len(needed) < len(self.shares) else None

    def attributes(self) -> dict[str, float | list[float]]:
        """Attributes of the function besides its limits."""
        found: dict[str, float | list[float]] = {}
        if self.contraction is not None:
            found["contraction"] = float(self.contraction)
        if self.shares is not None:
            found["error_shares"] = [float(share) for share in self.shares.ravel()]
        return found

    def start(self, omega: str) -> Progress:
        """Progress before the first sweep."""
        infinite, none = self.main.number(float("inf")), self.main.constant(np.array(0, dtype=np.int64))
        first = self.main.setting("min_sweeps", "int")
        return Progress(omega, infinite, none, first, self.main.number(0.0), infinite)

    def after(
        self, body: Writer, now: Progress, sweep: str, last: str, limit: str, changes: Sequence[tuple[str, str]]
    ) -> tuple[str, Progress]:
        """(whether to go on, progress) after a sweep.

        Args:
            body: the writer of the loop's body.
            now: the progress before it.
            sweep: the number of sweeps before it.
            last: the number of sweeps after which the loop ends in any case.
            limit: the largest residual that ends it.
            changes: (‖Δs_l‖, ‖s_l‖) of every layer.
        """
        one, whole = body.number(1.0), body.constant(np.array(1, dtype=np.int64))
        count = body.op("Add", sweep, whole)
        measured = body.op("Or", body.op("GreaterOrEqual", count, now.following), body.op("Equal", count, last))
        change = self._change(body, now, changes)
        known = body.op("Greater", now.measured, body.constant(np.array(0, dtype=np.int64)))
        falling = body.op("And", known, body.op("Less", change, now.previous))
        steps = body.op("Cast", body.op("Sub", count, now.measured), to=body.elem_type)
        quotient = body.op("Where", falling, body.op("Div", change, now.previous), body.number(0.5))
        rate = body.op("Pow", quotient, body.op("Div", one, steps))
        residual, slowest = self._residual(body, now, change, falling, rate)
        finished = body.op("LessOrEqual", residual, limit)
        if self.first_alone:
            finished = body.op("And", finished, body.op("Greater", count, whole))
        stride = self._stride(body, residual, limit, falling, rate)
        if self.first_alone:
            omega = body.op("Identity", one, stem="omega")
        else:
            relaxed = body.op("Greater", now.omega, one)
            growing = body.op("And", relaxed, body.op("Greater", change, now.previous))
            omega = body.op("Where", body.op("And", measured, growing), one, now.omega, stem="omega")
        new = Progress(
            omega,
            body.op("Where", measured, change, now.previous, stem="previous"),
            body.op("Where", measured, count, now.measured, stem="measured"),
            body.op("Where", measured, body.op("Add", count, stride), now.following, stem="next"),
            body.op("Where", measured, slowest, now.slowest, stem="slowest"),
            body.op("Where", measured, residual, now.residual, stem="residual"),
        )
        unfinished = body.op("And", body.op("Not", finished), body.op("Not", body.op("IsNaN", residual)))
        return body.op("Or", body.op("Not", measured), unfinished), new

    def _change(self, body: Writer, now: Progress, changes: Sequence[tuple[str, str]]) -> str:
        place = body.ints([1])
        moved, size = (
            body.op("Concat", *(body.op("Reshape", pair[side], place) for pair in changes), axis=0) for side in (0, 1)
        )
        size = body.op("Add", size, body.number(float(np.finfo(body.dtype).tiny)))
        factor = body.number(1.0)
        beyond = None
        if self.contraction and not self.first_alone:
            rate = expected_contraction(self.contraction, self.typical)
            beyond = body.scaled(body.op("Sub", now.omega, factor), (1 - rate) / rate)
            factor = body.op("Add", factor, beyond)
        largest = body.op("ReduceMax", body.op("Mul", body.op("Div", moved, size), factor), keepdims=0)
        if self.shares is None:
            return largest
        shape = self.main.ints(list(self.shares.shape))
        shares = self.main.op("Reshape", self.main.setting("error_shares", "floats"), shape)
        total = body.op("MatMul", shares, moved)
        if beyond is not None:
            total = body.op("Add", total, body.op("Mul", moved, beyond))
        bound = body.op("ReduceMax", body.op("Div", total, size), keepdims=0)
        deciding, least = self._deciding(), body.op("Min", largest, bound)
        if deciding is None:
            return least
        told = body.op("Gather", body.op("Div", moved, size), body.ints(deciding), axis=0)
        far = body.op("Greater", bound, body.scaled(body.op("ReduceMax", told, keepdims=0), FAR_ABOVE))
        return body.op("Where", far, least, bound)

    def _residual(self, body: Writer, now: Progress, change: str, falling: str, rate: str) -> tuple[str, str]:
        """(the error that is left in units of κ/(1 − κ), `Progress.slowest` from here on)."""
        slowest = now.slowest
        if not self.contraction:
            return change, slowest
        one, certified = body.number(1.0), self.main.setting("contraction", "float")
        if self.first_alone:  # a sweep that is over-relaxed by a small ω − 1 contracts by so much less than a plain one
            ahead = self.main.scaled(self.main.op("Sub", self.main.setting("relaxation", "float"), one), 2.0)
            after_it = body.op("Equal", now.measured, body.constant(np.array(1, dtype=np.int64)))
            rate = body.op("Add", rate, body.op("Where", after_it, ahead, body.number(0.0)))
        seen = body.scaled(rate, SAFETY)
        if self.first_alone:
            slowest = body.op("Where", body.op("And", after_it, falling), seen, slowest)
            seen = body.op("Max", seen, slowest)
        expected = self.main.op("Min", self.main.scaled(certified, self.typical), self.main.number(MOST))
        if self.relaxed:
            seen = body.op("Max", seen, expected)
        better = body.op("And", falling, body.op("Less", seen, certified))
        rate = body.op("Where", better, seen, certified)
        inverse = self.main.op("Div", self.main.op("Sub", one, certified), certified)
        left = body.op("Mul", body.op("Div", rate, body.op("Sub", one, rate)), inverse)
        if not self.first_alone:
            left = body.op("Div", left, now.omega)
        return body.op("Mul", change, left), slowest

    def _stride(self, body: Writer, residual: str, limit: str, falling: str, rate: str) -> str:
        """max(1, min(⌊0.7 log(limit/residual)/log(rate)⌋, 10)) where the rate is known, else 1."""
        one = body.number(1.0)
        left = body.op("Log", body.op("Div", limit, residual))
        steps = body.op("Floor", body.op("Div", body.scaled(left, 0.7), body.op("Log", rate)))
        sound = body.op("Not", body.op("Or", body.op("IsNaN", steps), body.op("IsInf", steps)))
        steps = body.op("Where", body.op("And", falling, sound), steps, one)
        return body.op("Cast", body.op("Max", one, body.op("Min", steps, body.number(10.0))), to=7)
