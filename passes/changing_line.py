"""Find the line of the model's own code that changes something, such as the state of a random generator.

Promise: the trace function of the process (a debugger's, a coverage tool's) is restored.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ffebm_compiler.passes.process import is_users

__all__ = ["changing_line"]


@contextmanager
def changing_line(state: Callable[[], object]) -> Iterator[list[str]]:
    """Watch each line until `state` changes; the list then holds ` (FILE, line N) at 'CODE'` of that line."""
    found: list[str] = []
    place = ("", 0)
    before, tracer = state(), sys.gettrace()

    def follow(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal place
        if found or not is_users(frame.f_globals.get("__name__")):
            return None
        if state() != before:
            code = linecache.getline(*place).strip()
            found.append(f" ({place[0]}, line {place[1]})" + (f" at {code!r}" if code else ""))
            sys.settrace(tracer)
            return None
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
        return follow

    sys.settrace(follow)
    try:
        yield found
    finally:
        sys.settrace(tracer)
