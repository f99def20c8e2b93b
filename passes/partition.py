"""Partition: which operation is in which energy block. Decides, rewrites nothing.

Blocks must form an acyclic quotient graph within the hardware's capacity, with the fewest
boundary conversions (a DAC value for every input of a block, an ADC value for every output, per
sample), then the fewest blocks. The construction has three steps:

1. *Waves* (Kahn's algorithm): all digital operations that are ready run; then a wave of analog
   ones, depth first, until nothing analog is ready; and so on. Within a wave there is no digital
   operation, so any cut of the wave's order into consecutive segments is acyclic.
2. *Cuts*: dynamic programming over the units of a wave (a weight-stationary layer and the
   activations and wiring that follow it) finds the segments with the fewest conversions, then
   the fewest segments. It is optimal along the wave's order.
3. *Trim*: wiring at the rim of a block that costs more conversions than it saves turns digital.

Then blocks are assigned to cores; where those are a budget, the least valuable blocks (MACs per
tile) turn digital. Deterministic: same graph, same partition.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ffebm_compiler.errors import PlanError
from ffebm_compiler.hardware import Hardware
from ffebm_compiler.ir import Operation, OperationGraph, Role

__all__ = ["Partition", "conversions", "partition", "quotient_order"]


@dataclass
class Partition:
    """Operations of each block, operations of each digital part, and reasons."""

    blocks: list[list[str]]
    digital: list[list[str]]
    rejected: dict[str, str] = field(default_factory=dict)
    """Weight-stationary operation -> why it stayed digital."""


def partition(
    graph: OperationGraph,
    hardware: Hardware,
    block_ops: Collection[str] = ("add", "reshape"),
    digital: Mapping[str, str] | None = None,
) -> Partition:
    """Partition a graph of operations.

    Args:
        graph: the dynamic operations, in topological order.
        hardware: the capacities.
        block_ops: kinds of wiring that may join a block (dropout and copies always may).
        digital: operations that must stay digital, with the reason.
    """
    rejected = dict(digital or {})
    for operation in graph.operations:
        if operation.role is Role.WEIGHT and operation.name not in rejected:
            reason = too_large(operation, hardware)
            if reason:
                rejected[operation.name] = reason
    problem = _Problem(graph, hardware, frozenset(block_ops) | {"dropout", "copy"}, frozenset(rejected))
    blocks = [problem.trim(segment) for wave in problem.waves() for segment in problem.cut(wave)]
    blocks = _within_cores(problem, [block for block in blocks if block], rejected)
    return Partition(blocks, _digital_parts(graph, blocks), rejected)


def tiles_of(operation: Operation, hardware: Hardware) -> int:
    """Tiles that one weight-stationary operation takes."""
    return hardware.tiles(operation.rows, operation.cols, operation.groups, operation.positions)


def too_large(operation: Operation, hardware: Hardware) -> str:
    """Why a layer fits no core, or nothing."""
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


class _Problem:
    """The graph with what the three steps ask of it."""

    def __init__(
        self, graph: OperationGraph, hardware: Hardware, kinds: frozenset[str], rejected: frozenset[str]
    ) -> None:
        self.graph = graph
        self.hardware = hardware
        self.kinds = kinds
        self.rejected = rejected
        self.users = graph.users()
        self.order = {operation.name: index for index, operation in enumerate(graph.operations)}

    def is_layer(self, name: str) -> bool:
        """Whether an operation is a layer that may be analog."""
        return self.graph[name].role is Role.WEIGHT and name not in self.rejected

    def may_join(self, name: str) -> bool:
        """Whether an operation may be in a block together with a layer that feeds it."""
        operation = self.graph[name]
        if operation.role is Role.ACTIVATION:
            return True
        return operation.role is Role.WIRING and operation.kind in self.kinds

    def waves(self) -> list[list[str]]:
        """Analog operations in waves: between two waves only digital ones run."""
        missing = {op.name: sum(1 for s in op.inputs if s in self.graph) for op in self.graph.operations}
        ready_layers: list[int] = []
        ready_other: list[int] = []

        def release(name: str) -> list[str]:
            released = []
            for user in self.users[name]:
                missing[user] -= 1
                if not missing[user]:
                    released.append(user)
            return released

        def file(name: str) -> None:
            heapq.heappush(ready_layers if self.is_layer(name) else ready_other, self.order[name])

        for operation in self.graph.operations:
            if not missing[operation.name]:
                file(operation.name)
        waves = []
        while ready_layers or ready_other:
            while ready_other:
                for user in release(self.graph.operations[heapq.heappop(ready_other)].name):
                    file(user)
            wave: list[str] = []
            fed: set[str] = set()
            # Depth first: the followers of a layer come right after it, so that chains stay together.
            stack = [self.graph.operations[index].name for index in sorted(ready_layers, reverse=True)]
            ready_layers.clear()
            while stack:
                name = stack.pop()
                if not self.is_layer(name) and not (
                    self.may_join(name) and any(source in fed for source in self.graph[name].inputs)
                ):
                    heapq.heappush(ready_other, self.order[name])
                    continue
                wave.append(name)
                fed.add(name)
                followers = sorted(release(name), key=self.order.__getitem__, reverse=True)
                stack.extend(user for user in followers if self.is_layer(user))
                stack.extend(user for user in followers if not self.is_layer(user))
            if wave:
                waves.append(wave)
        return waves

    def cut(self, wave: list[str]) -> list[list[str]]:
        """The wave's best cut into consecutive segments within capacity."""
        units: list[list[str]] = []
        for name in wave:
            if self.is_layer(name) or not units:
                units.append([])
            units[-1].append(name)
        best: list[tuple[tuple[int, int], int]] = [((0, 0), 0)]
        for end in range(1, len(units) + 1):
            candidates = []
            for start, cost in self._segments(units, end):
                (conversions_before, blocks_before), _ = best[start]
                candidates.append(((conversions_before + cost, blocks_before + 1), start))
            best.append(min(candidates))
        segments: list[list[str]] = []
        end = len(units)
        while end:
            start = best[end][1]
            segments.append([name for unit in units[start:end] for name in unit])
            end = start
        return segments[::-1]

    def _segments(self, units: list[list[str]], end: int) -> Iterable[tuple[int, int]]:
        """(start, conversions) of every segment that ends at `end` and fits a core."""
        members: list[str] = []
        tiles = 0
        hardware = self.hardware
        for start in range(end - 1, -1, -1):
            members = units[start] + members
            head = self.graph[units[start][0]]
            layers = end - start
            tiles += tiles_of(head, hardware) if head.role is Role.WEIGHT else 0
            if start < end - 1 and not (
                (hardware.layers_per_block is None or layers <= hardware.layers_per_block)
                and (hardware.tiles_per_core is None or tiles <= hardware.tiles_per_core)
                and (hardware.neurons_per_block is None or self.neurons(members) <= hardware.neurons_per_block)
            ):
                return
            yield start, sum(conversions(self.graph, self.trim(members), self.users))

    def neurons(self, members: Iterable[str]) -> int:
        """Neurons of a block: the values of its layers."""
        return sum(self.graph[name].values for name in members if self.is_layer(name))

    def trim(self, members: list[str]) -> list[str]:
        """Drop what is not fed by a layer of the block, then wiring that costs more than it saves."""
        fed: set[str] = set()
        kept = []
        for name in members:
            if self.is_layer(name) or any(source in fed for source in self.graph[name].inputs):
                fed.add(name)
                kept.append(name)
        for name in reversed(list(kept)):
            if self.graph[name].role is not Role.WIRING:
                continue
            inside = set(kept)
            tail = self._tail(name, inside)
            if tail is None:
                continue
            without = [member for member in kept if member not in tail]
            saves = sum(conversions(self.graph, kept, self.users)) - sum(conversions(self.graph, without, self.users))
            # Wiring at the very end that converts as many values either way belongs to the digital side.
            neutral = len(tail) == 1 and self.graph[name].kind in ("reshape", "copy", "dropout")
            if saves > 0 or (saves == 0 and neutral):
                kept = without
        return kept

    def _tail(self, name: str, inside: set[str]) -> set[str] | None:
        """The operation and what follows it in the block; None if a layer follows."""
        tail: set[str] = set()
        stack = [name]
        while stack:
            current = stack.pop()
            if current in tail:
                continue
            if self.is_layer(current):
                return None
            tail.add(current)
            stack.extend(user for user in self.users[current] if user in inside)
        return tail


