"""What `plan_for_accuracy` measures: mappings of a hybrid, and the hybrids of plans that are made of them."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from ffebm_compiler.accuracy.evaluation import Evaluate, Measure, Setting, check_repeats, identity_of, whole_number
from ffebm_compiler.accuracy.journal import Journal
from ffebm_compiler.accuracy.mappings import Mapping as Layers
from ffebm_compiler.accuracy.mappings import Mappings
from ffebm_compiler.accuracy.parts import parts_of
from ffebm_compiler.accuracy.runs import check_executor, run
from ffebm_compiler.convert import convert
from ffebm_compiler.convert import plan as make_plan
from ffebm_compiler.errors import InputError, PlanError
from ffebm_compiler.hardware.layers import matches
from ffebm_compiler.plan import Plan
from ffebm_compiler.runtime.devices.devices import Devices, devices_of
from ffebm_compiler.runtime.devices.laws import checked_number

__all__ = ["Planner", "plan_options"]

_UNSEEN = 1_000_003
"""Added to the seeds of the devices that confirm a mapping. The search has not seen those."""


def plan_options(given: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """The arguments that are handed to `ffebm.plan`.

    Raises:
        InputError: `ffebm.plan` has no such argument.
    """
    known = [name for name in list(signature(make_plan).parameters)[3:] if name not in without]
    for name in given:
        if name not in known:
            raise InputError(f"there is no argument {name!r}; those of ffebm.plan are {', '.join(known)}")
    return dict(given)


@dataclass
class Planner:
    """One call: what is measured, and how mappings become plans."""

    model: nn.Module | ExportedProgram
    example_inputs: Any
    kwargs: Mapping[str, Any] | None
    options: dict[str, Any]
    settings: dict[str, Any]
    """Feedback and energy."""
    measure: Measure
    mappings: Mappings
    max_drop: float
    fixed: Layers
    """Parts of `force_analog`."""

    @classmethod
    def of(
        cls,
        model: nn.Module | ExportedProgram,
        example_inputs: Any,
        evaluate: Evaluate,
        *,
        devices: str | Devices,
        max_drop: float,
        kwargs: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any],
        draws: int = 3,
        age: float = 0.0,
        higher_is_better: bool = True,
        executor: Executor | None = None,
        file: str | Path | None = None,
        options: Mapping[str, Any],
    ) -> Planner:
        """Convert the model, and check the arguments of `plan_for_accuracy`."""
        chosen = devices_of(devices)
        if chosen is None:
            raise InputError("plan_for_accuracy needs devices: pass devices='pcm', another preset or a Devices(...)")
        if not callable(evaluate):
            raise InputError(f"evaluate is a {type(evaluate).__name__}; expected a function of a network")
        budget = checked_number("max_drop", max_drop, remedy="the largest drop of the metric, such as 0.01")
        draws = whole_number("draws", draws, 1)
        checked_number("age", age, remedy="seconds since the devices were programmed")
        check_executor(executor)
        hybrid = convert(model, example_inputs, kwargs, **settings, **options)
        parts = parts_of(hybrid.plan)
        if not parts:
            raise PlanError(
                "no layer can be analog on this hardware, whatever the accuracy: print(ffebm.plan(...)) says why"
            )
        measure = Measure(hybrid, evaluate, chosen, float(age))
        source = check_repeats(measure, Setting("source", "the source's own computation", settling=()))
        of = identity_of(hybrid, measure, source)
        journal = Journal(file, "plan for accuracy", of)
        mappings = Mappings(measure, parts, source, journal, draws, 1.0 if higher_is_better else -1.0, executor)
        forced = options.get("force_analog", ())
        patterns = (forced,) if isinstance(forced, str) else tuple(forced)
        fixed = frozenset(i for i, part in enumerate(parts) if any(matches(path, patterns) for path in part.paths))
        return cls(model, example_inputs, kwargs, dict(options), dict(settings), measure, mappings, budget, fixed)

    def plan_of(self, mapping: Layers) -> Plan:
        """The plan whose analog layers are these."""
        parts = self.mappings.parts
        analog = [path for index in mapping for path in parts[index].paths]
        modules = set(self.measure.hybrid.plan.modules)
        forced, moved = [], []
        for index, part in enumerate(parts):
            if index in mapping:
                continue
            for path in part.paths:
                # A pattern names a module with all that is in it, so that layers without one of their own are moved.
                alone = path in modules and not any(other.startswith(f"{path}.") for other in analog)
                forced += [glob.escape(path)] if alone else []
                moved += [] if alone else list(part.operations)
        given = self.options.get("force_digital", ())
        patterns = (given,) if isinstance(given, str) else tuple(given)
        options = {**self.options, "force_digital": (*patterns, *forced)}
        plan = make_plan(self.model, self.example_inputs, self.kwargs, **options)
        for name in dict.fromkeys(moved):
            plan = plan.move(name, "digital")
        return plan

    def confirmed(self, plan: Plan) -> list[float]:
        """The drop of a plan's own hybrid for each unseen draw."""
        hybrid = convert(self.model, self.example_inputs, self.kwargs, plan=plan, **self.settings)
        seen = self.measure
        measure = Measure(hybrid, seen.evaluate, seen.devices, seen.age, seen.seed + _UNSEEN)
        operations = tuple(name for block in plan.blocks for name in block.operations)
        key = ",".join(plan.rejected)
        told = f"the plan with {len(plan.blocks)} blocks on devices"
        draws = range(self.mappings.draws)
        settings = [Setting(f"plan without {key} | {draw}", told, operations, None, draw) for draw in draws]
        journal = self.mappings.journal
        run(measure, settings, "confirming", journal, self.mappings.executor)
        values = [journal.number(each.key) for each in settings]
        return [self.mappings.sign * (self.mappings.source - value) for value in values]
