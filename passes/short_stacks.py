"""Short stacks: the lines of the user's code that the exporter notes for every operation, without all that called them.

The exporter symbolises the whole stack and reads the source line of each of its frames, a tenth of its time, and then
keeps those from the outermost `forward` on. Most frames are torch's own and stand at the same instruction for every
operation, so that each is described once.

Promise: the same text stands on every node. `torch.fx` is left as it was found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import FrameSummary, StackSummary
from types import CodeType, FrameType
from typing import Any

from torch.fx import proxy

__all__ = ["short_stacks"]

_NAME = "CapturedTraceback"


class _Stacks:
    """Describes running frames, in the place of the class `torch.utils._traceback.CapturedTraceback`."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[CodeType, FrameSummary]] = {}
        """(id of code, index of its instruction) -> the code, kept so that its id stays its own, and its line."""

    def extract(self) -> _Stack:
        """The frames of the caller."""
        return _Stack(sys._getframe(1), self)

    def line(self, frame: FrameType) -> FrameSummary:
        """Where a frame stands. Its source line is read when it is printed."""
        code = frame.f_code
        key = (id(code), frame.f_lasti)
        known = self._known.get(key)
        if known is None:
            line = FrameSummary(code.co_filename, frame.f_lineno, code.co_name, lookup_line=False)
            known = self._known[key] = (code, line)
        return known[1]


class _Stack:
    """The running frames of one operation."""

    def __init__(self, frame: FrameType | None, stacks: _Stacks) -> None:
        self._frame = frame
        self._stacks = stacks

    def summary(self) -> StackSummary:
        """The frames from the outermost `forward` on, outermost first."""
        found: list[FrameType] = []
        outermost, frame = 0, self._frame
        while frame is not None:
            found.append(frame)
            if frame.f_code.co_name == "forward":
                outermost = len(found)
            frame = frame.f_back
        return StackSummary(map(self._stacks.line, reversed(found[:outermost])))


@contextmanager
def short_stacks() -> Iterator[None]:
    """Let `torch.fx` note short stacks while the context is open. A torch without this class notes what it would."""
    before: Any = vars(proxy).get(_NAME)
    if before is None:
        yield
        return
    setattr(proxy, _NAME, _Stacks())
    try:
        yield
    finally:
        setattr(proxy, _NAME, before)
