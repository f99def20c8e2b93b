"""Opaque outputs: find tensors in what a forward returns that no recipe of `containers` reaches.

A set, an iterator or a function that holds a computed tensor would hold the tracer's stand-in for it.

Promise: nothing is iterated or called, and no module is looked into.
"""

from __future__ import annotations

import functools
import gc
import types
from collections import deque
from typing import Any

from torch import nn
from torch._subclasses import FakeTensor

from ffebm_compiler.passes.containers import Recipe

__all__ = ["opaque_output"]

_MOST = 10_000
"""So many objects are looked at."""
_CLOSED = (nn.Module, type, types.ModuleType, types.CodeType, types.FrameType, str, bytes, int, float, complex)


def opaque_output(recipe: Recipe) -> str:
    """What the outputs hold a computed tensor in that cannot be built again, in words; or an empty text."""
    pending = [recipe]
    while pending:
        part = pending.pop()
        if part.form == "constant" and _holds_tensor(part.constant):
            return f"in a {type(part.constant).__name__}"
        pending.extend(part.parts)
    return ""


def _holds_tensor(value: Any) -> bool:
    pending: deque[Any] = deque([value])
    seen: set[int] = set()
    while pending and len(seen) < _MOST:
        one = pending.popleft()
        if isinstance(one, FakeTensor):
            return True
        if id(one) not in seen and not isinstance(one, _CLOSED):
            seen.add(id(one))
            pending.extend(_held_by(one))
    return False


def _held_by(value: Any) -> list[Any]:
    """The objects that an object holds, without the globals of its code."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, types.GeneratorType):
        return list(value.gi_frame.f_locals.values()) if value.gi_frame is not None else []
    if isinstance(value, types.MethodType | functools.partial):
        return gc.get_referents(value)
    return [*gc.get_referents(value), *getattr(value, "__dict__", {}).values()]
