"""The timeline of the page: when each block and digital part runs, where the costs know how long it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffebm_compiler.hardware.costs import Quantity
from ffebm_compiler.passes.partition.block_costs import total_work

if TYPE_CHECKING:
    from ffebm_compiler.plan_data import PlanData
    from ffebm_compiler.reports.costs import CostReport

__all__ = ["timeline_of"]


def timeline_of(plan: PlanData, report: CostReport, order: list[str]) -> dict[str, Any]:
    """The latency of each block and digital part in `order`, one after the other, as JSON values. All is modelled.

    Where a latency is unknown there are no bars, and `missing` names the constants that would tell it.
    """
    times: dict[str, Quantity] = {cost.block: cost.latency for cost in report.blocks}
    step = report.constants["digital_ns"].value
    for part in plan.digital_parts:
        work, _ = total_work(plan, [plan.graph[name] for name in part.operations])
        times[part.name] = step * (work.macs + work.elements)
    shown = order if report.latency.known else []
    return {
        "rows": [(name, times[name].low, times[name].high, str(times[name])) for name in shown],
        "total": str(report.latency),
        "missing": [] if report.latency.known else _missing(report),
        "unsettled": [cost.block for cost in report.blocks if cost.sweeps is None],
    }


def _missing(report: CostReport) -> list[str]:
    """The constants of time that are unknown."""
    return [
        name
        for name, constant in report.constants.items()
        if not constant.value.known and (name.endswith("_ns") or name == "converters")
    ]
