"""The rule of states: every state owns a layer, or a digital value drives it. So a block of one layer equals its layer.

Feedback runs from the drive of a state to the states that it reads. A state could be driven by other
states of its block through wires alone: an activation of an activation, two activations of one
product, an activation of a residual sum that is read elsewhere. It would feed back into them,
and a block of one layer would not settle to its layer (Nest & Ernoult 2024,
Corollary A.5.1). So an activation joins a block only if it *owns* a layer of the block. That means that the
layer's product reaches it through wiring that nothing else reads, with no activation in between.
Each product then ends in one state, and a block of L layers has at most L states.

An activation that owns no layer is digital. If a product is read twice or leaves the
block, it is owned by an additional state with the identity as activation (`lower_block`).

With `digital_drive` a block may also have *driven* states. Such a state is an activation of a value that comes
from outside of the block through DACs. It has no weight and feeds back into nothing. It receives feedback from the
layers of the block that read it. It must have such a layer, since without feedback it would only be the activation
itself. Nothing else in the block may read it, except wiring of one operand (a reshape, a pooling) that only layers
read. Other readers would feed back into it through wires alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ffebm_compiler.ir import OperationGraph, Role

__all__ = ["activations_without_a_layer", "driven_states"]


def activations_without_a_layer(
    graph: OperationGraph, members: Collection[str], users: Mapping[str, Sequence[str]]
) -> list[str]:
    """The activations of a block that own no layer of it. `users` is `graph.users()`."""
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
    """The activations of a block that are states driven by a digital value. `users` is `graph.users()`."""
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
    """Whether at least one layer of a block reads a value, and nothing else does but wiring that only layers read."""
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
