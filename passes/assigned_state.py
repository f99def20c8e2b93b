"""Assigned state: what a forward assigns to a buffer is written into it.

`self.mean = 0.9 * self.mean + 0.1 * h.mean(0)` puts another tensor in the buffer's place. A graph has the buffers that
it was traced with. So the value is written into the old tensor when the forward ends, as `self.mean.copy_(...)` would
do. The exporter does so for the buffers of the outermost module alone.

A buffer that the forward makes again for the sizes of a call (`self.table = table_for(n)`) is not written. The graph
makes it in every call.

Promise: while a forward is traced, every other buffer that it replaces is written in place instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import _trace

from ffebm_compiler.passes.explain_capture import NotTraceable

__all__ = ["assignments_are_writes", "is_remade", "without_the_exporters_own"]


@contextlib.contextmanager
def assignments_are_writes(source: nn.Module, remade: Container[str]) -> Iterator[None]:
    """While the context is open, one traced forward runs. Buffers with the names `remade` are not written."""
    tables = [(path, table) for path, m in source.named_modules() for table in (m._parameters, m._buffers)]
    before = [(path, table, dict(table)) for path, table in tables]
    yield
    replaced = [
        (f"{path}.{name}".lstrip("."), table, name, old, table[name])
        for path, table, known in before
        for name, old in known.items()
        if old is not None and name in table and table[name] is not old
    ]
    for _, table, leaf, old, _ in replaced:
        table[leaf] = old
    writes = [(old, _checked(name, old, new)) for name, _, _, old, new in replaced if name not in remade]
    if not writes:  # a region without gradient would be traced, and be empty
        return
    olds = {_storage(old) for old, _ in writes}
    writes = [(old, value.clone() if _storage(value) in olds else value) for old, value in writes]
    with torch.no_grad():
        for old, value in writes:
            old.copy_(value)


def _checked(name: str, old: Any, new: Any) -> Tensor:
    """The new value, without the history of its gradient."""
    if isinstance(old, nn.Parameter):
        raise NotTraceable(
            f"the forward puts another tensor in the place of the parameter {name!r}, which no optimizer would follow; "
            "write into it under torch.no_grad(), or keep the value in a buffer"
        )
    if not isinstance(new, Tensor):
        raise NotTraceable(
            f"the forward assigns {type(new).__name__} to {name!r}, where a tensor of shape {tuple(old.shape)} is; "
            "assign a tensor of that shape"
        )
    if is_remade(old, new):
        raise NotTraceable(
            f"the forward assigns {new.dtype} of shape {tuple(new.shape)} to {name!r}, which is {old.dtype} of shape "
            f"{tuple(old.shape)}; a graph keeps the shapes of the state, so assign a tensor of that shape and dtype"
        )
    return new.detach()


def is_remade(old: Any, new: Any) -> bool:
    """Whether a tensor in a buffer's place could not be written there: none was there, or one of another kind.

    The kind is the shape, dtype and device.
    """
    if not isinstance(new, Tensor):
        return False
    return not isinstance(old, Tensor) or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def without_the_exporters_own() -> Iterator[None]:
    """Turn off what the exporter does about buffers that the outermost module replaces."""
    before = _trace.register_buffer_assignment_hook  # type: ignore[attr-defined]

    class Nothing:
        def remove(self) -> None:
            """Nothing was registered."""

    _trace.register_buffer_assignment_hook = lambda mod, assigned_buffers: Nothing()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _trace.register_buffer_assignment_hook = before  # type: ignore[attr-defined]
