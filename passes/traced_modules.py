"""Traced modules: while a forward is traced, its modules stay where and what they are.

- `layer.to(device)` in the forward does nothing if the layer is there already.
- A module with two names stays itself. The exporter's stand-ins are other objects to the model's code.
- Modules are found by their names, even if a method has the same name (`type`, `train`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer
from torch.nn.utils._named_member_accessor import NamedMemberAccessor
from torch.utils._python_dispatch import _disable_current_modes

from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.explain_capture import NotTraceable

__all__ = ["modules_as_they_are"]

_STANDS_IN = "enable_attr_proxy"
"""The exporter's attribute that says whether it makes stand-ins for modules."""


@contextlib.contextmanager
def modules_as_they_are() -> Iterator[None]:
    """Put torch into a state in which its modules stay what they are, and restore it afterwards."""
    with _modules_stay(), _modules_are_themselves(), _modules_by_name():
        yield


@contextlib.contextmanager
def _modules_stay() -> Iterator[None]:
    """Let `layer.to(x.device)` do nothing if the layer is there already, and refuse it otherwise."""
    before = nn.Module._apply

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                moved = fn(probe)
            if (moved.dtype, moved.device) != (probe.dtype, probe.device):
                raise NotTraceable(
                    f"the forward moves {name!r} of a {type(self).__name__} to {moved.dtype} on {moved.device} while "
                    "it runs; move the model before it is converted"
                )
        return self

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


@contextlib.contextmanager
def _modules_are_themselves() -> Iterator[None]:
    """Turn off the exporter's stand-ins, which it makes for a module with two names to tell the names apart.

    A stand-in is another object. `layer is self.layers[-1]` would be false, and reads of `training` would be missed.
    """
    setattr(_ModuleStackTracer, _STANDS_IN, property(lambda _: False, lambda _, __: None))
    try:
        yield
    finally:
        delattr(_ModuleStackTracer, _STANDS_IN)


@contextlib.contextmanager
def _modules_by_name() -> Iterator[None]:
    """Let the exporter look modules up by name. It would find the method if the parent has one of that name."""
    before = NamedMemberAccessor.get_submodule
    NamedMemberAccessor.get_submodule = lambda self, name: module_at(self.module, name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        NamedMemberAccessor.get_submodule = before  # type: ignore[method-assign]
