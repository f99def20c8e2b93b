"""Later modules: modules of a hybrid that were replaced by others after conversion.

A hybrid runs blocks in place of modules, and reads their tensors and training flags. So a module may give way to one of
the same type and settings, whose tensors and flags then count. Any other would be ignored, and is refused.

Settings of modules, such as `stride` or a number that the user's forward reads, were captured too. If one is set later,
a warning says that the hybrid goes on with the former value. Rates of dropout and momentums of norms are followed.

A folded batch norm gathers no statistics. If those that it has are reset, as to estimate them anew, a warning says so.
"""

from __future__ import annotations

import warnings
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ffebm_compiler.errors import FFEBMWarning, UnsupportedError
from ffebm_compiler.runtime.feedforward.blocks import ReboundOperation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ffebm_compiler.passes.lower import Lowered

__all__ = ["LaterModules"]


class LaterModules:
    """The modules of a hybrid at the places where they were last seen."""

    def __init__(
        self,
        source: nn.Module,
        at_root: Mapping[str, nn.Module | None],
        operations: tuple[ReboundOperation, ...],
        folded: frozenset[str] = frozenset(),
    ) -> None:
        self.folded = folded
        """Paths of the batch norms that are folded into the weights before them."""
        self.operations = operations
        """The operations of the blocks that follow training flags of modules."""
        self.at_root = at_root
        """The table of the hybrid itself, which has the source's modules under the source's names, and one more."""
        self.names = tuple(source._modules)
        self._see()

    def _see(self) -> None:
        """Note which modules there are now, and their settings."""
        self.places = [(name, self.at_root, name) for name in self.names]
        """For each place: the path of its module, the table of the module that holds it, and its name there."""
        known: set[nn.Module] = set()
        for name in self.names:
            top = self.at_root.get(name)
            for path, parent in () if top is None else top.named_modules(known, name):
                self.places += [(f"{path}.{child}", parent._modules, child) for child in parent._modules]
        self.seen = self._now()
        followed = {(operation.owner, name) for operation in self.operations for name in operation.follows}
        self.watched = [
            (path, module, name)
            for (path, _, _), module in zip(self.places, self.seen, strict=True)
            if module is not None
            for name, value in vars(module).items()
            if name == "training" or (_is_setting(name, value) and (module, name) not in followed)
        ]
        """For each setting of a submodule: its path, the module and the name. The hybrid watches those of the root."""
        self.note_settings()
        self.norms = {path: (table, name) for path, table, name in self.places if path in self.folded}
        self.statistics = self._statistics()
        self.without_data = {path for path in self.statistics if self._is_reset(path)}
        """Paths of the folded norms whose statistics are those of one that has seen no data."""

    def note_settings(self) -> None:
        """Take the present settings for known."""
        self.settings = self._settings()

    def _now(self) -> list[nn.Module | None]:
        return [table.get(name) for _, table, name in self.places]

    def _settings(self) -> list[Any]:
        return [module.__dict__.get(name) for _, module, name in self.watched]

    def _statistics(self) -> dict[str, tuple[int, int]]:
        """(object, counter of in-place operations) of the running variance of each folded norm."""
        found = {path: getattr(table.get(name), "running_var", None) for path, (table, name) in self.norms.items()}
        return {p: (id(v), v._version) for p, v in found.items() if isinstance(v, Tensor) and not v.is_inference()}

    def _is_reset(self, path: str) -> bool:
        """Whether a folded norm has mean 0 and variance 1."""
        table, name = self.norms[path]
        norm: Any = table.get(name)
        if norm.running_mean is None or norm.running_mean.is_meta:
            return False
        return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())

    def look_at_statistics(self) -> None:
        """Warn of folded norms whose statistics were reset since the last call."""
        now = self._statistics()
        if now == self.statistics:
            return
        changed = [path for path, stamp in now.items() if self.statistics.get(path) != stamp]
        self.statistics = now
        found = {path for path in changed if self._is_reset(path)}
        reset = sorted(found - self.without_data)
        self.without_data = self.without_data.difference(changed) | found
        if reset:
            warnings.warn(
                f"the running statistics of {', '.join(map(repr, reset[:4]))}{', ...' if len(reset) > 4 else ''} were "
                "reset (mean 0, variance 1), and these batch norms are folded into the weights before them "
                "(fold_batchnorm=True), so that no forward gathers new ones, and blocks run with those. Load the "
                "former ones again (hybrid.load_state_dict). To estimate new ones, as torch.optim.swa_utils.update_bn "
                "does, run it on the source and convert again, or convert with fold_batchnorm=False",
                FFEBMWarning,
                stacklevel=2,
            )

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """Let the operations that read the flags of `old` read those of `new`."""
        for operation in self.operations:
            operation.follow(old, new)

    def look(self) -> None:
        """Follow the modules that took the place of others since the last call.

        Raises:
            UnsupportedError: one of them is of another type than its predecessor, or has other settings or submodules.
        """
        self.look_at_settings()
        self.look_at_statistics()
        now = self._now()
        if all(map(is_, now, self.seen)):
            return
        for (path, _, _), old, new in zip(self.places, self.seen, now, strict=True):
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
        self._see()

    def look_at_settings(self) -> None:
        """Warn of settings that were set since the last call."""
        settings = self._settings()
        if all(map(is_, settings, self.settings)):
            return
        changes = [
            (path, module, name, before, after)
            for (path, module, name), before, after in zip(self.watched, self.settings, settings, strict=True)
            if type(before) is not type(after) or before != after
        ]
        switched = {module for _, module, name, _, _ in changes if name == "training"}  # their `train` may set others
        changed = [
            f"{name!r} of {path!r} from {before!r} to {after!r}"
            for path, module, name, before, after in changes
            if module not in switched
        ]
        self.settings = settings
        if changed:
            warnings.warn(
                f"settings of modules of the hybrid were changed ({', '.join(changed[:4])}"
                f"{', ...' if len(changed) > 4 else ''}), but they were captured as they were at conversion, and the "
                "hybrid goes on with the former values if a forward reads them: set them on the source and convert "
                "again",
                FFEBMWarning,
                stacklevel=2,
            )


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


def _is_setting(name: str, value: object) -> bool:
    return isinstance(value, _PLAIN) and not name.startswith("_") and name != "training"


_PLAIN = (bool, int, float, str, tuple, list, type(None))


def _settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that its forward may read: numbers, texts and functions, and the types of others."""
    return {
        name: value if isinstance(value, _PLAIN) or callable(value) else type(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and not isinstance(value, Tensor)
    }


def _named(module: nn.Module | None) -> str:
    return "nothing" if module is None else repr(module).split("\n", 1)[0]
