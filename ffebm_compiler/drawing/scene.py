"""Scenes: what a picture of a plan shows, as data.

A `Scene` is the quotient DAG of a plan with its texts. It has a node for each energy block,
digital part, network input and network output, and an edge for the values between two nodes. It
has no coordinates, so that every format (SVG, HTML, DOT) draws the same content.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ffebm_compiler.driven import settles
from ffebm_compiler.errors import PlanError
from ffebm_compiler.ir import Operation, Role
from ffebm_compiler.reports.text import count

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import BlockPlan, DigitalPart, PlanData

__all__ = [
    "Domain",
    "Edge",
    "Line",
    "Node",
    "Scene",
    "operation_words",
    "own_feedback",
    "part_lines",
    "scene_of",
    "shape_words",
    "totals_words",
]

Domain = Literal["analog", "digital", "input", "output"]

_MOST_LINES = 8
"""How many lines of layers or operations a node shows. The others are counted in one more line."""


@dataclass(frozen=True)
class Line:
    """A line of text in a node."""

    text: str
    style: Literal["plain", "quiet", "warn"] = "plain"


@dataclass(frozen=True)
class Node:
    """An energy block, a digital part, a network input or the network output."""

    key: str
    domain: Domain
    title: str
    lines: tuple[Line, ...]
    tooltip: str
    """Everything about the node, including what its lines leave out."""
    circuit: bool = False
    """Whether it is an energy block that settles as a circuit of resistors."""
    settles: bool = False
    """Whether it is an energy block with feedback between its states."""


@dataclass(frozen=True)
class Edge:
    """The values that flow from one node to another."""

    source: str
    target: str
    shape: str
    conversion: str
    """The conversions on the way, e.g. `DAC 1024`; empty between digital parts."""
    values: int
    """Values per sample."""


@dataclass(frozen=True)
class Scene:
    """Nodes and edges in a topological order, and the texts around them."""

    title: str
    totals: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    rejected: tuple[tuple[str, str], ...]
    """(module path, reason) of each weight-stationary layer that stayed digital."""
    notes: tuple[str, ...]


def shape_words(shape: tuple[int | None, ...] | list[int | None], values: int) -> str:
    """A shape as text without its batch axis, such as `16×8×8`.

    It is the number of values instead if sizes are unknown, or if they do not multiply to the values per sample (an
    axis merges the batch with another one).
    """
    sizes = [size for size in shape if size is not None]
    if not sizes or math.prod(sizes) != values:
        return _plural(values, "value")
    return "×".join(map(str, sizes))


def totals_words(plan: PlanData) -> str:
    """The plan in one line: blocks, parts, tiles, conversions and the analog share of the work."""
    tiles = sum(block.tiles for block in plan.blocks)
    return " · ".join(
        (
            _plural(len(plan.blocks), "energy block"),
            _plural(len(plan.digital_parts), "digital part"),
            _plural(tiles, "tile"),
            f"{count(plan.conversions)} conversions per sample",
            f"{100 * plan.analog_share:.1f} % of {count(plan.total_macs)} MACs analog",
        )
    )


def operation_words(operations: list[Operation]) -> str:
    """Targets of operations with their counts: `reshape ×7, permute`."""
    targets = [operation.target for operation in operations]
    return ", ".join(f"{name} ×{targets.count(name)}" if targets.count(name) > 1 else name for name in set_of(targets))


def set_of(items: list[str]) -> list[str]:
    """The items without repetitions, in order."""
    return list(dict.fromkeys(items))


def scene_of(plan: PlanData, hybrid: HybridCore | None = None) -> Scene:
    """The scene of a plan. `hybrid` adds which blocks have feedback weights of their own.

    Raises:
        PlanError: where the plan has no operation, or its blocks and parts form a cycle.
    """
    if not plan.graph.operations:
        raise PlanError(
            f"the plan of {plan.model} has no operation, so there is nothing to draw: make it with ffebm.plan(model, "
            "example_inputs)"
        )
    import networkx

    quotient = plan.to_networkx()
    if not networkx.is_directed_acyclic_graph(quotient):
        cycle = " -> ".join(source for source, _ in networkx.find_cycle(quotient))
        raise PlanError(f"the plan is cyclic ({cycle}): make it again with ffebm.plan()")
    made = {name: _input_node(name, values) for name, values in plan.graph.inputs.items()}
    made.update(
        (block.name, _block_node(plan, block, own_feedback(hybrid, block.name), circuit_words(hybrid, block.name)))
        for block in plan.blocks
    )
    made.update((part.name, _part_node(plan, part)) for part in plan.digital_parts)
    nodes = [made[name] for name in networkx.lexicographical_topological_sort(quotient, key=list(made).index)]
    domains = {node.key: node.domain for node in nodes}
    edges = [
        _edge(plan, domains, source, target, list(data["tensors"]))
        for source, target, data in quotient.edges(data=True)
        if data["tensors"]  # an operation may also need the sizes of a value alone
    ]
    for index, name in enumerate(set_of(list(plan.graph.outputs))):
        key = f"output {index + 1}" if len(set(plan.graph.outputs)) > 1 else "output"
        key = key if key not in made else f"{key} of the network"
        home = plan.home(name) if name in plan.graph else name
        nodes.append(Node(key, "output", key, (), f"{key}: {name}"))
        edges.append(_edge(plan, {**domains, key: "output"}, home, key, [name]))
    return Scene(
        title=f"{plan.model} on {plan.hardware.name}",
        totals=totals_words(plan),
        nodes=tuple(nodes),
        edges=tuple(edges),
        rejected=tuple(plan.rejected.items()),
        notes=plan.notes,
    )


def _plural(number: int, noun: str) -> str:
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def _edge(plan: PlanData, domains: dict[str, Domain], source: str, target: str, tensors: list[str]) -> Edge:
    values = sum(plan.graph.values(name) for name in tensors)
    if len(tensors) == 1:
        name = tensors[0]
        shape = shape_words(plan.graph[name].shape if name in plan.graph else (), values)
    else:
        shapes = set_of(
            [shape_words(plan.graph[t].shape if t in plan.graph else (), plan.graph.values(t)) for t in tensors]
        )
        shape = (
            f"{len(tensors)} × {shapes[0]}" if len(shapes) == 1 else f"{len(tensors)} tensors, {count(values)} values"
        )
    crossing = []
    if domains[source] == "analog":
        crossing.append(f"ADC {count(values)}")
    if domains[target] == "analog":
        crossing.append(f"DAC {count(values)}")
    return Edge(source, target, shape, ", ".join(crossing), values)


def _input_node(name: str, values: int) -> Node:
    return Node(name, "input", f"{name} · input", (), f"network input {name}: {values} values per sample")


def own_feedback(hybrid: HybridCore | None, block: str) -> dict[str, str | None]:
    """Feedback weights of a block -> the parameter beside which each is."""
    if hybrid is None:
        return {}
    return {name: place.parameter for name, place in hybrid.feedback_names.items() if place.block == block}


def circuit_words(hybrid: HybridCore | None, block: str) -> str:
    """What the circuit of a block is made of; empty if it is no circuit, or has one layer and settles nothing."""
    if hybrid is None or not hybrid.energy_blocks[block].program.coupled:
        return ""
    return hybrid.energy_function.elements


def _block_node(plan: PlanData, block: BlockPlan, own: Iterable[str], circuit: str) -> Node:
    operations = [plan.graph[name] for name in block.operations]
    layers = [op for op in operations if op.role is Role.WEIGHT]
    driven = [op for op in operations if op.name in block.driven]
    others = [op for op in operations if op.role is not Role.WEIGHT and op.name not in block.driven]
    lines = [Line(f"{op.path or op.name}: state {op.target}, driven, no weights") for op in driven]
    lines += [Line(f"{op.path or op.name}: {op.target} {_matrix(op)}") for op in layers]
    lines = _first_lines(lines, "layers")
    if others:
        lines.append(Line(f"with {operation_words(others)}", "quiet"))
    if circuit:
        lines.append(Line(f"circuit: {circuit}", "quiet"))
    names = list(own)
    if names:
        lines.append(Line(f"feedback through {_plural(len(names), 'weight')} of its own", "quiet"))
    lines.append(Line(f"{_plural(block.tiles, 'tile')} · DAC {count(block.dac)} · ADC {count(block.adc)}", "quiet"))
    feedback = settles(plan.graph, block.operations, block.driven)
    tooltip = [f"{block.name}: energy block, {'settles on analog hardware' if feedback else 'without feedback'}"]
    tooltip += [f"layer {op.path or op.name}: {op.target} {_matrix(op)}, {count(op.macs)} MACs" for op in layers]
    tooltip += [f"state {op.path or op.name}: {plan._explain_operation(op)}" for op in driven]
    tooltip += [f"settles as a circuit of {circuit}"] if circuit else []
    tooltip += [f"feedback weights of its own: {', '.join(names)}"] if names else []
    tooltip += [f"{_plural(block.tiles, 'tile')}, {block.neurons} neurons, {block.macs} MACs per sample"]
    tooltip += [f"{block.dac} DAC and {block.adc} ADC values per sample"]
    return Node(block.name, "analog", block.name, tuple(lines), "\n".join(tooltip), bool(circuit), feedback)


def _part_node(plan: PlanData, part: DigitalPart) -> Node:
    operations = [plan.graph[name] for name in part.operations]
    tooltip = [f"{part.name}: feedforward block, runs digitally"]
    tooltip += [f"{op.path or 'the model itself'}: {op.target}" for op in operations]
    return Node(part.name, "digital", part.name, tuple(part_lines(plan, operations)), "\n".join(tooltip))


def part_lines(plan: PlanData, operations: list[Operation]) -> list[Line]:
    """A line for each module path of a digital part; layers that stayed digital come first."""
    stayed = [op for op in operations if (op.path or op.name) in plan.rejected and op.weights]
    lines = [Line(f"{op.path or op.name}: {op.target} stayed digital", "warn") for op in stayed]
    groups: list[tuple[str, list[Operation]]] = []
    for op in operations:
        if op in stayed:
            continue
        if not groups or groups[-1][0] != op.path:
            groups.append((op.path, []))
        groups[-1][1].append(op)
    lines += [
        Line(f"{path}: {operation_words(inside)}" if path else operation_words(inside)) for path, inside in groups
    ]
    return _first_lines(lines, "lines")


def _first_lines(lines: list[Line], noun: str) -> list[Line]:
    if len(lines) <= _MOST_LINES:
        return lines
    return [*lines[: _MOST_LINES - 1], Line(f"and {len(lines) - _MOST_LINES + 1} more {noun}", "quiet")]


def _matrix(operation: Operation) -> str:
    groups = f" ({operation.groups} groups)" if operation.groups > 1 else ""
    return f"{operation.rows}×{operation.cols}{groups}"
