"""Differences: what two plans of one network, drawn beside each other, do not share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffebm_compiler.driven import settles
from ffebm_compiler.errors import HardwareError
from ffebm_compiler.reports.costs import cost_report
from ffebm_compiler.reports.text import count

if TYPE_CHECKING:
    from ffebm_compiler.plan_data import PlanData

__all__ = ["differences_of"]


def differences_of(first: PlanData, second: PlanData) -> dict[str, Any]:
    """Figures of both, layers that are analog in one alone, and blocks that the other one lacks, as JSON values.

    Two blocks are the same if they have the same layers.
    """
    plans = (first, second)
    analog = [{path for block in plan.blocks for path in block.layers} for plan in plans]
    groups = [{frozenset(block.layers) for block in plan.blocks} for plan in plans]
    return {
        "rows": [
            ("energy blocks", *(count(len(plan.blocks)) for plan in plans)),
            ("blocks that settle", *(count(_settling(plan)) for plan in plans)),
            ("analog layers", *(count(len(paths)) for paths in analog)),
            ("tiles", *(count(sum(block.tiles for block in plan.blocks)) for plan in plans)),
            ("conversions per sample", *(count(plan.conversions) for plan in plans)),
            ("analog share of MACs", *(f"{100 * plan.analog_share:.1f} %" for plan in plans)),
            ("one inference, modelled", *(_energy(plan) for plan in plans)),
        ],
        "alone": [sorted(analog[0] - analog[1]), sorted(analog[1] - analog[0])],
        "blocks": [
            [block.name for block in plan.blocks if frozenset(block.layers) not in other]
            for plan, other in zip(plans, reversed(groups), strict=True)
        ],
    }


def _settling(plan: PlanData) -> int:
    return sum(settles(plan.graph, block.operations, block.driven) for block in plan.blocks)


def _energy(plan: PlanData) -> str:
    try:
        return str(cost_report(plan).inference)
    except HardwareError:
        return "unknown"
