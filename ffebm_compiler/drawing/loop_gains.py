"""A hybrid measured along its loop gain, for the slider of its page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ffebm_compiler.drawing.measurements import GainPoint
from ffebm_compiler.drawing.plots import feedback_sweep
from ffebm_compiler.reports.checks import compare
from ffebm_compiler.reports.numbers import number_of

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["loop_gain_points"]


def loop_gain_points(
    hybrid: HybridCore,
    *inputs: Any,
    evaluate: Callable[[HybridCore], float] | None = None,
    label: str = "accuracy",
    feedbacks: Iterable[float] = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5),
) -> list[GainPoint]:
    """Compare a hybrid with its source at each loop gain κ, for the slider of the page; its own feedback is restored.

    `evaluate(hybrid)` adds a figure of your own at each point, and `label` is its name.

    Raises:
        InputError: for a loop gain outside (0, 1), or a hybrid without blocks.
    """
    points: list[GainPoint] = []

    def measure(changed: HybridCore) -> float:
        comparison = compare(changed, inputs, {})
        value = None if evaluate is None else number_of(evaluate(changed), "at a loop gain")
        points.append(GainPoint(0.0, comparison, value, label if evaluate is not None else ""))
        return comparison.output

    measured = feedback_sweep(hybrid, measure, feedbacks)
    return [
        GainPoint(feedback, point.comparison, point.value, point.label)
        for feedback, point in zip(measured, points, strict=True)
    ]
