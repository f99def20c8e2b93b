"""Plots with matplotlib (`ffebm-compiler[plots]`): deviation, gradient agreement, accuracy against loop gain.

Each function returns a matplotlib `Figure`; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ffebm_compiler.drawing.raster import figure_class
from ffebm_compiler.errors import InputError

if TYPE_CHECKING:
    from ffebm_compiler.checks import Comparison, GradientReport
    from ffebm_compiler.hybrid import HybridModel

__all__ = ["feedback_sweep", "plot_deviation", "plot_feedback", "plot_gradients"]

_BLUE, _ORANGE, _GREY = "#0066a1", "#8a5200", "#6b6b6b"
_FLOOR = 1e-16
"""Smallest 1 − cosine that a logarithmic axis shows; float64 resolves no less."""


def plot_deviation(comparison: Comparison) -> Any:
    """Each block's relative deviation from the source, as bars, with the output as a line.

    Raises:
        InputError: where nothing was compared.
        ExportError: where matplotlib is missing.
    """
    if not comparison.blocks:
        raise InputError("the comparison holds no energy block: make it with hybrid.compare(x)")
    names, values = list(comparison.blocks), list(comparison.blocks.values())
    figure = figure_class()(figsize=(6.4, 1.4 + 0.28 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(names, values, color=_BLUE)
    axes.axvline(comparison.output, color=_ORANGE, linestyle="--", label=f"network output {comparison.output:.2g}")
    axes.invert_yaxis()
    axes.set_xlabel("deviation from the source, ‖hybrid − source‖ / ‖source‖")
    axes.legend(frameon=False)
    return figure


def plot_gradients(report: GradientReport) -> Any:
    """Each parameter's 1 − cosine against float64 unrolled, for every estimator, on a logarithmic axis.

    Raises:
        InputError: for a report without parameters.
        ExportError: where matplotlib is missing.
    """
    if not report.agreements:
        raise InputError("the gradient report holds no parameter: make it with ffebm.check_gradients(...)")
    names = list(report.agreements)
    figure = figure_class()(figsize=(7.2, 1.4 + 0.24 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for estimator, marker, colour in zip(
        report[names[0]], "os^Dv", (_BLUE, _ORANGE, _GREY, _BLUE, _ORANGE), strict=False
    ):
        distances = [max(1 - report[name][estimator].cosine, _FLOOR) for name in names]
        axes.plot(distances, range(len(names)), marker, color=colour, label=estimator, fillstyle="none")
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("1 − cosine with the float64 unrolled gradient")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False)
    return figure


def feedback_sweep(
    hybrid: HybridModel,
    evaluate: Callable[[HybridModel], float],
    feedbacks: Iterable[float] = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5),
) -> dict[float, float]:
    """`evaluate(hybrid)`, e.g. its accuracy, at each loop gain κ; the hybrid's own feedback is set again afterwards.

    Raises:
        InputError: for a loop gain outside (0, 1), or a hybrid without blocks.
    """
    if not hybrid.blocks:
        raise InputError("the hybrid has no energy block, so its loop gain cannot be changed")
    before = hybrid.blocks[0].module.feedback
    measured = {}
    try:
        for feedback in feedbacks:
            hybrid.set_feedback(feedback)
            measured[float(feedback)] = float(evaluate(hybrid))
    finally:
        hybrid.set_feedback(before)
    return measured


def plot_feedback(measured: Mapping[float, float], source: float | None = None, label: str = "accuracy") -> Any:
    """What `feedback_sweep` measured against the loop gain, with the source network's value as a line.

    Raises:
        InputError: where nothing was measured.
        ExportError: where matplotlib is missing.
    """
    if not measured:
        raise InputError("nothing was measured: make it with feedback_sweep(hybrid, evaluate)")
    figure = figure_class()(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    gains = sorted(measured)
    axes.plot(gains, [measured[gain] for gain in gains], "o-", color=_BLUE, label="hybrid")
    if source is not None:
        axes.axhline(source, color=_ORANGE, linestyle="--", label="source network")
    axes.set_xscale("log")
    axes.set_xlabel("loop gain κ")
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    return figure
