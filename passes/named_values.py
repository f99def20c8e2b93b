"""Named values: what a model's code names outside of its modules, to be restored after a call.

Promise: what was there is there again, and global variables and attributes of classes that were not there are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import Any

from torch import nn

from ffebm_compiler.passes.held import content_of, refill
from ffebm_compiler.passes.process import FunctionCaches, cell_content, is_users, mentioned_names
from ffebm_compiler.passes.unchanged import same_content

__all__ = ["NamedValues"]

_MISSING = object()


class NamedValues:
    """Global and closed-over variables, attributes of classes and objects, and containers, as they are now."""

    def __init__(self, reached: Sequence[Any]) -> None:
        """`reached` is what `reachable` finds."""
        functions = [f for f in reached if isinstance(f, FunctionType) and is_users(f.__module__)]
        classes = dict.fromkeys(kind for c in reached if isinstance(c, type) for kind in c.__mro__)
        self.variables = [
            (f.__globals__, {n: f.__globals__.get(n, _MISSING) for n in mentioned_names(f.__code__)}) for f in functions
        ]
        self.cells = [(cell, cell_content(cell)) for f in functions for cell in f.__closure__ or ()]
        self.classes = [(kind, dict(vars(kind))) for kind in classes if is_users(kind.__module__)]
        self.containers = [
            (value, content)
            for value in reached
            if not isinstance(value, nn.Module) and (content := content_of(value)) is not None
        ]
        self.caches = FunctionCaches(reached)

    def restore(self) -> None:
        """Restore them, and empty caches of functions that have been filled."""
        for names, before in self.variables:
            for name, value in before.items():
                if value is _MISSING:
                    names.pop(name, None)
                else:
                    names[name] = value
        for cell, content in self.cells:
            if cell_content(cell) is not content:
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
            if not same_content(content, content_of(container)):
                refill(container, content)
        self.caches.empty_filled()
