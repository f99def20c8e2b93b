"""`ReadPhase`: a phase as the hardware runs it, with literal states and a new read of the arrays at every update.

    s_l = σ_l(h_l + f_l),   h_l = d_l + Σ_{m>l} γ_{l,m} J_{ml}ᵀ s_m ,

with f_l = 0 in the free phase and f_l = −(β/c_l) a δ_l in a nudged one. Each product is read with noise of its own, so
that a change never falls below the noise. So the phase runs a given number of sweeps, and its result may be the mean of
the states after the last of them. (The other phases are in deviation coordinates, in which noise would cancel.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.phases.free_phase import FreePhase
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.solvers.base import GaussSeidel, Solver, sweep_layers
from ffebm_compiler.runtime.solvers.delay import delay_of_errors

__all__ = ["ReadPhase"]


class ReadPhase(FreePhase):
    """A free or nudged phase in literal states, whose products are read anew at every update."""

    def __init__(
        self,
        frame: Frame,
        setting: Setting,
        start: Sequence[Tensor] | None = None,
        forces: Sequence[Tensor | None] | None = None,
    ) -> None:
        self._forces = None if forces is None else tuple(forces)
        super().__init__(frame, setting, start)

    def order(self) -> list[int]:
        """Forward in a free phase. Backward in a nudged one, so that the nudge reaches the first layer in one sweep."""
        order = super().order()
        return order if self._forces is None else order[::-1]

    def delay(self, order: Sequence[int], by_sample: bool = False) -> int:
        """0 in the order above, if the errors of a nudged phase are those of layers that all others lead to."""
        if self._forces is None:
            return super().delay(order, by_sample)
        sources = tuple(index for index, force in enumerate(self._forces) if force is not None)
        program = self.frame.program
        return delay_of_errors(program.upstream, program.depths, sources, tuple(order))

    def _drive(self, index: int) -> Tensor:
        drive = self.frame.drive(index, self.values)
        force = None if self._forces is None else self._forces[index]
        return drive if force is None else drive + force

    def pulled(self, index: int) -> list[tuple[int, Tensor]]:
        """For each later layer m that reads layer l: (m, J_{ml}ᵀ s_m), read now."""
        state = self.frame.program.layers[index].state
        found = []
        for later in self.frame.program.downstream[index]:
            value = self._driven(later)
            part = None if value is None else self.frame.back.pullback(later, value, states=True).get(state)
            if part is not None:
                found.append((later, part))
        return found

    def _driven(self, index: int) -> Tensor | None:
        """A state as it drives its array backward: through DACs if it is digital."""
        value, reads = self.values[index], self.frame.reads
        if value is None or reads is None:
            return value
        return reads.driven(self.frame.program.layers[index].state, value)

    def run(self, sweeps: int, solver: Solver, average: int = 1) -> tuple[list[Tensor], int]:
        """Run `sweeps` sweeps and `average` − 1 more: (mean of the states after the last `average`, number of sweeps).

        Where a change takes several sweeps to reach every layer (`delay`), there are as many more.
        The sweeps are those of the physical system, plain Gauss–Seidel in the solver's schedule, whatever accelerates
        them in exact arithmetic.
        """
        plain = GaussSeidel(schedule=solver.schedule if isinstance(solver, GaussSeidel) else "auto", relaxation=1.0)
        order = plain.init(self)
        assert isinstance(order, list)
        total: list[Tensor] = []
        sweeps += self.delay(order)
        count = sweeps + average - 1
        for sweep in range(count):
            sweep_layers(self, order, measure=False)
            if sweep >= sweeps - 1:
                states = self.settled()[0]
                total = [a + s for a, s in zip(total, states, strict=True)] if total else list(states)
        return (total if average == 1 else [torch.div(state, average) for state in total]), count
