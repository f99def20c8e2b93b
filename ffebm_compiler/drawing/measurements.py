"""Measurements of a hybrid for its page: points along the loop gain, and the gradients of each block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ffebm_compiler.drawing.overlay import check_kind, same_blocks
from ffebm_compiler.errors import InputError

if TYPE_CHECKING:
    from ffebm_compiler.plan_data import BlockPlan, PlanData
    from ffebm_compiler.reports.checks import Comparison, GradientReport

__all__ = ["GainPoint", "gains_of", "gradients_of"]

_AGREES = 0.999
"""The cosine from which on a gradient counts as that of the network."""


@dataclass(frozen=True)
class GainPoint:
    """What was measured at one loop gain κ."""

    feedback: float
    comparison: Comparison
    """Deviations from the source, and sweeps."""
    value: float | None = None
    """What `evaluate` gave, such as an accuracy; None without it."""
    label: str = ""


def gains_of(plan: PlanData, points: Sequence[GainPoint]) -> dict[str, Any] | None:
    """The points as JSON values, by rising loop gain; None without points. What was not finite is null.

    Raises:
        InputError: where a point is of another plan, or two are of one loop gain.
    """
    check_kind("loop_gains", points, Sequence, "drawing.loop_gain_points(hybrid, x)")
    if not points:
        return None
    for point in points:
        check_kind("a point of loop_gains", point, GainPoint, "drawing.loop_gain_points(hybrid, x)")
        same_blocks(plan, set(point.comparison.blocks), "loop gain's comparison")
    if len({point.feedback for point in points}) < len(points):
        raise InputError("two points are of one loop gain: give each loop gain once")
    return {
        "label": points[0].label,
        "points": [
            {
                "feedback": point.feedback,
                "output": _finite(point.comparison.output),
                "value": None if point.value is None else _finite(point.value),
                "blocks": {name: _finite(value) for name, value in point.comparison.blocks.items()},
                "sweeps": dict(point.comparison.sweeps),
            }
            for point in sorted(points, key=lambda point: point.feedback)
        ],
    }


def gradients_of(block: BlockPlan, report: GradientReport | None) -> dict[str, Any] | None:
    """How a block's gradients agree with float64 unrolled ones, as JSON values; None without a weight in the report.

    `good` says whether every weight's gradient by the hybrid's own estimator has a cosine of 0.999 or more.
    """
    names = [] if report is None else [name for name in block.weights if name in report.agreements]
    if report is None or not names:
        return None
    worst = min(report[name][report.own].cosine for name in names)
    return {
        "good": bool(worst >= _AGREES),
        "text": f"worst cosine of {report.own} {worst:.6f}",
        "rows": [
            (name, estimator, f"{row.cosine:.6f}", f"{row.relative_error:.1e}")
            for name in names
            for estimator, row in report[name].items()
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
