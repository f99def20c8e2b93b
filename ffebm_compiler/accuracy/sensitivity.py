"""`sensitivity`: the loss that the devices of each weight and each block cause on their own."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from ffebm_compiler.accuracy.evaluation import Evaluate, Measure, Setting, check_repeats, identity_of, whole_number
from ffebm_compiler.accuracy.journal import Journal
from ffebm_compiler.accuracy.parts import Part, parts_of
from ffebm_compiler.accuracy.runs import check_executor, run
from ffebm_compiler.accuracy.sensitivity_report import Loss, Sensitivity
from ffebm_compiler.errors import InputError
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.runtime.devices.devices import Devices, devices_of
from ffebm_compiler.runtime.devices.laws import checked_number

__all__ = ["sensitivity"]


@dataclass(frozen=True)
class _Row:
    """A row of the result: the settings of its draws, and what it is of."""

    name: str
    kind: str
    blocks: tuple[str, ...]
    macs: int
    told: str
    operations: tuple[str, ...]
    settling: tuple[str, ...] | None = None
    draws: int = 1
    key: str = ""
    """Names what is measured. A block of one layer is measured as its weight."""

    def settings(self) -> list[Setting]:
        """One for each draw."""
        return [
            Setting(f"{self.key} | {draw}", self.told, self.operations, self.settling, draw)
            for draw in range(self.draws)
        ]


def sensitivity(
    hybrid: HybridModel,
    evaluate: Evaluate,
    devices: str | Devices | None = None,
    *,
    draws: int = 3,
    age: float = 0.0,
    higher_is_better: bool = True,
    executor: Executor | None = None,
    file: str | Path | None = None,
) -> Sensitivity:
    """Measure which weights and which blocks bear their devices.

    With m(P) the metric while only the part P is on devices and all else computes exactly, and m(∅) that of the ideal
    hybrid, the loss of P is the mean over the draws of m(∅) − m(P) (the other way round for a metric that should be
    small), with its standard error. Beside it stands the deviation of the outputs from the source's, which tells layers
    apart where a metric does not move. A weight is on devices with all layers that read it, and with the converters of
    their blocks. A block is on devices as a whole. The loss of a block's *feedback* is that of the ideal hybrid in
    which this block alone settles, against the source's own value.

    Args:
        hybrid: the hybrid, which is not changed. It may be on devices or not.
        evaluate: takes a network in evaluation mode and returns a number, such as the accuracy on validation data.
            It must return the same number for the same network.
        devices: a preset's name or a `Devices`. None takes those of the hybrid. Draw k has their seed + k.
        draws: how many devices of each kind are drawn.
        age: seconds since the devices were programmed.
        higher_is_better: whether the metric should be large. False for a loss or a perplexity.
        executor: an executor of `concurrent.futures`, such as a process pool, whose workers measure. The result is the
            same as without one. Processes need an `evaluate` that can be pickled.
        file: keeps the finished measurements (JSON). An interrupted call goes on from it.

    Returns:
        A `Sensitivity`: print it, or draw it by `save_svg`.

    Raises:
        InputError: there are no devices or no blocks; `evaluate` raises an error, is not deterministic, or returns no
            finite number; an argument is out of range; the file holds measurements of something else.
    """
    if not isinstance(hybrid, HybridModel):
        raise InputError(f"hybrid is a {type(hybrid).__name__}; expected a HybridModel, from ffebm.convert()")
    chosen = devices_of(devices) or hybrid.devices
    if chosen is None:
        raise InputError(
            "sensitivity needs devices, and this hybrid computes exactly: pass devices='pcm', another preset or a "
            "Devices(...)"
        )
    if not callable(evaluate):
        raise InputError(f"evaluate is a {type(evaluate).__name__}; expected a function of a network")
    parts = parts_of(hybrid.plan)
    if not parts:
        raise InputError(
            "the plan has no analog block, so that there is no layer to measure: print(hybrid.plan) says why each "
            "layer is digital. Convert with other hardware, or without force_digital"
        )
    draws = whole_number("draws", draws, 1)
    checked_number("age", age, remedy="seconds since the devices were programmed")
    check_executor(executor)
    measure = Measure(hybrid, evaluate, chosen, float(age))
    source = check_repeats(measure, Setting("source", "the source's own computation", settling=()))
    ideal, _ = measure.measured(Setting("ideal", "the ideal hybrid"))
    rows = _rows(hybrid, parts, draws)
    of = identity_of(hybrid, measure, source) | {"value of the ideal hybrid": repr(ideal)}
    journal = Journal(file, "sensitivity", of)
    settings: dict[str, Setting] = {}
    for setting in (setting for row in rows for setting in row.settings()):
        settings.setdefault(setting.key, setting)
    run(measure, list(settings.values()), "sensitivity", journal, executor)
    sign = 1.0 if higher_is_better else -1.0

    def loss(row: _Row) -> Loss:
        before = source if row.kind == "feedback" else ideal
        values = [journal.number(setting.key) for setting in row.settings()]
        keys = [setting.key for setting in row.settings()]
        known = all(journal.results[key].get("deviation") is not None for key in keys)
        deviation = statistics.fmean(journal.number(key, "deviation") for key in keys) if known else None
        found = tuple(sign * (before - value) for value in values)
        return Loss(row.name, row.kind, row.blocks, row.macs, found, deviation)

    losses = tuple(map(loss, rows))
    return Sensitivity(
        model=hybrid.plan.model,
        hardware=hybrid.plan.hardware.name,
        devices=chosen,
        age=float(age),
        draws=draws,
        source=source,
        ideal=ideal,
        total_macs=hybrid.plan.total_macs,
        losses=losses,
    )


def _rows(hybrid: HybridModel, parts: Sequence[Part], draws: int) -> list[_Row]:
    everything = tuple(op for part in parts for op in part.operations)
    total = sum(part.macs for part in parts)
    names = tuple(block.name for block in hybrid.plan.blocks)
    rows = [
        _Row("all layers", "all", names, total, "all layers on devices", everything, draws=draws),
    ]
    for part in parts:
        told = f"layer {', '.join(map(repr, part.paths))} on devices"
        rows.append(_Row(part.name, "weight", part.blocks, part.macs, told, part.operations, draws=draws))
    for block in hybrid.plan.blocks:
        held = tuple(op for op in everything if op in block.operations)
        told = f"{block.name} on devices"
        rows.append(_Row(block.name, "block", (block.name,), block.macs, told, held, draws=draws))
        if hybrid.energy_blocks[block.name].program.coupled:
            told = f"the feedback of {block.name}"
            rows.append(_Row(block.name, "feedback", (block.name,), block.macs, told, (), (block.name,)))
    keys: dict[object, str] = {}
    for row in rows:
        keys.setdefault((row.operations, row.settling), f"{row.kind} {row.name}")
    return [replace(row, key=keys[row.operations, row.settling]) for row in rows]
