"""The rule that makes a block of one layer its layer: every state of a block owns a layer.

Feedback runs from the drive of a state to the states that it reads. Were a state driven by other
states of its block through wires alone (an activation of an activation, two activations of one
product, an activation of a residual sum that is read elsewhere), it would feed back into them,
and a block of one layer would settle to something else than its layer (Nest & Ernoult 2024,
Corollary A.5.1). So an activation joins a block only where it *owns* a layer of the block: the
layer's product reaches it through wiring that nothing else reads, with no activation in between.
Each product then ends in one state, and a block of L layers has at most L states.

What follows without owning a layer is digital. Where a product is read twice or leaves the
block, it is a state of its own, with the identity as activation (`lower_block`), which owns it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ffebm_compiler.ir import OperationGraph, Role

__all__ = ["activations_without_a_layer"]


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