def _within_cores(problem: _Problem, blocks: list[list[str]], rejected: dict[str, str]) -> list[list[str]]:
    """Keep the blocks that fit the cores: most MACs per tile first, first fit decreasing."""
    hardware, graph = problem.hardware, problem.graph
    if hardware.cores is None:
        return blocks
    layers = [[graph[name] for name in block if problem.is_layer(name)] for block in blocks]
    tiles = [sum(tiles_of(layer, hardware) for layer in members) for members in layers]
    value = [sum(layer.macs for layer in members) / max(1, size) for members, size in zip(layers, tiles, strict=True)]
    capacity = math.inf if hardware.tiles_per_core is None else hardware.tiles_per_core
    free = [capacity] * hardware.cores
    kept = set()
    for index in sorted(range(len(blocks)), key=lambda i: (-value[i], i)):
        core = next((c for c, room in enumerate(free) if room >= tiles[index]), None)
        if core is None:
            for layer in layers[index]:
                rejected[layer.name] = (
                    f"the {hardware.cores} cores are full: its block needs {tiles[index]} tiles and other blocks "
                    "do more multiply-accumulates per tile"
                )
            continue
        free[core] -= tiles[index]
        kept.add(index)
    return [block for index, block in enumerate(blocks) if index in kept]


def quotient_order(graph: OperationGraph, blocks: list[list[str]]) -> list[str | int]:
    """Digital operations (by name) and blocks (by index) in an order in which they can run.

    Raises:
        PlanError: where the blocks form a cycle, naming a block in it.
    """
    home: dict[str, str | int] = {}
    for index, block in enumerate(blocks):
        for name in block:
            home[name] = index
    missing: dict[str | int, int] = {}
    followers: dict[str | int, set[str | int]] = {}
    for operation in graph.operations:
        place = home.get(operation.name, operation.name)
        missing.setdefault(place, 0)
        for source in operation.inputs:
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
        stuck = sorted(place for place, count in missing.items() if count and isinstance(place, int))
        name = f"block {stuck[0] + 1}" if stuck else "a digital operation"
        raise PlanError(
            f"the blocks form a cycle through {name}: a value would have to leave a block and come back into it; "
            "split the block or move one of its layers to the digital side"
        )
    return order


def _digital_parts(graph: OperationGraph, blocks: list[list[str]]) -> list[list[str]]:
    """Digital operations in as few parts as the order of the blocks allows."""
    home = {name: index for index, block in enumerate(blocks) for name in block}
    level: dict[str | int, int] = {}
    for place in quotient_order(graph, blocks):
        names = blocks[place] if isinstance(place, int) else [place]
        depth = 0
        for name in names:
            for source in graph[name].inputs:
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
