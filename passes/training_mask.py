"""Training masks: find products with a random factor that depends only on a value's shape.

Stochastic depth multiplies a branch by random zeros and ones in train mode. Such a factor is drawn once a forward,
before anything settles. So it counts as wiring and may stand inside an energy block.

Promise: the graph that is found computes x · m, with m independent of the values of x.
"""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.ir import Program
from ffebm_compiler.passes.align_modes import is_size, operands
from ffebm_compiler.passes.mode_parts import Piece, Side
from ffebm_compiler.passes.unchanged import generators_unchanged

__all__ = ["OF_SHAPE", "mask_of", "rate_of"]

aten = torch.ops.aten
OF_SHAPE = (
    aten.new_empty.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_zeros.default,
    aten.empty_like.default,
    aten.rand_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.sym_size.int,
)
"""Operations that read the shape, the dtype and the device of their operand, not its values."""

_DRAWN_MASKS = 1024
"""How many masks are drawn to find the largest factor."""


def mask_of(piece: Piece, reads: list[list[tuple[fx.Node, fx.Node]]], training: Program) -> fx.GraphModule | None:
    """The graph x -> x · m of a piece that only train mode has; None if the piece is something else."""
    if piece.evaluation or len(piece.results) != 1 or len(reads[0]) != 1:
        return None
    result = piece.results[0][1]
    read = [operand for node in piece.training for operand in operands(node) if operand not in piece.training]
    values = dict.fromkeys(operand for operand in read if not is_size(operand))
    if result is None or len(values) != 1:
        return None
    (x,) = values
    if dict(reads[1])[x] is not reads[0][0][1] or not _is_multiple(result, x):
        return None
    if str(x.meta["val"].shape) != str(result.meta["val"].shape):
        return None
    side = Side(training, 1)
    side.bind(x, 0)
    for size in read:
        if is_size(size) and not _read_from_x(side, size, x):
            return None
    return side.finish(piece.training, [result], single=True)


def rate_of(part: fx.GraphModule, captured: torch.Tensor) -> float:
    """The p for which 1/(1 − p) is the largest factor of a mask, by which it can increase a norm.

    Args:
        part: the graph x -> x · m.
        captured: x as it was captured. A size that is fixed there may be fixed in the graph too.
    """
    leading = [size if isinstance(size, int) else _DRAWN_MASKS for size in captured.shape[:1]]
    try:
        largest = _largest(part, (*leading, *(1 for _ in captured.shape[1:])), captured.device)
    except RuntimeError:  # the graph holds sizes of the capture that do not broadcast
        sizes = (size.node.hint if isinstance(size, torch.SymInt) else size for size in captured.shape[1:])
        largest = _largest(part, (*leading, *sizes), captured.device)
    return 1 - 1 / largest if largest > 1 else 0.0


def _largest(part: fx.GraphModule, shape: tuple[int, ...], device: torch.device) -> float:
    with generators_unchanged(), torch.no_grad():
        torch.manual_seed(0)
        draws = range(max(1, _DRAWN_MASKS // max(1, *shape[:1], 1)))
        return max(float(part(torch.ones(shape, device=device)).abs().max()) for _ in draws)


def _is_multiple(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is x times factors that depend on its shape alone."""
    if node is x:
        return True
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or node.kwargs:
        return False
    first, second = node.args
    sides = [(first, second)] if node.target is aten.div.Tensor else [(first, second), (second, first)]
    return any(
        isinstance(value, fx.Node)
        and _is_multiple(value, x)
        and (not isinstance(factor, fx.Node) or _is_free_of(factor, x))
        for value, factor in sides
    )


def _is_free_of(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node does not depend on the values of x."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or current.target in OF_SHAPE:
            continue
        seen.add(current)
        if current is x:
            return False
        pending.extend(operands(current))
    return True


def _read_from_x(side: Side, size: fx.Node, x: fx.Node) -> bool:
    """Read a size of the network from x itself; False if x has no such dimension."""
    wanted = str(size.meta["val"])
    for dimension, length in enumerate(x.meta["val"].shape):
        if str(length) == wanted:
            side.env[size] = side.graph.call_function(aten.sym_size.int, (side.placeholders[0], dimension))
            return True
    return False
