"""`Measured`: a solver that asks a fabric for equilibria, and computes none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.errors import FabricError, FFEBMError, InputError, UnsupportedError
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.finite import check_inputs, check_weights
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.solvers.base import Solver
from ffebm_compiler.runtime.solvers.changes import no_change
from ffebm_compiler.runtime.solvers.fabric import Question, checked_states, outside
from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint

__all__ = ["Measured", "Unplugged"]

_RECORD = "_ffebm_programmed"
"""The attribute of a fabric that says what it holds. It lies there, since several `Measured` may share a fabric."""


@dataclass(frozen=True)
class _Programmed:
    """What a fabric was programmed with."""

    program: BlockProgram
    setting: Setting
    shapes: tuple[torch.Size, ...]
    weights: tuple[Tensor | None, ...]
    circuit: Any
    """What settles: the object that `program` returned, or the fabric itself."""

    def fits(self, question: Question, weights: tuple[Tensor | None, ...]) -> bool:
        """Whether it is what a question is about."""
        return (
            self._is_of(question)
            and self.setting == question.setting
            and all(_equal(mine, theirs) for mine, theirs in zip(self.weights, weights, strict=True))
        )

    def _is_of(self, question: Question) -> bool:
        """Whether it is the same block, with inputs of the same shapes."""
        program = question.frame.program
        return (self.program is program or self.program == program) and self.shapes == _shapes(question)


class Measured(Solver):
    """Equilibria that a fabric measures: the free states, and those under the nudge −(β/c_l) δ_l of the fields.

    Equilibrium propagation needs no more. Its gradient is the contrast of two measured states,

        g_θ = [∂_θE(s^{+β}) − ∂_θE(s^{−β})] / 2β ,

    formed in float64 from the states as they were measured, and not in deviation coordinates. A circuit of resistors
    and diodes has a potential of its own, its co-content, in which the resistors' part is that of E. So this is the
    gradient of the circuit as it is, whatever its diodes are. β must be of a size that the fabric resolves:
    `EquilibriumPropagation(beta=0.1, variant="centered")`.

    `fabric.program(block, weights)` is called before the first measurement, whenever weights or gains have changed
    since, and after an error. If it returns an object with a method `settle`, that is the block's circuit. Otherwise
    the fabric itself settles, and holds the block that was programmed last. Copies of a hybrid share the fabric.

    Args:
        fabric: an object with the methods `program(block, weights)` and `settle(inputs, nudge) -> states`.
        timeout: seconds after which a call of the fabric counts as failed; None waits for ever.

    Raises:
        InputError: the fabric has no such methods, or the timeout is no positive number.
        FabricError: later, from a forward or a backward: the fabric fails, or its answer has the wrong shape or dtype,
            too few states or values that are not finite. It names the block.
        UnsupportedError: later, for gradients that need more than equilibria (implicit, unrolled, holomorphic).

    Sources: Scellier & Bengio 2017 (arXiv 1602.05179); Kendall et al. 2020 (arXiv 2006.01981) for circuits.
    """

    at_once = True

    def __init__(self, fabric: Any, timeout: float | None = None) -> None:
        missing = [name for name in ("program", "settle") if not callable(getattr(fabric, name, None))]
        if missing or isinstance(fabric, type):
            raise InputError(
                f"fabric is {'the class' if isinstance(fabric, type) else 'a'} {_name(fabric)}; expected an object "
                "with the methods program(block, weights) and settle(inputs, nudge): see docs/hardware-in-the-loop.md"
            )
        timeout = plain(timeout)
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0):
            raise InputError(f"timeout is {timeout!r}; expected seconds, a positive number, or None")
        super().__init__()
        object.__setattr__(self, "fabric", fabric)
        object.__setattr__(self, "timeout", timeout)

    fabric: Any
    timeout: float | None

    @property
    def fabric_name(self) -> str:
        """The name of the fabric's class."""
        return _name(self.fabric)

    def __repr__(self) -> str:
        """The fabric's class."""
        return f"Measured({_name(self.fabric)})"

    def __eq__(self, other: object) -> bool:
        """Whether both ask the same fabric."""
        return isinstance(other, Measured) and other.fabric is self.fabric and other.timeout == self.timeout

    def __hash__(self) -> int:
        """By the fabric."""
        return hash((id(self.fabric), self.timeout))

    def __deepcopy__(self, memo: dict[int, Any]) -> Measured:
        """Itself: a copy of a hybrid is no second chip."""
        return self

    def init(self, problem: FixedPoint) -> object:
        """Nothing."""
        return None

    def step(
        self, problem: FixedPoint, memory: object, measure: bool = True, per_sample: bool = False
    ) -> Tensor | None:
        """Measure. Nothing is left to change then."""
        problem.answered([self._mean(question, problem.reads) for question in problem.questions()])
        return no_change(problem, per_sample)

    def _mean(self, question: Question, reads: int) -> list[Tensor]:
        """The mean of several measurements."""
        total = self._answer(question)
        for _ in range(reads - 1):
            total = [old + new for old, new in zip(total, self._answer(question), strict=True)]
        return [value / reads for value in total] if reads > 1 else total

    def _answer(self, question: Question) -> list[Tensor]:
        name, frame = question.frame.program.name, question.frame
        if frame.samples == 0:
            shapes = [frame.shapes[layer.drive] for layer in frame.program.layers]
            return [torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in shapes]
        question.check_masks()
        circuit = self._programmed(question).circuit
        inputs = tuple(outside(value) for value in question.frame.inputs)
        check_inputs(name, inputs)
        if question.held is None:
            nudge = None if question.nudge is None else tuple(map(_outside, question.nudge))
            method, call = "settle", lambda: circuit.settle(inputs, nudge)
        else:
            held = tuple(map(_outside, question.held))
            if not callable(getattr(circuit, "hold", None)):
                raise UnsupportedError(
                    f"{name}: the fabric {_name(self.fabric)} holds no states, which contrastive and coupled learning "
                    "need. Give it a method hold(inputs, held) -> states, or use 'ep', which injects currents"
                )
            method, call = "hold", lambda: circuit.hold(inputs, held)
        try:
            found = self._called(call, name, method)
            return checked_states(found, question, f"{name}: {method} of the fabric {_name(self.fabric)}")
        except BaseException:
            self._note([])  # nobody knows what it holds now
            raise

    def _programmed(self, question: Question) -> _Programmed:
        """What the fabric holds for this block, programmed anew where it has changed."""
        weights = tuple(map(_outside, question.frame.weights))
        kept: list[_Programmed] = getattr(self.fabric, _RECORD, [])
        found = next((record for record in kept if record.fits(question, weights)), None)
        if found is not None:
            return found
        check_weights(question.frame.program.name, weights)
        block = question.block(tuple(map(_outside, weights)))
        try:
            made = self._called(
                lambda: self.fabric.program(block, tuple(map(_outside, weights))), block.name, "program"
            )
        except BaseException:
            self._note([])
            raise
        own = callable(getattr(made, "settle", None)) and made is not self.fabric
        record = _Programmed(
            question.frame.program, question.setting, _shapes(question), weights, made if own else self.fabric
        )
        self._note([*(r for r in kept if own and r.circuit is not self.fabric and not r._is_of(question)), record])
        return record

    def _note(self, records: list[_Programmed]) -> None:
        try:
            object.__setattr__(self.fabric, _RECORD, records)
        except AttributeError as error:
            raise FabricError(
                f"the fabric {_name(self.fabric)} takes no attribute, so that what it holds cannot be noted there: "
                f"leave __slots__ out, or add {_RECORD!r} to them"
            ) from error

    def _called(self, call: Callable[[], Any], name: str, method: str) -> Any:
        """What a method of the fabric returns, within the timeout."""
        try:
            return call() if self.timeout is None else _within(self.timeout, call)
        except FFEBMError as error:
            if name in str(error):
                raise
            raise type(error)(f"{name}: {error}") from error
        except Exception as error:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise FabricError(
                f"{name}: {method} of the fabric {_name(self.fabric)} failed ({why}). No weight was changed. Mend the "
                "cause and call the hybrid again: the fabric is programmed anew before it is measured"
            ) from error


@dataclass
class Unplugged:
    """The fabric of a hybrid that was saved. A file holds no fabric."""

    fabric: str
    """The name of the class that it had."""

    def program(self, block: object, weights: object) -> None:
        """Say that it is missing.

        Raises:
            FabricError: always.
        """
        raise FabricError(
            f"its equilibria were measured by a fabric of the class {self.fabric} when the hybrid was saved, and a "
            "file holds no fabric: call hybrid.set_solver(ffebm.Measured(fabric)), or set_solver(None) to compute them"
        )

    settle = program


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns, waited for at most so long. A call that hangs is left to itself."""
    found: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:g} s")
    if errors:
        raise errors[0]
    return found[0]


def _name(fabric: Any) -> str:
    if isinstance(fabric, Unplugged):
        return fabric.fabric
    return fabric.__name__ if isinstance(fabric, type) else type(fabric).__name__


def _outside(value: Tensor | None) -> Tensor | None:
    return None if value is None else outside(value)


def _shapes(question: Question) -> tuple[torch.Size, ...]:
    whole = not question.frame.program.resizable
    return tuple(value.shape if whole else value.shape[1:] for value in question.frame.inputs)


def _equal(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    return torch.equal(mine, theirs)
