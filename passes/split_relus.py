"""Split ReLUs: max(h, 0) for the first units of a value and min(h, 0) for the others becomes one activation.

The hidden layers of Scellier's deep resistive networks (2024, arXiv 2402.11674) are cat(relu(h[:k]), −relu(−h[k:])). As
written, its parts would be states of their own. They are found in any spelling: a concatenation of parts of one value,
which slices, `narrow`, `chunk`, `split` or `tensor_split` take, before or after elementwise operations that compute
max(h, 0) or min(h, 0).

Promise: no concatenation is left that computes a split ReLU.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ffebm_compiler.ir import Program, ensures
from ffebm_compiler.passes.dead_code import erase_dead
from ffebm_compiler.passes.recognise_activations import ELEMENTWISE
from ffebm_compiler.runtime.activations.table import SplitReLU, split_relu

__all__ = ["split_relus"]

aten = torch.ops.aten

_SPLITS = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}
_JOINS = {aten.cat.default, aten.concat.default, aten.concatenate.default, aten.hstack.default}
_LONGEST = 8
"""The largest number of operations on a part."""


def _rest(node: fx.Node, *names: str) -> list[object]:
    """The arguments of an operation after its first one, None where one is left out."""
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names, 1)]


def _section(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """(value, dimension below 0, start, end) of an operation that takes a part of a value; 0 stands for the whole."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].target in _SPLITS:
        split, place = node.args[0], node.args[1]
        (dim,) = _rest(split, "_", "dim")[1:]
        source = split.args[0]
        parts = split.meta["val"]
        if not isinstance(place, int) or not all(isinstance(p, Tensor) for p in parts):
            return None
        axis = dim if isinstance(dim, int) else 0
        sizes = [part.shape[axis] for part in parts]
        place %= len(sizes)
        first, last = sum(sizes[:place]), sum(sizes[: place + 1])
    elif node.target is aten.slice.Tensor:
        source = node.args[0]
        dim, begin, end, step = _rest(node, "dim", "start", "end", "step")
        if step not in (None, 1):
            return None
        axis, first, last = dim or 0, begin or 0, end  # type: ignore[assignment]
        if first == 0 and (last is None or last == sys.maxsize):  # of the whole, as in h[:, :k]
            return source, 0, 0, -1  # type: ignore[return-value]
    elif node.target is aten.narrow.default:
        source, axis, first, length = node.args  # type: ignore[assignment]
        if not (isinstance(first, int) and isinstance(length, int)):
            return None
        last = first + length
    else:
        return None
    value = source.meta["val"]  # type: ignore[union-attr]
    size, rank = value.shape[axis], value.dim()
    last = size if last is None else last
    if not all(type(bound) is int for bound in (size, first, last)):
        return None
    first, last = (min(max(bound + size if bound < 0 else bound, 0), size) for bound in (first, last))
    return source, axis % rank - rank, first, last  # type: ignore[return-value]


def _parts(item: fx.Node) -> Iterator[tuple[fx.Node, int, int, int, bool]]:
    """(h, dimension, start, end, above) for every h of which a value is max(h, 0) or min(h, 0) of a part."""
    operations: list[fx.Node] = []
    taken: tuple[int, int, int] | None = None
    node = item
    while len(operations) <= _LONGEST:
        section = _section(node)
        if section is not None:
            node, axis, first, last = section
            if axis < 0 and taken is not None and taken[0] != axis:
                return
            if axis < 0:
                taken = (axis, first, last) if taken is None else (axis, first + taken[1], first + taken[2])
        elif node.target in ELEMENTWISE and len(node.all_input_nodes) == 1:
            operations.append(node)
            node = node.all_input_nodes[0]
        else:
            return
        above = _half(operations)
        if taken is not None and above is not None and node.meta["val"].dtype == item.meta["val"].dtype:
            yield (node, *taken, above)


def _half(operations: list[fx.Node]) -> bool | None:
    """Whether operations, the last one first, compute max(h, 0) (True) or min(h, 0) (False) of their source h."""
    grid = value = torch.linspace(-12, 12, 481, dtype=torch.float64, device="cpu")
    try:
        for node in reversed(operations):
            present = value
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _, now=present: now)  # type: ignore[misc]
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError):
        return None
    if value.shape != grid.shape:
        return None
    if torch.equal(value, grid.clamp(min=0)):
        return True
    return False if torch.equal(value, grid.clamp(max=0)) else None


def _found(node: fx.Node) -> tuple[fx.Node, SplitReLU] | None:
    """(h, activation) of a concatenation that is a split ReLU of h."""
    if node.target not in _JOINS or not isinstance(node.args[0], list | tuple) or len(node.args[0]) < 2:
        return None
    items = [item for item in node.args[0] if isinstance(item, fx.Node)]
    if len(items) < len(node.args[0]) or not all(isinstance(item.meta.get("val"), Tensor) for item in items):
        return None
    dim = 1 if node.target is aten.hstack.default else _rest(node, "dim")[0]
    rank = node.meta["val"].dim()
    axis = (dim if isinstance(dim, int) else 0) % rank - rank
    found = [{part[0]: part for part in reversed(list(_parts(item)))} for item in items]
    for value in found[0]:
        parts = [part[value] for part in found if value in part]
        if len(parts) < len(items) or axis == -value.meta["val"].dim() or any(part[1] != axis for part in parts):
            continue
        ends = [0, *(part[3] for part in parts)]
        above = [part[4] for part in parts]
        covered = all(part[2] == end for part, end in zip(parts, ends, strict=False))
        if not covered or ends[-1] != value.meta["val"].shape[axis] or above != sorted(above, reverse=True):
            continue
        border = ends[sum(above)]
        if 0 < border < ends[-1]:
            return value, SplitReLU(border, ends[-1] - border, axis)
    return None


def _is_split_relu(program: Program, node: fx.Node) -> bool:
    return _found(node) is not None


@ensures("is a concatenation that computes a split ReLU, which is one activation", _is_split_relu)
def split_relus(program: Program) -> Program:
    """Replace every cat(relu(h[:k]), −relu(−h[k:]))."""
    graph = program.graph
    replaced = False
    for node in list(graph.nodes):
        found = _found(node)
        if found is None:
            continue
        value, activation = found
        with graph.inserting_before(node):
            fresh = graph.call_function(split_relu, (value, activation.above, activation.below, activation.dim))
        fresh.meta = dict(node.meta)
        node.replace_all_uses_with(fresh)
        graph.erase_node(node)
        replaced = True
    if replaced:
        erase_dead(program)
    return program
