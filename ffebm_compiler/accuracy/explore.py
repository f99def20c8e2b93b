"""`explore`: accuracy, energy, latency and area of a network over hardware, loop gain and devices."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from ffebm_compiler.accuracy.evaluation import ONE_AT_A_TIME, Evaluate, Measure, Setting, check_repeats, whole_number
from ffebm_compiler.accuracy.exploration import Exploration, Point, Refused
from ffebm_compiler.accuracy.journal import Found, Journal, digest_of
from ffebm_compiler.accuracy.planner import plan_options
from ffebm_compiler.accuracy.runs import check_executor, run
from ffebm_compiler.convert import DEFAULT_FEEDBACK, convert
from ffebm_compiler.errors import ConvergenceError, HardwareError, InputError, PlanError, UnsupportedError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.presets import resolve_hardware
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.passes.partition.placement import placement_of
from ffebm_compiler.plan_data import PlanData
from ffebm_compiler.runtime.devices.devices import Devices, devices_of
from ffebm_compiler.runtime.devices.laws import checked_number
from ffebm_compiler.runtime.energies.base import Energy
from ffebm_compiler.runtime.energies.choice import energy_of

__all__ = ["explore"]

_IDEAL = Devices()


@dataclass(frozen=True)
class _Choice:
    """One point of the grid."""

    hardware: Hardware
    feedback: float | str
    devices: Devices | None

    @property
    def key(self) -> str:
        """All of it, as JSON."""
        devices = None if self.devices is None else self.devices.to_dict()
        return json.dumps([self.hardware.to_dict(), self.feedback, devices], sort_keys=True)

    @property
    def told(self) -> str:
        """How an error names it."""
        devices = "ideal arithmetic" if self.devices is None else self.devices.name
        return f"hardware {self.hardware.name}, feedback {self.feedback}, devices {devices}"


@dataclass
class _Work:
    """Measure a point. The hybrid of the last hardware is kept, since a capture takes longest."""

    model: nn.Module | ExportedProgram
    example_inputs: Any
    kwargs: Mapping[str, Any] | None
    evaluate: Evaluate
    options: dict[str, Any]
    draws: int
    age: float
    made: tuple[Hardware, HybridModel] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which make their own hybrid."""
        return {**self.__dict__, "made": None}

    def hybrid(self, hardware: Hardware) -> HybridModel:
        """The hybrid on a fabric."""
        if self.made is None or self.made[0] != hardware:
            made = convert(self.model, self.example_inputs, self.kwargs, hardware=hardware, **self.options)
            self.made = hardware, made
        return self.made[1]

    def __call__(self, choice: _Choice) -> Found:
        """The numbers of a point, or why it cannot be."""
        try:
            with ONE_AT_A_TIME:  # torch captures one model at a time
                return self._measured(choice)
        except (HardwareError, UnsupportedError, PlanError, ConvergenceError) as error:
            return {"refused": str(error)}

    def _measured(self, choice: _Choice) -> Found:
        hybrid = self.hybrid(choice.hardware)
        if not hybrid.plan.blocks:
            raise UnsupportedError(_all_digital(hybrid))
        hybrid.set_feedback(choice.feedback)
        measure = Measure(hybrid, self.evaluate, choice.devices or _IDEAL, self.age)
        held: tuple[str, ...] = ()
        if choice.devices is not None:
            held = tuple(name for block in hybrid.plan.blocks for name in block.operations)
        draws = self.draws if choice.devices is not None else 1
        values = [measure.measured(Setting("", choice.told, held, None, draw))[0] for draw in range(draws)]
        report, plan = hybrid.cost_report(), hybrid.plan
        energy, chip, training = report.inference, report.chip_inference, report.training
        latency = report.latency
        return {
            "value": statistics.fmean(values),
            "error": statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
            "energy_low": energy.low,
            "energy_high": energy.high,
            "chip_energy_low": chip.low,
            "chip_energy_high": chip.high,
            "training_low": training.low,
            "training_high": training.high,
            "latency_low": latency.low,
            "latency_high": latency.high,
            "area": float(_crosspoints(plan)),
            "tiles": float(sum(block.tiles for block in plan.blocks)),
            "cores": float(placement_of(plan).cores) if plan.blocks else 0.0,
            "conversions": float(plan.conversions),
            "analog_share": plan.analog_share,
        }


def _crosspoints(plan: PlanData) -> int:
    """Places for devices on all tiles that are used; on tiles without a size, the devices."""
    fabric = plan.hardware
    if fabric.tile_rows is not None and fabric.tile_cols is not None:
        return sum(block.tiles for block in plan.blocks) * fabric.tile_rows * fabric.tile_cols
    layers = [plan.graph[name] for block in plan.blocks for name in block.operations]
    return sum(op.rows * op.cols * op.groups * fabric.devices_per_weight for op in layers)


