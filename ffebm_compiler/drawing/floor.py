"""The floor plan of the page: which tile of which core holds which layer, and how full it is."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from ffebm_compiler.errors import PlanError
from ffebm_compiler.ir import Role
from ffebm_compiler.passes.partition.placement import placement_of
from ffebm_compiler.reports.text import count

if TYPE_CHECKING:
    from ffebm_compiler.plan_data import PlanData

__all__ = ["floor_plan"]

_MOST_TILES = 20_000
"""More tiles than these are not drawn one by one."""


def floor_plan(plan: PlanData) -> dict[str, Any]:
    """Cores and tiles as JSON values, or a sentence in `why` that says why there is no floor plan.

    A layer has the core, its first tile there, and runs `[utilisation, tiles]` of neighbouring tiles that are equally
    full. A utilisation is the share of a tile's devices that hold a weight.
    """
    hardware = plan.hardware
    if not plan.blocks:
        return {"why": "no layer is on a tile"}
    if hardware.tiles_per_core is None or hardware.tile_rows is None or hardware.tile_cols is None:
        return {"why": f"the hardware {hardware.name} has tiles or cores without limit"}
    try:
        placement = placement_of(plan)
    except PlanError as error:
        return {"why": str(error)}
    if placement.tiles > _MOST_TILES:
        return {"why": f"{count(placement.tiles)} tiles are too many to draw one by one"}
    index = {op.name: position for position, op in enumerate(plan.graph.operations)}
    operations = [name for block in plan.blocks for name in block.operations if plan.graph[name].role is Role.WEIGHT]
    return {
        "tiles": hardware.tiles_per_core,
        "used": placement.tiles,
        "utilisation": placement.utilisation,
        "cores": [(core.core, core.tiles) for core in placement.per_core],
        "layers": [
            {
                "op": index[name],
                "core": layer.core,
                "first": layer.first,
                "runs": [
                    (value, len(list(run)))
                    for value, run in groupby(round(tile.utilisation, 3) for tile in layer.tiles())
                ],
            }
            for name, layer in zip(operations, placement.layers, strict=True)
        ],
    }
