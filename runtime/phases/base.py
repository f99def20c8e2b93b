"""Phases: the fixed-point problems of an energy block.

With scales c_l, γ_{l,m} = c_m/c_l and the σ_l of the block's energy (`runtime/energies/base.py`), the free phase
settles

    s_l = σ_l(h_l),   h_l = d_l + Σ_{m>l} γ_{l,m} (∂d_m/∂s_l)ᵀ s_m .                              (1)

The nudged phase works in deviation coordinates s^β = s* + β v, u_l = c_l v_l, so that nothing
cancels in float32 (`docs/mathematics.md`):

    K_l = Σ_{k<l} (c_l/c_k) J_{lk} u_k + Σ_{m>l} J_{ml}ᵀ u_m − δ_l,
    u_l = [σ_l(h_l + (β/c_l) K_l) − σ_l(h_l)] / (β/c_l) .                                        (2)

The adjoint phase is its limit β → 0, u_l = σ_l'(h_l) K_l, which is H λ = −δ for λ = u/c.

If the feedback has weights of its own, the J_{ml}ᵀ of (1) and (2) have those weights (the
frame's `back`). There is no energy then. In the adjoint phase the two are exchanged: J_{lk} has the feedback weights
and J_{ml}ᵀ the forward ones, which makes it the transpose of the linear response.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ffebm_compiler.runtime.energies.base import Setting
from ffebm_compiler.runtime.program.frame import Frame, take_rows
from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint

__all__ = ["Phase", "merged", "narrow", "onto"]


class Phase(FixedPoint):
    """A phase with its values, and with pulled-back values that are reused as long as they are valid."""

    def __init__(self, frame: Frame, setting: Setting, values: list[Tensor | None]) -> None:
        self.frame = frame
        self.setting = setting
        self.scales = setting.scales
        self.typical = setting.typical
        self.values = values
        self.scratch = {}
        self.samples = frame.samples
        self.training = frame.training
        self._version = [0] * len(values)
        self._pulled: dict[int, tuple[int, dict[int, Tensor], Tensor]] = {}

    def store(self, index: int, value: Tensor | None) -> None:
        """Make `value` the present one of a layer."""
        self.values[index] = value
        self._version[index] += 1

    def pulled(self, index: int) -> list[tuple[int, Tensor]]:
        """For each later layer m that reads layer l: (m, J_{ml}ᵀ x_m)."""
        program = self.frame.program
        found = []
        for later in program.downstream[index]:
            value = self.values[later]
            if value is None:
                continue
            known = self._pulled.get(later)
            if known is None or known[0] != self._version[later]:
                parts = (
                    self._pull_back(later, value)
                    if known is None or not self.light
                    else self._pull_change(known, later, value)
                )
                self._pulled[later] = known = (self._version[later], parts, value)
            part = known[1].get(program.layers[index].state)
            if part is not None:
                found.append((later, part))
        return found

    @property
    def light(self) -> bool:
        """Whether the products of changes are computed in bfloat16 by now."""
        return self.frame.light

    def _pull_change(
        self, known: tuple[int, dict[int, Tensor], Tensor], later: int, value: Tensor
    ) -> dict[int, Tensor]:
        """J_{ml}ᵀ x_m from what was pulled back before, and a light product of the change of x_m since."""
        _, parts, before = known
        moved = self.moved(before, value, alone=True)
        with self.frame.lightly():
            change = self._pull_back(later, moved)
        own = len(change) == 1  # several parts may share memory
        return {register: onto(change[register], part, moved if own else None) for register, part in parts.items()}

    def _pull_back(self, later: int, value: Tensor) -> dict[int, Tensor]:
        """The parts of the pulled-back value of a layer, for each state that its drive reads."""
        return self.frame.back.pullback(later, value, states=True)

    def refine(self) -> None:
        """Discard values that were computed in bfloat16."""
        self.frame.coarse = False
        self._pulled.clear()

    def adopt(self, other: FixedPoint, rows: Tensor) -> None:
        """Copy the values of a narrowed phase into this one."""
        for index, value in enumerate(other.values):
            self.store(index, merged(self.values[index], value, rows))


def onto(change: Tensor, base: Tensor, moved: Tensor | None) -> Tensor:
    """base + change, written over `change` if it has its own memory: not that of `moved`, which it was made from."""
    shared = moved is None or change.untyped_storage().data_ptr() == moved.untyped_storage().data_ptr()
    if shared or change.shape != base.shape or change.stride() != base.stride():
        return base + change
    return change.add_(base)


def merged(whole: Tensor | None, part: Tensor | None, rows: Tensor) -> Tensor | None:
    """`whole` with some of its rows replaced. It is a new tensor, since others may read the old one."""
    if whole is None or part is None:
        return whole
    return whole.index_copy(0, rows.to(whole.device), part)


def narrow(values: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    """The given rows of every value."""
    return [None if value is None else take_rows(value, rows) for value in values]
