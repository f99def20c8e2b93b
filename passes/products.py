"""Products of several tensors over named dimensions, taken apart into layers and a rest.

    Σ t₁[...] t₂[...] ...   over every name that the result does not have

An activation is multiplied by one weight at a time; the pair that sums most names comes first. Each such product is a
layer: a `linear` where that says the same, else a `contraction`. Before, each factor is made simple. Names that no
other factor has are summed, dimensions of size one that are broadcast are dropped, and diagonals are taken.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import fx

from ffebm_compiler.ir import Program
from ffebm_compiler.passes.emit import emit_like
from ffebm_compiler.passes.static import is_static, static_nodes
from ffebm_compiler.runtime.program.contraction import contraction

__all__ = ["Products", "Term", "shape_of"]

aten = torch.ops.aten
_EXPANDING = (aten.expand.default, aten.repeat.default)
Term = tuple[fx.Node, tuple[object, ...]]
"""A value and a name for each of its dimensions. Dimensions with the same name run together, as in `einsum`."""


class Products:
    """Emits products of activations and weights in the place of a node."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.static = static_nodes(program)
        self.like: fx.Node | None = None
        """The node in whose place nodes are emitted."""

    def emit(self, target: Callable[..., object], *args: object) -> fx.Node:
        """A new node in the place of `like`, with its module and line."""
        assert self.like is not None
        fresh = emit_like(self.program.graph, self.like, target, *args)
        if is_static(self.program, fresh, self.static):
            self.static.add(fresh)
        return fresh

    def mixed(self, *nodes: object) -> bool:
        """Whether some operands are activations and some are weights or expanded weights."""
        found = {
            node in self.static or (node.target in _EXPANDING and node.args[0] in self.static)
            for node in nodes
            if isinstance(node, fx.Node)
        }
        return len(found) == 2

    def product(self, terms: Sequence[Term], result: Sequence[object]) -> fx.Node | None:
        """Σ of the product of all terms over the names that the result does not have; None if no layer comes of it."""
        left = [self._diagonal(*term) for term in terms]
        left = self._without_ones([self._unexpanded(left, index) for index in range(len(left))], result)
        found = False
        while len(left) > 1:
            left = [self._summed_over_own_names(left, index, result) for index in range(len(left))]
            pair = self._next_pair(left, result)
            if pair is None:
                break
            value, weight = (left[index] for index in pair)
            rest = [term for index, term in enumerate(left) if index not in pair]
            kept = {*result, *(name for _, names in rest for name in names)}
            names = tuple(dict.fromkeys(name for name in (*value[1], *weight[1]) if name in kept))
            if not rest:
                names = tuple(result)
            mixed = self.mixed(value[0], weight[0])
            found = found or mixed
            left = [(self._multiply(value, weight, names, mixed), names), *rest]
        if not found:
            return None
        if len(left) == 1 and left[0][1] == tuple(result):
            return left[0][0]
        return self.emit(aten.einsum.default, _equation([n for _, n in left], result), [node for node, _ in left])

    def _next_pair(self, terms: Sequence[Term], result: Sequence[object]) -> tuple[int, int] | None:
        """Indices of the next two terms to multiply; None if there are none.

        These are an activation and a weight that share a summed name. If there are none, two activations or two
        weights that share one are multiplied, as long as terms of both kinds are left.
        """
        several = self.mixed(*(node for node, _ in terms))
        best: list[tuple[bool, int, int, int]] = []
        for first, (node, names) in enumerate(terms):
            for second, (other, others) in enumerate(terms):
                elsewhere = {*result, *(x for k, (_, n) in enumerate(terms) if k not in (first, second) for x in n)}
                shared = sum(name in others and name not in elsewhere for name in names)
                layer = node not in self.static and other in self.static
                alike = first < second and several and not self.mixed(node, other)
                if shared and (layer or alike):
                    best.append((layer, shared, -first, -second))
        if not best:
            return None
        _, _, first, second = max(best)
        return -first, -second

    def _multiply(self, value: Term, weight: Term, names: tuple[object, ...], mixed: bool) -> fx.Node:
        """The product of two terms. It is a layer if `mixed`: one is an activation and the other a weight."""
        (x, of_x), (w, of_w) = value, weight
        if not mixed:
            return self.emit(aten.einsum.default, _equation([of_x, of_w], names), [x, w])
        if (
            len(of_w) == 2
            and of_x[-1:] + names[-1:] in (of_w, of_w[::-1])
            and of_x[:-1] == names[:-1]
            and len(of_x) > 1
        ):
            return self.emit(aten.linear.default, x, w if of_w[1] == of_x[-1] else self.emit(aten.t.default, w))
        return self.emit(contraction, x, w, _equation([of_x, of_w], names))

    def _summed_over_own_names(self, terms: Sequence[Term], index: int, result: Sequence[object]) -> Term:
        """A term, summed over the names that neither another term nor the result has."""
        node, names = terms[index]
        others = {*result, *(name for k, (_, n) in enumerate(terms) if k != index for name in n)}
        dims = [dim for dim, name in enumerate(names) if name not in others]
        if not dims:
            return node, names
        return self.emit(aten.sum.dim_IntList, node, dims), tuple(name for name in names if name in others)

    def _diagonal(self, node: fx.Node, names: tuple[object, ...]) -> Term:
        """A term whose names are all different, since diagonals are taken over repeated ones."""
        for name in names:
            while names.count(name) > 1:
                first = names.index(name)
                second = names.index(name, first + 1)
                node = self.emit(aten.diagonal.default, node, 0, first, second)
                names = (*(n for k, n in enumerate(names) if k not in (first, second)), name)
        return node, names

    def _without_ones(self, terms: Sequence[Term], result: Sequence[object]) -> list[Term]:
        """Terms without dimensions of size one that are broadcast to another term's larger dimension."""
        large = {n for node, names in terms for n, size in zip(names, shape_of(node), strict=True) if not _is_one(size)}
        found = []
        for node, names in terms:
            ones = [k for k, size in enumerate(shape_of(node)) if _is_one(size) and names[k] in large]
            for dim in reversed(ones):
                node = self.emit(aten.squeeze.dim, node, dim)
            found.append((node, tuple(name for k, name in enumerate(names) if k not in ones)))
        return found

    def _unexpanded(self, terms: Sequence[Term], index: int) -> Term:
        """A term without an expansion of a parameter along dimensions that another term has; then it is static."""
        node, names = terms[index]
        source = node.args[0] if node.target in _EXPANDING else None
        if node in self.static or not isinstance(source, fx.Node) or source not in self.static:
            return node, names
        missing = len(names) - len(shape_of(source))
        sizes = [1] * missing + list(shape_of(source))
        pairs = list(enumerate(zip(map(str, sizes), map(str, shape_of(node)), strict=True)))
        copied = [k for k, (one, size) in pairs if one == "1" != size]
        elsewhere = {name for k, (_, n) in enumerate(terms) if k != index for name in n}
        same = all(k in copied or one == size for k, (one, size) in pairs)
        if not same or any(names[k] not in elsewhere for k in copied):
            return node, names
        for dim in reversed([k - missing for k in copied if k >= missing]):
            source = self.emit(aten.squeeze.dim, source, dim)
        return source, tuple(name for k, name in enumerate(names) if k not in copied)


def shape_of(node: fx.Node) -> Sequence[object]:
    """The sizes of a node's value."""
    shape: Sequence[object] = node.meta["val"].shape
    return shape


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1


def _equation(operands: Iterable[Sequence[object]], result: Sequence[object]) -> str:
    letters: dict[object, str] = {}
    for name in [name for names in operands for name in names]:
        letters.setdefault(name, string.ascii_lowercase[len(letters)])
    sides = [",".join("".join(letters[name] for name in names) for names in operands)]
    return "->".join([*sides, "".join(letters[name] for name in result)])
