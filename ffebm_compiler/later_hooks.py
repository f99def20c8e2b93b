"""Later hooks: warn of hooks that are set on modules of a hybrid after conversion, since nothing calls them.

A hybrid runs blocks in place of modules. The forward hooks that the source had were captured with it. A hook that is
set on a module of the hybrid is never called, and a warning says so. FSDP's hooks are called, see `sharded`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ffebm_compiler.errors import FFEBMWarning
from ffebm_compiler.sharded import engine_hooks

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LaterHooks"]

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class LaterHooks:
    """The hooks that a source's modules had when it was converted."""

    def __init__(self, source: nn.Module) -> None:
        self.tables: list[dict[int, Any]] = []
        self.places: list[tuple[str, nn.Module, str]] = []
        for path, module in source.named_modules():
            if path:  # hooks of the hybrid itself are called
                self.tables += [vars(module)[kind] for kind in _KINDS]
                self.places += [(path, module, kind) for kind in _KINDS]
        self.known = list(map(len, self.tables))
        self.count = sum(self.known)
        self.units: dict[str, nn.Module] = {}
        """Path of each module that FSDP shards on its own -> the module."""

    def look(self) -> None:
        """Find the units of FSDP, and warn of any other hook that was set since the last call."""
        if sum(map(len, self.tables)) == self.count:
            return
        now = list(map(len, self.tables))
        ours = [len(engine_hooks(table)) for table in self.tables]
        self.units = {path: module for (path, module, _), n in zip(self.places, ours, strict=True) if n}
        grown = zip(self.places, now, ours, self.known, strict=True)
        place = next((place for place, count, engine, before in grown if count - engine > before), None)
        self.known, self.count = now, sum(now)
        if place is not None:
            path, _, kind = place
            warnings.warn(
                f"module {path!r} of the hybrid has a {kind[1:-1].replace('_', ' ')} that was set after conversion. It "
                "is never called, since a hybrid runs blocks in place of modules. Set a forward hook on the source and "
                "convert again; in place of a backward hook use Tensor.register_hook in forward",
                FFEBMWarning,
                stacklevel=4,
            )
