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

With `digital_drive` an activation may be in a block as a driven state, too (d[v, b] = 1): where its operand is not in
it, and whatever of the block reads it is a layer, or wiring of one operand that leads to layers alone (l[w, b] = 1),
and something does. It takes neurons then.
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


def _driven_states(
    model: _Model,
    graph: OperationGraph,
    x: dict[tuple[str, str], int],
    layers: Collection[str],
    others: Collection[str],
) -> dict[tuple[str, str], int]:
    """The variables d of activations, with their rows."""
    users, driven = graph.users(), {}
    for b in layers:
        leads = {(v, b): x[v, b] for v in layers if (v, b) in x}
        for v in reversed(others):  # readers come later
            op = graph[v]
            if op.role is not Role.ACTIVATION and len(op.inputs) > 1:
                continue
            column = model.variable(whole=op.role is Role.ACTIVATION)
            model.row({column: 1.0, x[v, b]: -1.0}, high=0)
            here = [user for user in users[v] if (user, b) in x]
            model.row({column: 1.0, **{leads[user, b]: -1.0 for user in here if (user, b) in leads}}, high=0)
            for user in here:
                if user not in layers:
                    also = {leads[user, b]: -1.0} if (user, b) in leads else {}
                    model.row({column: 1.0, x[user, b]: 1.0, **also}, high=1)
            if op.role is Role.ACTIVATION:
                driven[v, b] = column
                for u in op.inputs:
                    if (u, b) in x:
                        model.row({column: 1.0, x[u, b]: 1.0}, high=1)
            else:
                leads[v, b] = column
    return driven


def optimum(
    graph: OperationGraph,
    hardware: Hardware,
    kinds: Collection[str],
    limit_s: float = 20.0,
    digital_drive: bool = False,
) -> tuple[int, int] | None:
    """(conversions per sample, blocks) of the best partition; None where the time limit came first.

    Args:
        graph: the operations.
        hardware: the capacities (`cores` is not part of the problem).
        kinds: kinds of wiring that may join a block.
        limit_s: seconds for the solver.
        digital_drive: whether activations of values from outside of a block may be states of it.
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
    driven = _driven_states(model, graph, x, layers, others) if digital_drive else {}
    for v in others:
        model.row({x[v, b]: 1.0 for b in layers}, 0, 1)
        for b in layers:
            terms = {x[v, b]: 1.0}
            for u in graph[v].inputs:
                if (u, b) in x:
                    terms[x[u, b]] = terms.get(x[u, b], 0.0) - 1.0
            if (v, b) in driven:
                terms[driven[v, b]] = -1.0
            model.row(terms, high=0)
    users = graph.users()
    owned = dict(x)
    for v in others:
        for b in layers:
            bearing = [u for u in graph[v].inputs if (u, b) in owned and len(users[u]) == 1 and u not in graph.outputs]
            activation = graph[v].role is Role.ACTIVATION
            column = x[v, b] if activation else model.variable()
            alone = {driven[v, b]: -1.0} if (v, b) in driven else {}
            model.row({column: 1.0, **{owned[u, b]: -1.0 for u in bearing}, **alone}, high=0)
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
        states = {driven[v, b]: graph[v].values for v in others if (v, b) in driven}
        for capacity, load in (
            (hardware.layers_per_block, {x[v, b]: 1 for v in members}),
            (hardware.tiles_per_core, {x[v, b]: tiles[v] for v in members}),
            (hardware.neurons_per_block, {x[v, b]: graph[v].values for v in members} | states),
        ):
            if capacity is not None:
                model.row({column: float(size) for column, size in load.items()}, high=capacity)
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
