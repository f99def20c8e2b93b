"""Recipes of input containers as JSON: classes by module and name, imported already when they are read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ffebm_compiler.errors import InputError
from ffebm_compiler.passes.containers import Recipe

__all__ = ["recipe_from", "stored_recipe"]


def stored_recipe(recipe: Recipe) -> dict[str, Any] | None:
    """A recipe as JSON values; None for a trivial one.

    Raises:
        TypeError: where it holds something that JSON does not know.
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


def recipe_from(stored: Mapping[str, Any] | None) -> Recipe:
    """The recipe that `stored_recipe` wrote.

    Raises:
        InputError: where a class is not there: its module must be imported before the hybrid is loaded.
    """
    if stored is None:
        return Recipe()
    kind: Any = None
    if stored["class"] is not None:
        module, name = stored["class"]
        kind = sys.modules.get(module)
        for part in str(name).split("."):
            kind = getattr(kind, part, None)
        if not isinstance(kind, type):
            raise InputError(
                f"the hybrid takes inputs of class {module}.{name}, which is not there: import {module} before loading"
            )
    return Recipe(kind, tuple(stored["names"]), tuple(map(recipe_from, stored["parts"])), str(stored["form"]))
