"""Containers: inputs and outputs of any class become plain tuples, lists and dictionaries, and are built again.

`torch.export` takes only containers that are registered with torch, and a registration holds for the whole process.
But a forward may take and return objects of any class: dataclasses, namedtuples, subclasses of `dict`, attrs
classes, objects with tensors in their attributes (caches, distributions, batches of detection
models). Here they become plain containers of their tensors, and a `Recipe` builds the objects again.
Nothing is registered.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

__all__ = ["PLAIN", "Form", "Recipe", "leaves_of", "plain"]

_PLAIN = (tuple, list, dict)
"""Classes of containers that `torch.export` takes as they are."""
_LEAVES = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to build one container, or one leaf, from its plain form."""

    kind: type | None = None
    """Class of the container; None for a leaf."""
    names: tuple[Any, ...] = ()
    """Keys, fields, attributes or places of the parts."""
    parts: tuple[Recipe, ...] = ()
    form: str = ""
    """`"sequence"`, `"mapping"`, `"fields"` or `"attributes"`; `"constant"` for what holds no tensor."""
    constant: Any = None

    @property
    def trivial(self) -> bool:
        """Whether the plain form is the value itself."""
        if self.kind is None:
            return not self.form
        return self.kind in _PLAIN and all(part.trivial for part in self.parts)

    def build(self, value: Any) -> Any:
        """The container, from its plain form."""
        if self.form == "constant":
            return self.constant
        if self.kind is None:
            return value
        values = value.values() if isinstance(value, dict) else value
        parts = [part.build(item) for part, item in zip(self.parts, values, strict=True)]
        return _BUILD[self.form](self.kind, self.names, parts)

    def __eq__(self, other: object) -> bool:
        """Whether both build the same kind of container."""
        if not isinstance(other, Recipe):
            return NotImplemented
        mine, theirs = (self.kind, self.names, self.form), (other.kind, other.names, other.form)
        return mine == theirs and self.parts == other.parts and _are_equal(self.constant, other.constant)

    __hash__ = None  # type: ignore[assignment]


PLAIN = Recipe()
"""The recipe of a leaf, and of a container that is already plain."""


@dataclasses.dataclass(frozen=True)
class Form:
    """Structure of inputs or outputs: which containers, and where the leaves are in them."""

    spec: Any
    """torch's tree specification of the plain form."""
    recipe: Recipe = PLAIN
    """How to build the containers from the plain form."""

    @property
    def num_leaves(self) -> int:
        """Number of leaves."""
        return int(self.spec.num_leaves)

    @classmethod
    def of(cls, value: Any) -> tuple[list[Any], Form]:
        """The leaves of a value, and its form."""
        shown, recipe = plain(value)
        leaves, spec = pytree.tree_flatten(shown)
        return leaves, cls(spec, recipe)

    def build(self, leaves: Iterable[Any]) -> Any:
        """A value of this form."""
        return self.recipe.build(pytree.tree_unflatten(list(leaves), self.spec))

    def matches(self, other: Form) -> bool:
        """Whether values of both forms have the same containers."""
        same = self.recipe.trivial and other.recipe.trivial
        return bool(self.spec == other.spec) and (same or self.recipe == other.recipe)


def leaves_of(value: Any) -> list[Any]:
    """The leaves of a value, in containers of whatever class."""
    return Form.of(value)[0]


def _are_equal(first: object, second: object) -> bool:
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    try:
        equal = first == second
        return bool(equal.all() if hasattr(equal, "all") else equal) or _same_attributes(first, second)
    except Exception:  # objects that cannot be compared
        return False


def _same_attributes(first: object, second: object) -> bool:
    mine = getattr(first, "__dict__", None)
    return mine is not None and type(first).__eq__ is object.__eq__ and mine == getattr(second, "__dict__", None)


def plain(value: Any) -> tuple[Any, Recipe]:
    """The plain form of a value, and the recipe that builds the value from it."""
    return _plain(value, ())


