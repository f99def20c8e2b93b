"""The free phase of an energy block: equation (1) of `runtime/phases/base.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.phases.base import Phase, merged, narrow, onto
from ffebm_compiler.runtime.phases.error_phases import AdjointPhase
from ffebm_compiler.runtime.program.frame import Frame, take_rows
from ffebm_compiler.runtime.solvers.conjugate import newton_step
from ffebm_compiler.runtime.solvers.delay import delay_of_states
from ffebm_compiler.runtime.solvers.fabric import Question
from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint

__all__ = ["HOLD", "FreePhase"]

HOLD = 30
"""Number of sweeps after which max pooling holds its winners, since near a tie they could change for ever."""


class FreePhase(Phase):
    """Equation (1), started from the values without feedback or from given states.

    The values without feedback are the source's states σ_l(d_l), or those of the energy's own σ_l (`starts_loaded`).
    With `source` they are the source's in any case.
    """

    def __init__(
        self, frame: Frame, setting: Setting, start: Sequence[Tensor] | None = None, source: bool = False
    ) -> None:
        count = len(frame.program.layers)
        super().__init__(frame, setting, [None] * count if start is None else list(start))
        self.preactivations: list[Tensor | None] = [None] * count
        self._drives: dict[int, tuple[tuple[int, ...], Tensor, list[Tensor | None]]] = {}
        self._updates = 0
        self.loose = frame.program.smooth
        self.literal: tuple[Tensor, ...] = ()
        """The states as a fabric measured them, in float64; empty where they are computed."""
        self.pace = frame.pace("free")
        if start is None:
            loaded = setting.energy.starts_loaded and not source
            if not (loaded and frame.evaluated):
                self._run_forward(frame.activations)
            if loaded:
                self._run_forward(self.activations)  # their loads need shapes, from the first run or an earlier frame
        elif not frame.evaluated:
            for index in range(count):  # this evaluates the shapes, and the winners of max pooling at these states
                self._drive(index)

    def _run_forward(self, activations: Sequence[Activation]) -> None:
        for index, activation in enumerate(activations):
            drive = self._drive(index)
            self.preactivations[index] = drive
            self.store(index, activation.value(drive))

    @cached_property
    def activations(self) -> tuple[Activation, ...]:
        """σ_l of the energy."""
        return self.setting.activations(self.frame)

    @property
    def held(self) -> bool:
        """Whether winners of max pooling had to be held because they kept changing."""
        return self.frame.program.selects and self._updates > HOLD * len(self.values)

    def delay(self, order: Sequence[int], by_sample: bool = False) -> int:
        """0 in the forward order, in which a sweep carries a change from each layer to all later ones."""
        return delay_of_states(self.frame.program.upstream, tuple(order))

    def carried(self) -> list[int]:
        """The layers that feed back into earlier ones. A forward sweep starts from their values alone."""
        return [index for index, above in enumerate(self.frame.program.upstream) if above]

    def settled(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(states, pre-activations), s_l = σ_l(h_l) where they are computed."""
        return _complete(self.values), _complete(self.preactivations)

    def _drive(self, index: int) -> Tensor:
        key = tuple(self._version[k] for k in self.frame.program.upstream[index])
        known = self._drives.get(index)
        if known is None or known[0] != key:
            before = None if known is None else known[2]
            drive = self._changed_drive(index, known[1], before) if before and known and self.light else None
            if drive is None:
                drive = self.frame.drive(index, self.values)
            states = list(self.values) if self.frame.light else []
            self._drives[index] = known = (key, drive, states)
        return known[1]

    @property
    def light(self) -> bool:
        """Whether changes are small enough by now for light products."""
        return self.frame.light and self._updates > self.full_sweeps * len(self.values)

    def _changed_drive(self, index: int, drive: Tensor, before: Sequence[Tensor | None]) -> Tensor:
        """The drive d_l from the one at the states before, by a light product of their changes."""
        moved: list[Tensor | None] = [None] * len(before)
        last: Tensor | None = None
        upstream = self.frame.program.upstream[index]
        for other in upstream:
            value, known = self.values[other], before[other]
            assert value is not None
            assert known is not None
            last = moved[other] = self.moved(known, value, alone=len(upstream) == 1)
        with self.frame.lightly():
            change = self.frame.tangent(index, moved)
        alone = last if len(upstream) == 1 else None
        return drive if change is None else onto(change, drive, alone)

    def update(self, index: int) -> Tensor:
        """σ_l(h_l)."""
        self.preactivations[index] = field = self._field(index)
        return self.activations[index].value(field)

    def advance(self, index: int) -> Tensor:
        """σ_l of the over-relaxed pre-activation, so that states and pre-activations belong together."""
        before = self.preactivations[index]
        if self.relaxation != 1 and before is not None and before is self._drive(index):
            field = self._field(index, self.relaxation)  # it only adds to what is there
            self.preactivations[index] = field
            return self.activations[index].value(field)
        field = self._field(index)
        if self.relaxation != 1 and before is not None:
            known = self._drives.get(index)
            own = known is not None and field is not known[1] and not torch.is_grad_enabled()
            over = field if own else None  # nobody else has this sum
            field = torch.lerp(before, field, self.relaxation, out=over)
        self.preactivations[index] = field
        return self.activations[index].value(field)

    def _field(self, index: int, omega: float = 1.0) -> Tensor:
        """h_l at the present states, with ω times what arrives from later layers."""
        self._updates += 1
        if self._updates > HOLD * len(self.values):
            self.frame.frozen = True
        field = self._drive(index)
        for later, part in self.pulled(index):
            field = torch.add(field, part, alpha=omega * self.scales[later] / self.scales[index])
        return field

    def questions(self) -> list[Question]:
        """The free equilibrium."""
        return [Question(self.frame, self.setting)]

    def answered(self, answers: Sequence[Sequence[Tensor]]) -> None:
        """Take over measured states. Pre-activations are the fields h_l at them, and s_l is not exactly σ_l(h_l)."""
        self.literal = tuple(answers[0])
        for index, state in enumerate(self.literal):
            self.store(index, state.to(self.values[index]))
        for index in range(len(self.literal)):
            self.preactivations[index] = self._field(index)

    def refine(self) -> None:
        """Discard values that were computed in bfloat16."""
        super().refine()
        self._drives.clear()

    def narrowed(self, rows: Tensor) -> FreePhase:
        """The phase of some of the samples, at their present states."""
        start = [take_rows(value, rows) for value in self.values if value is not None]
        phase = FreePhase(self.frame.narrowed(rows), self.setting, start)
        phase.preactivations = narrow(self.preactivations, rows)
        phase._updates, phase.full_sweeps = self._updates, self.full_sweeps
        return phase

    def adopt(self, other: FixedPoint, rows: Tensor) -> None:
        """Copy the states and pre-activations of a narrowed phase into this one."""
        assert isinstance(other, FreePhase)
        super().adopt(other, rows)
        for index, value in enumerate(other.preactivations):
            self.preactivations[index] = merged(self.preactivations[index], value, rows)

    def give_up(self, rows: Tensor) -> None:
        """Put samples back to their feedforward values."""
        self.adopt(FreePhase(self.frame.narrowed(rows), self.setting), rows)

    def correction(self, rtol: float) -> list[Tensor] | None:
        """Semismooth Newton: (1 − σ'(h) B/c) Δ = r, r_l = σ_l(h_l) − s_l, with B/c the coupling of all layers."""
        layers = self.frame.program.layers
        if not (self.frame.program.monotone and self.frame.program.symmetric):
            return None
        residuals = [self.update(index) - value for index, value in enumerate(self.values) if value is not None]
        fields = [field for field in self.preactivations if field is not None]
        response = AdjointPhase(self.frame, self.setting, fields, [None] * len(layers))
        return newton_step(response, residuals, self.scales, rtol)


def _complete(values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    assert all(value is not None for value in values)
    return tuple(value for value in values if value is not None)
