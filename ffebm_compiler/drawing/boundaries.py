"""Boundaries: why an energy block ends where it does, and which values are side inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Role
from ffebm_compiler.reports.text import count

if TYPE_CHECKING:
    from ffebm_compiler.plan_data import BlockPlan, PlanData

__all__ = ["ends_of", "side_inputs"]

_MANY_READERS = 3
"""How many blocks and parts must read a value without weights before it is called a side input."""


def ends_of(plan: PlanData, block: BlockPlan) -> list[tuple[str, str]]:
    """For each operation behind a block: its module path or name, and why it is not in the block."""
    blocks = {other.name: other for other in plan.blocks}
    inside = set(block.operations)
    found: dict[str, str] = {}
    for operation in plan.graph.operations:
        if operation.name in inside or inside.isdisjoint(operation.data):
            continue
        other = blocks.get(plan.home(operation.name))
        name = operation.path or operation.name
        if other is None:
            found.setdefault(name, plan._explain_operation(operation).removeprefix("digital: "))
        else:
            found.setdefault(name, f"{other.name}: {_together(plan.hardware, block, other)}")
    if not inside.isdisjoint(plan.graph.outputs):
        found.setdefault("output", "the network ends here")
    return list(found.items())


def _together(hardware: Hardware, block: BlockPlan, other: BlockPlan) -> str:
    """Why two blocks are not one."""
    for what, limit, needed in (
        ("tiles", hardware.tiles_per_core, block.tiles + other.tiles),
        ("layers", hardware.layers_per_block, len(block.layers) + len(other.layers)),
        ("neurons", hardware.neurons_per_block, block.neurons + other.neurons),
    ):
        if limit is not None and needed > limit:
            return f"one block of both would need {count(needed)} {what}, and a core holds {count(limit)}"
    return "one block of both would save no conversion, or something digital lies between them"


def side_inputs(plan: PlanData) -> dict[str, list[str]]:
    """Operation -> those of its inputs that are side inputs, such as masks, positions and constants.

    A side input is computed without a parameter, each of its readers also reads a value that parameters were needed
    for, and either several blocks and parts read it or it is a constant, which depends on no input of the network.
    """
    made: set[str] = set()
    fed = set(plan.graph.inputs)
    """Values that depend on an input."""
    for operation in plan.graph.operations:
        weights = operation.role is Role.WEIGHT or any(name in plan.weights for name in operation.weights)
        if weights or not made.isdisjoint(operation.data):
            made.add(operation.name)
        if not fed.isdisjoint(operation.data):
            fed.add(operation.name)
    readers: dict[str, set[str]] = {}
    for operation in plan.graph.operations:
        for source in operation.data:
            if source in plan.graph and source not in made and plan.home(source) != plan.home(operation.name):
                readers.setdefault(source, set()).add(plan.home(operation.name))
    many = {source for source, homes in readers.items() if len(homes) >= _MANY_READERS or source not in fed}
    return {
        operation.name: [source for source in operation.data if source in many]
        for operation in plan.graph.operations
        if not many.isdisjoint(operation.data) and not made.isdisjoint(operation.data)
    }
