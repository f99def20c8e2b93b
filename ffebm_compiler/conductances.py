"""Conductances: the weights of deep resistive networks are never negative.

A weight of a block with feedback is a conductance if the block's energy says so (`Energy.nonnegative`). Given weights
that are negative are refused by name. An optimizer moves them freely, and right after its step, those that it left
below 0 are set to 0. So are they where an optimizer that moves weights within a step (LBFGS) evaluates its closure
again. Evaluation changes nothing.

A weight may be a parameter, a view of one, a multiple of one (by a folded batch norm, or a mask), or computed
otherwise. The values of a multiple that are below 0 are set to 0 in its parameter. A weight that is computed otherwise
is only checked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ffebm_compiler.block_operands import fetched, names_behind
from ffebm_compiler.errors import InputError
from ffebm_compiler.passes.unchanged import generators_unchanged, tensors_unchanged
from ffebm_compiler.runtime.energies.loads import multiplying_weights
from ffebm_compiler.runtime.weight_stamp import WeightStamp
from ffebm_compiler.static_values import static_value
from ffebm_compiler.weight_origins import Origin, origin_of

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts

__all__ = ["KEPT", "check_conductances", "clamp_after_steps", "clamp_conductances"]

KEPT = frozenset(("_conductance_hook", "_conductance_places", "_conductance_stamp"))
"""Attributes of a hybrid that belong to the object and not to its copies."""


def is_strict(hybrid: HybridParts) -> bool:
    """Whether the weights between the hybrid's states are conductances."""
    return hybrid.energy_function.nonnegative


class _Place(NamedTuple):
    """A weight between the states of a block."""

    block: str
    layer: str
    node: Any
    origin: Origin | None
    """What the weight is a view or a multiple of; None if it is computed otherwise."""
    sources: tuple[str, ...]
    """Names of the parameters and buffers that it is made of."""


def _places_of(hybrid: HybridParts) -> tuple[_Place, ...]:
    """The weights that are conductances, each once."""
    if not is_strict(hybrid):
        return ()
    known: tuple[_Place, ...] | None = hybrid.__dict__.get("_conductance_places")
    if known is None:
        known = hybrid.__dict__["_conductance_places"] = tuple(_found(hybrid))
    return known


def _found(hybrid: HybridParts) -> Iterator[_Place]:
    names = fetched(hybrid.lowered)
    parameters = dict(hybrid.named_parameters(remove_duplicate=False)).keys()
    seen: set[Any] = set()
    for name, block in hybrid.energy_blocks.items():
        program = block.program if block.arrays is None else block.arrays.source
        if not program.coupled:
            continue
        operands = hybrid._call_of(name).args[program.inputs :]
        for place in sorted(multiplying_weights(program)):
            node = operands[place]
            origin = origin_of(node, names, parameters)
            key = node if origin is None or origin.scaled else origin.name
            if key not in seen:
                seen.add(key)
                layer = next(la.name for la in program.layers for i in la.instructions if place in i.weights)
                yield _Place(name, layer, node, origin, names_behind([node], names))


def clamp_conductances(hybrid: HybridParts) -> tuple[str, ...]:
    """Set negative conductances to 0, and return the names of the tensors that had some."""
    changed: dict[str, None] = {}
    for place in _places_of(hybrid):
        if place.origin is not None:
            negative = _negative(hybrid, place, place.origin)
            if bool(negative.any()):
                _set_to_0(hybrid._tensor(place.origin.name), negative)
                changed[place.origin.name] = None
    return tuple(changed)


def _negative(hybrid: HybridParts, place: _Place, origin: Origin) -> Tensor:
    """Where the tensor behind a weight makes it negative."""
    if not origin.scaled:
        return hybrid._tensor(origin.name).detach() < 0
    with _static(hybrid, place) as value_of:
        return origin.opposed(hybrid._tensor(origin.name), value_of)


