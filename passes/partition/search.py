"""The improvement: merge blocks, move operations, and take small neighbourhoods apart and build them again.

Every step is a change that `State.attempt` accepts because the result is sound and has fewer
conversions, or as many in fewer blocks. The search stops when nothing improves or when its
clock (operations looked at, the same on every machine) runs out, so that the time grows with the
network and the result does not depend on the machine.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable

from ffebm_compiler.passes.partition.drive import make_driven
from ffebm_compiler.passes.partition.state import DIGITAL, State

__all__ = ["improve", "rebuild"]

_FAN = 12
"""Readers of one value that are looked at for a neighbour."""
_NEAR = 16
"""Blocks that follow in the order and are tried for a merge that saves no conversion."""
_WINDOW = 2000
"""Operations that a change may have to sort again."""
_WAYS = 16
"""Times that each block is taken apart and built again."""


def improve(state: State, budget: int) -> None:
    """Merge blocks and move operations until nothing helps or the clock says stop."""
    end = state.work + budget
    _merge_all(state, _WINDOW, end)
    _move_all(state, range(state.size), _WINDOW, end)
    _merge_all(state, _WINDOW, end)
    _merge_neutral(state, _WINDOW, end)


def rebuild(state: State, budget: int) -> None:
    """Take neighbourhoods apart and build them again until the clock says stop, and settle what costs the same."""
    _rebuild_all(state, _WINDOW, state.work + budget)
    _tidy(state)


def _partners(state: State, block: int) -> list[int]:
    """Blocks that a block could share a value with, also across one digital operation that may join."""
    home, found = state.home, dict[int, None]()
    members = state.members(block)
    state.work += len(members)
    for v in members:
        for u in state.reads[v]:
            for reader in state.readers[u][:_FAN]:
                found[home[reader]] = None
            if u < state.size:
                found[home[u]] = None
                if home[u] == DIGITAL and state.joins[u]:
                    for w in state.operands[u]:
                        found[home[w]] = None
        for reader in state.readers[v][:_FAN]:
            found[home[reader]] = None
            if home[reader] == DIGITAL and state.joins[reader]:
                for w in state.readers[reader][:_FAN]:
                    found[home[w]] = None
    return sorted(found.keys() - {block, DIGITAL})


def _union(state: State, first: int, second: int) -> list[tuple[int, int]]:
    """The changes that merge two blocks: the smaller one goes."""
    a, b = state.members(first), state.members(second)
    return [(v, second) for v in a] if len(a) < len(b) else [(v, first) for v in b]


def _gain(state: State, first: int, second: int) -> int:
    """Conversions that a merge saves, without what might join in between."""
    changes = _union(state, first, second)
    before = state.total
    done = [(v, state.home[v]) for v, _ in changes]
    for v, home in changes:
        state.put(v, home)
    gain = before - state.total
    for v, home in done:
        state.put(v, home)
    return gain


def _merge_all(
    state: State, window: int, end: int, only: Iterable[int] | None = None, noise: random.Random | None = None
) -> None:
    """Merge pairs of blocks, the pair that saves most first."""
    heap: list[tuple[float, int, int, int, int]] = []
    version: dict[int, int] = {}

    def offer(block: int, above: bool) -> None:
        for other in _partners(state, block):
            if (other > block or not above) and state.may_merge(block, other):
                gain: float = _gain(state, block, other)
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
        if state.attempt(_union(state, first, second), close=True, worst_window=window):
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
                state.attempt(_union(state, block, other), close=True, worst_window=window)


def _tail(state: State, v: int) -> list[int]:
    """An operation and what follows it in its block without being a layer."""
    home = state.home[v]
    found = {v: None}
    stack = [v]
    while stack:
        for reader in state.readers[stack.pop()][:_FAN]:
            if state.home[reader] == home and not state.layer[reader] and reader not in found:
                found[reader] = None
                stack.append(reader)
    return list(found)


def _joining(state: State, v: int, edges: list[tuple[int, ...]] | list[list[int]]) -> list[int]:
    """A digital operation and those along the edges that are digital and may join, eight at most."""
    found = {v: None}
    stack = [v]
    while stack and len(found) < 8:
        for w in edges[stack.pop()][:_FAN]:
            if state.home[w] == DIGITAL and state.joins[w] and w not in found:
                found[w] = None
                stack.append(w)
    return list(found)


def _targets(state: State, v: int) -> list[int]:
    """Homes that an operation could move to, also across one digital operation that may join."""
    home, found = state.home, dict[int, None]()
    for u in state.reads[v]:
        if u < state.size:
            found[home[u]] = None
            if state.layer[v] and home[u] == DIGITAL and state.joins[u]:  # it would come along
                for w in state.operands[u]:
                    found[home[w]] = None
        if state.layer[v]:
            for reader in state.readers[u][:_FAN]:
                found[home[reader]] = None
    for reader in state.readers[v][:_FAN]:
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


def _room(state: State, v: int, target: int) -> bool:
    load = state.load.get(target)
    if load is None or not state.layer[v]:
        return True
    return all(x + y <= limit for x, y, limit in zip(load, state.weight[v], state.capacity, strict=True))


def _groups(state: State, v: int, target: int) -> list[list[int]]:
    """Operations that could move with one."""
    groups = [[v]]
    if state.home[v] != DIGITAL:
        groups.append(_tail(state, v))
        if state.layer[v] and target != DIGITAL:  # with the wiring before it that no block holds yet
            groups.append(_joining(state, v, state.operands))
    elif target != DIGITAL:
        groups += [_joining(state, v, state.operands), _joining(state, v, state.readers)]
    return [group for index, group in enumerate(groups) if not index or len(group) > 1]


def _cut_before(state: State, v: int, window: int) -> None:
    """Give a layer a block of its own and make what feeds it in its old block digital."""
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
        changes = [(w, block) for w in _tail(state, v)] + [(u, DIGITAL) for u in feeding]
        state.attempt(changes, worst_window=window)


def _move_readers(state: State, v: int, window: int) -> None:
    """Move all that follows an operation out of its block, or what reads it into the block, at once."""
    home = state.home[v]
    if home == DIGITAL or len(state.readers[v]) < 2:
        return
    state.attempt([(w, DIGITAL) for w in _tail(state, v)[1:]], worst_window=window)
    outside = [w for w in state.readers[v][:_FAN] if state.home[w] == DIGITAL and state.joins[w]]
    if len(outside) > 1:
        state.attempt([(w, home) for w in outside], close=True, worst_window=window)


def _move_all(state: State, operations: Iterable[int], window: int, end: int, rounds: int = 3) -> None:
    """Move operations, alone or with what follows them, while it helps."""
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
            for target in _targets(state, v):
                if _room(state, v, target) and any(
                    state.attempt([(w, target) for w in group], close=True, worst_window=window)
                    for group in _groups(state, v, target)
                ):
                    break
        if state.objective() == before:
            return


def _on_boundary(state: State, v: int) -> bool:
    """Whether a value is converted here or next to here."""
    return bool(state.price(v)) or any(
        state.price(u) for around in (state.reads[v], state.readers[v][:_FAN]) for u in around
    )


def _rebuild_all(state: State, window: int, end: int) -> None:
    """Take a block and its neighbours apart and build them again, in several ways; keep what is better."""
    for seed in range(_WAYS):
        draw = random.Random(seed)
        for block in sorted(state.load, key=lambda b: state.span[b]):
            if state.work > end:
                return
            if block in state.load:
                _rebuild(state, block, draw, window, end)


def _rebuild(state: State, block: int, draw: random.Random, window: int, end: int) -> None:
    neighbours = _partners(state, block)
    draw.shuffle(neighbours)
    chosen = [block, *neighbours[: draw.choice((1, 2, 3, 5))]]
    operations = [v for b in chosen for v in state.members(b)]
    if len(operations) > 60:
        return
    before, mark = state.objective(), len(state.journal)
    fresh = []
    for v in [v for v in operations if state.layer[v]]:
        if state.load[state.home[v]][0] > 1:
            new = state.new_block()
            if state.attempt([(w, new) for w in _tail(state, v)], slack=1 << 62, worst_window=window):
                fresh.append(new)
    around = sorted({w for v in operations for w in (v, *state.operands[v], *state.readers[v][:_FAN])})
    _merge_all(state, window, end, [*fresh, *chosen], draw)
    _move_all(state, around, window, end, rounds=2)
    _merge_all(state, window, end, [b for b in {state.home[v] for v in operations} if b != DIGITAL])
    if not state.objective() < before:
        state.rollback(mark)


def _tidy(state: State) -> None:
    """Settle what costs the same either way: activations are analog, reshapes at the rim digital."""
    for v in range(state.size):
        if state.activation[v] and state.home[v] == DIGITAL and state.joins[v]:
            group = _joining(state, v, state.operands)
            for block in dict.fromkeys(state.home[u] for w in group for u in state.operands[w]):
                if block != DIGITAL and state.attempt([(w, block) for w in group], slack=0):
                    break
            make_driven(state, v)
    for v in reversed(range(state.size)):
        home = state.home[v]
        if home != DIGITAL and state.passes_on[v] and all(state.home[w] != home for w in state.readers[v]):
            state.attempt([(v, DIGITAL)], slack=0)