def _plain(value: Any, above: tuple[int, ...]) -> tuple[Any, Recipe]:
    taken = None if isinstance(value, _LEAVES) or id(value) in above else _take_apart(value)
    if taken is None:
        return (value, Recipe()) if _exportable(value) else (None, Recipe(form="constant", constant=value))
    form, names, items = taken
    parts = [_plain(item, (*above, id(value))) for item in items]
    if form == "attributes" and not any(_holds_tensor(item) for item, _ in parts):
        return None, Recipe(form="constant", constant=value)
    kind = type(value)
    recipe = Recipe(kind, tuple(names), tuple(recipe for _, recipe in parts), form)
    values = [item for item, _ in parts]
    if form == "sequence":
        return (values if kind is list else tuple(values)), recipe
    return dict(zip(names, values, strict=True)), recipe


def _exportable(leaf: Any) -> bool:
    """Whether the exporter takes a leaf: a tensor, a number, a text, a container registered with torch."""
    known = isinstance(leaf, (*_LEAVES, int, float, complex, str)) or leaf is None
    return known or type(leaf) in pytree.SUPPORTED_NODES


def _holds_tensor(item: Any) -> bool:
    return any(isinstance(leaf, _LEAVES) for leaf in pytree.tree_leaves(item))


def _take_apart(value: Any) -> tuple[str, list[Any], list[Any]] | None:
    """Take a container apart into its form, names and parts; None for a leaf."""
    kind = type(value)
    if isinstance(value, nn.Module | type | enum.Enum) or kind.__module__ == "numpy":
        return None
    if isinstance(value, dict) and not isinstance(value, defaultdict):
        return "mapping", list(value), list(value.values())
    if isinstance(value, list | tuple):
        return "sequence", list(range(len(value))), list(value)
    if kind in pytree.SUPPORTED_NODES:
        return None  # it is registered with torch, so that the exporter takes it as it is
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return "fields", names, [getattr(value, name) for name in names]
    names = list(_attributes(value))
    return ("attributes", names, [getattr(value, name) for name in names]) if names else None


def _attributes(value: Any) -> Iterator[str]:
    """Names of the attributes that an object of a class written in Python holds."""
    if type(value).__module__ in ("builtins", "functools", "types", "inspect") and type(value) is not SimpleNamespace:
        return
    yield from getattr(value, "__dict__", {})
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name


def _sequence(kind: Any, names: tuple[Any, ...], parts: list[Any]) -> Any:
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def _mapping(kind: Any, names: tuple[Any, ...], parts: list[Any]) -> Any:
    items = dict(zip(names, parts, strict=True))
    if kind is dict:
        return items
    constructors = (kind, lambda given: kind(**given))
    for construct in reversed(constructors) if dataclasses.is_dataclass(kind) else constructors:
        try:
            made = construct(items)
        except Exception:  # the constructor of a subclass may take other arguments
            continue
        if list(made) == list(items):
            return made
    made = kind.__new__(kind)
    dict.update(made, items)
    return made


def _fields(kind: Any, names: tuple[Any, ...], parts: list[Any]) -> Any:
    values = dict(zip(names, parts, strict=True))
    taken = {field.name for field in dataclasses.fields(kind) if field.init}
    try:
        made = kind(**{name: value for name, value in values.items() if name in taken})
    except Exception:  # a constructor of its own, or checks that a tensor does not pass
        return _with_attributes(kind, names, parts)
    for name in names:
        if name not in taken:
            object.__setattr__(made, name, values[name])
    return made


def _with_attributes(kind: Any, names: tuple[Any, ...], parts: list[Any]) -> Any:
    made = kind.__new__(kind)
    for name, value in zip(names, parts, strict=True):
        object.__setattr__(made, name, value)
    return made


_BUILD: dict[str, Callable[[Any, tuple[Any, ...], list[Any]], Any]] = {
    "sequence": _sequence,
    "mapping": _mapping,
    "fields": _fields,
    "attributes": _with_attributes,
}
