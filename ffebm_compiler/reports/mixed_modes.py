"""Mixed modes: find out by trying whether neighbouring modules may be in different modes.

The two captures, with all modules in eval mode and with all in train mode, show what each module does in each mode.
They do not show whether a value between two modules that both read their mode is the same value in both captures.
`merge_modes` takes it for one value if each mode reads one. Here such modules are put in different modes once. If the
hybrid then deviates from its source, it refuses mixed modes.
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
    """Let neighbouring modules be in different modes if `same()` holds while they are.

    Args:
        hybrid, source: the two to compare. Only the hybrid's permission for mixed modes changes.
        same: whether both compute the same in the present modes of their modules.
    """
    switches = [module for module in hybrid.lowered.modules() if isinstance(module, ModeSwitch) and module.joined]
    sides = _sides(switches)
    tried = [switch for switch in switches if all(sides[other] != sides[switch.owner] for other in switch.joined)]
    if not tried:
        return
    for switch in tried:
        switch.checked = True
    if not all(_agree_in_mixed_modes(hybrid, source, sides, first, same) for first in (True, False)):
        for switch in tried:
            switch.checked = False


def _agree_in_mixed_modes(
    hybrid: HybridCore, source: nn.Module, sides: dict[nn.Module, bool], first: bool, same: Callable[[], bool]
) -> bool:
    with hybrid.in_mode(True), hybrid.feedforward_mode(), hybrid.held_feedback():
        for module, side in sides.items():
            module.training = side == first
            if module is hybrid:
                source.training = hybrid.training
        try:
            return same()
        except Exception:  # other modules must be in one mode, or the source does not run in these modes
            return False


def _sides(switches: Iterable[ModeSwitch]) -> dict[nn.Module, bool]:
    """Assign each module one of two sides, so that neighbours have different ones as far as possible."""
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
