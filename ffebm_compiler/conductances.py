"""Conductances: the weights of deep resistive networks are never negative.

A weight of a block with feedback is a conductance if the block's energy says so (`Energy.nonnegative`). Given weights
that are negative are refused by name. An optimizer moves them freely, and right after its step, those that it left
below 0 are set to 0. Evaluation changes nothing.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ffebm_compiler.block_operands import fetched
from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.energies.loads import multiplying_weights
from ffebm_compiler.runtime.weight_stamp import WeightStamp

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts

__all__ = ["KEPT", "check_conductances", "clamp_after_steps", "clamp_conductances", "conductances_of"]

aten = torch.ops.aten

KEPT = frozenset(("_conductance_hook", "_conductance_names", "_conductance_stamp"))
"""Attributes of a hybrid that belong to the object and not to its copies."""

_VIEWS = {
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.clone.default,
    aten.alias.default,
}
"""Operations between a parameter and a weight that keep every value as it is."""


def is_strict(hybrid: HybridParts) -> bool:
    """Whether the weights between the hybrid's states are conductances."""
    return hybrid.energy_function.nonnegative


def conductances_of(hybrid: HybridParts) -> tuple[str, ...]:
    """Names of the parameters and buffers whose values are conductances."""
    if not is_strict(hybrid):
        return ()
    known: tuple[str, ...] | None = hybrid.__dict__.get("_conductance_names")
    if known is None:
        known = hybrid.__dict__["_conductance_names"] = _names(hybrid)
    return known


def _names(hybrid: HybridParts) -> tuple[str, ...]:
    names = fetched(hybrid.lowered)
    found: dict[str, None] = {}
    for name, block in hybrid.energy_blocks.items():
        program = block.program if block.arrays is None else block.arrays.source
        if not program.coupled:
            continue
        operands = hybrid._call_of(name).args[program.inputs :]
        for place in sorted(multiplying_weights(program)):
            node = operands[place]
            while isinstance(node, fx.Node) and node not in names and node.target in _VIEWS:
                node = node.args[0]
            if node in names:
                found[names[node]] = None
    return tuple(found)


def clamp_conductances(hybrid: HybridParts) -> tuple[str, ...]:
    """Set negative conductances to 0, and return the names of the tensors that had some."""
    changed = []
    with torch.no_grad():
        for name in conductances_of(hybrid):
            if _clamp(hybrid._tensor(name)):
                changed.append(name)
    return tuple(changed)


def _clamp(tensor: Tensor) -> bool:
    negative = bool((tensor < 0).any())
    if negative:
        tensor.clamp_(min=0)
    return negative


def check_conductances(hybrid: HybridParts) -> None:
    """Refuse negative conductances. It looks at tensors that have changed since the last look.

    Raises:
        InputError: names the parameter and its least value.
    """
    if not is_strict(hybrid):
        return
    names = conductances_of(hybrid)
    tensors = [hybrid._tensor(name) for name in names]
    stamp: WeightStamp | None = hybrid.__dict__.get("_conductance_stamp")
    present = WeightStamp.of(tensors)
    if stamp is not None and stamp.equals(present):
        return
    for name, tensor in zip(names, tensors, strict=True):
        if not tensor.is_meta and bool((tensor < 0).any()):
            raise InputError(
                f"{name!r} holds negative values (the least is {float(tensor.detach().min()):.3g}), and a conductance "
                "of a deep resistive network is 0 or more. Initialise it with ffebm.init.conductances_(weight), or set "
                "negative values to 0 with hybrid.clamp_conductances(). energy='unamplified' and energy='resistive' "
                "have signed weights"
            )
    hybrid.__dict__["_conductance_stamp"] = present


def clamp_after_steps(hybrid: HybridParts) -> None:
    """Let every step of an optimizer of this process be followed by a clamp of the conductances that it moves."""
    if not is_strict(hybrid) or "_conductance_hook" in hybrid.__dict__:
        return
    reference = weakref.ref(hybrid)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = reference()
        if alive is not None:
            _clamp_moved(alive, optimizer)

    handle = register_optimizer_step_post_hook(after)
    hybrid.__dict__["_conductance_hook"] = handle
    weakref.finalize(hybrid, handle.remove)


def _clamp_moved(hybrid: HybridParts, optimizer: Optimizer) -> None:
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    with torch.no_grad():
        for name in conductances_of(hybrid):
            tensor = hybrid._tensor(name)
            if id(tensor) in moved:
                tensor.clamp_(min=0)
