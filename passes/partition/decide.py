"""Partition: decide which operation is in which energy block. Nothing is rewritten here.

Blocks must form an acyclic quotient graph within the hardware's capacity. The objective is the fewest
boundary conversions (a DAC value for every input of a block, an ADC value for every output, per
sample), then the fewest blocks. With `prices` it is the least modelled energy. Random numbers are drawn in the
source's order. So the operations that draw form a chain, and its links count as edges in the proof that the quotient
is acyclic. There are three parts, each in a file of its own:

1. `waves` constructs two starts, both acyclic by construction. One uses waves of Kahn's algorithm, with the
   best cuts of each wave by dynamic programming. The other fills one block after the other.
2. `search` merges blocks and moves operations, and `rebuild` takes small neighbourhoods apart and builds them
   again, while the objective falls. The better of the two results is taken.
3. `state` holds the cost and the proof of acyclicity, which the search keeps up to date.

Then blocks are assigned to cores. If there are too few cores, the least valuable blocks (MACs per
tile) turn digital. The result is deterministic: the same graph gives the same partition. `benchmarks/partition.py`
compares it with the exact optimum.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ffebm_compiler.errors import PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import ALWAYS_JOIN, Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.prices import Prices
from ffebm_compiler.passes.partition.rebuild import rebuild
from ffebm_compiler.passes.partition.search import improve
from ffebm_compiler.passes.partition.state import State, tiles_of
from ffebm_compiler.passes.partition.waves import layer_by_layer, next_fit, waves_and_cuts

__all__ = [
    "Partition",
    "conversions",
    "core_homes",
    "digital_parts",
    "order_with_draws",
    "pack_cores",
    "partition",
    "quotient_order",
    "tiles_of",
    "too_large",
]

_EFFORT, _EFFORT_EACH = 80_000, 8
"""The budget of operations that the improvement of one start may visit: a base, and a number per operation."""
_SMALL = 150
"""Up to so many operations both starts are taken apart and built again. Beyond, only the better one is.

