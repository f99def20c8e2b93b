"""Search: improve a partition by merging blocks and moving operations.

`State.attempt` accepts a step only if the result is sound and has fewer
conversions, or equally many in fewer blocks. The search stops when nothing improves or when its
budget runs out. The budget counts visited operations, so that the time grows with the
network and the result does not depend on the machine.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable

from ffebm_compiler.passes.partition.state import DIGITAL, State

__all__ = ["FAN", "WINDOW", "improve", "joining", "merge_all", "move_all", "partners", "tail"]

FAN = 12
"""The largest number of readers of one value that are tried for a neighbour."""
_NEAR = 16
"""How many following blocks are tried for a merge that saves no conversion."""
WINDOW = 2000
"""The largest number of operations that a change may have to sort again."""


def improve(state: State, budget: int) -> None:
    """Merge blocks and move operations until nothing helps or the budget is used up."""
    end = state.work + budget
    merge_all(state, WINDOW, end)
    move_all(state, range(state.size), WINDOW, end)
    merge_all(state, WINDOW, end)
    _merge_neutral(state, WINDOW, end)


def partners(state: State, block: int) -> list[int]:
    """Blocks that could share a value with this block, also through one digital operation that may join."""
    home, found = state.home, dict[int, None]()
    members = state.members(block)
    state.work += len(members)
    for v in members:
        for u in state.reads[v]:
            for reader in state.readers[u][:FAN]:
                found[home[reader]] = None
            if u < state.size:
                found[home[u]] = None
                if home[u] == DIGITAL and state.joins[u]:
                    for w in state.operands[u]:
                        found[home[w]] = None
        for reader in state.readers[v][:FAN]:
            found[home[reader]] = None
            if home[reader] == DIGITAL and state.joins[reader]:
                for w in state.readers[reader][:FAN]:
                    found[home[w]] = None
    return sorted(found.keys() - {block, DIGITAL})


def _merging_changes(state: State, first: int, second: int) -> list[tuple[int, int]]:
    """The changes that merge the smaller of two blocks into the larger one."""
    a, b = state.members(first), state.members(second)
    return [(v, second) for v in a] if len(a) < len(b) else [(v, first) for v in b]


def _saved_conversions(state: State, first: int, second: int) -> int:
    """Conversions that a merge saves, not counting operations in between that might join."""
    changes = _merging_changes(state, first, second)
    before = state.total
    done = [(v, state.home[v]) for v, _ in changes]
    for v, home in changes:
        state.put(v, home)
    gain = before - state.total
    for v, home in done:
        state.put(v, home)
    return gain


def merge_all(
    state: State, window: int, end: int, only: Iterable[int] | None = None, noise: random.Random | None = None
) -> None:
    """Merge pairs of blocks. The pair that saves most comes first."""
    heap: list[tuple[float, int, int, int, int]] = []
    version: dict[int, int] = {}

    def offer(block: int, above: bool) -> None:
        for other in partners(state, block):
            if (other > block or not above) and state.may_merge(block, other):
                gain: float = _saved_conversions(state, block, other)
                if noise is not None:
                    gain *= noise.uniform(0.5, 1.5)
                pair = (min(block, other), max(block, other))
                heapq.heappush(heap, (-gain, *pair, version.get(pair[0], 0), version.get(pair[1], 0)))

    blocks = sorted(state.load) if only is None else [block for block in only if block in state.load]
    for block in blocks:
        if state.work > end:
            break
        offer(block, only is None)
    while heap and state.work < end:
        _, first, second, at_first, at_second = heapq.heappop(heap)
        if first not in state.load or second not in state.load:
            continue
        if (version.get(first, 0), version.get(second, 0)) != (at_first, at_second):
            continue
        if state.attempt(_merging_changes(state, first, second), close=True, worst_window=window):
            kept = first if first in state.load else second
            version[kept] = version.get(kept, 0) + 1
            offer(kept, False)


def _merge_neutral(state: State, window: int, end: int) -> None:
    """Merge blocks that share nothing, for fewer blocks."""
    blocks = sorted(state.load, key=lambda block: state.span[block])
    for index, block in enumerate(blocks):
        for other in blocks[index + 1 : index + 1 + _NEAR]:
            if state.work > end:
                return
            if block not in state.load:
                break
            if other in state.load and state.may_merge(block, other):
                state.attempt(_merging_changes(state, block, other), close=True, worst_window=window)


def tail(state: State, v: int) -> list[int]:
    """An operation and the operations after it in its block, up to the next layers."""
    home = state.home[v]
    found = {v: None}
    stack = [v]
    while stack:
        for reader in state.readers[stack.pop()][:FAN]:
            if state.home[reader] == home and not state.layer[reader] and reader not in found:
                found[reader] = None
                stack.append(reader)
    return list(found)


def joining(state: State, v: int, edges: list[tuple[int, ...]] | list[list[int]]) -> list[int]:
    """A digital operation and up to eight digital ones along the edges that may join."""
    found = {v: None}
    stack = [v]
    while stack and len(found) < 8:
        for w in edges[stack.pop()][:FAN]:
            if state.home[w] == DIGITAL and state.joins[w] and w not in found:
                found[w] = None
                stack.append(w)
    return list(found)


def _possible_homes(state: State, v: int) -> list[int]:
    """Homes that an operation could move to, also through one digital operation that may join."""
    home, found = state.home, dict[int, None]()
    for u in state.reads[v]:
        if u < state.size:
            found[home[u]] = None
            if state.layer[v] and home[u] == DIGITAL and state.joins[u]:  # `u` would move with it
                for w in state.operands[u]:
                    found[home[w]] = None
        if state.layer[v]:
            for reader in state.readers[u][:FAN]:
                found[home[reader]] = None
    for reader in state.readers[v][:FAN]:
        found[home[reader]] = None
    found.pop(home[v], None)
    found.pop(DIGITAL, None)
    targets = list(found)
    if state.layer[v]:
        if state.load[home[v]][0] > 1:
            targets.append(state.new_block())
    elif home[v] != DIGITAL:
        targets.append(DIGITAL)
    return targets


def _has_room(state: State, v: int, target: int) -> bool:
    load = state.load.get(target)
    if load is None or not state.layer[v]:
        return True
    return all(x + y <= limit for x, y, limit in zip(load, state.weight[v], state.capacity, strict=True))


def _groups(state: State, v: int, target: int) -> list[list[int]]:
    """Groups of operations that could move together with this one."""
    groups = [[v]]
    if state.home[v] != DIGITAL:
        groups.append(tail(state, v))
        if state.layer[v] and target != DIGITAL:  # together with digital wiring before it
            groups.append(joining(state, v, state.operands))
    elif target != DIGITAL:
        groups += [joining(state, v, state.operands), joining(state, v, state.readers)]
    return [group for index, group in enumerate(groups) if not index or len(group) > 1]


def _cut_before(state: State, v: int, window: int) -> None:
    """Give a layer a block of its own, and make the operations that feed it in its old block digital."""
    home = state.home[v]
    if not state.layer[v] or state.load[home][0] < 2:
        return
    feeding: dict[int, None] = {}
    stack = [v]
    while stack:
        for u in state.operands[stack.pop()]:
            if state.home[u] == home and not state.layer[u] and u not in feeding:
                feeding[u] = None
                stack.append(u)
    if feeding:
        block = state.new_block()
        changes = [(w, block) for w in tail(state, v)] + [(u, DIGITAL) for u in feeding]
        state.attempt(changes, worst_window=window)


def _move_readers(state: State, v: int, window: int) -> None:
    """Move everything after an operation out of its block at once, or its readers into the block."""
    home = state.home[v]
    if home == DIGITAL or len(state.readers[v]) < 2:
        return
    state.attempt([(w, DIGITAL) for w in tail(state, v)[1:]], worst_window=window)
    outside = [w for w in state.readers[v][:FAN] if state.home[w] == DIGITAL and state.joins[w]]
    if len(outside) > 1:
        state.attempt([(w, home) for w in outside], close=True, worst_window=window)


def move_all(state: State, operations: Iterable[int], window: int, end: int, rounds: int = 3) -> None:
    """Move operations, alone or with those that follow them, while it helps."""
    operations = [v for v in operations if state.layer[v] or state.joins[v]]
    for _ in range(rounds):
        before = state.objective()
        for v in operations:
            if state.work > end:
                return
            if not _on_boundary(state, v):
                continue
            _move_readers(state, v, window)
            _cut_before(state, v, window)
            for target in _possible_homes(state, v):
                if _has_room(state, v, target) and any(
                    state.attempt([(w, target) for w in group], close=True, worst_window=window)
                    for group in _groups(state, v, target)
                ):
                    break
        if state.objective() == before:
            return


def _on_boundary(state: State, v: int) -> bool:
    """Whether the value of an operation, or of a neighbour, is converted."""
    return bool(state.price(v)) or any(
        state.price(u) for around in (state.reads[v], state.readers[v][:FAN]) for u in around
    )
