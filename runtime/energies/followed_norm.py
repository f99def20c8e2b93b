"""The largest singular value of a linear map, followed while the map changes: `tracked_norms.py` says how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Following", "Launched", "LinearMap", "Track", "drawn_probe", "followed"]

_KEPT_VECTORS = 3
_JUMPS_ABOVE = 0.01
"""If a norm changes by more than this between two measurements (relative), it is measured to convergence."""
_MOVES_ABOVE = 0.1
"""If the map has changed by more than this since it was last measured to convergence, it is again.

The unit is its norm, and the changes of steps are added as squares. The change of one step is the root mean square of
the singular values of ΔJ, by its product with the probe. It tells of changes with so many directions that the norm
hardly moves at first, as where a step changes one entry of a convolution's kernel at all positions.
"""
_RESTS_BELOW = 1e-3
"""If a norm changes by less than this in two passes (relative), it has converged."""
_MOST_PASSES = 30


@dataclass(frozen=True)
class Track:
    """The values that are kept of an edge between two measurements."""

    norm: float
    """Largest singular value at the last measurement."""
    vectors: Tensor
    """U, with one left vector in each row and its entries in the order of memory."""
    image: Tensor
    """Jᵀ q at the last measurement, as one row."""
    moved: float = 0.0
    """By how much the map has changed since it was last measured to convergence."""


class LinearMap(Protocol):
    """A linear map on the rows of a matrix."""

    def forward(self, rows: Tensor) -> Tensor | None:
        """J x for every row x; None where J is zero."""

    def transpose(self, rows: Tensor) -> Tensor | None:
        """Jᵀ y for every row y; None where J is zero."""

    def probe(self, seed: int) -> Tensor:
        """A random row y whose mean squared length is one."""

    def here(self, rows: Tensor) -> Tensor:
        """Kept rows, moved to the present device and dtype."""


def drawn_probe(size: int, seed: int) -> Tensor:
    """A random row whose mean squared length is one. It depends on the seed, but not on the device or rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, size), generator=generator, dtype=torch.float32, device="cpu").div_(math.sqrt(max(1, size)))


def followed(edge: LinearMap, probe: Tensor, track: Track | None) -> Track | None:
    """The track of a map, such as an edge, after a change of the weights; None if the map is zero."""
    return Launched({(0, 1): Following(edge, probe, track)}).tracks()[0, 1]


class Following:
    """One pass over one map. Its products are launched at once, and its small numbers are read later."""

    def __init__(self, edge: LinearMap, probe: Tensor, track: Track | None) -> None:
        self.edge = edge
        self.probe = probe  # captured kernels read it
        self.track = track
        self.image: Tensor | None = None
        """Jᵀ q; None if the map is zero."""
        self.ritz: _Ritz | None = None
        self.known = False
        """Whether the edge was measured before."""
        fits = track is not None and track.vectors.shape[1] == probe.shape[1] and math.isfinite(track.norm)
        rows = torch.cat([edge.here(track.vectors), probe]) if track is not None and fits else probe
        basis = edge.transpose(rows)
        if basis is None:
            return
        self.image = basis[-1:]
        self.known = track is not None and fits and track.image.shape == self.image.shape
        if track is not None and self.known:
            basis = torch.cat([basis[:-1], self.image - edge.here(track.image)])
            self.image = self.image.clone()  # the other rows are not kept
        self.ritz = _Ritz(edge, basis)

    def result(self, products: np.ndarray) -> Track:
        """The track, from the inner products of the pass. Passes follow until the norm rests if it has jumped."""
        assert self.ritz is not None
        assert self.image is not None
        norm, vectors = self.ritz.result(products)
        moved = 0.0
        if self.track is not None and self.known:  # the last row of the basis is the change of the image
            moved = math.hypot(self.track.moved, math.sqrt(max(float(products[0][-1, -1]), 0.0)))
        if self.track is None or not self.known or self._jumped(norm, moved, self.track.norm):
            norm, vectors = _converge(self.edge, norm, vectors)
            moved = 0.0
        return Track(norm, vectors, self.image.clone() if self.image.device.type == "cuda" else self.image, moved)

    @staticmethod
    def _jumped(norm: float, moved: float, before: float) -> bool:
        """Whether the norm has to be measured to convergence."""
        return abs(norm - before) > _JUMPS_ABOVE * before or moved > _MOVES_ABOVE * before


