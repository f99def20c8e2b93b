"""Operator norms of a block's edges, followed while the weights move.

The operator J of an edge is the Jacobian of a later layer's drive by an earlier layer's state. From one measurement to
the next, a few left vectors U and the image Jᵀ q of a fixed random probe q are kept. One pass takes two products:

    1.  Jᵀ [U, q]
    2.  Z = [Jᵀ U, Jᵀ q − (Jᵀ q at the measurement before)]
    3.  J Z, and Rayleigh–Ritz in span Z gives singular values of J. The leading left vectors are the new U.

Most columns of Z are a step of block power iteration. The last one comes from the *change* ΔJ of the operator, applied
to the probe. An optimizer's step has few large singular directions. If ΔJ = τ u vᵀ with a singular pair (u, v) of J,
then the column ΔJᵀ q is parallel to v, however small its part in the kept vectors, and in any number of dimensions.
Without this column, a direction that overtakes the kept ones is seen late. In 1 024 dimensions, one that grew by 0.1 a
step drove the true loop gain to twice the reported one (`benchmarks/loop_gain.py`).

An edge without a weight between its states, such as a residual wire, never changes and is measured once.

If the estimate jumps, or J has changed much since (the last column says how much, whatever its directions), passes with
fresh probes are repeated until it rests. (Golub & Van Loan 2013, sections 8.2 and
10.1, for the parts.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.edge_norms import COHERENT, directions, without_tokens
from ffebm_compiler.runtime.energies.followed_norm import Following, Launched, Track, drawn_probe
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["TrackedNorms"]


class TrackedNorms:
    """Largest singular values of the edges of a block, measured again after each change of its weights."""

    def __init__(self) -> None:
        self.tracks: dict[tuple[int, int], Track] = {}
        self._probes: dict[tuple[int, int], Tensor] = {}
        self._places: list[tuple[int, int]] = []
        """The edges, in the order of `directions`."""

    def measure(self, frame: Frame) -> list[tuple[int, int, float]]:
        """(l, m, ‖J_{ml}‖₂) of every edge at the weights of a frame, and (m, l, norm) for feedback weights.

        The norms are approached from below.

        Args:
            frame: the block without its random masks, evaluated once for one sample so that all shapes are known.
        """
        return self.finish(self.launch(frame))

    def launch(self, frame: Frame) -> Launched:
        """The products of one measurement, on the device. `finish` reads their inner products."""
        begun: dict[tuple[int, int], Following] = {}
        places = []
        with torch.no_grad():
            for start, end, view in directions(frame):
                place, edge = (start, end), _Edge(view, min(start, end), max(start, end))
                places.append(place)
                known = self.tracks.get(place)
                if known is not None and edge.constant and known.vectors.shape[1] == edge.outer.numel():
                    continue
                probe = self._probes.get(place)
                if probe is None or probe.shape[1] != edge.outer.numel():
                    probe = edge.probe(seed=0)
                probe = self._probes[place] = edge.here(probe)
                begun[place] = Following(edge, probe, known)
        self._places = places
        return Launched(begun)

    def finish(self, launched: Launched, read: np.ndarray | None = None) -> list[tuple[int, int, float]]:
        """The norms of a measurement. `read` has its `inner_products`; None: they are read here."""
        with torch.no_grad():
            measured = launched.tracks(read)
        self.tracks.update((place, track) for place, track in measured.items() if track is not None)
        norms = {
            place: None if place in measured and measured[place] is None else self.tracks[place]
            for place in self._places
        }
        return [(*place, 0.0 if track is None else track.norm) for place, track in norms.items()]

    @property
    def coherent(self) -> bool:
        """Whether the leading left vector of some edge is aligned with equal entries, as `EdgeNorms.coherent`."""
        leading = [track.vectors[0].double() for track in self.tracks.values()]
        if not leading:
            return False
        cosines = [u.sum().abs() / (u.norm() * math.sqrt(u.numel())).clamp(min=1e-300) for u in leading]
        return bool((torch.stack(cosines) >= COHERENT).any())

    def own_tracks(self) -> None:
        """Give every track memory of its own, which captured kernels may read in every later step."""
        self.tracks = {
            place: replace(track, vectors=track.vectors.clone(), image=track.image.clone())
            for place, track in self.tracks.items()
        }

    def state(self) -> dict[str, dict[str, Any]]:
        """The kept numbers and tensors. Those of the edge from layer l to layer m have the key "l-m"."""
        return {
            f"{earlier}-{later}": {"norm": track.norm, "vectors": track.vectors, "image": track.image}
            for (earlier, later), track in self.tracks.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the result of `state`."""
        self.tracks = {}
        for key, kept in state.items():
            earlier, later = map(int, key.split("-"))
            self.tracks[earlier, later] = Track(float(kept["norm"]), kept["vectors"], kept["image"])


