"""Short stacks: the lines of the user's code that the exporter notes for every operation, without all that called them.

The exporter symbolises the whole stack and reads the source line of each of its frames, a tenth of its time, and then
keeps those from the outermost `forward` on.

Promise: the same text stands on every node. `torch.fx` is left as it was found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import FrameSummary, StackSummary
from types import FrameType
from typing import Any

from torch.fx import proxy

__all__ = ["short_stacks"]

_NAME = "CapturedTraceback"


class _Stack:
    """The running frames, in the place of `torch.utils._traceback.CapturedTraceback`."""

    def __init__(self, frame: FrameType | None) -> None:
        self._frame = frame

    @staticmethod
    def extract() -> _Stack:
        """The frames of the caller."""
        return _Stack(sys._getframe(1))

    def summary(self) -> StackSummary:
        """The frames from the outermost `forward` on, outermost first. Source lines are read when they are printed."""
        found: list[tuple[FrameType, int]] = []
        outermost, frame = 0, self._frame
        while frame is not None:
            found.append((frame, frame.f_lineno))
            if frame.f_code.co_name == "forward":
                outermost = len(found)
            frame = frame.f_back
        summary = StackSummary()
        for frame, line in reversed(found[:outermost]):
            summary.append(FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name, lookup_line=False))
        return summary


@contextmanager
def short_stacks() -> Iterator[None]:
    """Let `torch.fx` note short stacks while the context is open. A torch without this class notes what it would."""
    before: Any = vars(proxy).get(_NAME)
    if before is None:
        yield
        return
    setattr(proxy, _NAME, _Stack)
    try:
        yield
    finally:
        setattr(proxy, _NAME, before)
