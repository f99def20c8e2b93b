"""The content of the side panel beside the plan: curves of how a block settles, and the modelled costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ffebm_compiler.drawing.overlay import same_blocks
from ffebm_compiler.errors import HardwareError
from ffebm_compiler.hardware.costs import Quantity
from ffebm_compiler.reports.costs import cost_report, cost_report_of
from ffebm_compiler.reports.text import count

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import PlanData
    from ffebm_compiler.reports.costs import BlockCost, CostReport
    from ffebm_compiler.reports.diagnosis import BlockDiagnosis, Diagnosis

__all__ = ["block_costs", "costs_of", "curves_of", "total_costs"]


def curves_of(plan: PlanData, diagnosis: Diagnosis | None) -> dict[str, dict[str, Any]]:
    """For each block with feedback: its curves and the facts beside them, as JSON values.

    Raises:
        InputError: where the diagnosis is of another plan.
    """
    if diagnosis is None:
        return {}
    same_blocks(plan, set(diagnosis.blocks), "diagnosis")
    return {name: _curves(block) for name, block in diagnosis.blocks.items() if block.residuals}


def _curves(block: BlockDiagnosis) -> dict[str, Any]:
    start = block.energies[0] if block.energies else 0.0
    end = "a minimum of E" if block.monotone else "a stationary point of E"
    if not block.symmetric:
        end = "of a vector field: its feedback has weights of its own, so that there is no energy"
    predicted = "unknown, no certificate" if block.predicted is None else count(block.predicted)
    return {
        "facts": [
            ("spectral radius ρ", f"{block.radius:.3g}"),
            ("residual's ratio per sweep", f"{block.rate:.3g}"),
            ("sweeps predicted", predicted),
            ("sweeps of the forward", count(block.sweeps)),
            ("equilibrium", end),
        ],
        "sweeps": block.sweeps,
        # JSON has no infinity, so that a diverged value is a gap in the curve.
        "residuals": _finite(block.residuals),
        "states": [[[_rounded(v) for v in row] for row in rows] for rows in block.states],
        "energies": _finite([energy - start for energy in block.energies]),
    }


def _rounded(value: float) -> float | None:
    """Three digits, which a colour does not show; None where it is not finite."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def costs_of(plan: PlanData, hybrid: HybridCore | None) -> tuple[CostReport | None, str]:
    """The cost report, with the hybrid's own sweeps if one is given; else None, and a note that says why."""
    try:
        return (cost_report(plan) if hybrid is None else cost_report_of(hybrid)), ""
    except HardwareError as error:
        return None, f"no costs are shown: {error}"


def block_costs(cost: BlockCost) -> list[tuple[str, str]]:
    """The modelled costs of one block, per sample."""
    return [
        ("crossbars", str(cost.analog)),
        ("DACs and ADCs", str(cost.converters)),
        ("one inference", str(cost.inference)),
        ("same layers digital, 45 nm", str(cost.digital)),
        ("one training step", str(cost.training)),
        *([("one inference, chip level", str(cost.chip_inference))] if cost.chip_inference.known else []),
        ("latency", str(cost.latency)),
    ]


def total_costs(report: CostReport) -> dict[str, Any]:
    """The modelled costs of the network, per sample, and every constant with its source, as JSON values."""

    def row(name: str, hybrid: Quantity, digital: Quantity | None) -> tuple[str, str, str]:
        return name, str(hybrid), "" if digital is None else str(digital)

    chip = []
    if report.chip_inference.known:
        chip = [
            row("one inference, chip level", report.chip_inference, report.digital_inference),
            row("one training step, chip level", report.chip_training, report.digital_training),
        ]
    missing = ", ".join(f"{name} ×{times}" if times > 1 else name for name, times in report.uncounted.items())
    return {
        "short": str(report.inference),
        "latency": str(report.latency),
        "energy": _shares(
            ("crossbars", _sum(report, "analog")),
            ("converters and partial sums", _sum(report, "converters")),
            ("memory between blocks", _sum(report, "traffic")),
            ("digital work", report.digital_parts),
        ),
        "time": _shares(
            ("blocks", report.block_latency), ("digital work", _less(report.latency, report.block_latency))
        ),
        "rows": [
            row("one inference", report.inference, report.digital_inference),
            row("one training step", report.training, report.digital_training),
            *chip,
            row("latency", report.latency, None),
            row("latency of the blocks", report.block_latency, None),
        ],
        "uncounted": missing,
        "constants": [
            (constant.name, constant.what, str(constant.value), constant.source)
            for constant in report.constants.values()
        ],
    }


def _sum(report: CostReport, part: str) -> Quantity:
    """One kind of energy over all blocks."""
    return sum((getattr(block, part) for block in report.blocks), Quantity(0.0, 0.0, "pJ"))


def _less(total: Quantity, part: Quantity) -> Quantity:
    """What a total has beside one of its parts."""
    if total.low is None or total.high is None or part.low is None or part.high is None:
        return Quantity(None, None, total.unit)
    return Quantity(total.low - part.low, total.high - part.high, total.unit)


def _shares(*parts: tuple[str, Quantity]) -> list[tuple[str, float, str]]:
    """Name, share of the total (middles of the ranges) and range of each part; empty if one is unknown or all are 0."""
    middles = [None if q.low is None or q.high is None else (q.low + q.high) / 2 for _, q in parts]
    known = [middle for middle in middles if middle is not None]
    if len(known) < len(parts) or not sum(known):
        return []
    return [(name, middle / sum(known), str(q)) for (name, q), middle in zip(parts, known, strict=True)]
