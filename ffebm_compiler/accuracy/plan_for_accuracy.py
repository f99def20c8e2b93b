"""`plan_for_accuracy`: as much analog as a budget of accuracy allows, found by sensitivity and measured afterwards."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from ffebm_compiler.accuracy.accuracy_plan import AccuracyPlan, AccuracyReport, DigitalLayer
from ffebm_compiler.accuracy.evaluation import Evaluate, whole_number
from ffebm_compiler.accuracy.mappings import Mapping as Layers
from ffebm_compiler.accuracy.mappings import Refused, search
from ffebm_compiler.accuracy.parts import Part
from ffebm_compiler.accuracy.planner import Planner, plan_options
from ffebm_compiler.convert import DEFAULT_FEEDBACK
from ffebm_compiler.errors import PlanError
from ffebm_compiler.runtime.devices.devices import Devices
from ffebm_compiler.runtime.energies.base import Energy

__all__ = ["best_plan", "plan_for_accuracy"]

_BUDGETS = (1.0, 0.85, 0.7, 0.5, 0.25, 0.0)
"""Shares of the allowed drop that the search is given, one after the other, until a mapping is confirmed."""
_SCREENED = 32
"""Mappings of one search that are measured with further draws at most."""
_CONFIRMED = 4
"""Mappings of one search that are confirmed at most."""


def plan_for_accuracy(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    evaluate: Evaluate,
    *,
    devices: str | Devices,
    max_drop: float = 0.01,
    kwargs: Mapping[str, Any] | None = None,
    feedback: float | str = DEFAULT_FEEDBACK,
    energy: str | Energy = "hopfield",
    draws: int = 3,
    age: float = 0.0,
    higher_is_better: bool = True,
    trials: int | None = None,
    executor: Executor | None = None,
    file: str | Path | None = None,
    **as_plan: Any,
) -> AccuracyPlan:
    """The plan with the most analog multiply-accumulates whose measured accuracy drops by at most `max_drop`.

    The loss of every layer alone says in which order layers become digital. Whole mappings are then measured: how many
    layers must be digital, which of them may be analog again, and which change places (`mappings.search`). The best
    mapping becomes a plan. Its own hybrid is measured with devices that the search has not seen. Where it drops by more
    than `max_drop`, the next best mapping is taken, or the search is repeated within a smaller budget.

    Args:
        model: the network, which is not changed.
        example_inputs, kwargs: as for `convert`.
        evaluate: takes a network in evaluation mode and returns a number, the same for the same network.
        devices: a preset's name or a `Devices`. Draw k has their seed + k.
        max_drop: the largest drop, in the units of `evaluate` (0.01 is one point of an accuracy from 0 to 1), as the
            mean over the draws.
        feedback, energy: as for `convert`.
        draws: how many devices each mapping is measured with.
        age: seconds since the devices were programmed.
        higher_is_better: whether the metric should be large.
        trials: how many mappings the improvement measures at most. None is two for each layer.
        executor: an executor of `concurrent.futures` whose workers measure.
        file: keeps the finished measurements (JSON). An interrupted call goes on from it.
        as_plan: the arguments of `ffebm.plan`, such as `hardware` and `fold_batchnorm`. Layers of `force_analog` stay
            analog.

    Returns:
        An `AccuracyPlan`, which is a `Plan` with a `report`.

    Raises:
        PlanError: no analog layer is possible within `max_drop`. Says what is reachable.
        InputError: `evaluate` raises an error, is not deterministic, or returns no finite number; an argument is out of
            range; the file holds measurements of something else.
    """
    planner = Planner.of(
        model,
        example_inputs,
        evaluate,
        devices=devices,
        max_drop=max_drop,
        kwargs=kwargs,
        settings={"feedback": feedback, "energy": energy},
        draws=draws,
        age=age,
        higher_is_better=higher_is_better,
        executor=executor,
        file=file,
        options=plan_options(as_plan, ("feedback",)),
    )
    if trials is not None:
        trials = whole_number("trials", trials, 0)
    return best_plan(planner, lambda most, refused: search(planner.mappings, most, refused, planner.fixed, trials))


def best_plan(planner: Planner, find: Callable[[float, Refused], Iterator[Layers]]) -> AccuracyPlan:
    """The plan of the first mapping that unseen devices confirm.

    A search picks mappings that its own devices flatter. So further devices screen the best of them, unless nothing
    else was measured, and the search goes on without those that they refuse. If unseen devices confirm none of those
    that pass, it begins again within a smaller budget.

    Args:
        planner: what is measured.
        find: takes a budget and mappings that are refused, and yields mappings whose measured drop is within it, the
            best first. It is asked for another one if a mapping is refused.

    Raises:
        PlanError: they confirm none. Says what is reachable.
    """
    tried: dict[Layers, float] = {}
    for share in _BUDGETS:
        confirmed = 0
        for mapping in itertools.islice(find(share * planner.max_drop, tuple(tried)), _SCREENED):
            if len(planner.mappings.seen) > 1:
                tried[mapping] = planner.mappings.drop_again(mapping)
                if tried[mapping] > planner.max_drop:
                    continue
            if confirmed == _CONFIRMED:
                break
            confirmed += 1
            plan = planner.plan_of(mapping)
            drops = planner.confirmed(plan)
            tried[mapping] = statistics.fmean(drops)
            if tried[mapping] <= planner.max_drop:
                return AccuracyPlan.measured(plan, _report(planner, mapping, drops))
    raise _unreachable(planner, tried)


def _report(planner: Planner, mapping: Layers, drops: Sequence[float]) -> AccuracyReport:
    mappings, drop = planner.mappings, statistics.fmean(drops)
    alone = {next(iter(one)): loss for one, loss in mappings.seen.items() if len(one) == 1}
    parts: Sequence[Part] = mappings.parts
    digital = tuple(
        DigitalLayer(part.name, part.paths, part.macs, alone.get(index, math.nan))
        for index, part in enumerate(parts)
        if index not in mapping
    )
    everything = frozenset(range(len(parts)))
    return AccuracyReport(
        devices=planner.measure.devices,
        age=planner.measure.age,
        max_drop=planner.max_drop,
        source=mappings.source,
        value=mappings.source - mappings.sign * drop,
        drop=drop,
        error=statistics.stdev(drops) / len(drops) ** 0.5 if len(drops) > 1 else None,
        full_drop=mappings.seen[everything],
        draws=mappings.draws,
        mappings=len(mappings.seen),
        digital=digital,
    )


def _unreachable(planner: Planner, tried: Mapping[Layers, float]) -> PlanError:
    mappings, fixed = planner.mappings, planner.fixed
    drops = {mapping: drop for mapping, drop in mappings.seen.items() if mapping and fixed <= mapping}
    drops |= {mapping: max(drop, drops.get(mapping, drop)) for mapping, drop in tried.items()}
    least = min(drops, key=lambda mapping: (drops[mapping], -mappings.macs(mapping)))
    paths = [path for index in sorted(least) for path in mappings.parts[index].paths]
    share = 100 * mappings.macs(least) / max(1, planner.measure.hybrid.plan.total_macs)
    named = ", ".join(map(repr, paths[:3])) + ", ..." * (len(paths) > 3)
    kept = " that force_analog keeps analog" if fixed and least == fixed else ""
    return PlanError(
        f"max_drop={planner.max_drop:g} is not reachable with an analog layer on {planner.measure.devices.name}: the "
        f"smallest drop of {len(drops)} measured mappings is {drops[least]:.3g}, with {share:.1f} % of the "
        f"multiply-accumulates analog ({named}{kept}). Allow such a drop, use better devices or a smaller feedback, or "
        "leave the network digital"
    )
