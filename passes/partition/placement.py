"""Placement: find the core, tile, rows and columns of every weight.

A layer's matrix of rows × cols weights (per group, per unrolled position) is cut into a grid of
tiles of `tile_rows` rows and ⌊tile_cols / devices_per_weight⌋ weights. The tiles of a block lie
one after the other on one core. Blocks are put on cores largest first, each on the first core
with room, so that several small blocks share a core. If groups share tiles, their matrices lie
along a tile's diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ffebm_compiler.errors import PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Operation, Role
from ffebm_compiler.passes.partition.decide import core_homes, tiles_of
from ffebm_compiler.plan_data import PlanData

__all__ = ["CorePlacement", "LayerPlacement", "Tile", "TilePlacement", "place_layers", "placement_of"]


@dataclass(frozen=True)
class Tile:
    """One crossbar, and the part of a weight matrix that it holds."""

    core: int
    index: int
    """Number of the tile in its core, from 0."""
    layer: str
    group: int
    """The group that it holds, or the first one on its diagonal."""
    position: int
    """The output position that it serves with `conv_mapping="unrolled"`; 0 otherwise."""
    rows: tuple[int, int]
    """First row of the group's matrix and the one after the last."""
    cols: tuple[int, int]
    """First column of the group's matrix and the one after the last."""
    utilisation: float
    """Share of the tile's devices that hold a weight."""
    groups: int = 1
    """Number of groups that it holds along its diagonal."""


@dataclass(frozen=True)
class LayerPlacement:
    """The tiles of one layer, as a grid."""

    layer: str
    core: int
    first: int
    """Number of its first tile in the core."""
    rows: int
    """Rows of one group's matrix, including a row for the bias if it takes one."""
    cols: int
    groups: int
    positions: int
    down: int
    """Tiles along the rows of one group."""
    across: int
    """Tiles along the columns of one group."""
    hardware: Hardware
    """The fabric with this layer's overrides."""
    per_tile: int = 1
    """Groups on one tile; 1 unless they share tiles."""

    @property
    def count(self) -> int:
        """Tiles of the layer."""
        return self.down * self.across * -(-self.groups // self.per_tile) * self.positions

    @property
    def devices(self) -> int:
        """Devices that hold a weight."""
        return self.rows * self.cols * self.groups * self.positions * self.hardware.devices_per_weight

    @property
    def tile_devices(self) -> int:
        """Devices of one of its tiles. An unlimited side is as long as the matrix."""
        rows = self.hardware.tile_rows or self.rows * self.per_tile
        return rows * (self.hardware.tile_cols or self.cols * self.hardware.devices_per_weight * self.per_tile)

    def tiles(self) -> Iterator[Tile]:
        """Every tile, position by position, group by group, row by row of the grid."""
        each = self.hardware.devices_per_weight
        high = self.hardware.tile_rows or self.rows
        # Counted in devices, since the two columns of one weight may lie on neighbouring tiles.
        wide = self.hardware.tile_cols or self.cols * each
        index = self.first
        for position in range(self.positions):
            for group in range(0, self.groups, self.per_tile):
                held = min(self.per_tile, self.groups - group)
                for i in range(self.down):
                    for j in range(self.across):
                        rows = (i * high, min(self.rows, (i + 1) * high))
                        lines = (j * wide, min(self.cols * each, (j + 1) * wide))
                        used = (rows[1] - rows[0]) * (lines[1] - lines[0]) * held / self.tile_devices
                        cols = (lines[0] // each, -(-lines[1] // each))
                        yield Tile(self.core, index, self.layer, group, position, rows, cols, used, held)
                        index += 1


@dataclass(frozen=True)
class CorePlacement:
    """The blocks and tiles on one core."""

    core: int
    blocks: tuple[int, ...]
    """Indices of its blocks."""
    tiles: int
    utilisation: float
    """Share of its tiles that are used; 1 if a core is unlimited."""


@dataclass(frozen=True)
class TilePlacement:
    """The whole fabric."""

    layers: tuple[LayerPlacement, ...]
    per_core: tuple[CorePlacement, ...]

    @property
    def cores(self) -> int:
        """Cores that are used."""
        return len(self.per_core)

    @property
    def tiles(self) -> int:
        """Tiles that are used."""
        return sum(core.tiles for core in self.per_core)

    @property
    def utilisation(self) -> float:
        """Share of the devices of used tiles that hold a weight; 0 if no tile is used."""
        devices = sum(layer.count * layer.tile_devices for layer in self.layers)
        return sum(layer.devices for layer in self.layers) / devices if devices else 0.0

    def layer(self, name: str) -> LayerPlacement:
        """The placement of a layer by its module path.

        Raises:
            PlanError: if it has none.
        """
        for layer in self.layers:
            if layer.layer == name:
                return layer
        raise PlanError(f"layer {name!r} is on no tile: it is digital or does not exist")


def placement_of(plan: PlanData) -> TilePlacement:
    """The placement of a plan's layers. Arguments and errors are those of `place_layers`."""
    graph = plan.graph
    layers = [[op for n in block.operations if (op := graph[n]).role is Role.WEIGHT] for block in plan.blocks]
    return place_layers(layers, plan.hardware)


def place_layers(blocks: Sequence[Sequence[Operation]], hardware: Hardware) -> TilePlacement:
    """Put the layers of every block on the tiles of cores.

    Args:
        blocks: the weight-stationary layers of each block.
        hardware: the fabric.

    Raises:
        PlanError: `hardware.cores` are too few.
    """
    sizes = [sum(tiles_of(layer, hardware) for layer in layers) for layers in blocks]
    homes = core_homes(sizes, [sum(layer.macs for layer in layers) for layers in blocks], hardware)
    if None in homes:
        number = "the only core" if hardware.cores == 1 else f"the {hardware.cores} cores"
        raise PlanError(
            f"the blocks do not fit {number} of {hardware.tiles_per_core} tiles: give the hardware more cores"
        )
    used: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    placed = []
    for index, (core, layers) in enumerate(zip(homes, blocks, strict=True)):
        assert core is not None
        members.setdefault(core, []).append(index)
        for op in layers:
            fabric = hardware.for_layer(op.path)
            positions = op.positions if fabric.conv_mapping == "unrolled" else 1
            rows = op.rows + int(op.bias and fabric.bias_row)
            per_tile = fabric.groups_per_tile(rows, op.cols, op.groups)
            per_group = tiles_of(op, hardware) // (-(-op.groups // per_tile) * positions)
            down = 1 if fabric.tile_rows is None else -(-rows // fabric.tile_rows)
            placed.append(
                LayerPlacement(
                    layer=op.path or op.name,
                    core=core,
                    first=used.get(core, 0),
                    rows=rows,
                    cols=op.cols,
                    groups=op.groups,
                    positions=positions,
                    down=down,
                    across=per_group // down,
                    hardware=fabric,
                    per_tile=per_tile,
                )
            )
            used[core] = used.get(core, 0) + placed[-1].count
    cores = tuple(
        CorePlacement(
            core,
            tuple(members[core]),
            used[core],
            1.0 if hardware.tiles_per_core is None else used[core] / hardware.tiles_per_core,
        )
        for core in sorted(members)
    )
    return TilePlacement(tuple(placed), cores)
