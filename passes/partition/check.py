"""Validation: check that a plan which was read or edited still fits its own graph and hardware.

Everything in a plan follows from its graph, its hardware and the list of operations of each
block. So everything is computed again and compared. The error names the first wrong value, its place, and the
right value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from ffebm_compiler.errors import PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.layers import matches
from ffebm_compiler.ir import ALWAYS_JOIN, Role
from ffebm_compiler.passes.partition.decide import core_homes, quotient_order
from ffebm_compiler.passes.partition.rules import activations_without_a_layer, driven_states
from ffebm_compiler.passes.planning import describe_block
from ffebm_compiler.plan_data import BlockPlan, DigitalPart, PlanData, fingerprint

__all__ = ["check_plan"]

_LEAVE_OUT = "leave everything but name and operations of an edited block out of the file, and it is computed"
_REMEDY = "make the plan again with ffebm.plan(), or edit it with plan.move()"


def check_plan(plan: PlanData) -> None:
    """Check that a plan is complete, acyclic, within capacity and free of contradictions.

    Raises:
        PlanError: something is wrong. Names the block, part or layer, its value, and the right value.
    """
    if plan.fingerprint != fingerprint(plan.graph):
        raise PlanError(
            f"the graph was changed, since its fingerprint is {fingerprint(plan.graph)!r} and the plan has "
            f"{plan.fingerprint!r}: {_REMEDY}"
        )
    _check_homes(plan)
    users = plan.graph.users()
    for block in plan.blocks:
        _check_members(plan, block, users)
        _check_capacity(plan.hardware, block)
    _check_derived(plan, users)
    blocks = [list(block.operations) for block in plan.blocks]
    quotient_order(plan.graph, blocks, [block.name for block in plan.blocks])
    parts = [list(part.operations) for part in plan.digital_parts]
    names = [*(block.name for block in plan.blocks), *(part.name for part in plan.digital_parts)]
    quotient_order(plan.graph, [*blocks, *parts], names)
    _check_cores(plan)
    _check_reasons(plan)


def _check_homes(plan: PlanData) -> None:
    names: set[str] = set()
    home: dict[str, str] = {}
    places: list[BlockPlan | DigitalPart] = [*plan.blocks, *plan.digital_parts]
    for place in places:
        if place.name in names:
            raise PlanError(f"the plan has two places named {place.name!r}: give one another name")
        names.add(place.name)
        for operation in place.operations:
            if operation not in plan.graph:
                raise PlanError(
                    f"{place.name} holds {operation!r}, which is no operation of the plan's graph: {_REMEDY}"
                )
            if operation in home:
                raise PlanError(f"operation {operation!r} is in {home[operation]} and in {place.name}: keep one")
            home[operation] = place.name
    for op in plan.graph.operations:
        if op.name not in home:
            raise PlanError(f"operation {op.name!r} of {op.path!r} is in no block and no digital part: {_REMEDY}")


def _check_members(plan: PlanData, block: BlockPlan, users: Mapping[str, list[str]]) -> None:
    joins = (*plan.options.block_ops, *ALWAYS_JOIN)
    inside, fed = set(block.operations), set()
    driven = driven_states(plan.graph, block.operations, users) if plan.options.digital_drive else []
    for op in (op for op in plan.graph.operations if op.name in inside):
        what = f"{block.name} holds {op.name!r} of {op.path!r}"
        if op.role is Role.DIGITAL:
            raise PlanError(f"{what}, which must be digital: {op.reason}. Move it to a digital part of the plan")
        if op.role is Role.WIRING and op.kind not in joins:
            raise PlanError(
                f"{what}, wiring of kind {op.kind!r}, which block_ops {plan.options.block_ops} does not list: "
                f"move it to a digital part of the plan, or plan again with {op.kind!r} in block_ops"
            )
        if matches(op.path, plan.options.force_digital):
            raise PlanError(
                f"{what}, which force_digital={plan.options.force_digital} keeps digital: change one of the two"
            )
        if op.role is Role.WEIGHT or op.name in driven or any(source in fed for source in op.inputs):
            fed.add(op.name)
    unfed = [name for name in block.operations if name not in fed]
    if unfed and plan.options.digital_drive and plan.graph[unfed[0]].role is Role.ACTIVATION:
        raise PlanError(
            f"{block.name} holds the activation {unfed[0]!r} of a value from outside of it, but not only layers of the "
            "block read it, or none does. A state driven by a digital value needs feedback from layers; move it to a "
            "digital part"
        )
    if unfed:
        raise PlanError(
            f"{block.name} holds {unfed[0]!r}, which no layer of the block feeds: move it to a digital part"
        )
    if not block.operations:
        raise PlanError(f"{block.name} holds no operation: remove it")
    for name in activations_without_a_layer(plan.graph, block.operations, users):
        if name in driven:
            continue
        raise PlanError(
            f"{block.name} holds the activation {name!r}, which owns no layer of the block, since no layer's product "
            "reaches it alone and without another activation in between. Its feedback would change what a layer "
            "computes; move it to a digital part"
        )


def _check_capacity(hardware: Hardware, block: BlockPlan) -> None:
    for count, limit, what in (
        (len(block.layers), hardware.layers_per_block, "layers and layers_per_block is"),
        (block.tiles, hardware.tiles_per_core, "tiles and tiles_per_core is"),
        (block.neurons, hardware.neurons_per_block, "neurons and neurons_per_block is"),
    ):
        if limit is not None and count > limit:
            raise PlanError(
                f"{block.name} ({', '.join(block.layers[:3])}{', ...' if len(block.layers) > 3 else ''}) has {count} "
                f"{what} {limit}: move a layer out of it with plan.move(path, 'digital') or to another block"
            )


def _check_derived(plan: PlanData, users: Mapping[str, list[str]]) -> None:
    order = {op.name: index for index, op in enumerate(plan.graph.operations)}
    for block in plan.blocks:
        right = describe_block(plan.graph, plan.hardware, users, order, block.name, block.operations)
        for field in fields(BlockPlan):
            said, found = getattr(block, field.name), getattr(right, field.name)
            if said != found:
                raise PlanError(
                    f"{block.name} says {field.name}={_short(said)}, but its operations make it {_short(found)}: "
                    f"{_LEAVE_OUT}"
                )
        _check_capacity(plan.hardware, right)


def _check_cores(plan: PlanData) -> None:
    hardware = plan.hardware
    if hardware.cores is None:
        return
    tiles = [block.tiles for block in plan.blocks]
    if None in core_homes(tiles, [block.macs for block in plan.blocks], hardware):
        raise PlanError(
            f"the blocks need more than the {hardware.cores} cores of {hardware.tiles_per_core} tiles "
            f"({sum(tiles)} tiles in all): move a layer to the digital side"
        )


def _check_reasons(plan: PlanData) -> None:
    home = {name: block.name for block in plan.blocks for name in block.operations}
    homes: dict[str, set[str]] = {}
    for op in plan.graph.operations:
        path = op.path or op.name
        if op.role is not Role.WEIGHT:
            continue
        if op.name not in home:
            if path not in plan.rejected:
                raise PlanError(f"layer {path!r} is in no block and rejected gives no reason for it: {_REMEDY}")
            if matches(op.path, plan.options.force_analog):
                raise PlanError(
                    f"layer {path!r} is digital and force_analog={plan.options.force_analog} asks for it: change one "
                    "of the two"
                )
            continue
        for weight in op.weights:
            homes.setdefault(weight, set()).add(home[op.name])
    for weight, placement in plan.weights.items():
        found = homes.get(weight, set())
        if (placement.block in found) if placement.block is not None else not found:
            continue
        said = placement.block or "digital"
        raise PlanError(
            f"weight {weight!r} is said to be {said}, but its layers are in {', '.join(sorted(found)) or 'no block'}: "
            f"{_LEAVE_OUT}"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
