"""Counters: numbers that every call of a model changes, in attributes, objects, containers, classes and variables.

A forward may count its calls and compute something else once it has counted far enough (a warm-up, a temperature that
falls). Two calls do not show it. So the numbers are set to what they would be many calls later.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CellType
from typing import Any, NamedTuple

from ffebm_compiler.passes.held import content_of, holder_of
from ffebm_compiler.passes.named_values import NamedValues
from ffebm_compiler.passes.process import cell_content
from ffebm_compiler.passes.unchanged import Attributes

__all__ = ["CALLS", "advance"]

CALLS = 100_000
"""How many calls later counters are tried."""


class _Change(NamedTuple):
    attribute: str
    """The attribute that is or holds the value; "" for a variable or a class."""
    holder: Any
    """A dictionary, a list, a class or a cell."""
    key: Any
    old: Any
    new: Any


def advance(attributes: Attributes, named: NamedValues) -> list[str] | None:
    """Let the numbers that changed since both were made change `CALLS` times as much again, as whole steps.

    Returns:
        The names of the attributes among them, or None if no number changed. Both arguments can restore the numbers.
    """
    changes = [*_in_named(named), *_in_attributes(attributes)]  # an attribute's name is the better one
    counters = {(id(c.holder), c.key): c for c in changes if _is_counted(c.old, c.new)}
    for _, holder, key, old, new in counters.values():
        later = new + CALLS * (new - old)
        if isinstance(holder, type):
            setattr(holder, key, later)
        elif isinstance(holder, CellType):
            holder.cell_contents = later
        else:
            holder[key] = later
    return list(dict.fromkeys(c.attribute for c in counters.values() if c.attribute)) if counters else None


def _is_counted(old: Any, new: Any) -> bool:
    return type(old) is type(new) and type(new) in (int, float) and old != new


def _in_attributes(attributes: Attributes) -> Iterator[_Change]:
    for path, module in attributes.modules.items():
        for key, old in attributes.before[path].items():
            name = f"{path}.{key}" if path else key
            yield _Change(name, vars(module), key, old, vars(module).get(key))
            for container, content in attributes.contents[path][key]:
                yield from _in_container(name, container, content)


def _in_named(named: NamedValues) -> Iterator[_Change]:
    for names, before in named.variables:
        yield from (_Change("", names, key, old, names.get(key)) for key, old in before.items())
    for cell, content in named.cells:
        yield _Change("", cell, None, content, cell_content(cell))
    for kind, known in named.classes:
        yield from (_Change("", kind, key, old, vars(kind).get(key)) for key, old in known.items())
    for container, content in named.containers:
        yield from _in_container("", container, content)


def _in_container(name: str, container: Any, content: list[Any]) -> Iterator[_Change]:
    """Changes of a container's items or an object's attributes, where `content` is what `content_of` gave before."""
    holder, present = holder_of(container), content_of(container)
    if isinstance(holder, set):
        return
    if not isinstance(holder, dict):
        content, present = list(enumerate(content)), list(enumerate(present))
    now = dict(present)
    yield from (_Change(name, holder, key, old, now.get(key)) for key, old in content)
