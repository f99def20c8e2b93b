"""Mode parts: split the differences of two captures into pieces, and make each piece one module.

A piece holds operations of either mode or both that their values connect. Its operations follow one
module's flag. Either all of them are computed from parameters alone or none is. Sizes are computed again in each piece.

Promise: a piece's module computes, in each mode, what that mode's operations compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ffebm_compiler.ir import Program
from ffebm_compiler.passes.align_modes import Difference, is_size, operands
from ffebm_compiler.runtime.feedforward.block_graph import BlockGraph
from ffebm_compiler.runtime.feedforward.blocks import ReboundOperation
from ffebm_compiler.runtime.feedforward.state import WriteInput, WriteState

__all__ = ["Piece", "Side", "is_effect", "is_write", "pieces_of", "tensors_read"]


@dataclass(eq=False)
class Piece:
    """Operations of one difference that belong together."""

    place: int
    evaluation: list[fx.Node]
    training: list[fx.Node]
    results: list[tuple[fx.Node | None, fx.Node | None]] = field(default_factory=list)
    """The values that others read, each as (value in eval mode, value in train mode); None where a mode has none."""


def tensors_read(node: fx.Node, paired: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The values and paired sizes that a node depends on, also through sizes that only its mode has."""
    found: dict[fx.Node, None] = {}
    pending = list(reversed(operands(node)))
    while pending:
        operand = pending.pop()
        if is_size(operand) and not paired(operand):
            pending.extend(reversed(operands(operand)))
        else:
            found[operand] = None
    return list(found)


def is_effect(program: Program, node: fx.Node) -> bool:
    """Whether an operation draws random numbers or writes state."""
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable
    if node.op != "call_module":
        return False
    return isinstance(program.graph_module.get_submodule(str(node.target)), ReboundOperation | WriteInput | WriteState)


def is_write(program: Program, node: fx.Node) -> bool:
    """Whether an operation writes a parameter or buffer of the source."""
    return node.op == "call_module" and isinstance(program.graph_module.get_submodule(str(node.target)), WriteState)


def pieces_of(
    difference: Difference,
    joined: list[tuple[fx.Node, fx.Node]],
    static: Mapping[fx.Node, bool],
    owner: Callable[[fx.Node], str],
    paired: Callable[[fx.Node], bool],
) -> list[Piece]:
    """Split a difference into pieces, in an order in which they can run.

    Args:
        difference: the operations to split.
        joined: pairs of values, one of each mode, that one operation reads.
        static: whether a value is computed from parameters alone.
        owner: gives the path of the module whose flag an operation follows.
        paired: whether both modes have a node.
    """
    import networkx

    nodes = [node for node in (*difference.evaluation, *difference.training) if not is_size(node)]
    flow: networkx.DiGraph[fx.Node] = networkx.DiGraph()
    flow.add_nodes_from(nodes)
    flow.add_edges_from(
        (operand, node)
        for node in nodes
        for operand in tensors_read(node, paired)
        if operand in flow and operand != node
    )
    together: networkx.Graph[fx.Node] = networkx.Graph()
    together.add_nodes_from(nodes)
    links = [*flow.edges, *((one, other) for one, other in joined if one in flow and other in flow)]
    together.add_edges_from(
        (one, other) for one, other in links if static[one] == static[other] and owner(one) == owner(other)
    )
    together.add_edges_from(_links_within_modules(together, set(difference.evaluation), static, owner))
    group = {node: place for place, held in enumerate(networkx.connected_components(together)) for node in held}
    between: networkx.DiGraph[int] = networkx.DiGraph()
    between.add_nodes_from(group.values())
    between.add_edges_from((group[one], group[other]) for one, other in flow.edges if group[one] != group[other])
    merged = networkx.condensation(between)
    # Pieces that are computed from parameters alone come first where they can. Then the order of the captures decides.
    order = {node: index for index, node in enumerate(difference.training)}
    order |= {node: index for index, node in enumerate(difference.evaluation) if node not in order}
    members = {place: {node for node in nodes if group[node] in merged.nodes[place]["members"]} for place in merged}
    rank = {
        place: (not all(static[node] for node in held), min(order[node] for node in held), min(map(str, held)))
        for place, held in members.items()
    }
    return [
        Piece(
            difference.place,
            [node for node in difference.evaluation if node in members[place]],
            [node for node in difference.training if node in members[place]],
        )
        for place in networkx.lexicographical_topological_sort(merged, key=rank.__getitem__)
    ]


def _links_within_modules(
    together: Any, evaluation: set[fx.Node], static: Mapping[fx.Node, bool], owner: Callable[[fx.Node], str]
) -> list[tuple[fx.Node, fx.Node]]:
    """Links between the one group that a module has in eval mode alone and the one that it has in train mode alone."""
    import networkx

    found: dict[tuple[str, bool], tuple[list[fx.Node], list[fx.Node]]] = {}
    for held in networkx.connected_components(together):
        sides = {node in evaluation for node in held}
        first = next(iter(held))
        of_module = found.setdefault((owner(first), static[first]), ([], []))
        for side in sides:
            of_module[side].append(first)
    return [(ours[0], theirs[0]) for ours, theirs in found.values() if len(ours) == len(theirs) == 1]


class Side:
    """The operations of a piece in one mode, as a graph of its own."""

    def __init__(self, program: Program, operands_count: int) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.env: dict[fx.Node, fx.Node] = {}
        self.placeholders = [self.graph.placeholder(f"operand_{index}") for index in range(operands_count)]

    def bind(self, node: fx.Node, index: int) -> None:
        """Note that a value of this mode is the module's operand `index`."""
        self.env[node] = self.placeholders[index]

    def value(self, node: fx.Node) -> fx.Node:
        """The node of a value in this graph. A size is computed again here."""
        if node not in self.env:
            self.env[node] = self.graph.node_copy(node, self.value)
            self.env[node].meta = dict(node.meta)
            if node.op == "call_module":
                self.root.add_module(str(node.target), self.program.graph_module.get_submodule(str(node.target)))
        return self.env[node]

    def finish(self, nodes: list[fx.Node], results: list[fx.Node | None], single: bool) -> fx.GraphModule:
        """The module that returns `results`: a tuple, or the value itself if `single`."""
        for node in nodes:
            self.value(node)
        values: list[Any] = [None if node is None else self.value(node) for node in results]
        self.graph.output(values[0] if single else tuple(values))
        self.graph.lint()
        return BlockGraph(self.root, self.graph, "Mode")