def explore(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    evaluate: Evaluate,
    *,
    hardware: Sequence[str | Hardware] = ("crossbar-256",),
    feedback: Sequence[float | str] = (DEFAULT_FEEDBACK,),
    devices: Sequence[str | Devices | None] = (None,),
    kwargs: Mapping[str, Any] | None = None,
    energy: str | Energy = "hopfield",
    draws: int = 3,
    age: float = 0.0,
    higher_is_better: bool = True,
    executor: Executor | None = None,
    file: str | Path | None = None,
    **as_plan: Any,
) -> Exploration:
    """Accuracy, energy, latency and area of every combination of hardware, loop gain and devices.

    Accuracy is the mean of `evaluate` over the draws of the devices. Energy and latency of an inference are those of
    the hybrid's cost report, *modelled*, with the sweeps that each loop gain predicts: bottom-up, and at chip level
    where the hardware is a published chip. They are compared at chip level if all are chips. Latency is known where the
    hardware gives the times of a read. Area counts the crosspoints of all tiles in use.

    Args:
        model: the network, which is not changed.
        example_inputs, kwargs: as for `convert`.
        evaluate: takes a network in evaluation mode and returns a number, the same for the same network.
        hardware: presets' names or `Hardware`s.
        feedback: loop gains, or `"symmetric"`.
        devices: presets' names, `Devices`, or None for exact arithmetic.
        energy: as for `convert`.
        draws: how many devices of each kind are drawn.
        age: seconds since the devices were programmed.
        higher_is_better: whether the metric should be large.
        executor: an executor of `concurrent.futures` whose workers measure.
        file: keeps the finished points (JSON). An interrupted exploration goes on from it, also with more choices.
        as_plan: the arguments of `ffebm.plan`, such as `fold_batchnorm`.

    Returns:
        An `Exploration`: print it, or draw it by `save_html`. Combinations that are not possible, or do not settle,
        are listed with their reasons.

    Raises:
        InputError: `evaluate` raises an error, is not deterministic, or returns no finite number; an argument is out of
            range or a list is empty; the file is of another exploration.
    """
    if not callable(evaluate):
        raise InputError(f"evaluate is a {type(evaluate).__name__}; expected a function of a network")
    draws = whole_number("draws", draws, 1)
    checked_number("age", age, remedy="seconds since the devices were programmed")
    check_executor(executor)
    fabrics = [resolve_hardware(each) for each in _listed("hardware", hardware)]
    kind = energy_of(energy)
    gains = []
    for each in _listed("feedback", feedback):
        gains.append(kind.check_feedback(kind.default_feedback if each is DEFAULT_FEEDBACK else each))
    kinds = [devices_of(each) for each in _listed("devices", devices)]
    options = {**plan_options(as_plan, ("hardware", "feedback")), "energy": energy}
    choices = list(
        {
            choice.key: choice
            for choice in (_Choice(fabric, gain, each) for fabric in fabrics for gain in gains for each in kinds)
        }.values()
    )
    work = _Work(model, example_inputs, kwargs, evaluate, options, draws, float(age))
    hybrid = next((made for fabric in fabrics if (made := work.hybrid(fabric)).plan.blocks), work.hybrid(fabrics[0]))
    if not hybrid.plan.blocks:
        raise InputError(
            f"{_all_digital(hybrid)}: there is nothing to explore. Give hardware with larger cores or without limits"
        )
    source = check_repeats(
        Measure(hybrid, evaluate, _IDEAL), Setting("source", "the source's own computation", settling=())
    )
    of = {
        "model": hybrid.plan.model,
        "weights": digest_of(hybrid),
        "options": repr(sorted(options.items(), key=str)),
        "example inputs": str(hybrid.conversion.leaves if hybrid.conversion is not None else ()),
        "draws": str(draws),
        "age": repr(float(age)),
        "value of the source": repr(source),
    }
    journal = Journal(file, "exploration", of)
    run(work, choices, "exploring", journal, executor)
    points, refused = [], []
    for choice in choices:
        found = journal.results[choice.key]
        names = (choice.hardware.name, choice.feedback, "none" if choice.devices is None else choice.devices.name)
        if "refused" in found:
            refused.append(Refused(*names, str(found["refused"])))
        else:
            try:
                points.append(Point.of(*names, found))
            except InputError as error:
                raise InputError(f"{journal.path}: {error}") from error
    return Exploration(hybrid.plan.model, source, higher_is_better, tuple(points), tuple(refused))


def _all_digital(hybrid: HybridModel) -> str:
    """That a fabric holds no layer, with the reason of the first one."""
    why = next((f" ({layer}: {reason})" for layer, reason in hybrid.plan.rejected.items()), "")
    return f"no layer of the network is analog on {hybrid.plan.hardware.name}{why}"


def _listed(name: str, values: object) -> list[Any]:
    """The choices as a list. A single one may stand alone.

    Raises:
        InputError: there are none.
    """
    found = list(values) if isinstance(values, list | tuple) else [values]
    if not found:
        raise InputError(f"{name} is an empty list; expected choices to explore, such as the defaults")
    return found
