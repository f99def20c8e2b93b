"""Later modules: modules of a hybrid that were replaced by others after conversion.

A hybrid runs blocks in place of modules, and reads their tensors and training flags. So a module may give way to one of
the same type and settings, whose tensors and flags then count. Any other would be ignored, and is refused.
"""

from __future__ import annotations

from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.runtime.feedforward.blocks import ReboundOperation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ffebm_compiler.passes.lower import Lowered

__all__ = ["LaterModules"]


class LaterModules:
    """The modules of a hybrid at the places where they were last seen."""

    def __init__(
        self, source: nn.Module, at_root: Mapping[str, nn.Module | None], operations: tuple[ReboundOperation, ...]
    ) -> None:
        self.operations = operations
        """The operations of the blocks that follow training flags of modules."""
        self.places: list[tuple[Mapping[str, nn.Module | None], str]] = []
        """For each place: the table of the module that holds it, and its name there."""
        self.paths: list[str] = []
        for path, parent in source.named_modules():
            table = parent._modules if path else at_root
            self.places += [(table, name) for name in parent._modules]
            self.paths += [f"{path}.{name}" if path else name for name in parent._modules]
        self.seen = [table.get(name) for table, name in self.places]

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Let the operations that read the flags of `old` read those of `new`."""
        for operation in self.operations:
            operation.follow(old, new)

    def look(self) -> None:
        """Follow the modules that took the place of others since the last call.

        Raises:
            UnsupportedError: one of them is of another type than its predecessor, or has other settings or submodules.
        """
        now = [table.get(name) for table, name in self.places]
        if all(map(is_, now, self.seen)):
            return
        for path, old, new in zip(self.paths, self.seen, now, strict=True):
            if new is old:
                continue
            if old is None or new is None or _described(old) != _described(new):
                raise UnsupportedError(
                    f"module {path!r} of the hybrid was {_named(old)} at conversion, and {_named(new)} has taken its "
                    "place. A hybrid runs blocks in place of modules, so that it would be ignored: change the source "
                    "and convert it again"
                )
            for part, successor in zip(old.modules(), new.modules(), strict=True):
                self.follow(part, successor)
        self.seen = now


def rebound_operations(lowered: Lowered) -> tuple[ReboundOperation, ...]:
    """The operations of a lowered graph, in digital parts and in energy blocks, that follow training flags."""
    found = [module for module in lowered.graph_module.modules() if isinstance(module, ReboundOperation)]
    for block in lowered.energy.values():
        drives = [instruction for layer in block.program.layers for instruction in layer.instructions]
        sources = (getattr(step.operator, "source", None) for step in (*drives, *block.program.readout))
        found += [source for source in sources if isinstance(source, ReboundOperation)]
    return tuple(found)


def _described(module: nn.Module) -> list[tuple[str, type[nn.Module], dict[str, Any]]]:
    """Path, type and settings of a module and of all that it holds."""
    return [(path, type(part), _settings(part)) for path, part in module.named_modules()]


def _settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that its forward may read: numbers, texts and functions, and the types of others."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return {
        name: value if isinstance(value, plain) or callable(value) else type(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and not isinstance(value, Tensor)
    }


def _named(module: nn.Module | None) -> str:
    return "nothing" if module is None else repr(module).split("\n", 1)[0]
