"""Held: find the tensors and containers in a model's attributes that are no modules, parameters or buffers.

Promise: `containers_in` finds each mutable container once, a few levels deep. `held_tensors` finds each tensor once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from itertools import islice
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ffebm_compiler.passes.process import is_users, reachable

__all__ = ["containers_in", "content_of", "held_tensors", "holder_of", "own_attributes", "plain_tensors", "refill"]

_DEPTH, _ITEMS = 4, 1000
"""How many levels deep, and among how many items, state is looked for. Beyond that it is taken for data."""
_PLAIN = (str, bytes, int, float, complex, type(None), Tensor)
_NO_OBJECTS = (Tensor, type, ModuleType, FunctionType, MethodType, BuiltinFunctionType)
_OF_TORCH = frozenset(vars(nn.Module()))


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are not torch's."""
    return {key: value for key, value in vars(module).items() if key not in _OF_TORCH}


def content_of(container: Any) -> Any:
    """The items of a container, or the attributes of an object, as a new list; None for anything else."""
    if isinstance(container, dict):
        return list(dict.items(container))
    if isinstance(container, list | set | deque):
        return list(container)
    return list(vars(container).items()) if _is_object(container) else None


def holder_of(container: Any) -> Any:
    """What holds the items of a container: itself, or the dictionary of an object's attributes."""
    return container if isinstance(container, dict | list | set | deque) else vars(container)


def refill(container: Any, content: list[Any]) -> None:
    """Put the items that `content_of` returned back into their container."""
    target = holder_of(container)
    target.clear()
    if isinstance(target, list | deque):
        target.extend(content)
    else:
        target.update(content)


def containers_in(value: Any, apart: Container[int] = ()) -> list[Any]:
    """The mutable containers and objects in a value, itself included, outside of the objects with the ids `apart`."""
    found: list[Any] = []
    if isinstance(value, _PLAIN):
        return found
    seen: set[int] = set()
    pending = [(value, 0)]
    while pending and len(found) < _ITEMS:
        here, depth = pending.pop()
        if isinstance(here, _PLAIN) or id(here) in seen or id(here) in apart or depth > _DEPTH:
            continue
        seen.add(id(here))
        if content_of(here) is not None:
            found.append(here)
        pending += [(item, depth + 1) for item in islice(_items(here), _ITEMS)]
    return found


def held_tensors(source: nn.Module, reached: list[Any] | None = None) -> list[Tensor]:
    """The parameters and buffers of a model, and all `plain_tensors`, each once."""
    registered = {id(tensor): tensor for tensor in (*source.parameters(), *source.buffers())}
    return [
        *registered.values(),
        *(tensor for tensor in plain_tensors(source, reached) if id(tensor) not in registered),
    ]


def plain_tensors(source: nn.Module, reached: list[Any] | None = None) -> list[Tensor]:
    """Tensors that a model's attributes hold or its code names, without its parameters and buffers, each once."""
    modules = {id(module) for module in source.modules()}
    named = reachable(source) if reached is None else reached
    found = {id(value): value for value in named if isinstance(value, Tensor) and not isinstance(value, FakeTensor)}
    for module in source.modules():
        for value in own_attributes(module).values():
            for holder in ([value], *containers_in(value, modules)):
                for item in islice(_items(holder), _ITEMS):
                    if isinstance(item, Tensor) and not isinstance(item, FakeTensor):
                        found.setdefault(id(item), item)
    return list(found.values())


def _is_object(value: Any) -> bool:
    """Whether a value is an object with attributes, of a class that is not torch's or Python's own."""
    if isinstance(value, nn.Module):
        return True  # a list hides it from its parent, as is usual for a teacher network
    return not isinstance(value, _NO_OBJECTS) and hasattr(value, "__dict__") and is_users(type(value).__module__)


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return iter(dict.values(value))
    if isinstance(value, list | tuple | set | deque):
        return iter(value)
    return iter(vars(value).values()) if _is_object(value) else iter(())
