"""The rule that makes a block of one layer its layer: every state owns a layer, or a digital value drives it.

Feedback runs from the drive of a state to the states that it reads. Were a state driven by other
states of its block through wires alone (an activation of an activation, two activations of one
product, an activation of a residual sum that is read elsewhere), it would feed back into them,
and a block of one layer would settle to something else than its layer (Nest & Ernoult 2024,
Corollary A.5.1). So an activation joins a block only where it *owns* a layer of the block: the
layer's product reaches it through wiring that nothing else reads, with no activation in between.
Each product then ends in one state, and a block of L layers has at most L states.

What follows without owning a layer is digital. Where a product is read twice or leaves the
block, it is a state of its own, with the identity as activation (`lower_block`), which owns it.

With `digital_drive` a block may have one more kind of state: a *driven* one, an activation of a value that comes
from outside of the block through DACs. It has no weight and feeds back into nothing. It receives feedback from the
layers of the block that read it. Without such a layer it would be the activation itself, so that it must have one,
and whatever else of the block reads it would feed back through wires alone, so that only layers may, or wiring of one
operand (a reshape, a pooling) that only layers read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ffebm_compiler.ir import OperationGraph, Role

__all__ = ["activations_without_a_layer", "driven_states"]


def activations_without_a_layer(
    graph: OperationGraph, members: Collection[str], users: Mapping[str, Sequence[str]]
) -> list[str]:
    """The activations of a block that own no layer of it; `users` is `graph.users()`."""
    inside, outputs = set(members), set(graph.outputs)
    carrying: set[str] = set()
    without = []
    for op in (op for op in graph.operations if op.name in inside):
        owning = any(source in carrying for source in op.inputs)
        if op.role is Role.ACTIVATION:
            if not owning:
                without.append(op.name)
        elif (op.role is Role.WEIGHT or owning) and len(users[op.name]) == 1 and op.name not in outputs:
            carrying.add(op.name)
    return without


def driven_states(graph: OperationGraph, members: Sequence[str], users: Mapping[str, Sequence[str]]) -> list[str]:
    """The activations of a block that are states driven by a digital value; `users` is `graph.users()`."""
    inside = set(members)
    return [
        name
        for name in members
        if graph[name].role is Role.ACTIVATION
        and inside.isdisjoint(graph[name].inputs)
        and _only_layers_read(graph, name, inside, users)
    ]


def _only_layers_read(
    graph: OperationGraph, name: str, inside: Collection[str], users: Mapping[str, Sequence[str]]
) -> bool:
    """Whether layers of a block read a value, and nothing else of it but wiring of one operand that layers read."""
    waiting = [name]
    while waiting:
        readers = [graph[user] for user in users[waiting.pop()] if user in inside]
        if not readers:
            return False
        for reader in readers:
            if reader.role is Role.WIRING and len(reader.inputs) == 1:
                waiting.append(reader.name)
            elif reader.role is not Role.WEIGHT:
                return False
    return True
