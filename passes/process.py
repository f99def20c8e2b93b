"""Process: undo what a trace changes in caches outside of the model and in torch's levels.

A model may cache tables outside of its modules: with `functools.lru_cache`, in a dictionary of a Python module, or in
a closure. During a trace such a cache fills with the tracer's fake tensors, and the user's
own model would return them from then on.

Promise: afterwards no cache of a function outside of torch and the standard library holds a fake
tensor, and torch's functional transforms are at their former level.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["FunctionCaches", "cell_content", "is_users", "mentioned_names", "process_unchanged", "reachable"]

_NOT_USERS = frozenset(sys.stdlib_module_names) | {"torch", "sympy", "mpmath", "numpy", "networkx", "ffebm_compiler"}
"""Top-level packages whose caches are left alone."""


@contextmanager
def process_unchanged(source: nn.Module, reached: list[Any] | None = None) -> Iterator[None]:
    """Afterwards, empty caches of the model's code that hold fake tensors, and restore torch's functional level."""
    level = torch._C._functorch.maybe_current_level()
    found = reachable(source) if reached is None else reached
    caches = FunctionCaches(found)
    containers = [value for value in found if type(value) in _CONTAINERS]
    try:
        yield
    finally:
        while torch._C._functorch.maybe_current_level() != level:
            torch._C._functorch.pop_dynamic_layer_stack()
        caches.empty_filled()
        for container in containers:
            _remove_fakes(container)


class FunctionCaches:
    """The caches of functions (`functools.lru_cache`) that a model's code reaches."""

    def __init__(self, reached: Sequence[Any]) -> None:
        """`reached` is what `reachable` finds."""
        caches: list[Any] = [value for value in reached if isinstance(value, functools._lru_cache_wrapper)]
        self.misses = [(cache, cache.cache_info().misses) for cache in caches]

    def empty_filled(self) -> None:
        """Empty those that have been filled since."""
        for cache, before in self.misses:
            if cache.cache_info().misses != before:
                cache.cache_clear()


def is_users(module: object) -> bool:
    """Whether a Python module is the user's, by its name: not torch, the standard library or this package."""
    return isinstance(module, str) and module.partition(".")[0] not in _NOT_USERS


def reachable(source: nn.Module) -> list[Any]:
    """Every object that a model's code can reach by name or attribute, once each, without plain values."""
    reached: list[Any] = []
    pending: list[Any] = []
    for module in source.modules():
        pending.append(type(module))
        pending += [part for key, part in vars(module).items() if key not in _OF_TORCH or part]
    seen: set[int] = set()
    while pending:
        found = pending.pop()
        if id(found) in seen or isinstance(found, _PLAIN):
            continue
        seen.add(id(found))
        reached.append(found)
        if not isinstance(found, torch.Tensor):
            pending += _referred_objects(found)
    return reached


def _referred_objects(found: Any) -> list[Any]:
    """The objects that an object of the user's code refers to."""
    if isinstance(found, FunctionType):
        if not is_users(found.__module__):
            return []
        names = mentioned_names(found.__code__)
        values = [found.__globals__[name] for name in names if name in found.__globals__]
        inner = [vars(value).get(name) for value in values if isinstance(value, ModuleType) for name in names]
        cells = [cell_content(cell) for cell in found.__closure__ or ()]
        defaults = [*(found.__defaults__ or ()), *(found.__kwdefaults__ or {}).values()]
        return [*values, *inner, *cells, *defaults, *vars(found).values()]
    if isinstance(found, type):
        return [part for kind in found.__mro__ if is_users(kind.__module__) for part in vars(kind).values()]
    if isinstance(found, MethodType):
        return [found.__func__, found.__self__]
    if isinstance(found, staticmethod | classmethod | functools._lru_cache_wrapper):
        return [found.__wrapped__]
    if isinstance(found, property):
        return [found.fget]
    if isinstance(found, functools.partial):
        return [found.func, *found.args]
    if isinstance(found, dict):  # the `values` of a subclass might import packages
        return [value for value in dict.values(found) if isinstance(value, FunctionType | MethodType)]
    if isinstance(found, ModuleType | nn.Module) or not is_users(type(found).__module__):
        return []
    return [type(found), *getattr(found, "__dict__", {}).values()]


@functools.lru_cache(maxsize=65536)
def mentioned_names(code: CodeType) -> frozenset[str]:
    """The global names and attributes that code mentions, also in the functions that it defines."""
    inner = [mentioned_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)


_PLAIN = (str, bytes, int, float, bool, type(None))
_OF_TORCH = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}
"""The attributes of every module, two dozen dictionaries of hooks above all. A trace fills no empty one."""
_CONTAINERS = (dict, list)


def cell_content(cell: CellType) -> Any:
    """The variable that a function has closed over; None if it is not set yet."""
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def _remove_fakes(container: Any) -> None:
    if isinstance(container, dict):
        for key in [key for key, value in dict.items(container) if _holds_fake(value)]:
            del container[key]
    elif any(_holds_fake(value) for value in container):
        container[:] = [value for value in container if not _holds_fake(value)]


def _holds_fake(value: Any) -> bool:
    """Whether a value is a fake tensor, or a small container of some."""
    if isinstance(value, FakeTensor):
        return True
    if isinstance(value, list | tuple):
        return any(isinstance(item, FakeTensor) for item in value)
    return isinstance(value, dict) and any(isinstance(item, FakeTensor) for item in dict.values(value))
