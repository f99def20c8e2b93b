"""Construct a partition from waves of Kahn's algorithm, and the best cuts of each wave.

Between two waves only digital operations run, and within a wave only analog ones. So every
cut of a wave's order into consecutive segments is acyclic. A unit is a layer and the operations after it up to the
next layer. Dynamic programming over the units of a wave finds the segments with the fewest
conversions, then the fewest segments. If a segment may hold very many units, neighbours are
joined first, so that the work stays proportional to the network.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from ffebm_compiler.passes.partition.state import State

__all__ = ["layer_by_layer", "next_fit", "waves_and_cuts"]

_LOOK_BACK = 48
"""The largest number of units in a searched segment. Longer segments are searched over joined units."""


def waves_and_cuts(state: State) -> list[list[int]]:
    """Operations of each block, acyclic and within capacity."""
    segments = []
    for wave in _waves(state):
        # Depth first and the order of the graph are both tried, since neither is always better.
        _, best = min((_cut(state, order) for order in (wave, sorted(wave))), key=lambda found: found[0])
        for segment in best:
            segments += _filled(state, segment)
    return segments


def next_fit(state: State) -> list[list[int]]:
    """Another start: fill one block after the other in the order of the graph."""
    return _filled(state, range(state.size))


def layer_by_layer(state: State) -> list[list[int]]:
    """A start for energies: every layer alone, with what follows it. Nothing settles."""
    found = []
    for block in _filled(state, range(state.size)):
        for v in block:
            if state.layer[v]:
                found.append([v])
            else:
                found[-1].append(v)
    return found


def _filled(state: State, operations: Iterable[int]) -> list[list[int]]:
    """Fill blocks one after the other with operations in topological order.

    A block is closed when a layer does not fit, or depends on the block through an operation outside of it.
    """
    blocks: list[list[int]] = []
    inside = _Inside(state)
    after: set[int] = set()
    load = (0, 0, 0)
    for v in operations:
        late = any(u in after for u in state.needs[v])
        if state.layer[v]:
            more = state.weight[v]
            load = (load[0] + more[0], load[1] + more[1], load[2] + more[2])
            if not blocks or late or not _within(load, state.capacity):
                blocks.append([])
                inside, after, load = _Inside(state), set(), more
            blocks[-1].append(v)
            inside.add(v)
        elif not late and inside.may_hold(v):
            blocks[-1].append(v)
            inside.add(v)
        elif late or inside.feeds(v):
            after.add(v)
    return blocks


class _Inside:
    """The operations of one block, added in topological order."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.members: set[int] = set()
        self.carrying: set[int] = set()
        """The operations that hand a layer's product to a single operation, without an activation in between."""

    def feeds(self, v: int) -> bool:
        """Whether an operation reads an operation of the block."""
        return any(u in self.members for u in self.state.needs[v])

    def may_hold(self, v: int) -> bool:
        """Whether an operation that is no layer may join, by the rules of `State.fed` and the allowed wiring."""
        state = self.state
        feeding = self.carrying if state.activation[v] else self.members
        return state.joins[v] and any(u in feeding for u in state.operands[v])

    def add(self, v: int) -> None:
        """Add an operation."""
        state = self.state
        self.members.add(v)
        behind = not state.activation[v] and any(u in self.carrying for u in state.operands[v])
        if state.read_once[v] and (state.layer[v] or behind):
            self.carrying.add(v)


def _waves(state: State) -> list[list[int]]:
    """The waves of analog operations."""
    missing = [len(needs) for needs in state.needs]
    layers: list[int] = []
    others: list[int] = []

    def release(v: int) -> list[int]:
        released = []
        for user in state.followers[v]:
            missing[user] -= 1
            if not missing[user]:
                released.append(user)
        return released

    def file(v: int) -> None:
        heapq.heappush(layers if state.layer[v] else others, v)

    for v in range(state.size):
        if not missing[v]:
            file(v)
    waves = []
    while layers or others:
        while others:
            for user in release(heapq.heappop(others)):
                file(user)
        wave: list[int] = []
        inside = _Inside(state)
        # Depth first, so that the followers of a layer come right after it and chains stay together.
        stack = sorted(layers, reverse=True)
        layers.clear()
        while stack:
            v = stack.pop()
            if not state.layer[v] and not inside.may_hold(v):
                heapq.heappush(others, v)
                continue
            wave.append(v)
            inside.add(v)
            followers = sorted(release(v), reverse=True)
            stack.extend(user for user in followers if state.layer[user])
            stack.extend(user for user in followers if not state.layer[user])
        if wave:
            waves.append(wave)
    return waves


def _cut(state: State, wave: list[int]) -> tuple[tuple[int, int], list[list[int]]]:
    """((conversions, segments), segments) of the wave's best cut into consecutive segments within capacity."""
    units: list[list[int]] = []
    for v in wave:
        if state.layer[v] or not units:
            units.append([])
        units[-1].append(v)
    units = _runs(state, units)
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for end in range(1, len(units) + 1):
        candidates = []
        for start, cost in _segments(state, units, end):
            before = best[start]
            candidates.append((before[0] + cost, before[1] + 1, start))
        best.append(min(candidates))
    segments: list[list[int]] = []
    end = len(units)
    while end:
        start = best[end][2]
        segments.append([v for unit in units[start:end] for v in unit])
        end = start
    return best[-1][:2], segments[::-1]


def _load(state: State, unit: list[int]) -> tuple[int, int, int]:
    loads = [state.weight[v] for v in unit]
    return sum(x[0] for x in loads), sum(x[1] for x in loads), sum(x[2] for x in loads)


def _within(load: tuple[int, ...], capacity: tuple[float, ...], share: float = 1.0) -> bool:
    return all(used <= limit * share for used, limit in zip(load, capacity, strict=True))


def _runs(state: State, units: list[list[int]]) -> list[list[int]]:
    """The units, joined to longer runs if a segment could hold more units than are searched."""
    loads = [_load(state, unit) for unit in units]
    whole = tuple(sum(column) for column in zip(*loads, strict=True))
    if _within(whole, state.capacity):
        return [[v for unit in units for v in unit]]
    if len(units) <= _LOOK_BACK:
        return units
    joined: list[list[int]] = []
    used = (0, 0, 0)
    for unit, load in zip(units, loads, strict=True):
        both = (used[0] + load[0], used[1] + load[1], used[2] + load[2])
        if joined and _within(both, state.capacity, 1 / _LOOK_BACK):
            joined[-1].extend(unit)
            used = both
        else:
            joined.append(list(unit))
            used = load
    return joined


def _segments(state: State, units: list[list[int]], end: int) -> list[tuple[int, int]]:
    """(start, conversions) of every segment that ends at `end` and fits a core."""
    found = []
    inside: set[int] = set()
    reading: dict[int, int] = {}
    cost = 0
    load = (0, 0, 0)
    for start in range(end - 1, max(-1, end - 1 - 2 * _LOOK_BACK), -1):
        more = _load(state, units[start])
        load = (load[0] + more[0], load[1] + more[1], load[2] + more[2])
        if start < end - 1 and not _within(load, state.capacity):
            break
        for v in reversed(units[start]):
            inside.add(v)
            used = reading.get(v, 0)
            if used:
                cost -= state.values[v]
            if state.output[v] or used < len(state.readers[v]):
                cost += state.values[v]
            for u in state.reads[v]:
                if not reading.get(u):
                    cost += state.values[u]
                reading[u] = reading.get(u, 0) + 1
        found.append((start, cost))
    return found
