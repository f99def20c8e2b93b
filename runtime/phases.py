"""Phases: the fixed-point problems of an energy block.

With scales c_l and γ_{l,m} = c_m/c_l, the free phase settles

    s_l = σ_l(h_l),   h_l = d_l + Σ_{m>l} γ_{l,m} (∂d_m/∂s_l)ᵀ s_m .                              (1)

The nudged phase works in deviation coordinates s^β = s* + β v, u_l = c_l v_l, so that nothing
cancels in float32 (DESIGN of the deviation coordinates: `docs/mathematics.md`):

    K_l = Σ_{k<l} (c_l/c_k) J_{lk} u_k + Σ_{m>l} J_{ml}ᵀ u_m − δ_l,
    u_l = [σ_l(h_l + (β/c_l) K_l) − σ_l(h_l)] / (β/c_l) .                                        (2)

The adjoint phase is its limit β → 0, u_l = σ_l'(h_l) K_l, which is H λ = −δ for λ = u/c.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.program import Frame
from ffebm_compiler.runtime.solvers import FixedPoint

__all__ = ["AdjointPhase", "FreePhase", "NudgedPhase"]


_HOLD = 30
"""Sweeps after which max pooling holds its winners: near a tie they could change places for ever."""


class _Phase(FixedPoint):
    """Shared bookkeeping: values, and pulled-back values that are reused while they hold."""

    def __init__(self, frame: Frame, scales: Sequence[float], values: list[Tensor | None]) -> None:
        self.frame = frame
        self.scales = tuple(scales)
        self.values = values
        self.scratch = {}
        self._version = [0] * len(values)
        self._pulled: dict[int, tuple[int, dict[int, Tensor]]] = {}

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
            version, parts = self._pulled.get(later, (-1, {}))
            if version != self._version[later]:
                parts = self.frame.pullback(later, value, states=True)
                self._pulled[later] = (self._version[later], parts)
            part = parts.get(program.layers[index].state)
            if part is not None:
                found.append((later, part))
        return found


class FreePhase(_Phase):
    """Equation (1), started from the feedforward values."""

    def __init__(self, frame: Frame, scales: Sequence[float]) -> None:
        count = len(frame.program.layers)
        super().__init__(frame, scales, [None] * count)
        self.preactivations: list[Tensor | None] = [None] * count
        self._drives: dict[int, tuple[tuple[int, ...], Tensor]] = {}
        self._updates = 0
        for index, layer in enumerate(frame.program.layers):
            drive = self._drive(index)
            self.preactivations[index] = drive
            self.store(index, layer.activation.value(drive))

    def _drive(self, index: int) -> Tensor:
        key = tuple(self._version[k] for k in self.frame.program.upstream[index])
        known = self._drives.get(index)
        if known is None or known[0] != key:
            known = (key, self.frame.drive(index, self.values))
            self._drives[index] = known
        return known[1]

    def update(self, index: int) -> Tensor:
        """σ_l(h_l)."""
        self._updates += 1
        if self._updates > _HOLD * len(self.values):
            self.frame.frozen = True
        field = self._drive(index)
        for later, part in self.pulled(index):
            field = torch.add(field, part, alpha=self.scales[later] / self.scales[index])
        self.preactivations[index] = field
        return self.frame.program.layers[index].activation.value(field)


class _ErrorPhase(_Phase):
    """Error currents u at a settled state, driven by −δ (or −u by δ: the adjoint phase is linear)."""

    def __init__(
        self,
        frame: Frame,
        scales: Sequence[float],
        preactivations: Sequence[Tensor],
        drives: Sequence[Tensor | None],
    ) -> None:
        super().__init__(frame, scales, [None] * len(preactivations))
        self.preactivations = tuple(preactivations)
        self._drive = tuple(drives)

    def order(self) -> list[int]:
        """Backward: the nudge reaches the first layer in one sweep."""
        return list(reversed(range(len(self.values))))

    def force(self, index: int) -> Tensor | None:
        """K_l, or None where nothing has arrived yet."""
        total = self._drive[index]
        for _, pulled in self.pulled(index):
            total = pulled if total is None else total + pulled
        ratio, deviations = self.frame.deviations(index, self.values, self.scales)
        part = self.frame.tangent(index, deviations)
        if part is None:
            return total
        return part * ratio if total is None else torch.add(total, part, alpha=ratio)


class NudgedPhase(_ErrorPhase):
    """Equation (2) for one sign and size of the nudging strength β."""

    def __init__(
        self,
        frame: Frame,
        scales: Sequence[float],
        preactivations: Sequence[Tensor],
        drives: Sequence[Tensor | None],
        beta: float,
    ) -> None:
        super().__init__(frame, scales, preactivations, drives)
        self._steppers = [
            layer.activation.stepper(h, beta / scale)
            for layer, h, scale in zip(frame.program.layers, preactivations, scales, strict=True)
        ]

    def update(self, index: int) -> Tensor | None:
        """u_l from the finite difference of σ_l."""
        force = self.force(index)
        return None if force is None else self._steppers[index](force)


class AdjointPhase(_ErrorPhase):
    """u_l = σ_l'(h_l) K_l."""

    def __init__(
        self,
        frame: Frame,
        scales: Sequence[float],
        preactivations: Sequence[Tensor],
        drives: Sequence[Tensor | None],
    ) -> None:
        super().__init__(frame, scales, preactivations, drives)
        layers = frame.program.layers
        self.slopes = [layer.activation.derivative(h) for layer, h in zip(layers, preactivations, strict=True)]

    def update(self, index: int) -> Tensor | None:
        """u_l from the derivative of σ_l."""
        force = self.force(index)
        return None if force is None else self.slopes[index] * force
