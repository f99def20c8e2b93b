"""Later hooks: hooks on the source's modules that are set after conversion, and that nothing calls.

A hybrid runs blocks, not modules. Forward hooks that a source had were captured with it; one that is set on a
module of the hybrid would wait for ever, and whoever set it should know.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ffebm_compiler.errors import FFEBMWarning

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LaterHooks"]

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class LaterHooks:
    """The hooks of a source's modules as they were when it was converted."""

    def __init__(self, source: nn.Module) -> None:
        self.tables: list[dict[int, Any]] = []
        self.places: list[tuple[str, str]] = []
        for path, module in source.named_modules():
            if path:  # those of the hybrid itself are called
                self.tables += [vars(module)[kind] for kind in _KINDS]
                self.places += [(path, kind) for kind in _KINDS]
        self.known = list(map(len, self.tables))
        self.count = sum(self.known)

    def look(self) -> None:
        """Warn of a hook that has come since the last look."""
        if sum(map(len, self.tables)) == self.count:
            return
        now = list(map(len, self.tables))
        place = next((p for p, n, k in zip(self.places, now, self.known, strict=True) if n > k), None)
        self.known, self.count = now, sum(now)
        if place is not None:
            path, kind = place
            warnings.warn(
                f"module {path!r} of the hybrid has a {kind[1:-1].replace('_', ' ')} that was set after conversion: a "
                "hybrid runs blocks, not modules, so that it is never called; set forward hooks on the source and "
                "convert again",
                FFEBMWarning,
                stacklevel=4,
            )