On 40 public networks of 51 to 724 operations, for two fabrics, this changes no conversion.
"""


@dataclass
class Partition:
    """The operations of each block and of each digital part, and the reasons."""

    blocks: list[list[str]]
    digital: list[list[str]]
    rejected: dict[str, str] = field(default_factory=dict)
    """Weight-stationary operation -> why it stayed digital."""


def partition(
    graph: OperationGraph,
    hardware: Hardware,
    block_ops: Collection[str] = ("add", "reshape"),
    digital: Mapping[str, str] | None = None,
    digital_drive: bool = False,
    prices: Prices | None = None,
) -> Partition:
    """Partition a graph of operations.

    Args:
        graph: the dynamic operations, in topological order.
        hardware: the capacities.
        block_ops: kinds of wiring that may join a block (those of `ir.ALWAYS_JOIN` always may).
        digital: operations that must stay digital, with the reason.
        digital_drive: whether an activation of a digital value may be a state of a block (`rules.driven_states`).
        prices: energies to minimise in the place of conversions.
    """
    rejected = dict(digital or {})
    for operation in graph.operations:
        if operation.role is Role.WEIGHT and operation.name not in rejected:
            reason = too_large(operation, hardware)
            if reason:
                rejected[operation.name] = reason
    kinds = frozenset((*block_ops, *ALWAYS_JOIN))
    states = []
    for start in (waves_and_cuts, next_fit, *([] if prices is None else [layer_by_layer])):
        state = State(graph, hardware, kinds, frozenset(rejected), digital_drive=digital_drive, prices=prices)
        for segment in start(state):
            block = state.new_block()
            for v in segment:
                state.put(v, block)
        state.start()
        improve(state, _EFFORT + _EFFORT_EACH * state.size)
        states.append(state)
    if len(graph.operations) > _SMALL:
        states = [min(states, key=State.objective)]
    for state in states:
        left = _EFFORT + _EFFORT_EACH * state.size - state.work
        rebuild(state, left if state.size <= _SMALL else left // 2)
    state = min(states, key=State.objective)
    names = [operation.name for operation in graph.operations]
    order = sorted(state.load, key=lambda block: state.span[block])
    blocks = [[names[v] for v in sorted(state.members(block))] for block in order]
    blocks = _within_cores(graph, hardware, blocks, rejected)
    return Partition(blocks, digital_parts(graph, blocks), rejected)


def too_large(operation: Operation, hardware: Hardware) -> str:
    """Why a layer fits no core, or an empty text."""
    tiles = tiles_of(operation, hardware)
    if hardware.tiles_per_core is not None and tiles > hardware.tiles_per_core:
        return f"it needs {tiles} tiles and a core has {hardware.tiles_per_core}"
    if hardware.neurons_per_block is not None and operation.values > hardware.neurons_per_block:
        return f"it has {operation.values} neurons and a block holds {hardware.neurons_per_block}"
    return ""


def conversions(graph: OperationGraph, members: Collection[str], users: Mapping[str, list[str]]) -> tuple[int, int]:
    """(DAC, ADC) values per sample that cross the boundary of a set of operations."""
    inside = set(members)
    entering: dict[str, None] = {}
    leaving = 0
    outputs = set(graph.outputs)
    for name in members:
        entering.update((source, None) for source in graph[name].inputs if source not in inside)
        if name in outputs or any(user not in inside for user in users[name]):
            leaving += graph[name].values
    return sum(graph.values(name) for name in entering), leaving


def pack_cores(tiles: Sequence[int], hardware: Hardware, order: Sequence[int]) -> list[int | None]:
    """The core of each block. Blocks are put in the given order, each on the first core with room.

    If no core has room, a new one is taken if `cores` is None; otherwise the block's core is None.
    """
    capacity = math.inf if hardware.tiles_per_core is None else hardware.tiles_per_core
    used: list[int] = []
    homes: list[int | None] = [None] * len(tiles)
    for index in order:
        core = next((core for core, taken in enumerate(used) if taken + tiles[index] <= capacity), None)
        if core is None:
            if hardware.cores is not None and len(used) == hardware.cores:
                continue
            core = len(used)
            used.append(0)
        used[core] += tiles[index]
        homes[index] = core
    return homes


def core_homes(tiles: Sequence[int], macs: Sequence[int], hardware: Hardware) -> list[int | None]:
    """The core of each block, with the largest put first, or the one with most MACs per tile if that leaves one out."""
    homes = pack_cores(tiles, hardware, sorted(range(len(tiles)), key=lambda index: (-tiles[index], index)))
    if None not in homes:
        return homes
    return pack_cores(
        tiles, hardware, sorted(range(len(tiles)), key=lambda index: (-macs[index] / max(1, tiles[index]), index))
    )


def _within_cores(
    graph: OperationGraph, hardware: Hardware, blocks: list[list[str]], rejected: dict[str, str]
) -> list[list[str]]:
    """Keep the blocks that fit the cores, those with most MACs per tile first."""
    if hardware.cores is None:
        return blocks
    layers = [[graph[name] for name in block if graph[name].role is Role.WEIGHT] for block in blocks]
    tiles = [sum(tiles_of(layer, hardware) for layer in members) for members in layers]
    homes = core_homes(tiles, [sum(layer.macs for layer in members) for members in layers], hardware)
    full = "the only core is full" if hardware.cores == 1 else f"the {hardware.cores} cores are full"
    for index, core in enumerate(homes):
        if core is None:
            for layer in layers[index]:
                rejected[layer.name] = (
                    f"{full}: its block needs {tiles[index]} tiles and other blocks do more multiply-accumulates "
                    "per tile"
                )
    return [block for block, core in zip(blocks, homes, strict=True) if core is not None]


def quotient_order(
    graph: OperationGraph, blocks: Sequence[Sequence[str]], names: Sequence[str] | None = None, draws: bool = False
) -> list[str | int]:
    """Digital operations (by name) and blocks (by index) in an order in which they can run.

    Args:
        graph: the operations.
        blocks: the operations of each block, which run together.
        names: names of the blocks for an error.
        draws: whether random numbers must be drawn in the source's order.

    Raises:
        PlanError: the blocks form a cycle; names a block on it (by `names`, or by number).
    """
    needs = graph.needs(draws)
    home: dict[str, str | int] = {}
    for index, block in enumerate(blocks):
        for name in block:
            home[name] = index
    missing: dict[str | int, int] = {}
    followers: dict[str | int, set[str | int]] = {}
    for operation in graph.operations:
        place = home.get(operation.name, operation.name)
        missing.setdefault(place, 0)
        for source in needs[operation.name]:
            if source not in graph:
                continue
            origin = home.get(source, source)
            if origin != place and place not in followers.setdefault(origin, set()):
                followers[origin].add(place)
                missing[place] += 1
    first: dict[str | int, int] = {}
    for index, operation in enumerate(graph.operations):
        first.setdefault(home.get(operation.name, operation.name), index)
    ready = [(first[place], place) for place, count in missing.items() if not count]
    heap = [(index, str(place), place) for index, place in ready]
    heapq.heapify(heap)
    order: list[str | int] = []
    while heap:
        _, _, place = heapq.heappop(heap)
        order.append(place)
        for follower in followers.get(place, ()):
            missing[follower] -= 1
            if not missing[follower]:
                heapq.heappush(heap, (first[follower], str(follower), follower))
    if len(order) < len(missing):
        # Going back from a block that waits, one reaches a cycle.
        waits = sorted((place for place, count in missing.items() if count), key=first.__getitem__)
        before = {follower: place for place in waits for follower in followers.get(place, ())}
        place = waits[0]
        seen: list[str | int] = []
        while place not in seen:
            seen.append(place)
            place = before[place]
        on_cycle = [p for p in seen[seen.index(place) :] if isinstance(p, int)]
        name = (names[min(on_cycle)] if names else f"block {min(on_cycle) + 1}") if on_cycle else "a digital operation"
        raise PlanError(
            f"the blocks form a cycle through {name}, so that a value would leave a block and come back into it: "
            "split the block or move one of its layers to the digital side"
        )
    return order


def order_with_draws(graph: OperationGraph, blocks: Sequence[Sequence[str]]) -> tuple[list[str | int], bool]:
    """`quotient_order` with random numbers drawn as in the source if that is possible, and whether it is.

    Raises:
        PlanError: the blocks form a cycle even if the order of draws does not count.
    """
    try:
        return quotient_order(graph, blocks, draws=True), True
    except PlanError:  # the plan was edited by hand, and its blocks cannot draw in the source's order
        return quotient_order(graph, blocks), False


def digital_parts(graph: OperationGraph, blocks: list[list[str]]) -> list[list[str]]:
    """Digital operations in as few parts as the order of the blocks, and of random draws, allows."""
    home = {name: index for index, block in enumerate(blocks) for name in block}
    level: dict[str | int, int] = {}
    order, kept = order_with_draws(graph, blocks)
    needs = graph.needs(kept)
    for place in order:
        names = blocks[place] if isinstance(place, int) else [place]
        depth = 0
        for name in names:
            for source in needs[name]:
                if source not in graph or home.get(source, source) == place:
                    continue
                origin = home.get(source, source)
                # A digital part runs before the blocks of its level, and after those of the level before.
                depth = max(depth, level[origin] + (1 if isinstance(origin, int) and isinstance(place, str) else 0))
        level[place] = depth
    parts: dict[int, list[str]] = {}
    for operation in graph.operations:
        if operation.name not in home:
            parts.setdefault(level[operation.name], []).append(operation.name)
    return [parts[depth] for depth in sorted(parts)]