def _set_to_0(tensor: Any, where: Any) -> None:
    """Set values to 0, also of a tensor that is sharded where the mask is whole."""
    if hasattr(tensor, "device_mesh"):
        if not hasattr(where, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            where = distribute_tensor(where, tensor.device_mesh, tensor.placements)
        tensor, where = tensor.to_local(), where.to_local()
    with torch.no_grad():
        tensor.masked_fill_(where, 0)


@contextmanager
def _static(hybrid: HybridParts, place: _Place) -> Iterator[Callable[[Any], Tensor | None]]:
    """Values of nodes of the lowered graph that a weight is made of, whole where they are sharded."""
    known: dict[Any, Tensor | None] = {}
    with hybrid._whole(place.sources), generators_unchanged(), tensors_unchanged(hybrid.written_state()):
        yield lambda node: static_value(hybrid.lowered, node, known)


def check_conductances(hybrid: HybridParts) -> None:
    """Refuse negative conductances. It looks at tensors that have changed since the last look.

    Raises:
        InputError: names the parameter, or the layer whose weight is computed, and the least value.
    """
    if not is_strict(hybrid):
        return
    places = _places_of(hybrid)
    tensors = _tensors_behind(hybrid, places)
    stamp: WeightStamp | None = hybrid.__dict__.get("_conductance_stamp")
    present = WeightStamp.of(tensors)
    if stamp is not None and stamp.equals(present):
        return
    if not any(tensor.is_meta for tensor in tensors):
        for place in places:
            _check(hybrid, place)
    hybrid.__dict__["_conductance_stamp"] = present


def _tensors_behind(hybrid: HybridParts, places: tuple[_Place, ...]) -> list[Tensor]:
    return [tensor for block in dict.fromkeys(place.block for place in places) for tensor in hybrid._made_of(block)]


def _check(hybrid: HybridParts, place: _Place) -> None:
    origin = place.origin
    if origin is not None and not origin.scaled:
        value: Tensor | None = hybrid._tensor(origin.name)
    else:
        with torch.no_grad(), _static(hybrid, place) as value_of:
            value = value_of(place.node)
    if value is None or not bool((value < 0).any()):
        return
    factors = ", ".join(repr(name) for name in place.sources if origin is None or name != origin.name)
    if origin is None:
        what = f"the weight of layer {place.layer!r}, which is computed from {factors},"
        remedy = "Compute it so that it is 0 or more, as by a softplus."
    elif origin.scaled:
        what = f"{origin.name!r}, multiplied by {factors or 'a factor'},"
        remedy = (
            "Set negative products to 0 with hybrid.clamp_conductances(), or leave batch norms digital "
            "(fold_batchnorm=False) if one of them has the factor."
        )
    else:
        what = repr(origin.name)
        remedy = (
            "Initialise it with ffebm.init.conductances_(weight), or set negative values to 0 with "
            "hybrid.clamp_conductances()."
        )
    raise InputError(
        f"{what} holds negative values (the least is {float(value.detach().min()):.3g}), and a conductance of a deep "
        f"resistive network is 0 or more. {remedy} energy='unamplified' and energy='resistive' have signed weights"
    )


def clamp_after_steps(hybrid: HybridParts) -> None:
    """Let every step of an optimizer of this process be followed by a clamp of the conductances that it moves."""
    if not is_strict(hybrid) or "_conductance_hook" in hybrid.__dict__:
        return
    reference = weakref.ref(hybrid)

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        alive = reference()
        return None if alive is None else _with_clamped_closure(alive, optimizer, args, kwargs)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        alive = reference()
        if alive is not None:
            _clamp_moved(alive, optimizer)

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    hybrid.__dict__["_conductance_hook"] = handles
    for handle in handles:
        weakref.finalize(hybrid, handle.remove)


def _with_clamped_closure(
    hybrid: HybridParts, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any] | None:
    """The arguments of a step, with a closure that clamps first where the step has moved weights; None without one."""
    own = args[1] if len(args) > 1 else kwargs.get("closure")
    places = _places_of(hybrid)
    if not callable(own) or not any(_moves(hybrid, optimizer, place) for place in places):
        return None
    given = WeightStamp.of(_tensors_behind(hybrid, places))

    def closure() -> Any:
        if not given.fits(_tensors_behind(hybrid, places)):
            _clamp_moved(hybrid, optimizer)
        return own()

    return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closure})


def _moves(hybrid: HybridParts, optimizer: Optimizer, place: _Place) -> bool:
    """Whether an optimizer steps what a weight is made of."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return any(id(hybrid._tensor(name)) in moved for name in place.sources)


def _clamp_moved(hybrid: HybridParts, optimizer: Optimizer) -> None:
    for place in _places_of(hybrid):
        if place.origin is not None and _moves(hybrid, optimizer, place):
            # No number is read here, so that the host does not wait for the device.
            _set_to_0(hybrid._tensor(place.origin.name), _negative(hybrid, place, place.origin))
