"""Measure which layers may be analog, and search for the mapping with the most analog multiply-accumulates."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from ffebm_compiler.accuracy.evaluation import Measure, Setting
from ffebm_compiler.accuracy.journal import Journal
from ffebm_compiler.accuracy.parts import Part
from ffebm_compiler.accuracy.runs import run

__all__ = ["Mapping", "Mappings", "search"]

_RUNGS = 2000
"""Mappings with the most multiply-accumulates for their losses that are kept at most."""
_TRIALS = 2
"""How many mappings the improvement measures for each part at most."""
_AGAIN = 2
"""How many it measures at least after a mapping was refused, if it may measure any."""
_CONSIDERED = 1000
_PAIRS = 64
"""Up to so many parts, two may become analog in one step."""

Mapping = frozenset[int]
"""Numbers of the parts that are analog."""
Refused = Collection[Mapping]


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
    deviations: dict[Mapping, float | None] = field(default_factory=dict)
    """Mean deviation of its outputs from the source's (`outputs.py`), where `evaluate` shows it."""

    def macs(self, mapping: Mapping) -> int:
        """Multiply-accumulates of the analog layers."""
        return sum(self.parts[index].macs for index in mapping)

    def drops(self, mappings: Iterable[Mapping], title: str) -> list[float]:
        """The mean drop of each mapping over the draws: source − value, or the other way round."""
        wanted = list(mappings)
        draws = range(self.draws)
        settings = {mapping: self._settings(mapping, draws) for mapping in wanted if mapping not in self.seen}
        if settings:
            run(self.measure, [each for some in settings.values() for each in some], title, self.journal, self.executor)
        for mapping, some in settings.items():
            self.seen[mapping] = self._mean(some)
            known = all(self.journal.results[each.key].get("deviation") is not None for each in some)
            found = [self.journal.number(each.key, "deviation") for each in some] if known else []
            self.deviations[mapping] = statistics.fmean(found) if known else None
        return [self.seen[mapping] for mapping in wanted]

    def drop(self, mapping: Mapping) -> float:
        """The mean drop of one mapping."""
        return self.drops([mapping], "mappings")[0]

    def losses(self) -> list[float]:
        """What each part alone on devices costs: the deviation of the outputs, or the drop where that is not known.

        Deviations add up, and are told apart where an accuracy does not move. No loss is below 0.
        """
        singles = [frozenset({index}) for index in range(len(self.parts))]
        drops = self.drops(singles, "layers alone")
        deviations = [self.deviations.get(each) for each in singles]
        known = [each for each in deviations if each is not None]
        return known if len(known) == len(singles) else [max(drop, 0.0) for drop in drops]

    def drop_again(self, mapping: Mapping) -> float:
        """The mean drop of a mapping over twice as many other draws, which flatter no mapping that a search chose."""
        settings = self._settings(mapping, range(self.draws, 3 * self.draws))
        run(self.measure, settings, "screening", self.journal, self.executor)
        return self._mean(settings)

    def _mean(self, settings: Sequence[Setting]) -> float:
        values = [self.journal.number(each.key) for each in settings]
        return statistics.fmean(self.sign * (self.source - value) for value in values)

    def _settings(self, mapping: Mapping, draws: Iterable[int]) -> list[Setting]:
        held = [self.parts[index] for index in sorted(mapping)]
        operations = tuple(name for part in held for name in part.operations)
        settling = tuple(dict.fromkeys(block for part in held for block in part.blocks))
        named = ", ".join(repr(path) for part in held[:3] for path in part.paths) + ", ..." * (len(held) > 3)
        told = f"layers {named} on devices" if len(held) > 1 else f"layer {named} on devices"
        key = ",".join(map(str, sorted(mapping)))
        return [Setting(f"analog {key} | {draw}", told, operations, settling, draw) for draw in draws]


