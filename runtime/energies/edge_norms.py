"""Edge norms: ‖J_{ml}‖₂ of every edge of a block, measured to convergence, and of the edges of many blocks together.

Norms are measured on the actual operator (the convolution with its padding and stride) by
Golub–Kahan–Lanczos bidiagonalisation (`lanczos.py`). It approaches the largest singular value from below, and
`MARGIN` is added for the rest.

Edges of different blocks with the same operators and shapes, as a deep network has them, take their steps together:
their weights are stacked, and `torch.func.vmap` runs each product once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.lanczos import Product, largest_singular_values
from ffebm_compiler.runtime.program.block_program import Instruction
from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.program.operators import Linear, Scale, Sum

__all__ = [
    "COHERENT",
    "MARGIN",
    "EdgeNorms",
    "directions",
    "edge_gain",
    "edge_norms",
    "edge_norms_of_each",
    "without_tokens",
]

MARGIN = 1.005
"""Factor on every measured norm. The iteration stops when several steps change the norm by less than 0.1 %."""

COHERENT = 0.5
"""From this cosine between the leading left singular vector of an edge and equal entries on, errors add up.

It is 1/√n for n random signs. For weights of one sign the vector has one sign too (Perron 1907), and its cosine is
below 1 only as far as its entries differ.
"""

_STACKED = 1 << 22
"""How many values of weights are stacked at most. Larger products cost more than launching them one by one."""


class EdgeNorms(NamedTuple):
    """What is measured of the edges of a block."""

    norms: tuple[tuple[int, int, float], ...]
    """(k, m, norm) of every edge, times its `edge_gain`."""
    coherent: bool
    """Whether the leading left singular vector of some edge is aligned with equal entries (`COHERENT`)."""


def edge_norms(frame: Frame, like: Sequence[Tensor]) -> EdgeNorms:
    """The norms of all edges of a block, on states shaped like `like`.

    The norm of (k, m) is ‖J_{mk}‖₂, that of the map from the state of layer k into the field of a later layer m, whose
    feedback is its transpose. Where the feedback has weights of its own, (m, k, norm) is there too, of the map back.
    """
    return edge_norms_of_each([(frame, like)])[0]


def edge_norms_of_each(
    blocks: Sequence[tuple[Frame, Sequence[Tensor]]],
) -> list[EdgeNorms]:
    """The result of `edge_norms` for each block, measured together where blocks are alike."""
    edges = [
        (number, start, end, _Edge.of(view, min(start, end), max(start, end), like[min(start, end)]))
        for number, (frame, like) in enumerate(blocks)
        for start, end, view in directions(frame)
    ]
    norms: dict[int, tuple[float, float]] = {}
    for group in _alike([edge for *_, edge in edges]):
        found = largest_singular_values(*_products(group), group[0].start(), len(group))
        norms.update((id(edge), pair) for edge, pair in zip(group, found, strict=True))
    measured: list[list[tuple[int, int, float]]] = [[] for _ in blocks]
    coherent = [False for _ in blocks]
    for number, start, end, edge in edges:
        norm, cosine = norms[id(edge)]
        measured[number].append((start, end, edge_gain(blocks[number][0], start, end) * norm * MARGIN))
        coherent[number] |= cosine >= COHERENT
    return [EdgeNorms(tuple(found), together) for found, together in zip(measured, coherent, strict=True)]


def directions(frame: Frame) -> list[tuple[int, int, Frame]]:
    """(k, m, frame) of every map between two states that is measured: the frame is the one whose J_{mk} it is."""
    forward = [(earlier, later, frame) for later, leaves in enumerate(frame.program.upstream) for earlier in leaves]
    if frame.program.symmetric:
        return forward
    return forward + [(later, earlier, frame.back) for earlier, later, _ in forward]


def edge_gain(frame: Frame, start: int, end: int) -> float:
    """Factor on the norm of an edge for random masks and for learned slopes above 1.

    A learned slope changes with the weights, and the program's own activations do not know it. So the present
    √(Lip σ_l Lip σ_m), divided by theirs, is a factor here, and the certificate follows the slopes.
    """
    gain = 1.0
    for instruction in frame.program.layers[max(start, end)].instructions:
        gain = instruction.operator.gain(gain)
    for index in (start, end):
        layer = frame.program.layers[index]
        if layer.parameters:
            gain *= math.sqrt(frame.activations[index].lipschitz / layer.activation.lipschitz)
    return gain


def without_tokens(frame: Frame, earlier: int, later: int) -> Frame:
    """A frame with one token if the edge treats all tokens alike, since its norm is then the same."""
    dims = len(frame.shapes[frame.program.layers[earlier].state])
    if dims < 3 or not _by_token(frame, earlier, later) or not frame.program.resizable:
        return frame
    shapes = {
        r: torch.Size((s[0], *[1] * (len(s) - 2), s[-1])) if len(s) == dims else s for r, s in frame.shapes.items()
    }
    return Frame(frame.program, (), frame.weights, frame.drawn, shapes, frozen=True)


def _by_token(frame: Frame, earlier: int, later: int) -> bool:
    """Whether an edge is made of products with matrices and sums, which treat all tokens alike."""
    dims = len(frame.shapes[frame.program.layers[earlier].state])
    return all(
        isinstance(i.operator, Linear | Scale | Sum) and all(len(frame.shapes[r]) == dims for r in i.operands)
        for i in frame.program.layers[later].instructions
        if any(frame.program.from_states[r] for r in i.operands)
    )


@dataclass(frozen=True, eq=False)
class _Edge:
    """The map from one state into the drive of a later layer."""

    frame: Frame
    earlier: int
    later: int
    like: Tensor
    """A state of the earlier layer, or one token of it."""

    @classmethod
    def of(cls, frame: Frame, earlier: int, later: int, like: Tensor) -> _Edge:
        """The edge, on one token if all are treated alike."""
        one = without_tokens(frame, earlier, later)
        if one is not frame:
            like = like[(slice(None), *[slice(1)] * (like.dim() - 2), slice(None))]
        return cls(one, earlier, later, like)

    @property
    def path(self) -> list[Instruction]:
        """The instructions between the state and the drive, and those of other states."""
        program = self.frame.program
        return [i for i in program.layers[self.later].instructions if any(program.from_states[r] for r in i.operands)]

    @property
    def weights(self) -> dict[int, Tensor]:
        """The weights of the path, by their indices."""
        found = {w: self.frame.weights[w] for i in self.path for w in i.weights if w is not None}
        return {index: weight for index, weight in found.items() if weight is not None}

    @property
    def kind(self) -> Hashable:
        """What edges have in common that may be measured together; None for one that is measured alone."""
        program, path = self.frame.program, self.path
        alone = not program.symmetric or 2 * self.size > _STACKED
        if alone or not _by_token(self.frame, self.earlier, self.later):
            return None
        items = tuple((i.operator, i.operands, i.weights, i.output) for i in path)
        states = tuple(one.state for one in program.layers)
        weights = tuple((index, w.shape, w.dtype, w.device) for index, w in self.weights.items())
        # Sums broadcast, so the shape of every operand matters.
        shapes = tuple(self.frame.shapes[r] for i in path for r in (*i.operands, i.output))
        drive = program.layers[self.later].drive
        return self.earlier, self.later, items, states, drive, weights, shapes, self.like.shape, self.like.dtype

    @property
    def size(self) -> int:
        """Number of values of the weights."""
        return sum(weight.numel() for weight in self.weights.values())

    def start(self) -> Tensor:
        """A random state of length one, the same on every device and rank."""
        generator = torch.Generator().manual_seed(0)
        dtype = self.like.dtype if self.like.dtype in (torch.float32, torch.float64) else torch.float32
        drawn = torch.randn(self.like.shape, generator=generator, dtype=dtype, device="cpu")
        start = torch.empty_like(self.like).copy_(drawn)
        return start / torch.linalg.vector_norm(start)

    def forward(self, frame: Frame, state: Tensor) -> Tensor:
        """J x."""
        slots: list[Tensor | None] = [None] * len(frame.program.layers)
        slots[self.earlier] = state
        image = frame.tangent(self.later, slots)
        shape = frame.shapes[frame.program.layers[self.later].drive]
        return state.new_zeros(shape) if image is None else image

    def transpose(self, frame: Frame, field: Tensor) -> Tensor:
        """Jᵀ y."""
        found = frame.pullback(self.later, field, states=True)
        state = frame.program.layers[self.earlier].state
        return found[state] if state in found else field.new_zeros(frame.shapes[state])


def _alike(edges: Sequence[_Edge]) -> Iterator[list[_Edge]]:
    """Groups of edges that are measured together."""
    groups: dict[Hashable, list[_Edge]] = {}
    for edge in edges:
        kind = edge.kind
        groups.setdefault(id(edge) if kind is None else kind, []).append(edge)
    for group in groups.values():
        most = max(1, _STACKED // max(group[0].size, 1))
        yield from (group[place : place + most] for place in range(0, len(group), most))


def _products(group: Sequence[_Edge]) -> tuple[Product, Product]:
    """J and Jᵀ of all edges of a group, on their states and fields along a new leading dimension."""
    first, frame = group[0], group[0].frame
    if len(group) == 1:
        return (lambda x: first.forward(frame, x[0])[None]), (lambda y: first.transpose(frame, y[0])[None])
    each_has = [edge.weights for edge in group]
    stacked = {index: torch.stack([weights[index] for weights in each_has]) for index in first.weights}

    def each(product: Callable[[Frame, Tensor], Tensor]) -> Product:
        def of_one(weights: dict[int, Tensor], value: Tensor) -> Tensor:
            own = [weights.get(index, weight) for index, weight in enumerate(frame.weights)]
            return product(Frame(frame.program, (), own, dict(frame.drawn), dict(frame.shapes), frozen=True), value)

        mapped = torch.func.vmap(of_one)
        return lambda values: mapped(stacked, values)

    return each(first.forward), each(first.transpose)
