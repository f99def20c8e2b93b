"""Operator norms of a block's edges, followed while the weights move.

For the operator J of an edge (the Jacobian of a later layer's drive by an earlier layer's state) a block of vectors is
kept from one measurement to the next. One pass, with V the kept right vectors and P fixed random probes:

    1.  Y = J V,  D = J P − (J P at the measurement before)
    2.  Z = Jᵀ [Y, D]
    3.  Rayleigh–Ritz in span Z: the singular values of J there; the leading vectors are kept.

The first columns of Z are a step of block power iteration. The others are what the *change* ΔJ of the operator has
made of the probes: an optimizer's step has few large singular directions, and where ΔJ = τ p qᵀ with (p, q) a singular
pair of J, the column Jᵀ ΔJ P is q itself, however small its part in V and however many dimensions there are. Without
them a direction that overtakes the kept ones is seen late: in 1 024 dimensions, one that grows by 0.1 a step drove the
true loop gain to 2.0 times the told one, and to 1.005 times with them (`benchmarks/loop_gain.py`).

Where the estimate jumps, passes with fresh probes are repeated until it rests. (Golub & Van Loan 2013, sections 8.2 and
10.1, for the parts.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.runtime.frame import Frame

__all__ = ["Track", "TrackedNorms"]

_KEPT = 4
_PROBES = 2
_JUMP = 0.01
"""Relative change of a norm between two measurements from which on it is measured to convergence."""
_REST = 1e-3
"""Relative change of a norm in a pass at which it has converged."""
_PASSES = 30


@dataclass(frozen=True)
class Track:
    """What is kept of an edge between two measurements."""

    norm: float
    """Largest singular value found last."""
    vectors: Tensor
    """V, one vector a row, each of the shape of a state of one sample."""
    images: Tensor
    """J P at the last measurement, one row a probe."""


class TrackedNorms:
    """Largest singular values of the edges of a block, measured again after each change of its weights."""

    def __init__(self) -> None:
        self.tracks: dict[tuple[int, int], Track] = {}

    def measure(self, frame: Frame) -> list[tuple[int, int, float]]:
        """(l, m, ‖J_{ml}‖₂) of every edge at the weights of a frame, from below.

        Args:
            frame: the block evaluated once for one sample, so that all shapes are known, without its random masks.
        """
        found = []
        with torch.no_grad():
            for later, leaves in enumerate(frame.program.upstream):
                for earlier in leaves:
                    track = _followed(_Edge(frame, earlier, later), self.tracks.get((earlier, later)))
                    if track is not None:
                        self.tracks[earlier, later] = track
                    found.append((earlier, later, 0.0 if track is None else track.norm))
        return found

    def state(self) -> dict[str, dict[str, Any]]:
        """What is kept, under "l-m" for the edge from layer l to layer m: numbers and tensors only."""
        return {
            f"{earlier}-{later}": {"norm": track.norm, "vectors": track.vectors, "images": track.images}
            for (earlier, later), track in self.tracks.items()
        }

    def restore(self, state: dict[str, dict[str, Any]]) -> None:
        """Take over what `state` returned."""
        self.tracks = {}
        for key, kept in state.items():
            earlier, later = map(int, key.split("-"))
            self.tracks[earlier, later] = Track(float(kept["norm"]), kept["vectors"], kept["images"])


class _Edge:
    """The operator of an edge on several vectors at once, one a row."""

    def __init__(self, frame: Frame, earlier: int, later: int) -> None:
        self.frame, self.earlier, self.later = frame, earlier, later
        program = frame.program
        self.register = program.layers[earlier].state
        self.shape = frame.shapes[self.register]
        weight = next((w for w in frame.weights if w is not None and w.is_floating_point()), None)
        self.dtype = torch.float32 if weight is None else weight.dtype
        self.device = torch.device("cpu") if weight is None else weight.device

    def forward(self, rows: Tensor) -> Tensor | None:
        """J x for every row x; None where J is zero."""
        if self.frame.program.resizable:
            image = self._tangent(self.frame.repeated(len(rows)), rows.flatten(0, 1))
            return None if image is None else image.unflatten(0, (len(rows), 1))
        images = [self._tangent(self.frame, row) for row in rows]
        return None if images[0] is None else torch.stack([image for image in images if image is not None])

    def _tangent(self, frame: Frame, state: Tensor) -> Tensor | None:
        slots: list[Tensor | None] = [None] * len(frame.program.layers)
        slots[self.earlier] = state
        return frame.tangent(self.later, slots)

    def transpose(self, rows: Tensor) -> Tensor:
        """Jᵀ y for every row y."""
        if self.frame.program.resizable:
            frame = self.frame.repeated(len(rows))
            return frame.pullback(self.later, rows.flatten(0, 1), states=True)[self.register].unflatten(
                0, (len(rows), 1)
            )
        return torch.stack([self.frame.pullback(self.later, row, states=True)[self.register] for row in rows])

    def random(self, count: int, seed: int) -> Tensor:
        """Random rows of unit length on average: the same for the same seed, on any device and rank."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn((count, *self.shape), generator=generator, dtype=torch.float32)
        return drawn.div_(math.sqrt(max(1, self.shape.numel()))).to(self.device, self.dtype)

    def here(self, rows: Tensor) -> Tensor:
        """Rows kept from before, on the device and in the dtype of the weights now."""
        return rows.to(self.device, self.dtype)


