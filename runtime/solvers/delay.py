"""How long a change travels: the sweeps after the first that it takes to reach every layer as it is.

A sweep carries a change from layer k to l at once if it updates k before l, and else in the next sweep. What goes
against the feedback's direction arrives undiminished, and what comes back is smaller by about the loop gain. So as long
as a change is on its way, the changes of a sweep say nothing about the layers that it has yet to reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from heapq import heappop, heappush

__all__ = ["delay_of_errors", "delay_of_states"]

Edge = tuple[int, int]
_KEPT = 1024
"""How many results are kept."""


@lru_cache(_KEPT)
def delay_of_states(upstream: tuple[tuple[int, ...], ...], order: tuple[int, ...]) -> int:
    """The delay in a free phase, in which states carry what changes on to later layers.

    Args:
        upstream: for each layer, the layers that it reads.
        order: the order in which a sweep updates the layers.
    """
    return _longest_wait(_forward(upstream), order)


@lru_cache(_KEPT)
def delay_of_errors(
    upstream: tuple[tuple[int, ...], ...], depths: tuple[int, ...], driven: tuple[int, ...], order: tuple[int, ...]
) -> int:
    """The delay of error currents, which go back from the driven layers, and on to later layers by the feedback alone.

    Args:
        upstream: for each layer, the layers that it reads.
        depths: the layers' depths; an error that is carried forward falls by the feedback gain with each.
        driven: the layers at which errors arrive from outside.
        order: the order in which a sweep updates the layers.
    """
    forward = _forward(upstream)
    lengths = {**{(end, start): 0 for start, end in forward}, **{(a, b): depths[b] - depths[a] for a, b in forward}}
    ways: dict[int, list[int]] = {}
    for start, end in lengths:
        ways.setdefault(start, []).append(end)
    shortest: dict[int, int] = {}
    ahead = [(0, index) for index in driven]
    while ahead:
        length, index = heappop(ahead)
        if index in shortest:
            continue
        shortest[index] = length
        for end in ways.get(index, ()):
            heappush(ahead, (length + lengths[index, end], end))
    leading = [
        (a, b) for (a, b), length in lengths.items() if a in shortest and shortest[a] + length == shortest.get(b)
    ]
    return _longest_wait(leading, order)


def _forward(upstream: Sequence[Sequence[int]]) -> list[Edge]:
    return [(start, end) for end, above in enumerate(upstream) for start in above]


def _longest_wait(edges: Iterable[Edge], order: Sequence[int]) -> int:
    """The most edges of a path that end at a layer which a sweep updates first. No path comes back to its start."""
    place = {index: position for position, index in enumerate(order)}
    out: dict[int, list[int]] = {}
    missing = dict.fromkeys(place, 0)
    for start, end in edges:
        out.setdefault(start, []).append(end)
        missing[end] += 1
    waits = dict.fromkeys(place, 0)
    ready = [index for index, count in missing.items() if not count]
    while ready:
        start = ready.pop()
        for end in out.get(start, ()):
            waits[end] = max(waits[end], waits[start] + (place[end] < place[start]))
            missing[end] -= 1
            if not missing[end]:
                ready.append(end)
    return max(waits.values(), default=0)
