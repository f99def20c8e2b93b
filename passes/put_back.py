"""Put back: replace the part of a tensor that a view shows.

`slice`, `select` and `diagonal` have scatter operations, and reshapes and permutations have inverses. For any other
view that only shows elements of its operand, `runtime.feedforward.in_place.put_through` finds each element's place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.runtime.feedforward.in_place import put_through, written_without_gradient

__all__ = ["Step", "put_back"]

aten = torch.ops.aten

_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
_RESHAPES = (
    "view", "reshape", "_unsafe_view", "flatten", "ravel", "squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as",
    "atleast_1d", "atleast_2d", "atleast_3d",
)  # fmt: skip
_SAME = ("alias", "contiguous", "to", "type_as", "clone", "lift_fresh", "resolve_conj", "resolve_neg")
_OWN_INVERSE = ("t", "transpose", "swapaxes", "swapdims", "numpy_T", "matrix_T", "mT")


@dataclass(frozen=True, eq=False)
class Step:
    """How one view is taken from the value before it."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: fx.Node
    """The captured node of the view, which has its meta data."""
    index: int | None = None
    """Index of the view if the operation gives several (`split`, `unbind`)."""


def put_back(graph: fx.Graph, step: Step, whole: fx.Node, part: fx.Node) -> fx.Node:
    """Add the nodes that compute `whole` with the part that `step` takes of it replaced by `part`.

    Raises:
        UnsupportedError: the view shows its operand in another dtype, or by strides.
    """
    target, operands = _inverse(step, whole, part)
    if target is None:
        return part
    fresh = graph.call_function(target, operands)
    fresh.meta = {
        **whole.meta,
        **{key: part.meta[key] for key in ("stack_trace", "nn_module_stack") if key in part.meta},
    }
    return fresh


def _inverse(step: Step, whole: fx.Node, part: fx.Node) -> tuple[Callable[..., Any] | None, tuple[Any, ...]]:
    view, arguments = step.target, step.args
    assert isinstance(view, torch._ops.OpOverload)
    name = view._schema.name.split("::")[1]
    if view in _SCATTERS and not step.kwargs and not part.meta["val"].is_complex():
        return _SCATTERS[view], (whole, part, *arguments)
    if name in ("detach", "detach_"):
        return written_without_gradient, (whole, part)
    if name in _SAME:
        return None, ()
    if name in _RESHAPES and not isinstance(arguments[0] if arguments else None, torch.dtype):
        return aten.reshape_as.default, (part, whole)
    if name in _OWN_INVERSE:
        return view, (part, *arguments)
    if view is aten.permute.default:
        dims = list(arguments[0])
        return view, (part, sorted(range(len(dims)), key=lambda index: int(dims[index]) % len(dims)))
    if view is aten.view_as_real.default:
        return aten.view_as_complex.default, (part,)
    if view is aten.view_as_complex.default:
        return aten.view_as_real.default, (part,)
    if name in ("as_strided", "real", "imag", "view") or step.kwargs:
        raise UnsupportedError(f"writes in place through {view}, a view that cannot be undone")
    return put_through, (whole, part, view, step.index, *arguments)
