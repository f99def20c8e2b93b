"""A hidden compiler: the model's code is told that nothing compiles it, so that it runs as in an ordinary call.

Code that asks `torch.compiler.is_compiling()` or `is_exporting()` may then skip steps that the rest of its forward
needs.

Promise: torch's own code is told the truth, and both functions are restored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["hidden_compiler"]

_NAMES = ("is_compiling", "is_exporting")


@contextmanager
def hidden_compiler(compiled: bool = False) -> Iterator[set[str]]:
    """Answer `compiled` to the model's code while the context is open; yields the names of the modules that asked."""
    asked: set[str] = set()

    def answering(original: Callable[[], bool]) -> Callable[[], bool]:
        def answer() -> bool:
            name = str(sys._getframe(1).f_globals.get("__name__", ""))
            if name == "torch" or name.startswith("torch."):
                return original()
            asked.add(name)
            return compiled

        return answer

    before = {name: getattr(torch.compiler, name) for name in _NAMES}
    try:
        for name, original in before.items():
            setattr(torch.compiler, name, answering(original))
        yield asked
    finally:
        for name, original in before.items():
            setattr(torch.compiler, name, original)
