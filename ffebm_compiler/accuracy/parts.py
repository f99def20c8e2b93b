"""The weights of a plan's blocks, each with the layers that read it: what may be on devices or digital on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ffebm_compiler.ir import Operation, Role
from ffebm_compiler.plan_data import PlanData

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True)
class Part:
    """A weight on crossbars, and all layers that are moved with it."""

    name: str
    """Name of the parameter, or the module path if the weight is computed."""
    paths: tuple[str, ...]
    """Module paths of the layers that read it. A module's layers stay together, since a plan is made of paths."""
    operations: tuple[str, ...]
    blocks: tuple[str, ...]
    """Names of the blocks that hold the layers."""
    macs: int
    """Multiply-accumulates per sample."""


def parts_of(plan: PlanData) -> tuple[Part, ...]:
    """The parts of a plan, in the order of the network. Layers that share a weight or a module path are one part."""
    groups: list[tuple[set[str], list[Operation]]] = []
    homes = {name: block.name for block in plan.blocks for name in block.operations}
    for op in plan.graph.operations:
        if op.role is not Role.WEIGHT or op.name not in homes:
            continue
        marks = {f"weight {name}" for name in op.weights if name in plan.weights} | {f"path {op.path or op.name}"}
        touching = [group for group in groups if group[0] & marks]
        if not touching:
            groups.append((marks, [op]))
            continue
        first = touching[0]
        for other in touching[1:]:
            groups.remove(other)
            first[0].update(other[0])
            first[1].extend(other[1])
        first[0].update(marks)
        first[1].append(op)
    return tuple(_part(plan, homes, ops) for _, ops in groups)


def _part(plan: PlanData, homes: dict[str, str], ops: Sequence[Operation]) -> Part:
    first = ops[0]
    name = next((weight for weight in first.weights if weight in plan.weights), first.path or first.name)
    return Part(
        name,
        tuple(dict.fromkeys(op.path or op.name for op in ops)),
        tuple(op.name for op in ops),
        tuple(dict.fromkeys(homes[op.name] for op in ops)),
        sum(op.macs for op in ops),
    )
