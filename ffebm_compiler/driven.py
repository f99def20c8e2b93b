"""Describe states: whether a block has feedback, which digital value drives a state, which layers feed back into it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from ffebm_compiler.ir import Operation, OperationGraph, Role

__all__ = ["UNDRIVEN", "driven_places", "driven_sentence", "layers_that_read", "settles"]

UNDRIVEN = "as a state driven by a digital value it would cost conversions, or in no block do only layers read it"
"""Why an activation is digital although `digital_drive` is on, as a clause."""


def layers_that_read(graph: OperationGraph, members: Collection[str], name: str) -> tuple[str, ...]:
    """Module paths of the layers of a block that read one of its values, directly or through the block's wiring."""
    inside, reached, found = set(members), {name}, []
    for op in (op for op in graph.operations if op.name in inside):
        if reached.isdisjoint(op.inputs):
            continue
        if op.role is Role.WEIGHT:
            found.append(op.path or op.name)
        elif op.role is Role.WIRING:
            reached.add(op.name)
    return tuple(dict.fromkeys(found))


def driven_sentence(graph: OperationGraph, members: Collection[str], state: Operation, origin: str) -> str:
    """A sentence about a driven state of a block. `origin` names the place of the value that drives it."""
    source = state.inputs[0]
    value = f"{graph[source].target} of {origin}" if source in graph else f"the network's input {source}"
    return (
        f"{state.target} is a state driven by a digital value ({value}, {state.values} DAC values), "
        f"without a weight of its own, with feedback from {', '.join(layers_that_read(graph, members, state.name))}"
    )


def driven_places(
    graph: OperationGraph, blocks: Iterable[tuple[str, Collection[str], Collection[str]]]
) -> dict[str, tuple[str, frozenset[str]]]:
    """Driven state -> a text about its place, and the layers that feed back into it.

    Args:
        graph: the operations.
        blocks: the name, the operations and the driven operations of each block.
    """
    found = {}
    for block, members, driven in blocks:
        for name in driven:
            layers = layers_that_read(graph, members, name)
            path = graph[name].path
            where = f"{block}, driven, with feedback from {', '.join(layers)}"
            found[f"{path}: {name}" if path else name] = (where, frozenset(layers))
    return found


def settles(graph: OperationGraph, operations: Sequence[str], driven: Collection[str]) -> bool:
    """Whether any state of a block feeds another, so that it has feedback. If not, it equals its source layers."""
    products: set[str] = set()
    """Sums of products, which become a state's drive."""
    states = set(driven)
    """States, and what wiring makes of them."""
    for name in operations:
        operation = graph[name]
        product, state = (any(source in found for source in operation.inputs) for found in (products, states))
        weight = operation.role is Role.WEIGHT
        if (weight and (product or state)) or (product and state):
            return True
        if weight or (product and operation.role is not Role.ACTIVATION):
            products.add(name)
        elif product or state:
            states.add(name)
    return False
