"""Mixed modes: modules that hand a value on may be in different modes, where trying it shows that it is one value.

Two captures, all in eval and all in train mode, say what each module does in each; what passes between two modules
that both ask for their mode is named in neither. `merge_modes` takes it for one value where each mode reads one, and
here such modules are put in different modes once. Where the hybrid then is not its source, it refuses mixed modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

from ffebm_compiler.runtime.feedforward.modes import ModeSwitch

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["allow_mixed_modes"]


def allow_mixed_modes(hybrid: HybridCore, source: nn.Module, same: Callable[[], bool]) -> None:
    """Let modules that hand one value on be in different modes, where `same()` holds with neighbours in two modes.

    Args:
        hybrid, source: what is compared; neither changes, but for what the hybrid allows.
        same: whether both compute the same in the modes in which their modules are.
    """
    switches = [module for module in hybrid.lowered.modules() if isinstance(module, ModeSwitch) and module.joined]
    sides = _sides(switches)
    tried = [switch for switch in switches if all(sides[other] != sides[switch.owner] for other in switch.joined)]
    if not tried:
        return
    for switch in tried:
        switch.checked = True
    if not all(_agree(hybrid, source, sides, first, same) for first in (True, False)):
        for switch in tried:
            switch.checked = False


def _agree(
    hybrid: HybridCore, source: nn.Module, sides: dict[nn.Module, bool], first: bool, same: Callable[[], bool]
) -> bool:
    with hybrid.in_mode(True), hybrid.feedforward_mode(), hybrid.held_feedback():
        for module, side in sides.items():
            module.training = side == first
            if module is hybrid:
                source.training = hybrid.training
        try:
            return same()
        except Exception:  # other modules must be in one mode, or the source does not run so
            return False


def _sides(switches: Iterable[ModeSwitch]) -> dict[nn.Module, bool]:
    """One of two sides for each module, so that neighbours are on different ones where that is possible."""
    neighbours: dict[nn.Module, list[nn.Module]] = {}
    for switch in switches:
        for other in switch.joined:
            neighbours.setdefault(other, []).append(switch.owner)
            neighbours.setdefault(switch.owner, []).append(other)
    sides: dict[nn.Module, bool] = {}
    for start in neighbours:
        pending = [start]
        sides.setdefault(start, True)
        while pending:
            module = pending.pop()
            for other in neighbours[module]:
                if other not in sides:
                    sides[other] = not sides[module]
                    pending.append(other)
    return sides