def search(
    mappings: Mappings, most: float, refused: Refused = (), fixed: Mapping = frozenset(), trials: int | None = None
) -> Iterator[Mapping]:
    """Mappings whose measured drop is at most `most`: that with the most analog multiply-accumulates first.

    1. The loss of every part alone: the deviation of the outputs, which adds up, or the drop.
    2. As if losses added up, the mappings with the most multiply-accumulates for their sum of losses: the rungs of a
       ladder from nothing to everything analog. Bisection finds the highest rung whose own drop, measured as a whole,
       is within the budget.
    3. Parts become analog in the order of their multiply-accumulates, each if the drop stays within the budget.
    4. The best mapping of all these is improved while measurements allow: digital parts become analog again, or change
       places with analog ones of fewer multiply-accumulates. Steps that the losses promise to be within the budget
       come first.
    5. Who asks for the next mapping refuses the last one. Then 3 and 4 are done again without it, 4 with a few
       measurements more.

    Args:
        mappings: what is measured.
        most: the largest drop.
        refused: mappings that count as above the budget, whatever was measured.
        fixed: parts that stay analog.
        trials: how many mappings step 4 measures at most. None is two for each part.

    Yields:
        The largest mapping within the budget, and, each time it is refused, the largest of those found without it.
    """
    refused = set(refused)

    def within(mapping: Mapping) -> bool:
        return mapping not in refused and mappings.drop(mapping) <= most

    everything = frozenset(range(len(mappings.parts)))
    if within(everything):
        yield everything
        refused.add(everything)
    losses = mappings.losses()
    free = sorted(everything - fixed)
    rungs = [fixed | some for some in _ladder(mappings, free, losses)]
    low, high = -1, len(rungs) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if not rungs[middle] or within(rungs[middle]):
            low = middle
        else:
            high = middle

    def best() -> Mapping | None:
        found = (each for each in mappings.seen if each and fixed <= each and within(each))
        return min(found, key=lambda each: (-mappings.macs(each), mappings.seen[each]), default=None)

    trials = left = _TRIALS * len(free) if trials is None else trials
    while True:
        _by_macs(mappings, free, fixed, within)
        left = _improve(mappings, best() or fixed, within, fixed, losses, left)
        found = best()
        if found is None:
            return
        yield found
        refused.add(found)
        left = max(left, min(trials, _AGAIN))


@dataclass(frozen=True)
class _Rung:
    """Some parts, by the last of them and the rest."""

    loss: float = 0.0
    macs: int = 0
    last: int | None = None
    rest: _Rung | None = None

    def parts(self) -> Mapping:
        """All of them."""
        found, rung = set(), self
        while rung.last is not None and rung.rest is not None:
            found.add(rung.last)
            rung = rung.rest
        return frozenset(found)


def _ladder(mappings: Mappings, free: Sequence[int], losses: Sequence[float]) -> list[Mapping]:
    """Some parts, more and more: no others have as many multiply-accumulates and no larger sum of losses.

    Where there are too many, some of them are left out.
    """
    rungs = [_Rung()]
    for index in free:
        macs = mappings.parts[index].macs
        more = [_Rung(rung.loss + losses[index], rung.macs + macs, index, rung) for rung in rungs]
        highest = -1
        kept = []
        for rung in heapq.merge(rungs, more, key=lambda each: (each.loss, -each.macs)):
            if rung.macs > highest:
                highest = rung.macs
                kept.append(rung)
        step = -(-len(kept) // _RUNGS)
        rungs = [*kept[:-1:step], kept[-1]]
    return [rung.parts() for rung in rungs]


def _by_macs(mappings: Mappings, free: Sequence[int], fixed: Mapping, within: Callable[[Mapping], bool]) -> None:
    """Measure how parts become analog one by one within the budget, those with the most multiply-accumulates first."""
    mapping = fixed
    for index in sorted(free, key=lambda index: -mappings.parts[index].macs):
        if within(mapping | {index}):
            mapping |= {index}


def _improve(
    mappings: Mappings,
    start: Mapping,
    within: Callable[[Mapping], bool],
    fixed: Mapping,
    losses: Sequence[float],
    trials: int,
) -> int:
    """Add digital parts and exchange them while that gives more analog multiply-accumulates within the budget.

    Returns how many trials are left.
    """

    def lost(mapping: Mapping) -> float:
        return sum(losses[index] for index in mapping)

    current, left = start, trials
    improved = True
    while improved and left > 0:
        improved = False
        largest = max((lost(mapping) for mapping in mappings.seen if within(mapping)), default=0.0)
        for mapping in _steps(mappings, current, fixed, losses, largest - lost(current)):
            if mapping in mappings.seen and not within(mapping):
                continue
            if left <= 0:
                break
            left -= mapping not in mappings.seen
            if within(mapping):
                current, improved = mapping, True
                break
    return left


def _steps(mappings: Mappings, current: Mapping, fixed: Mapping, losses: Sequence[float], room: float) -> list[Mapping]:
    """Mappings with more analog multiply-accumulates, one step away: up to two parts in, and up to two out.

    Those come first whose losses promise to fit into the room that is left, by what they gain: the sum of losses grows
    up to the largest of a mapping within the budget. The others follow by how little they promise to exceed it.
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