class Launched:
    """One pass over all edges of a block, whose products are on the device."""

    def __init__(self, begun: dict[tuple[int, int], Following]) -> None:
        self._begun = begun

    @property
    def inner_products(self) -> Tensor:
        """All numbers that the host needs, in one row, so that it waits for the device once."""
        rows = [one.ritz.products.flatten() for one in self._begun.values() if one.ritz is not None]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64, device="cpu")

    @property
    def size(self) -> int:
        """How many numbers that are."""
        return sum(one.ritz.products.numel() for one in self._begun.values() if one.ritz is not None)

    def tracks(self, read: np.ndarray | None = None) -> dict[tuple[int, int], Track | None]:
        """The tracks of all edges; None for an edge whose map is zero."""
        values = self.inner_products.cpu().numpy() if read is None else read
        found: dict[tuple[int, int], Track | None] = {}
        for place, one in self._begun.items():
            if one.ritz is None:
                found[place] = None
                continue
            size = one.ritz.products.numel()
            found[place] = one.result(values[:size].reshape(one.ritz.products.shape))
            values = values[size:]
        return found

    @property
    def repeatable(self) -> bool:
        """Whether a captured graph may repeat it: every edge was known before."""
        return all(one.ritz is not None and one.known for one in self._begun.values())

    def repeat_from(self, tracks: Mapping[tuple[int, int], Track]) -> bool:
        """Copy tracks to where the captured kernels read them. Returns False if their shapes have changed."""
        pairs = [(one, one.track, tracks[place]) for place, one in self._begun.items()]
        if any(mine is None or mine.vectors.shape != kept.vectors.shape for _, mine, kept in pairs):
            return False
        for one, mine, kept in pairs:
            assert mine is not None
            mine.vectors.copy_(kept.vectors)
            mine.image.copy_(kept.image)
            one.track = replace(kept, vectors=mine.vectors, image=mine.image)
        return True


def _converge(edge: LinearMap, norm: float, vectors: Tensor) -> tuple[float, Tensor]:
    """Repeat passes with fresh probes until the norm rests in two of them."""
    resting = 0
    for index in range(_MOST_PASSES):
        if not math.isfinite(norm):
            break
        fresh = edge.transpose(edge.probe(seed=1 + index))
        assert fresh is not None
        fresh = edge.forward(fresh)
        assert fresh is not None
        basis = edge.transpose(torch.cat([vectors, fresh]))
        assert basis is not None
        ritz, before = _Ritz(edge, basis), norm
        norm, vectors = ritz.result(ritz.products.cpu().numpy())
        resting = resting + 1 if abs(norm - before) <= _RESTS_BELOW * norm else 0
        if resting == 2:
            break
    return norm, vectors


class _Ritz:
    """Rayleigh–Ritz of J in the span of some rows, which need no norm."""

    def __init__(self, edge: LinearMap, basis: Tensor) -> None:
        images = edge.forward(basis)
        assert images is not None
        self.images = images
        self.products = torch.stack([basis @ basis.T, images @ images.T]).double()
        """Inner products of all pairs of rows, of the basis and of its images, in float64."""

    def result(self, products: np.ndarray) -> tuple[float, Tensor]:
        """(largest singular value, leading left vectors), from the inner products."""
        overlap, energy = products
        images = self.images
        if not np.isfinite(products).all():
            return math.inf, images[:_KEPT_VECTORS]
        lengths = np.sqrt(np.diag(overlap))
        factors = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        # Rows may be nearly parallel, so directions of the basis that are lost in round-off are left out.
        sizes, axes = np.linalg.eigh(overlap * np.outer(factors, factors))
        certain = sizes > 1e-5 * max(sizes[-1], 1e-30)
        if not certain.any():  # J is zero
            return 0.0, images[:_KEPT_VECTORS]
        white = factors[:, None] * axes[:, certain] / np.sqrt(sizes[certain])
        values, turned = np.linalg.eigh(white.T @ energy @ white)
        chosen = (white @ turned)[:, ::-1][:, :_KEPT_VECTORS].T
        turn = torch.from_numpy(chosen.copy()).to(images.dtype)
        if images.device.type == "cuda":  # only a copy from pinned memory does not wait
            turn = turn.pin_memory()
        return math.sqrt(max(float(values[-1]), 0.0)), turn.to(images.device, non_blocking=True) @ images
