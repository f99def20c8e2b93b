"""Finite values: a branch on whether values are finite is traced as for finite values, with a note.

`if not torch.isfinite(h).all(): h = h.clamp(...)` guards against overflow. The graph holds one path, and a network
is trained and used with finite values.

Promise: a branch is decided only if its condition is computed from `isfinite`, `isnan` and `isinf` alone. Every such
place is noted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.passes.source_line import running_line

__all__ = ["FiniteValues"]

_OF_FINITE = {"isfinite": True, "isnan": False, "isinf": False, "isposinf": False, "isneginf": False}
"""Function -> its result for every finite value."""
_KEEP_TRUTH = ("all", "any", "amax", "amin", "detach", "flatten", "reshape")
_NEGATE = ("logical_not", "bitwise_not", "__invert__")


class FiniteValues:
    """Follows what a traced forward would compute from finite values."""

    def __init__(self) -> None:
        self._truth_if_finite: dict[int, tuple[Tensor, bool]] = {}
        self._lines: dict[str, None] = {}

    def call(self, func: Any, args: tuple[Any, ...]) -> bool | None:
        """The answer to a call that asks whether values are finite; None for every other call."""
        asks = func in (Tensor.__bool__, Tensor.item, torch.is_nonzero)
        if not asks or not isinstance(args[0], Tensor) or id(args[0]) not in self._truth_if_finite:
            return None
        self._lines[running_line()] = None
        return self._truth_if_finite[id(args[0])][1]

    def computed(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Note a result whose elements are all equal and known as long as the values are finite."""
        name = getattr(func, "__name__", "")
        known = self._truth_if_finite.get(id(args[0])) if args else None
        if not isinstance(result, Tensor) or (name not in _OF_FINITE and known is None):
            return
        if name in _OF_FINITE:
            self._truth_if_finite[id(result)] = result, _OF_FINITE[name]
        elif known is not None and name in (*_KEEP_TRUTH, *_NEGATE):
            self._truth_if_finite[id(result)] = result, known[1] != (name in _NEGATE)

    def notes(self) -> Iterator[str]:
        """Notes for the plan: one sentence for each branch."""
        for line in self._lines:
            yield f"the forward branches on whether values are finite{line}: it is captured for finite ones"
