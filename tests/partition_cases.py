"""Random operation graphs and fabrics for the tests and the benchmark of the partition."""

from __future__ import annotations

import random
from dataclasses import replace

import networkx

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.decide import Partition, conversions, tiles_of

SIZES = (4, 8, 16, 32, 64)


def random_graph(seed: int, operations: int = 12, layer_share: float = 0.45) -> OperationGraph:
    """A random DAG of layers, activations, sums, concatenations, reshapes, pooling and digital operations."""
    draw = random.Random(seed)
    inputs = {f"x{index}": draw.choice(SIZES) for index in range(draw.choice((1, 1, 2)))}
    names, made = list(inputs), []
    sizes = dict(inputs)

    def recent() -> str:
        return draw.choice(names[-4:]) if draw.random() < 0.75 else draw.choice(names)

    for index in range(operations):
        name, source = f"op{index}", recent()
        value, role, kind, sources = sizes[source], Role.DIGITAL, "", (source,)
        rows = cols = 0
        groups = positions = 1
        toss = draw.random()
        if toss < layer_share:
            role, kind = Role.WEIGHT, draw.choice(("linear", "conv"))
            rows, cols = value, draw.choice(SIZES)
            groups = draw.choice((1, 1, 1, 2)) if rows % 2 == 0 and cols % 2 == 0 else 1
            positions = draw.choice((1, 1, 4))
            rows, cols, value = rows // groups, cols // groups, cols * positions
        elif toss < layer_share + 0.2:
            role, kind = Role.ACTIVATION, "relu"
        elif toss < layer_share + 0.4:
            role, kind = Role.WIRING, draw.choice(("add", "add", "reshape", "concat", "avg_pool", "copy"))
            if kind in ("add", "concat"):
                sources = tuple(dict.fromkeys((source, recent())))
            if kind == "concat":
                value = sum(sizes[s] for s in sources)
            elif kind == "avg_pool":
                value = max(1, value // 4)
            elif kind == "add":
                value = max(sizes[s] for s in sources)
        else:
            value = draw.choice(SIZES)
            if draw.random() < 0.4:
                sources = tuple(dict.fromkeys((source, recent())))
        sizes[name] = value
        names.append(name)
        made.append(
            Operation(name, role, f"m{index}", kind or "softmax", sources, value, (None, value), kind=kind, rows=rows,
                      cols=cols, groups=groups, positions=positions,
                      weights=(f"m{index}.weight",) if rows else ())
        )  # fmt: skip
    read = {source for operation in made for source in operation.inputs}
    outputs = tuple(op.name for op in made if op.name not in read or draw.random() < 0.1)
    return OperationGraph(inputs, tuple(made), outputs)


def random_hardware(seed: int) -> Hardware:
    """A fabric with some capacities that bind and some without a limit."""
    draw = random.Random(seed)
    return Hardware(
        tile_rows=draw.choice((None, 8, 16, 64)),
        tile_cols=draw.choice((None, 16, 64)),
        tiles_per_core=draw.choice((None, 2, 4, 8, 32)),
        layers_per_block=draw.choice((None, 1, 2, 3, 4)),
        neurons_per_block=draw.choice((None, None, 64, 256)),
        conv_mapping=draw.choice(("im2col", "im2col", "unrolled")),
        devices_per_weight=draw.choice((1, 2)),
    )


def chain(layers: int, branch_every: int = 0) -> OperationGraph:
    """A deep network: layer, activation, and every `branch_every` layers a sum with an earlier value."""
    made: list[Operation] = []
    source, skip = "x", "x"
    for index in range(layers):
        name = f"layer{index}"
        made.append(Operation(name, Role.WEIGHT, f"m{index}", "linear", (source,), 64, kind="linear", rows=64, cols=64))
        source = name
        if branch_every and index % branch_every == branch_every - 1:
            made.append(Operation(f"sum{index}", Role.WIRING, f"s{index}", "add", (source, skip), 64, kind="add"))
            source = f"sum{index}"
        made.append(Operation(f"relu{index}", Role.ACTIVATION, f"a{index}", "relu", (source,), 64, kind="relu"))
        source = f"relu{index}"
        if branch_every and index % branch_every == branch_every - 1:
            skip = source
        if branch_every and index % 32 == 31:  # something digital now and then, as pooling or attention
            made.append(Operation(f"pool{index}", Role.DIGITAL, f"p{index}", "max_pool", (source,), 64))
            source = skip = f"pool{index}"
    return OperationGraph({"x": 64}, tuple(made), (source,))


def total_conversions(graph: OperationGraph, blocks: list[list[str]]) -> int:
    """Of all blocks, inputs and outputs."""
    users = graph.users()
    return sum(sum(conversions(graph, block, users)) for block in blocks)


def with_neurons(hardware: Hardware, neurons: int | None) -> Hardware:
    """The same fabric with another limit on a block's neurons."""
    return replace(hardware, neurons_per_block=neurons)


def readers_of(graph: OperationGraph) -> networkx.DiGraph:
    """An edge from every value to every operation that reads it."""
    return networkx.DiGraph([(source, op.name) for op in graph.operations for source in op.inputs])


def owns_a_layer(graph: OperationGraph, readers: networkx.DiGraph, name: str, inside: set[str]) -> bool:
    """Whether a layer's product reaches an activation of a block alone: backwards, one value at a time."""
    if graph[name].role is not Role.ACTIVATION:
        return True
    waiting = list(graph[name].inputs)
    while waiting:
        source = waiting.pop()
        if source not in inside or readers.out_degree(source) != 1 or source in graph.outputs:
            continue
        if graph[source].role is Role.WEIGHT:
            return True
        if graph[source].role is Role.WIRING:
            waiting += graph[source].inputs
    return False


def may_be_driven(graph: OperationGraph, readers: networkx.DiGraph, name: str, inside: set[str]) -> bool:
    """Whether an activation of a block reads a value from outside, and layers of it alone read the activation."""

    def leads_on(value: str) -> bool:
        here = [graph[r] for r in readers.successors(value) if r in inside] if value in readers else []
        return bool(here) and all(
            op.role is Role.WEIGHT or (op.role is Role.WIRING and len(op.inputs) == 1 and leads_on(op.name))
            for op in here
        )

    return graph[name].role is Role.ACTIVATION and graph[name].inputs[0] not in inside and leads_on(name)


def faults(
    graph: OperationGraph,
    hardware: Hardware,
    result: Partition,
    kinds: frozenset[str],
    digital_drive: bool = False,
) -> list[str]:
    """What a partition breaks, found without the code that made it: empty for a sound one."""
    found = []
    home: dict[str, str] = {}
    for index, members in enumerate(result.blocks):
        for name in members:
            if name in home:
                found.append(f"{name} is in two blocks")
            home[name] = f"block {index}"
    for index, members in enumerate(result.digital):
        for name in members:
            if name in home:
                found.append(f"{name} is in two places")
            home[name] = f"part {index}"
    found += [f"{op.name} is nowhere" for op in graph.operations if op.name not in home]
    for op in graph.operations:
        analog = home.get(op.name, "").startswith("block")
        if op.role is Role.WEIGHT and analog == (op.name in result.rejected):
            found.append(f"layer {op.name} is analog: {analog}, rejected: {op.name in result.rejected}")
        if analog and (op.role is Role.DIGITAL or (op.role is Role.WIRING and op.kind not in kinds)):
            found.append(f"{op.name} may not be analog")
    readers = readers_of(graph)
    order = {op.name: index for index, op in enumerate(graph.operations)}
    for members in result.blocks:
        inside, fed = set(members), set()
        driven = {n for n in members if digital_drive and may_be_driven(graph, readers, n, inside)}
        layers = [graph[name] for name in members if graph[name].role is Role.WEIGHT]
        for op in (graph[name] for name in sorted(members, key=order.__getitem__)):
            if op.role is Role.WEIGHT or op.name in driven or any(s in fed for s in op.inputs):
                fed.add(op.name)
        found += [f"{name} is fed by no layer of its block" for name in inside - fed]
        found += [
            f"{name} owns no layer of its block"
            for name in sorted(inside)
            if name not in driven and not owns_a_layer(graph, readers, name, inside)
        ]
        if hardware.layers_per_block is not None and len(layers) > hardware.layers_per_block:
            found.append(f"{len(layers)} layers in a block")
        if hardware.tiles_per_core is not None:
            tiles = sum(tiles_of(layer, hardware) for layer in layers)
            if tiles > hardware.tiles_per_core:
                found.append(f"{tiles} tiles in a block")
        if hardware.neurons_per_block is not None:
            neurons = sum(layer.values for layer in layers) + sum(graph[name].values for name in driven)
            if neurons > hardware.neurons_per_block:
                found.append(f"{neurons} neurons in a block")
    quotient: networkx.DiGraph[str] = networkx.DiGraph()
    for op in graph.operations:
        for source in op.inputs:
            if source in graph and home.get(source) != home.get(op.name):
                quotient.add_edge(home.get(source, source), home.get(op.name, op.name))
    if not networkx.is_directed_acyclic_graph(quotient):
        found.append("the quotient has a cycle")
    return found
