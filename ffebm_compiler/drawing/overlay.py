"""Overlays: measured numbers on the blocks of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ffebm_compiler.errors import InputError
from ffebm_compiler.reports.checks import Comparison, GradientReport
from ffebm_compiler.reports.diagnosis import Diagnosis

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import PlanData

__all__ = [
    "Overlay",
    "check_kind",
    "deviation_overlay",
    "gradient_overlay",
    "loop_gain_overlay",
    "relaxation_overlay",
    "same_blocks",
]


@dataclass(frozen=True)
class Overlay:
    """A number for each energy block."""

    name: str
    sentence: str
    """A sentence that says what is measured. It is shown when the overlay is chosen."""
    values: Mapping[str, float]
    """Block name -> value."""
    logarithmic: bool = False
    """Whether the length of a bar shows the order of magnitude (over six of them) instead of the value."""

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values: text and length of a bar (0 to 1) for each block."""
        finite = [abs(value) for value in self.values.values() if math.isfinite(value)]
        top = max(finite, default=0.0) or 1.0
        return {
            "name": self.name,
            "sentence": self.sentence,
            "values": {
                block: {"text": f"{self.name} {value:.3g}", "share": self._share(value, top)}
                for block, value in self.values.items()
            },
        }

    def _share(self, value: float, top: float) -> float:
        if not math.isfinite(value):
            return 1.0
        if not self.logarithmic:
            return abs(value) / top
        return 0.0 if value == 0 else max(0.0, 1 + math.log10(abs(value) / top) / 6)


def deviation_overlay(plan: PlanData, comparison: Comparison) -> Overlay:
    """Each block's relative deviation from the source, from `hybrid.compare(x)`.

    Raises:
        InputError: where the comparison is of another plan.
    """
    check_kind("comparison", comparison, Comparison, "hybrid.compare(x)")
    same_blocks(plan, set(comparison.blocks), "comparison")
    sentence = f"deviation from the source, ‖hybrid − source‖/‖source‖; {comparison.output:.3g} at the output"
    return Overlay("deviation", sentence, dict(comparison.blocks))


def gradient_overlay(plan: PlanData, report: GradientReport) -> Overlay:
    """Each block's largest 1 − cos(gradient, float64 unrolled) by its own estimator, from `check_gradients`.

    Raises:
        InputError: where the report holds no parameter of the plan's blocks.
    """
    check_kind("gradients", report, GradientReport, "ffebm.check_gradients(hybrid, inputs, loss_fn)")
    estimator = report.own
    values = {}
    for block in plan.blocks:
        cosines = [report[name][estimator].cosine for name in block.weights if name in report.agreements]
        if cosines:
            values[block.name] = max(0.0, 1 - min(cosines))
    if not values:
        raise InputError(
            "the gradient report names no weight of the plan's blocks: make both from the same hybrid, with "
            "ffebm.check_gradients(hybrid, inputs, loss_fn)"
        )
    sentence = f"largest 1 − cosine of a weight's {estimator} gradient against float64 unrolled, on a logarithmic scale"
    return Overlay(f"1 − cos {estimator}", sentence, values, logarithmic=True)


def loop_gain_overlay(hybrid: HybridCore) -> Overlay:
    """Each block's certified loop gain κ = ρ²."""
    values = {block.name: float(block.loop_gain) for block in hybrid.blocks}
    return Overlay("loop gain", "loop gain κ = ρ², below 1 a block is certain to settle; 0 without feedback", values)


def relaxation_overlay(plan: PlanData, diagnosis: Diagnosis) -> Overlay:
    """The factor by which each block's residual shrinks per sweep, from `hybrid.diagnose(x)`.

    Raises:
        InputError: where the diagnosis is of another plan.
    """
    check_kind("diagnosis", diagnosis, Diagnosis, "hybrid.diagnose(x)")
    same_blocks(plan, set(diagnosis.blocks), "diagnosis")
    values = {name: block.rate for name, block in diagnosis.blocks.items()}
    sentence = "factor by which a block's residual changes per sweep, measured; below 1 it settles, 0 without feedback"
    return Overlay("rate", sentence, values)


def check_kind(name: str, value: object, kind: type, made: str) -> None:
    """Refuse what is no measurement of this kind.

    Raises:
        InputError: it is something else. Names the call that makes one.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name} is a {type(value).__name__}; expected a {kind.__name__}, which {made} returns")


def same_blocks(plan: PlanData, names: set[str], what: str) -> None:
    """Refuse a measurement of another plan.

    Raises:
        InputError: a name is no block of the plan.
    """
    known = {block.name for block in plan.blocks}
    if not names <= known:
        raise InputError(
            f"the {what} names {min(names - known)!r}, which is no block of the plan: make both from the same hybrid"
        )
