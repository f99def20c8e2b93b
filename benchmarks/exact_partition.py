"""The exact optimum of the partition problem on small graphs, as a mixed-integer linear program (HiGHS in scipy).

Written from the problem's statement alone, without the compiler's own partition, which it judges.

    x[v, b] ∈ {0, 1}   operation v is in block b; a block is named by its first layer, its leader
    q[v] ∈ [0, n]      position of v's place in the order of the quotient

    minimise  Σ_u values(u) · (DAC[u, b] + ADC[u])  ·(layers + 1) + number of blocks
    subject to: each layer in exactly one block, any other eligible operation in at most one and only with an operand
    of its block in it, an activation only where it owns a layer of the block; layers, tiles and neurons of a block
    within capacity; q[v] ≥ q[u] + 1 for every edge u → v that leaves a place, q equal within a block.

An activation owns a layer whose product reaches it through wiring of the block that nothing else reads:
o[v, b] ≤ Σ_u o[u, b] over the operands u of v with one reader, o[v, b] ≤ x[v, b], o = x for a layer, and an
activation is in a block only with an operand of one reader and o = 1.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import ALWAYS_JOIN, OperationGraph, Role

__all__ = ["optimum"]


class _Model:
    """Variables and rows of a linear program under construction."""

    def __init__(self) -> None:
        self.cost: list[float] = []
        self.upper: list[float] = []
        self.whole: list[int] = []
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def variable(self, cost: float = 0.0, upper: float = 1.0, whole: bool = False) -> int:
        self.cost.append(cost)
        self.upper.append(upper)
        self.whole.append(int(whole))
        return len(self.cost) - 1

    def row(self, terms: dict[int, float], low: float = -np.inf, high: float = np.inf) -> None:
        self.entries += [(len(self.low), column, factor) for column, factor in terms.items()]
        self.low.append(low)
        self.high.append(high)


def optimum(
    graph: OperationGraph, hardware: Hardware, kinds: Collection[str], limit_s: float = 20.0
) -> tuple[int, int] | None:
    """(conversions per sample, blocks) of the best partition; None where the time limit came first.

    Args:
        graph: the operations.
        hardware: the capacities (`cores` is not part of the problem).
        kinds: kinds of wiring that may join a block.
        limit_s: seconds for the solver.
    """
    joins = {*kinds, *ALWAYS_JOIN}
    layers, others = [], []
    tiles = {}
    for op in graph.operations:
        if op.role is Role.WEIGHT:
            size = hardware.tiles(op.rows, op.cols, op.groups, op.positions)
            fits = hardware.tiles_per_core is None or size <= hardware.tiles_per_core
            if fits and (hardware.neurons_per_block is None or op.values <= hardware.neurons_per_block):
                layers.append(op.name)
                tiles[op.name] = size
        elif op.role is Role.ACTIVATION or (op.role is Role.WIRING and op.kind in joins):
            others.append(op.name)
    if not layers:
        return 0, 0
    model, order = _Model(), {op.name: index for index, op in enumerate(graph.operations)}
    weight = len(layers) + 1
    x: dict[tuple[str, str], int] = {}
    for b in layers:
        for v in [*layers, *others]:
            if v in others or order[v] >= order[b]:
                x[v, b] = model.variable(1.0 if v == b else 0.0, whole=True)
    for v in layers:
        model.row({x[v, b]: 1.0 for b in layers if (v, b) in x}, 1, 1)
    for v in others:
        model.row({x[v, b]: 1.0 for b in layers}, 0, 1)
        for b in layers:
            terms = {x[v, b]: 1.0}
            for u in graph[v].inputs:
                if (u, b) in x:
                    terms[x[u, b]] = terms.get(x[u, b], 0.0) - 1.0
            model.row(terms, high=0)
    users = graph.users()
    owned = dict(x)
    for v in others:
        for b in layers:
            bearing = [u for u in graph[v].inputs if (u, b) in owned and len(users[u]) == 1 and u not in graph.outputs]
            activation = graph[v].role is Role.ACTIVATION
            column = x[v, b] if activation else model.variable()
            model.row({column: 1.0, **{owned[u, b]: -1.0 for u in bearing}}, high=0)
            if activation:
                del owned[v, b]
            else:
                model.row({column: 1.0, x[v, b]: -1.0}, high=0)
                owned[v, b] = column
    for b in layers:
        for v in [*layers, *others]:
            if (v, b) in x and v != b:
                model.row({x[v, b]: 1.0, x[b, b]: -1.0}, high=0)
        members = [v for v in layers if (v, b) in x]
        for capacity, load in (
            (hardware.layers_per_block, dict.fromkeys(members, 1)),
            (hardware.tiles_per_core, tiles),
            (hardware.neurons_per_block, {v: graph[v].values for v in members}),
        ):
            if capacity is not None:
                model.row({x[v, b]: float(load[v]) for v in members}, high=capacity)
    size = float(len(graph.operations))
    q = {op.name: model.variable(upper=size) for op in graph.operations}
    p = {b: model.variable(upper=size) for b in layers}
    for (v, b), column in x.items():
        model.row({q[v]: 1.0, p[b]: -1.0, column: size}, high=size)
        model.row({q[v]: -1.0, p[b]: 1.0, column: size}, high=size)
    for u in [*graph.inputs, *order]:
        price = float(graph.values(u)) * weight
        adc = model.variable(price)
        if u in graph.outputs:
            for b in layers:
                if (u, b) in x:
                    model.row({x[u, b]: 1.0, adc: -1.0}, high=0)
        for b in layers:
            readers = [v for v in users[u] if (v, b) in x]
            dac = model.variable(price) if readers else -1
            for v in readers:
                terms = {x[v, b]: 1.0, dac: -1.0}
                if (u, b) in x:
                    terms[x[u, b]] = -1.0
                model.row(terms, high=0)
            if (u, b) in x:
                for v in users[u]:
                    terms = {x[u, b]: 1.0, adc: -1.0}
                    if (v, b) in x:
                        terms[x[v, b]] = -1.0
                    model.row(terms, high=0)
        if u in graph:
            for v in users[u]:
                together = []
                for b in layers:
                    if (u, b) in x and (v, b) in x:
                        both = model.variable()
                        model.row({both: 1.0, x[u, b]: -1.0}, high=0)
                        model.row({both: 1.0, x[v, b]: -1.0}, high=0)
                        together.append(both)
                model.row({q[v]: 1.0, q[u]: -1.0, **dict.fromkeys(together, 1.0)}, low=1)
    rows, columns, factors = zip(*model.entries, strict=True)
    matrix = csr_matrix((factors, (rows, columns)), shape=(len(model.low), len(model.cost)))
    result = milp(
        np.array(model.cost),
        integrality=np.array(model.whole),
        bounds=Bounds(0, np.array(model.upper)),
        constraints=LinearConstraint(matrix, np.array(model.low), np.array(model.high)),
        options={"time_limit": limit_s, "mip_rel_gap": 0.0},
    )
    if result.status != 0:
        return None
    best = round(float(result.fun))
    return best // weight, best % weight if best % weight else weight
