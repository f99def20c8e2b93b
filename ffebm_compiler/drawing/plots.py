"""Plots with matplotlib (`ffebm-compiler[plots]`): deviation, gradients, relaxation, loop gain, design space.

Each function returns a matplotlib `Figure`; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ffebm_compiler.drawing.overlay import check_kind
from ffebm_compiler.drawing.raster import figure_class
from ffebm_compiler.errors import InputError
from ffebm_compiler.reports.checks import Comparison, GradientReport
from ffebm_compiler.reports.diagnosis import Diagnosis
from ffebm_compiler.reports.numbers import number_of

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.passes.partition.compare import SweepRow

__all__ = [
    "feedback_sweep",
    "plot_deviation",
    "plot_feedback",
    "plot_gradients",
    "plot_hardware",
    "plot_relaxation",
]

_BLUE, _ORANGE, _GREY = "#0066a1", "#8a5200", "#6b6b6b"
_FLOOR = 1e-16
"""Smallest 1 − cosine that a logarithmic axis shows. float64 does not resolve smaller ones."""


def plot_deviation(comparison: Comparison) -> Any:
    """Each block's relative deviation from the source, as bars, with the output as a line. What is infinite is named.

    Raises:
        InputError: where nothing was compared.
        ExportError: where matplotlib is missing.
    """
    check_kind("comparison", comparison, Comparison, "hybrid.compare(x)")
    if not comparison.blocks:
        raise InputError("the comparison holds no energy block: make it with hybrid.compare(x)")
    names = [name if math.isfinite(value) else f"{name} (infinite)" for name, value in comparison.blocks.items()]
    values = [value if math.isfinite(value) else 0.0 for value in comparison.blocks.values()]
    figure = figure_class()(figsize=(6.4, 1.4 + 0.28 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(names, values, color=_BLUE)
    line = comparison.output if math.isfinite(comparison.output) else math.nan
    axes.axvline(line, color=_ORANGE, linestyle="--", label=f"network output {comparison.output:.2g}")
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
    check_kind("report", report, GradientReport, "ffebm.check_gradients(...)")
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
    hybrid: HybridCore,
    evaluate: Callable[[HybridCore], float],
    feedbacks: Iterable[float] = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5),
) -> dict[float, float]:
    """`evaluate(hybrid)`, e.g. its accuracy, at each loop gain κ. The hybrid's own feedback is restored afterwards.

    Raises:
        InputError: for a loop gain outside (0, 1), a hybrid without blocks, or what is no number.
    """
    if not hybrid.blocks:
        raise InputError("the hybrid has no energy block, so its loop gain cannot be changed")
    before = hybrid.blocks[0].module.feedback
    measured = {}
    try:
        for feedback in feedbacks:
            hybrid.set_feedback(feedback)
            measured[float(feedback)] = number_of(evaluate(hybrid), f"at loop gain {feedback}")
    finally:
        hybrid.set_feedback(before)
    return measured


def plot_feedback(measured: Mapping[float, float], source: float | None = None, label: str = "accuracy") -> Any:
    """Plot the result of `feedback_sweep` against the loop gain, with the source network's value as a line.

    Raises:
        InputError: where nothing was measured.
        ExportError: where matplotlib is missing.
    """
    check_kind("measured", measured, Mapping, "feedback_sweep(hybrid, evaluate)")
    if not measured:
        raise InputError("nothing was measured: make it with feedback_sweep(hybrid, evaluate)")
    values = {gain: number_of(value, f"at loop gain {gain}") for gain, value in measured.items()}
    line = None if source is None else number_of(source, "of the source network")
    figure = figure_class()(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    gains = sorted(values)
    axes.plot(gains, [values[gain] for gain in gains], "o-", color=_BLUE, label="hybrid")
    if line is not None:
        axes.axhline(line, color=_ORANGE, linestyle="--", label="source network")
    axes.set_xscale("log")
    axes.set_xlabel("loop gain κ")
    axes.set_ylabel(label)
    axes.legend(frameon=False)
    return figure


def plot_relaxation(diagnosis: Diagnosis) -> Any:
    """Residual and energy of every block along sweeps, from `hybrid.diagnose(x)`.

    The energy is drawn as its distance from the energy of the last sweep, divided by the distance of the
    feedforward values. So blocks of any size can be compared. Dots mark where the forward stopped.

    Raises:
        InputError: where no block has feedback.
        ExportError: where matplotlib is missing.
    """
    check_kind("diagnosis", diagnosis, Diagnosis, "hybrid.diagnose(x)")
    blocks = {name: block for name, block in diagnosis.blocks.items() if block.residuals}
    if not blocks:
        raise InputError("no block of the diagnosis has feedback, so none settles in sweeps: nothing to plot")
    figure = figure_class()(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, block in blocks.items():
        sweeps = range(1, len(block.residuals) + 1)
        (line,) = left.plot(sweeps, [_positive(value) for value in block.residuals], label=name)
        if 1 <= block.sweeps <= len(block.residuals):
            left.plot(block.sweeps, _positive(block.residuals[block.sweeps - 1]), "o", color=line.get_color())
        energies = [energy for energy in block.energies if math.isfinite(energy)]
        if energies:
            scale = abs(energies[0] - energies[-1]) or 1.0
            shares = [(energy - energies[-1]) / scale for energy in block.energies]
            right.plot(range(len(shares)), shares, ".-", color=line.get_color())
    fields = [name for name, block in blocks.items() if not block.symmetric]
    if fields:
        shown = f"{', '.join(fields[:4])}{', ...' if len(fields) > 4 else ''}"
        right.set_title(f"no energy: {shown} (feedback through weights of its own)", fontsize=8, parse_math=False)
    left.set_ylabel("residual: largest relative change of a layer")
    right.set_ylabel("energy above the last sweep's, scaled")
    left.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel("sweep")
        axes.grid(alpha=0.3)
    left.legend(frameon=False, ncols=1 + len(blocks) // 9)
    return figure


def _positive(value: float) -> float:
    """The value if a logarithmic axis can show it, else a gap."""
    return value if math.isfinite(value) and value > 0 else math.nan


def plot_hardware(rows: Sequence[SweepRow]) -> Any:
    """Conversions against tiles for every kind of hardware that `partition.compare.sweep` tried.

    Each point is named by its settings and coloured by the share of the multiply-accumulates that
    is analog. The ringed points have the largest share, and no other with it beats them in both
    conversions and tiles.

    Raises:
        InputError: where nothing was swept.
        ExportError: where matplotlib is missing.
    """
    from ffebm_compiler.passes.partition.compare import SweepRow

    made = "ffebm_compiler.passes.partition.compare.sweep(plan, settings)"
    check_kind("rows", rows, Sequence, made)
    for index, row in enumerate(rows):
        check_kind(f"rows[{index}]", row, SweepRow, made)
    if not rows:
        raise InputError(f"the sweep holds no row: make it with {made}")
    figure = figure_class()(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    tiles, values = [row.tiles for row in rows], [row.conversions for row in rows]
    points = axes.scatter(
        tiles, values, c=[100 * row.analog_macs for row in rows], cmap="cividis", vmin=0, vmax=100, edgecolors=_GREY
    )
    figure.colorbar(points, label="multiply-accumulates that are analog, %")
    best = best_rows(rows)
    ring = {"s": 160, "facecolors": "none", "edgecolors": _ORANGE, "linewidths": 1.5}
    axes.scatter([row.tiles for row in best], [row.conversions for row in best], **ring)
    named: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        text = ", ".join(str(value) for value in row.settings.values())
        named.setdefault((row.tiles, row.conversions), []).append(text)
    for point, texts in named.items():
        if len(named) <= 24 or point in {(row.tiles, row.conversions) for row in best}:
            text = "\n".join(texts[:3]) + (f"\nand {len(texts) - 3} more" if len(texts) > 3 else "")
            axes.annotate(text, point, (8, 0), textcoords="offset points", fontsize=8, va="center", parse_math=False)
    axes.set_title(f"hardware: {', '.join(rows[0].settings)}", fontsize=10, parse_math=False)
    axes.set_xlabel("tiles")
    axes.set_ylabel("DAC and ADC values per sample")
    axes.margins(x=0.22, y=0.12)
    axes.grid(alpha=0.3)
    return figure


def best_rows(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """Of the rows with the largest analog share, those that no other beats in conversions and tiles, by tiles."""
    top = max(row.analog_macs for row in rows)
    best: list[SweepRow] = []
    for row in sorted(rows, key=lambda one: (one.tiles, one.conversions)):
        if row.analog_macs == top and (not best or row.conversions < best[-1].conversions):
            best.append(row)
    return best
