"""Process: undo what a trace changes in caches outside of the model and in torch's levels.

A model may cache tables outside of its modules: with `functools.lru_cache`, in a dictionary of a Python module, or in
a closure. During a trace such a cache fills with the tracer's fake tensors, and the user's
own model would return them from then on.

Promise: afterwards no cache of a function outside of torch and the standard library holds a fake
tensor, and torch's functional transforms are at their former level. `NamedValues` restores what the model's code
names.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["NamedValues", "is_users", "process_unchanged", "reachable"]

_NOT_USERS = frozenset(sys.stdlib_module_names) | {"torch", "sympy", "mpmath", "numpy", "networkx", "ffebm_compiler"}
"""Top-level packages whose caches are left alone."""


@contextmanager
def process_unchanged(source: nn.Module, reached: list[Any] | None = None) -> Iterator[None]:
    """Afterwards, empty caches of the model's code that hold fake tensors, and restore torch's functional level."""
    level = torch._C._functorch.maybe_current_level()
    found = reachable(source) if reached is None else reached
    caches: list[Any] = [value for value in found if isinstance(value, functools._lru_cache_wrapper)]
    containers = [value for value in found if type(value) in _CONTAINERS]
    misses = [cache.cache_info().misses for cache in caches]
    try:
        yield
    finally:
        while torch._C._functorch.maybe_current_level() != level:
            torch._C._functorch.pop_dynamic_layer_stack()
        for cache, before in zip(caches, misses, strict=True):
            if cache.cache_info().misses != before:
                cache.cache_clear()
        for container in containers:
            _remove_fakes(container)


class NamedValues:
    """What a model's code names, as it is now: global and closed-over variables, attributes of classes and objects,
    dictionaries and lists."""

    def __init__(self, reached: Sequence[Any]) -> None:
        """`reached` is what `reachable` finds."""
        functions = [f for f in reached if isinstance(f, FunctionType) and is_users(f.__module__)]
        classes = dict.fromkeys(kind for c in reached if isinstance(c, type) for kind in c.__mro__)
        self.variables = [
            (f.__globals__, {n: f.__globals__[n] for n in _mentioned_names(f.__code__) if n in f.__globals__})
            for f in functions
        ]
        self.cells = [(cell, _cell_content(cell)) for f in functions for cell in f.__closure__ or ()]
        self.classes = [(kind, dict(vars(kind))) for kind in classes if is_users(kind.__module__)]
        tables = [vars(value) if _is_users_object(value) else value for value in reached]
        self.containers = [(table, table.copy()) for table in tables if type(table) in _CONTAINERS]
        self.caches = [(c, c.cache_info().misses) for c in reached if isinstance(c, functools._lru_cache_wrapper)]

    def restore(self) -> None:
        """Restore it, and empty caches of functions that have been filled."""
        for names, before in self.variables:
            names.update(before)
        for cell, content in self.cells:
            if _cell_content(cell) is not content:
                cell.cell_contents = content
        for kind, known in self.classes:
            for name, value in list(vars(kind).items()):
                if name.startswith("__"):
                    continue  # Python's own, some of which it makes when they are asked for
                if name not in known:
                    delattr(kind, name)
                elif value is not known[name]:
                    setattr(kind, name, known[name])
        for container, content in self.containers:
            if not _same_items(container, content):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for cache, misses in self.caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _is_users_object(value: Any) -> bool:
    """Whether a value is an object of a class of the user's, with attributes, and no module."""
    apart = (type, nn.Module, torch.Tensor, FunctionType, MethodType, ModuleType)
    return not isinstance(value, apart) and hasattr(value, "__dict__") and is_users(type(value).__module__)


def _same_items(one: Any, other: Any) -> bool:
    """Whether two lists or dictionaries hold the same objects in the same order."""
    first, second = ([*x] if isinstance(x, list) else [*x.keys(), *x.values()] for x in (one, other))
    return len(first) == len(second) and all(map(operator.is_, first, second))


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
        names = _mentioned_names(found.__code__)
        values = [found.__globals__[name] for name in names if name in found.__globals__]
        inner = [vars(value).get(name) for value in values if isinstance(value, ModuleType) for name in names]
        cells = [_cell_content(cell) for cell in found.__closure__ or ()]
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
def _mentioned_names(code: CodeType) -> frozenset[str]:
    """The global names and attributes that code mentions, also in the functions that it defines."""
    inner = [_mentioned_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(code.co_names).union(*inner)


_PLAIN = (str, bytes, int, float, bool, type(None))
_OF_TORCH = frozenset(vars(nn.Module())) - {"_parameters", "_buffers"}
"""The attributes of every module, two dozen dictionaries of hooks above all. A trace fills no empty one."""
_CONTAINERS = (dict, list)


def _cell_content(cell: CellType) -> Any:
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
