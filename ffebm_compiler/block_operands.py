"""Block operands: what the lowered graph hands to energy blocks, as far as it depends on parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, fx, nn

from ffebm_compiler.passes.exported_program import place_of
from ffebm_compiler.passes.held import plain_tensors
from ffebm_compiler.passes.unchanged import generators_unchanged, tensors_unchanged
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.feedforward.fetch import Fetch
from ffebm_compiler.static_values import static_value

__all__ = [
    "Operands",
    "calls_of",
    "constants",
    "direct_weights",
    "fetched",
    "names_behind",
    "operands_of_each",
    "shared_constants",
]

Operands = tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]
"""(inputs, weights as devices hold them) of a block. An input that depends on the network's inputs is None."""


def operands_of_each(
    lowered: fx.GraphModule,
    blocks: Mapping[str, EnergyBlock],
    names: Sequence[str],
    written: Sequence[Tensor],
    gathered: Callable[[Sequence[str]], AbstractContextManager[None]] | None = None,
) -> Iterator[tuple[str, Operands]]:
    """The operands of each block, in one pass over the graph.

    Args:
        lowered, blocks: the graph, and its energy blocks by name.
        names: which blocks.
        written: the state that the graph writes, which stays as it is.
        gathered: holds whole tensors of some names while it is open. Sharded weights are gathered for one block at a
            time, and their values are copied.
    """
    calls = calls_of(lowered)
    sources = {} if gathered is None else fetched(lowered)
    for group in ([*names],) if gathered is None else ([name] for name in names):
        behind = names_behind([node for name in group for node in calls[name].all_input_nodes], sources)
        known: dict[fx.Node, Tensor | None] = {}
        whole = nullcontext() if gathered is None else gathered(behind)
        with whole, generators_unchanged(), tensors_unchanged(written):
            values = {name: tuple(static_value(lowered, node, known) for node in calls[name].args) for name in group}
            if gathered is not None:  # they are freed when the context ends
                values = {name: tuple(v if v is None else v.clone() for v in found) for name, found in values.items()}
        for name, found in values.items():
            count = blocks[name].program.inputs
            yield name, (found[:count], tuple(blocks[name].held(found[count:])))


def calls_of(lowered: fx.GraphModule) -> dict[str, fx.Node]:
    """The node that calls each part of a lowered graph."""
    return {str(node.target): node for node in lowered.graph.nodes if node.op == "call_module"}


def fetched(lowered: fx.GraphModule) -> dict[fx.Node, str]:
    """The nodes of a lowered graph that read a parameter or buffer, and its name."""
    calls = {node: lowered.get_submodule(str(node.target)) for node in lowered.graph.nodes if node.op == "call_module"}
    return {node: module.name for node, module in calls.items() if isinstance(module, Fetch)}


def constants(lowered: fx.GraphModule) -> dict[fx.Node, str]:
    """The nodes of a lowered graph that read a constant, and its name."""
    return {node: str(node.target) for node in lowered.graph.nodes if node.op == "get_attr"}


def names_behind(nodes: Iterable[fx.Node], names: Mapping[fx.Node, str]) -> tuple[str, ...]:
    """Those of the names (parameters and buffers, or constants) that these nodes are made of."""
    pending = list(nodes)
    seen: dict[fx.Node, None] = {}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen[node] = None
            pending += node.all_input_nodes
    return tuple(sorted({names[node] for node in seen if node in names}))


def direct_weights(lowered: fx.GraphModule, blocks: Mapping[str, EnergyBlock]) -> dict[str, tuple[str | None, ...]]:
    """Names of the weights of each block that multiplies by parameters and buffers themselves, not by computed ones."""
    names = fetched(lowered)
    found = {}
    for name, call in calls_of(lowered).items():
        if name in blocks:
            weights = call.args[blocks[name].program.inputs :]
            if all(weight is None or (isinstance(weight, fx.Node) and weight in names) for weight in weights):
                found[name] = tuple(names[weight] if isinstance(weight, fx.Node) else None for weight in weights)
    return found


def shared_constants(source: nn.Module, lowered: fx.GraphModule) -> dict[str, Tensor]:
    """Name of a constant of the graph -> the tensor in the source's attributes that has the same memory."""
    places = {place_of(tensor): tensor for tensor in plain_tensors(source)} if lowered._buffers else {}
    found = ((name, places.get(place_of(value))) for name, value in lowered._buffers.items() if value is not None)
    return {name: tensor for name, tensor in found if tensor is not None}