class _Edge:
    """The operator of an edge. Each row that it is applied to is a state of one sample."""

    def __init__(self, frame: Frame, earlier: int, later: int) -> None:
        program = frame.program
        self.earlier, self.later, self.register = earlier, later, program.layers[earlier].state
        self.frame = without_tokens(frame, earlier, later)
        self.inner = self.frame.shapes[self.register]
        self.outer = self.frame.shapes[program.layers[later].drive]
        weight = next((w for w in frame.weights if w is not None and w.is_floating_point()), None)
        self.dtype = torch.float32 if weight is None else weight.dtype
        self.device = torch.device("cpu") if weight is None else weight.device
        self.last = program.convolutional and self.device.type == "cpu"
        """Whether four-dimensional values are in channels-last memory."""
        self._copies: dict[int, Frame] = {}

    @property
    def constant(self) -> bool:
        """Whether no weight is between the two states, as on a residual wire, so that the operator never changes."""
        layer, reached = self.frame.program.layers[self.later], {self.register}
        for instruction in layer.instructions:
            if reached.intersection(instruction.operands):
                operator = instruction.operator
                if operator.draws or operator.selects or any(weight is not None for weight in instruction.weights):
                    return False
                reached.add(instruction.output)
        return True

    def forward(self, rows: Tensor) -> Tensor | None:
        """J x for every row x; None where J is zero."""
        program = self.frame.program
        slots: list[Tensor | None] = [None] * len(program.layers)
        if program.resizable:
            slots[self.earlier] = self._shaped(rows, self.inner)
            image = self._repeated(len(rows)).tangent(self.later, slots)
            return None if image is None else self._flat(image, len(rows))
        images = []
        for row in rows:
            slots[self.earlier] = self._shaped(row[None], self.inner)
            image = self.frame.tangent(self.later, slots)
            if image is None:
                return None
            images.append(self._flat(image, 1))
        return torch.cat(images)

    def transpose(self, rows: Tensor) -> Tensor | None:
        """Jᵀ y for every row y; None where J is zero."""
        if self.frame.program.resizable:
            given = self._shaped(rows, self.outer)
            found = self._repeated(len(rows)).pullback(self.later, given, states=True).get(self.register)
            return None if found is None else self._flat(found, len(rows))
        parts = []
        for row in rows:
            found = self.frame.pullback(self.later, self._shaped(row[None], self.outer), states=True).get(self.register)
            if found is None:
                return None
            parts.append(self._flat(found, 1))
        return torch.cat(parts)

    def _repeated(self, copies: int) -> Frame:
        """The frame of so many samples, which the two products of a pass share."""
        if copies not in self._copies:
            self._copies[copies] = self.frame.repeated(copies)
        return self._copies[copies]

    def _shaped(self, rows: Tensor, shape: torch.Size) -> Tensor:
        if self.frame.program.resizable:  # one sample a row
            shape = torch.Size((len(rows), *shape[1:]))
        if self.last and len(shape) == 4:
            return rows.reshape(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
        return rows.reshape(shape)

    def _flat(self, value: Tensor, rows: int) -> Tensor:
        if self.last and value.dim() == 4:
            value = value.permute(0, 2, 3, 1)
        return value.reshape(rows, -1)

    def probe(self, seed: int) -> Tensor:
        """A random field whose mean squared length is one. It depends on the seed, but not on the device or rank."""
        return drawn_probe(self.outer.numel(), seed).to(self.device, self.dtype)

    def here(self, rows: Tensor) -> Tensor:
        """Kept rows, moved to the present device and dtype of the weights."""
        return rows.to(self.device, self.dtype)
