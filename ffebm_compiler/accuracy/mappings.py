"""Measure which layers may be analog, and search for the mapping with the most analog multiply-accumulates."""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from ffebm_compiler.accuracy.evaluation import Measure, Setting
from ffebm_compiler.accuracy.journal import Journal
from ffebm_compiler.accuracy.parts import Part
from ffebm_compiler.accuracy.runs import run

__all__ = ["Mapping", "Mappings", "search"]

_HALVINGS = 8
_STEPS = 400
_CONSIDERED = 1000
_PAIRS = 64
"""Up to so many parts, two may become analog in one step."""

Mapping = frozenset[int]
"""Numbers of the parts that are analog."""


@dataclass
class Mappings:
    """Mappings of one hybrid, and the drop of the metric that each of them costs.

    A layer that is not analog computes exactly. A block with an analog layer settles, and one without is the source's.
    """

    measure: Measure
    parts: Sequence[Part]
    source: float
    journal: Journal
    draws: int = 3
    sign: float = 1.0
    executor: Executor | None = None
    seen: dict[Mapping, float] = field(default_factory=dict)
    """Mean drop of every mapping that was measured."""

    def macs(self, mapping: Mapping) -> int:
        """Multiply-accumulates of the analog layers."""
        return sum(self.parts[index].macs for index in mapping)

    def drops(self, mappings: Iterable[Mapping], title: str) -> list[float]:
        """The mean drop of each mapping over the draws: source − value, or the other way round."""
        wanted = list(mappings)
        draws = range(self.draws)
        settings = {mapping: self._settings(mapping, draws) for mapping in wanted if mapping not in self.seen}
        run(self.measure, [each for some in settings.values() for each in some], title, self.journal, self.executor)
        for mapping, some in settings.items():
            self.seen[mapping] = self._mean(some)
        return [self.seen[mapping] for mapping in wanted]

    def drop(self, mapping: Mapping) -> float:
        """The mean drop of one mapping."""
        return self.drops([mapping], "mappings")[0]

    def drop_again(self, mapping: Mapping) -> float:
        """The mean drop of a mapping over twice as many other draws, which flatter no mapping that a search chose."""
        settings = self._settings(mapping, range(self.draws, 3 * self.draws))
        run(self.measure, settings, "screening", self.journal, self.executor)
        return self._mean(settings)

    def _mean(self, settings: Sequence[Setting]) -> float:
        values = [float(self.journal.results[each.key]["value"] or 0.0) for each in settings]
        return statistics.fmean(self.sign * (self.source - value) for value in values)

    def _settings(self, mapping: Mapping, draws: Iterable[int]) -> list[Setting]:
        held = [self.parts[index] for index in sorted(mapping)]
        operations = tuple(name for part in held for name in part.operations)
        settling = tuple(dict.fromkeys(block for part in held for block in part.blocks))
        named = ", ".join(repr(path) for part in held[:3] for path in part.paths) + ", ..." * (len(held) > 3)
        told = f"layers {named} on devices" if len(held) > 1 else f"layer {named} on devices"
        key = ",".join(map(str, sorted(mapping)))
        return [Setting(f"analog {key} | {draw}", told, operations, settling, draw) for draw in draws]


