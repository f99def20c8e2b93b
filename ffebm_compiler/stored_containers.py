"""Recipes of input containers as JSON. A class is named by its module and name, and must be imported before reading."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, Literal

from ffebm_compiler.errors import InputError
from ffebm_compiler.files.checked_json import Malformed, short, typed
from ffebm_compiler.passes.containers import Recipe

__all__ = ["recipe_from", "stored_recipe"]

_FORM = Literal["", "sequence", "mapping", "fields", "attributes"]
_DEEPEST = 64


def stored_recipe(recipe: Recipe) -> dict[str, Any] | None:
    """A recipe as JSON values; None for a trivial one.

    Raises:
        TypeError: the recipe holds something that JSON cannot.
    """
    if recipe.trivial:
        return None
    if recipe.form == "constant":
        raise TypeError(f"an object of type {type(recipe.constant).__name__} among the example inputs")
    kind = recipe.kind
    return {
        "class": None if kind is None else [kind.__module__, kind.__qualname__],
        "names": list(recipe.names),
        "parts": [stored_recipe(part) for part in recipe.parts],
        "form": recipe.form,
    }


def recipe_from(stored: Any, place: str = "containers", depth: int = 0) -> Recipe:
    """The recipe that `stored_recipe` wrote.

    A file may name containers only: a subclass of `list`, `tuple` or `dict`, a dataclass, or a class whose attributes
    are set without its constructor. Nothing else is ever called.

    Raises:
        InputError: a class is not there. Its module must be imported before the hybrid is loaded.
        Malformed: something is missing or malformed; names the place.
    """
    if stored is None:
        return Recipe()
    given = typed(Mapping[str, Any], stored, place)
    if set(given) != {"class", "names", "parts", "form"} or depth > _DEEPEST:
        raise Malformed(f"{place}: expected class, names, parts and form, got {short(', '.join(given))}")
    named = typed(tuple[str, str] | None, given["class"], f"{place}.class")
    names = typed(tuple[str | float | bool | None, ...], given["names"], f"{place}.names")
    form = typed(_FORM, given["form"], f"{place}.form")
    parts = typed(tuple[Any, ...], given["parts"], f"{place}.parts")
    made = tuple(recipe_from(part, f"{place}.parts[{index}]", depth + 1) for index, part in enumerate(parts))
    if (named is None) != (form == "") or len(names) != len(parts):
        raise Malformed(f"{place}: class, form, names and parts do not fit each other")
    return Recipe(None if named is None else _container_class(named, form, place), tuple(given["names"]), made, form)


def _container_class(named: tuple[str, str], form: str, place: str) -> type:
    module, name = named
    kind: Any = sys.modules.get(module)
    for part in name.split("."):
        kind = getattr(kind, part, None)
    if not isinstance(kind, type):
        raise InputError(
            f"the hybrid takes inputs of class {module}.{name}, which is not there: import {module} before loading"
        )
    fits = {
        "sequence": issubclass(kind, list | tuple),
        "mapping": issubclass(kind, dict),
        "fields": is_dataclass(kind),
        "attributes": kind is SimpleNamespace
        or (not issubclass(kind, list | tuple | dict | type) and module not in ("builtins", "types")),
    }
    if not fits[form]:
        raise Malformed(f"{place}.class: {short(f'{module}.{name}')} is no container of the form {form!r}")
    return kind
