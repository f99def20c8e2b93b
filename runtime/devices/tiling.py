"""`Tiling`: how the weight matrices of one layer lie on tiles, as the plan places them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tiling"]


@dataclass(frozen=True)
class Tiling:
    """A layer's matrices (groups, rows, cols), cut into tiles."""

    groups: tuple[int, ...]
    """Groups on each tile along the diagonal; sums to the layer's groups."""
    rows: tuple[int, ...]
    """Rows of each tile; sums to the rows of one matrix."""
    cols: tuple[int, ...]
    """Weights in a row of each tile. A weight belongs to the tile of its first column."""
    devices: int = 2
    """Adjacent columns that hold one weight."""

    @classmethod
    def of(
        cls,
        rows: int,
        cols: int,
        groups: int = 1,
        *,
        tile_rows: int | None = None,
        tile_cols: int | None = None,
        devices: int = 2,
        groups_per_tile: int = 1,
    ) -> Tiling:
        """The tiling of matrices of rows × cols weights on tiles of tile_rows × tile_cols devices."""
        wide = tile_cols or cols * devices
        firsts = [-(-tile * wide // devices) for tile in range(-(-cols * devices // wide))]  # first weight of each tile
        ends = [*firsts[1:], cols]
        each = tuple(end - first for first, end in zip(firsts, ends, strict=True) if end > first)
        return cls(_chunks(groups, groups_per_tile), _chunks(rows, tile_rows or rows), each, devices)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, rows, cols) of the matrices."""
        return sum(self.groups), sum(self.rows), sum(self.cols)

    @property
    def count(self) -> tuple[int, int, int]:
        """Tiles along groups, rows and columns."""
        return len(self.groups), len(self.rows), len(self.cols)

    def largest(self, matrices: Tensor) -> Tensor:
        """max|W| of every tile, of shape `count`. Other leading dimensions are kept."""
        return self._reduced(matrices.abs(), lambda part, dim: part.amax(dim))

    def total(self, matrices: Tensor) -> Tensor:
        """The sum over every tile, of shape `count`. Other leading dimensions are kept."""
        return self._reduced(matrices, lambda part, dim: part.sum(dim))

    def _reduced(self, matrices: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
        for dim, sizes in ((-1, self.cols), (-2, self.rows), (-3, self.groups)):
            matrices = torch.stack([reduce(part, dim) for part in matrices.split(list(sizes), dim)], dim)
        return matrices

    def spread(self, values: Tensor) -> Tensor:
        """One value per tile -> the same value for every weight of the tile."""
        for dim, sizes in ((-3, self.groups), (-2, self.rows), (-1, self.cols)):
            if values.shape[dim] == 1:
                continue
            values = values.repeat_interleave(torch.tensor(sizes, device=values.device), dim)
        return values.expand(*values.shape[:-3], *self.shape)


def _chunks(total: int, size: int) -> tuple[int, ...]:
    return tuple(min(size, total - start) for start in range(0, total, size))
