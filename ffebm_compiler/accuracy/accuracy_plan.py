"""`AccuracyPlan`: a plan and what its accuracy was measured to be."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields
from typing import Any

from ffebm_compiler.errors import PlanError
from ffebm_compiler.plan import Plan
from ffebm_compiler.plan_data import PlanData
from ffebm_compiler.reports.text import count, table_text
from ffebm_compiler.runtime.devices.devices import Devices

__all__ = ["AccuracyPlan", "AccuracyReport", "DigitalLayer"]


@dataclass(frozen=True)
class DigitalLayer:
    """A layer that stays digital for the sake of accuracy."""

    name: str
    """Its weight."""
    paths: tuple[str, ...]
    macs: int
    loss: float
    """What the metric loses if this layer alone is on devices."""


@dataclass(frozen=True)
class AccuracyReport:
    """What was measured for a plan."""

    devices: Devices
    age: float
    max_drop: float
    source: float
    """The metric of the source network."""
    value: float
    """The metric of the plan's hybrid on devices, mean over draws that the search has not seen."""
    drop: float
    """source − value, or the other way round for a metric that should be small."""
    error: float | None
    """Its standard error."""
    full_drop: float
    """The drop with every layer that fits on devices."""
    draws: int
    mappings: int
    """How many mappings were measured."""
    digital: tuple[DigitalLayer, ...]


@dataclass(frozen=True)
class AccuracyPlan(Plan):
    """A plan with as much analog as the accuracy allows: `convert(model, x, plan=it, devices=...)` builds it."""

    report: AccuracyReport | None = None
    """What was measured."""

    @classmethod
    def measured(cls, plan: PlanData, report: AccuracyReport) -> AccuracyPlan:
        """The plan with its report."""
        return cls(**{item.name: getattr(plan, item.name) for item in fields(PlanData) if item.init}, report=report)

    @property
    def measurement(self) -> AccuracyReport:
        """What was measured.

        Raises:
            PlanError: the plan was read from a file, which holds no measurements.
        """
        if self.report is None:
            raise PlanError("this plan was not measured: make it by ffebm.plan_for_accuracy()")
        return self.report

    def __str__(self) -> str:
        """The plan's table, and what was measured."""
        return "\n".join([super().__str__(), *([] if self.report is None else self._report_lines(self.report))])

    def _report_lines(self, report: AccuracyReport) -> list[str]:
        spread = "" if report.error is None else f" ± {report.error:.2g}"
        age = f", {report.age:g} s old" if report.age else ""
        words = (
            f"accuracy on {report.devices.name}{age} (devices modelled): {report.value:.4g}, a drop of "
            f"{report.drop:.3g}{spread} from {report.source:.4g} over {report.draws} draws (at most "
            f"{report.max_drop:g} was asked for; everything analog drops {report.full_drop:.3g}); "
            f"{report.mappings} mappings were measured",
        )
        lines = [line for text in words for line in textwrap.wrap(text, 110)]
        if report.digital:
            rows: list[tuple[Any, ...]] = [
                (layer.name, count(layer.macs), f"{layer.loss:+.3g}")
                for layer in sorted(report.digital, key=lambda layer: -layer.loss)
            ]
            lines.append("digital for the sake of accuracy:")
            lines.append(table_text("", ("weight", "MACs", "loss alone"), rows))
        return lines
