"""Copied closures: functions that a copied model keeps as attributes must read the copy's tensors.

`self.head = lambda x: x @ self.embedding.weight.t()` closes over the model. A deep copy keeps functions as
they are, so the copy's `head` would still read the original's weight. The trace would take it for a constant
without a gradient. Such functions are made again here, over the copy.

Promise: no function among the copy's attributes, hooks and containers holds a part of the original
in its closure or its defaults, and no bound method belongs to one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CopiedClosures", "parameters_outside"]


class CopiedClosures:
    """The functions of a copied model, made again over what was copied."""

    def __init__(self, memo: dict[int, Any]) -> None:
        """`memo` is the memo of the deep copy: id of an original object -> its copy."""
        self.memo = memo
        self.copies = {id(value) for value in memo.values()}
        self.known: dict[int, Any] = {}

    def mend(self, copied: nn.Module) -> None:
        """Replace the functions that read the original by functions that read the copy."""
        for module in list(copied.modules()):
            for key, value in list(vars(module).items()):
                if key not in ("_parameters", "_buffers", "_modules"):
                    module.__dict__[key] = self.of(value)

    def of(self, value: Any) -> Any:
        """The value with the copy in place of the original; the value itself if it holds nothing of the original."""
        if id(value) in self.known:
            return self.known[id(value)]
        if isinstance(value, FunctionType):
            return self._function_over_copy(value)
        if isinstance(value, MethodType):
            owner = self._copy_of(value.__self__)
            return value if owner is value.__self__ else MethodType(value.__func__, owner)
        if isinstance(value, functools.partial):
            function = self.of(value.func)
            return value if function is value.func else functools.partial(function, *value.args, **value.keywords)
        if isinstance(value, dict):
            for key, item in list(value.items()):
                value[key] = self.of(item)
        elif isinstance(value, list):
            value[:] = [self.of(item) for item in value]
        elif type(value) is tuple:
            items = tuple(self.of(item) for item in value)
            return value if all(a is b for a, b in zip(items, value, strict=True)) else items
        return value

    def _function_over_copy(self, function: FunctionType) -> FunctionType:
        """A function with the same code that reads the copy. Functions that share a cell share the new cell."""
        cells = function.__closure__ or ()
        fresh = [self.known.get(id(cell), CellType()) for cell in cells]
        made = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(fresh) or None
        )
        changed = any(id(cell) in self.known and self.known[id(cell)] is not cell for cell in cells)
        self.known[id(function)] = made  # before its cells are read, since it may call itself
        for cell, new in zip(cells, fresh, strict=True):
            if id(cell) in self.known:
                continue
            self.known[id(cell)] = new
            try:
                content = cell.cell_contents
            except ValueError:  # still empty
                continue
            new.cell_contents = self._copy_of(content)
            changed |= new.cell_contents is not content and new.cell_contents is not made
        defaults = function.__defaults__ or ()
        named = function.__kwdefaults__ or {}
        made.__defaults__ = tuple(map(self._copy_of, defaults)) or None
        made.__kwdefaults__ = {key: self._copy_of(value) for key, value in named.items()} or None
        changed |= any(a is not b for a, b in zip(made.__defaults__ or (), defaults, strict=True))
        changed |= any((made.__kwdefaults__ or {})[key] is not value for key, value in named.items())
        if not changed:
            self.known |= {id(function): function, **{id(cell): cell for cell in cells}}
            return function
        made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
        made.__annotations__ = function.__annotations__
        made.__dict__.update(function.__dict__)
        return made

    def _copy_of(self, value: Any) -> Any:
        """The copy of a value that a function reaches; modules and tensors not copied yet are copied now."""
        if id(value) in self.memo:
            return self.memo[id(value)]
        if id(value) in self.copies:
            return value
        if isinstance(value, nn.Module | Tensor):
            reached = copy.deepcopy(value, self.memo)
            self.copies |= {id(copied) for copied in self.memo.values()}
            if isinstance(reached, nn.Module):
                self.mend(reached)
            return reached
        if isinstance(value, FunctionType | MethodType | functools.partial):
            return self.of(value)
        if type(value) in (list, tuple, dict):
            return self._container_of_copies(value)
        return value

    def _container_of_copies(self, value: Any) -> Any:
        """A container outside the copied model: a new one if one of its items was copied, else itself."""
        items = list(value.values()) if isinstance(value, dict) else list(value)
        reached = [self._copy_of(item) for item in items]
        if all(a is b for a, b in zip(items, reached, strict=True)):
            return value
        made = dict(zip(value, reached, strict=True)) if isinstance(value, dict) else type(value)(reached)
        self.memo[id(value)] = made
        return made


def parameters_outside(constants: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Names of the original's parameters among the constants of a trace: the copy's code still reads the original."""
    places = {parameter.data_ptr(): name for name, parameter in model.named_parameters() if _has_memory(parameter)}
    found = [value.data_ptr() for value in constants.values() if _has_memory(value)]
    return sorted({places[place] for place in found if place in places})


def _has_memory(value: Any) -> bool:
    """Whether a value is a plain dense tensor with memory: no subclass, not sparse, not on the meta device."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
        return False
    return bool(value.device.type != "meta" and value.numel())