def _followed(edge: _Edge, track: Track | None) -> Track | None:
    """The track of an edge after a change of the weights; None where its operator is zero."""
    known = track is not None and track.vectors.shape[1:] == edge.shape and math.isfinite(track.norm)
    probes = edge.random(_PROBES, seed=0)
    vectors = edge.here(track.vectors) if known and track is not None else edge.random(_KEPT, seed=1)
    images = edge.forward(torch.cat([vectors, probes]))
    if images is None:
        return None
    count = len(vectors)
    probed = images[count:]
    moved = probed - edge.here(track.images) if known and track is not None else probed
    norm, vectors = _rayleigh_ritz(edge, torch.cat([images[:count], moved]))
    if not (known and track is not None and abs(norm - track.norm) <= _JUMP * track.norm):
        norm, vectors = _converged(edge, norm, vectors)
    return Track(norm, vectors, probed)


def _converged(edge: _Edge, norm: float, vectors: Tensor) -> tuple[float, Tensor]:
    """Passes with fresh probes until the norm rests in two of them."""
    resting = 0
    for index in range(_PASSES):
        if not math.isfinite(norm):
            break
        images = edge.forward(torch.cat([vectors, edge.random(_PROBES, seed=2 + index)]))
        assert images is not None
        before = norm
        norm, vectors = _rayleigh_ritz(edge, images)
        resting = resting + 1 if abs(norm - before) <= _REST * norm else 0
        if resting == 2:
            break
    return norm, vectors


def _rayleigh_ritz(edge: _Edge, left: Tensor) -> tuple[float, Tensor]:
    """(largest singular value, leading right vectors) of J in the span of Jᵀ y for the rows y."""
    basis = _unit(edge.transpose(_unit(left)))
    images = edge.forward(basis)
    assert images is not None
    overlap, energy = _gram(basis), _gram(images)
    if not (np.isfinite(overlap).all() and np.isfinite(energy).all()):
        return math.inf, basis[:_KEPT]
    # Rows may be nearly parallel: directions of the basis that are lost in round-off are left out.
    sizes, axes = np.linalg.eigh(overlap)
    certain = sizes > 1e-5 * max(sizes[-1], 1e-30)
    white = axes[:, certain] / np.sqrt(sizes[certain])
    values, turned = np.linalg.eigh(white.T @ energy @ white)
    chosen = (white @ turned)[:, ::-1][:, :_KEPT].T
    weights = torch.from_numpy(chosen.copy()).to(basis)
    kept = (weights @ basis.flatten(1)).unflatten(1, basis.shape[1:])
    if len(kept) < _KEPT:
        kept = torch.cat([kept, kept.new_zeros((_KEPT - len(kept), *kept.shape[1:]))])
    return math.sqrt(max(float(values[-1]), 0.0)), kept


def _unit(rows: Tensor) -> Tensor:
    """Rows of unit length; one of zeros stays."""
    lengths = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    certain = lengths > torch.finfo(rows.dtype).tiny
    factors = torch.where(certain, 1 / lengths, torch.zeros_like(lengths))
    return rows * factors.reshape(-1, *[1] * (rows.dim() - 1))


def _gram(rows: Tensor) -> np.ndarray:
    """Inner products of all pairs of rows, in float64."""
    flat = rows.flatten(1)
    return (flat @ flat.T).double().cpu().numpy()
