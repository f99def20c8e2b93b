"""Chips: assign cores to chips, and count the values that cross between chips.

A fabric of several chips has `Hardware.cores_per_chip` cores on each. Cores are put on chips in the order in which data
reaches their first blocks, so that neighbours in the network are neighbours on the fabric. A digital part runs on the
chip from which most of the values come that it reads. The network's inputs are on the first chip that reads them.

A value crosses once to each other chip on which something reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import networkx

from ffebm_compiler.passes.partition.placement import TilePlacement, placement_of
from ffebm_compiler.plan_data import PlanData

__all__ = ["Chip", "FloorPlan", "floor_plan_of"]


@dataclass(frozen=True)
class Chip:
    """The cores and tiles on one chip."""

    chip: int
    cores: tuple[int, ...]
    """Numbers of its cores, as in the placement of tiles."""
    blocks: tuple[str, ...]
    digital_parts: tuple[str, ...]
    tiles: int
    utilisation: float
    """Share of the chip's tiles that are used; 1 if cores are unlimited."""


@dataclass(frozen=True)
class FloorPlan:
    """The chips of a fabric, to be printed."""

    chips: tuple[Chip, ...]
    crossings: Mapping[tuple[int, int], int]
    """(from chip, to chip) -> values per sample in one inference."""
    tiles: TilePlacement

    @property
    def crossing(self) -> int:
        """Values per sample that cross between chips in one inference."""
        return sum(self.crossings.values())

    def __str__(self) -> str:
        """A line for each chip, with its cores and the values per sample that enter and leave it."""
        lines = [f"{len(self.chips)} chips, {self.crossing} values per sample cross between them in an inference"]
        for chip in self.chips:
            entering = sum(values for (_, to), values in self.crossings.items() if to == chip.chip)
            leaving = sum(values for (origin, _), values in self.crossings.items() if origin == chip.chip)
            ends = [chip.blocks[0], *chip.blocks[1:][-1:]] if chip.blocks else ["no block"]
            lines.append(
                f"chip {chip.chip}: {len(chip.cores)} cores, {chip.tiles} tiles ({100 * chip.utilisation:.1f} %), "
                f"{' to '.join(ends)}, {entering} values in, {leaving} out"
            )
        return "\n".join(lines)


def floor_plan_of(plan: PlanData) -> FloorPlan:
    """Put the cores of a plan on chips. There is one chip if `hardware.cores_per_chip` is None.

    Raises:
        PlanError: the blocks do not fit `hardware.cores`.
    """
    tiles = placement_of(plan)
    order = sorted(tiles.per_core, key=lambda core: min(core.blocks))
    each = plan.hardware.cores_per_chip or max(1, len(order))
    chip_of_block = {
        plan.blocks[block].name: index // each for index, core in enumerate(order) for block in core.blocks
    }
    home = {name: chip_of_block[block.name] for block in plan.blocks for name in block.operations}
    chip_of_part = _digital_homes(plan, home)
    capacity = plan.hardware.tiles_per_core
    chips = []
    for chip in range(max(1, -(-len(order) // each))):
        cores = order[chip * each : (chip + 1) * each]
        used = sum(core.tiles for core in cores)
        chips.append(
            Chip(
                chip,
                tuple(sorted(core.core for core in cores)),
                tuple(block.name for block in plan.blocks if chip_of_block[block.name] == chip),
                tuple(part.name for part in plan.digital_parts if chip_of_part[part.name] == chip),
                used,
                1.0 if capacity is None else used / (capacity * each),
            )
        )
    return FloorPlan(tuple(chips), _crossings(plan, home), tiles)


def _digital_homes(plan: PlanData, home: dict[str, int]) -> dict[str, int]:
    """The chip of each digital part, in the order of data. Its operations are added to `home`."""
    quotient = plan.to_networkx()
    parts = {part.name: part for part in plan.digital_parts}
    chip_of = {block.name: home[block.operations[0]] for block in plan.blocks}
    for name in networkx.lexicographical_topological_sort(quotient):
        if name not in parts:
            continue
        votes: Counter[int] = Counter()
        for origin in quotient.predecessors(name):
            if origin in chip_of:
                votes[chip_of[origin]] += int(quotient.edges[origin, name]["values"])
        if not votes:  # it reads only the network's inputs, so it runs where its results are read
            votes.update(chip_of[reader] for reader in quotient.successors(name) if reader in chip_of)
        chip_of[name] = min(votes, key=lambda chip: (-votes[chip], chip)) if votes else 0
        home.update(dict.fromkeys(parts[name].operations, chip_of[name]))
    return {name: chip_of[name] for name in parts}


def _crossings(plan: PlanData, home: Mapping[str, int]) -> dict[tuple[int, int], int]:
    graph = plan.graph
    found: Counter[tuple[int, int]] = Counter()
    for name, readers in graph.users().items():
        chips = sorted({home[reader] for reader in readers})
        if not chips:
            continue
        here = home.get(name, chips[0])
        for chip in chips:
            if chip != here:
                found[here, chip] += graph.values(name)
    return dict(sorted(found.items()))
