"""Rebuild: take small neighbourhoods of blocks apart and build them again.

A result is kept only if it is better. The budget is counted as in `search`.
"""

from __future__ import annotations

import random

from ffebm_compiler.passes.partition.drive import make_driven
from ffebm_compiler.passes.partition.search import FAN, WINDOW, joining, merge_all, move_all, partners, tail
from ffebm_compiler.passes.partition.state import DIGITAL, State

__all__ = ["rebuild"]

_WAYS = 16
"""How many times each block is taken apart and built again."""


def rebuild(state: State, budget: int) -> None:
    """Take neighbourhoods apart and build them again until the budget is used up, then decide ties."""
    _rebuild_all(state, WINDOW, state.work + budget)
    _decide_ties(state)


def _rebuild_all(state: State, window: int, end: int) -> None:
    """Take each block and its neighbours apart, build them again in several ways, and keep the best."""
    for seed in range(_WAYS):
        draw = random.Random(seed)
        for block in sorted(state.load, key=lambda b: state.span[b]):
            if state.work > end:
                return
            if block in state.load:
                _rebuild(state, block, draw, window, end)


def _rebuild(state: State, block: int, draw: random.Random, window: int, end: int) -> None:
    neighbours = partners(state, block)
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
            if state.attempt([(w, new) for w in tail(state, v)], slack=1 << 62, worst_window=window):
                fresh.append(new)
    around = sorted({w for v in operations for w in (v, *state.operands[v], *state.readers[v][:FAN])})
    merge_all(state, window, end, [*fresh, *chosen], draw)
    move_all(state, around, window, end, rounds=2)
    merge_all(state, window, end, [b for b in {state.home[v] for v in operations} if b != DIGITAL])
    if not state.objective() < before:
        state.rollback(mark)


def _decide_ties(state: State) -> None:
    """Decide what costs the same either way: activations become analog, reshapes at the edge of a block digital."""
    for v in range(state.size):
        if state.activation[v] and state.home[v] == DIGITAL and state.joins[v]:
            group = joining(state, v, state.operands)
            for block in dict.fromkeys(state.home[u] for w in group for u in state.operands[w]):
                if block != DIGITAL and state.attempt([(w, block) for w in group], slack=0):
                    break
            make_driven(state, v)
    for v in reversed(range(state.size)):
        home = state.home[v]
        if home != DIGITAL and state.passes_on[v] and all(state.home[w] != home for w in state.readers[v]):
            state.attempt([(v, DIGITAL)], slack=0)