def search(mappings: Mappings, most: float, fixed: Mapping = frozenset(), trials: int | None = None) -> list[Mapping]:
    """Mappings whose measured drop is at most `most`, that with the most analog multiply-accumulates first.

    1. The loss of every part alone.
    2. As if losses added up, the mapping with the most multiply-accumulates within a sum of losses (a knapsack). The
       sum is found by bisection, so that the mapping's own drop, measured as a whole, is within the budget.
    3. Parts become analog in the order of their multiply-accumulates, each if the drop stays within the budget.
    4. The better mapping of 2 and 3 is improved while measurements allow: digital parts become analog again, or change
       places with analog ones of fewer multiply-accumulates. Steps that the losses promise to be within the budget
       come first.

    Args:
        mappings: what is measured.
        most: the largest drop.
        fixed: parts that stay analog.
        trials: how many mappings step 4 measures at most. None is four for each part.

    Returns:
        The mappings within the budget, or none.
    """
    everything = frozenset(range(len(mappings.parts)))
    mappings.drop(everything)
    singles = [frozenset({index}) for index in sorted(everything)]
    if mappings.seen[everything] > most:
        losses = [max(loss, 0.0) for loss in mappings.drops(singles, "layers alone")]
        free = sorted(everything - fixed)
        low, high = 0.0, sum(losses[index] for index in free)
        start = fixed | _knapsack(mappings, free, losses, low)
        if start and mappings.drop(start) > most:
            start = fixed
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            mapping = fixed | _knapsack(mappings, free, losses, middle)
            if not mapping or mappings.drop(mapping) <= most:
                low, start = middle, max(start, mapping, key=mappings.macs)
            else:
                high = middle
        start = max(start, _by_macs(mappings, free, fixed, most), key=mappings.macs)
        _improve(mappings, start, most, fixed, losses, 4 * len(free) if trials is None else trials)
    within = [mapping for mapping, drop in mappings.seen.items() if drop <= most and mapping and fixed <= mapping]
    return sorted(within, key=lambda mapping: (-mappings.macs(mapping), mappings.seen[mapping]))


def _knapsack(mappings: Mappings, free: Sequence[int], losses: Sequence[float], most: float) -> Mapping:
    """The parts with the most multiply-accumulates whose losses sum to at most `most`, in steps of a 400th of it."""
    steps = [0 if losses[i] <= 0 else math.ceil(_STEPS * losses[i] / most) if most > 0 else _STEPS + 1 for i in free]
    best: list[tuple[int, Mapping]] = [(0, frozenset())] * (_STEPS + 1)
    for index, size in zip(free, steps, strict=True):
        macs = mappings.parts[index].macs
        for room in range(_STEPS, size - 1, -1):
            before, chosen = best[room - size]
            if before + macs > best[room][0]:
                best[room] = before + macs, chosen | {index}
    return best[_STEPS][1]


def _by_macs(mappings: Mappings, free: Sequence[int], fixed: Mapping, most: float) -> Mapping:
    """Parts become analog one after the other, those with the most multiply-accumulates first, within the budget."""
    mapping = fixed
    for index in sorted(free, key=lambda index: -mappings.parts[index].macs):
        if mappings.drop(mapping | {index}) <= most:
            mapping |= {index}
    return mapping


def _improve(
    mappings: Mappings, start: Mapping, most: float, fixed: Mapping, losses: Sequence[float], trials: int
) -> None:
    """Add digital parts and exchange them while that gives more analog multiply-accumulates within the budget."""
    current, left = start, trials
    improved = True
    while improved and left > 0:
        improved = False
        room = most - (mappings.drop(current) if current else 0.0)
        for mapping in _steps(mappings, current, fixed, losses, room):
            if mapping in mappings.seen and mappings.seen[mapping] > most:
                continue
            if left <= 0:
                break
            left -= mapping not in mappings.seen
            if mappings.drop(mapping) <= most:
                current, improved = mapping, True
                break


def _steps(mappings: Mappings, current: Mapping, fixed: Mapping, losses: Sequence[float], room: float) -> list[Mapping]:
    """Mappings with more analog multiply-accumulates, one step away: up to two parts in, and up to two out.

    Those come first whose losses promise to fit into the room that the budget leaves, by what they gain. The others
    follow by how little they promise to exceed it.
    """
    digital = [index for index in range(len(mappings.parts)) if index not in current]
    movable = sorted(current - fixed)
    most_in = 2 if len(mappings.parts) <= _PAIRS else 1
    coming = [some for size in range(1, most_in + 1) for some in itertools.combinations(digital, size)]
    going = [some for size in (0, 1, 2) for some in itertools.combinations(movable, size)]
    macs = {some: sum(mappings.parts[index].macs for index in some) for some in (*coming, *going)}
    loss = {some: sum(losses[index] for index in some) for some in macs}
    found = []
    for some, others in itertools.product(coming, going):
        gain, promise = macs[some] - macs[others], loss[some] - loss[others]
        if gain > 0 and not (len(some) == 2 and len(others) == 2):
            found.append(((0.0, -gain) if promise <= room else (promise - room, -gain), some, others))
    first = heapq.nsmallest(_CONSIDERED, found)
    return [(current | frozenset(some)) - frozenset(others) for _, some, others in first]
