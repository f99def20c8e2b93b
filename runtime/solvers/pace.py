"""`Pace`: how many sweeps a phase takes in training, without waiting for the result.

Reading a residual makes the host wait for a GPU. For the blocks of a network this happens several times in each step,
and in between the GPU has nothing to do. But blocks that are certified to contract need the same number of sweeps in
one step as in the step before. So a training step on a GPU does as many sweeps as the last step needed. The
change of its last sweep stays on the device, and the *next* step reads it, when it has long been computed:

- The remaining error is above the tolerance: the phase does more sweeps from now on.
- It is not finite: a warning says so, and the phase waits for its result again, so that an error can name the block.
- In every 32nd step the phase waits for its result as on a CPU, which finds samples that do not settle, and whether
  fewer sweeps are enough.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pace", "Paces"]

_EVERY = 32
"""In every so many steps, a phase waits for its result."""
_MOST = 8
"""The largest number of sweeps that one late residual adds."""


class Pace:
    """The number of sweeps of one phase of a block, and the change of its last sweep that nobody has read yet."""

    def __init__(self) -> None:
        self.sweeps: int | None = None
        """Number of sweeps of the next step; None: it waits for the result and finds the number."""
        self.steps = 0
        """Number of steps since the phase last waited for its result."""
        self.residual = 0.0
        """Relative error that was left in the last step whose result is known."""
        self.capturing = False
        """Whether a CUDA graph is being captured. Whoever replays it knows when its changes can be read."""
        self.left = 1.0
        """Factor from the change of the last sweep to the error that is left, as it was when last waited for."""
        self._rule = 0.0, 0.0
        self._changes: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything without the change that nobody has read. A copy waits for its first result."""
        return {**self.__dict__, "sweeps": None, "_changes": None, "_arrived": None}

    def found(self, sweeps: int, residual: float, left: float) -> None:
        """Note the result of a phase that was waited for.

        Args:
            sweeps: how many it took.
            residual: relative error that was left.
            left: factor from the change of its last sweep to that error.
        """
        self.sweeps, self.residual, self.left, self.steps = sweeps, residual, left, 0

    def forget(self) -> None:
        """Wait for the result of the next step."""
        self.sweeps, self._changes = None, None

    def post(self, change: Tensor, rtol: float, contraction: float) -> None:
        """Note the change of the last sweep of a phase that was not waited for.

        Args:
            change: the largest relative change of a layer, a scalar.
            rtol: largest relative error at which the phase may stop.
            contraction: factor by which a sweep is expected to contract.
        """
        self._rule = rtol, contraction
        self.steps += 1
        if change.device.type == "cpu":
            self._changes, self._arrived = change, None
            return
        if self._changes is None or not self._changes.is_pinned():
            self._changes = torch.empty((), dtype=change.dtype, pin_memory=True, device="cpu")
        self._changes.copy_(change, non_blocking=True)
        if self.capturing:
            self._arrived = None
            return
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def read(self) -> bool:
        """Read the change of the step before, and correct the number of sweeps. Returns False if it is not finite."""
        if self._changes is None or self.sweeps is None:
            return True
        if self._arrived is not None:
            self._arrived.synchronize()
        rtol, contraction = self._rule
        self.residual = float(self._changes) * self.left
        if not math.isfinite(self.residual):
            self.forget()
            return False
        if self.residual > rtol:
            missing = math.log(rtol / self.residual) / math.log(contraction) if 0 < contraction < 1 else 1.0
            self.sweeps += max(1, min(math.ceil(missing), _MOST))
        if self.steps >= _EVERY:
            self.forget()
        return True

    def replayed(self) -> None:
        """Note a step that replayed a captured graph."""
        self.steps += 1


class Paces:
    """The paces of a block's phases."""

    def __init__(self) -> None:
        self._of: dict[str, Pace] = {}

    def of(self, phase: str) -> Pace:
        """The pace of a phase, by a name that is the same in every step."""
        return self._of.setdefault(phase, Pace())

    def all(self) -> list[Pace]:
        """Every pace."""
        return list(self._of.values())
