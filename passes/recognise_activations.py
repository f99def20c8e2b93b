"""Recognise activations: elementwise spellings of a known activation become that activation.

Models write SiLU as `x * sigmoid(x)`, softsign as `x / (1 + |x|)`, and half a dozen versions of
GELU by hand. A cone is a group of elementwise operations between one value and one result. It is
evaluated on a grid in float64 and compared with the activations that have a potential.

Promise: a replaced cone equals its activation to 1e-6 on [−12, 12].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ffebm_compiler.ir import Pass, Program
from ffebm_compiler.passes.dead_code import erase_dead
from ffebm_compiler.runtime.activations.table import quick_gelu

__all__ = ["ELEMENTWISE", "recognise_activations"]

aten = torch.ops.aten

ELEMENTWISE = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.abs.default,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.exp.default,
    aten.log1p.default,
    aten.tanh.default,
    aten.erf.default,
    aten.sigmoid.default,
    aten.softplus.default,
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardsigmoid.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.minimum.default,
    aten.maximum.default,
}
"""Operations that act on every value alone."""

_KNOWN: tuple[tuple[Callable[..., object], dict[str, str], Callable[[Tensor], Tensor]], ...] = (
    (aten.silu.default, {}, F.silu),
    (aten.gelu.default, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    (aten.gelu.default, {}, F.gelu),
    (aten.hardswish.default, {}, F.hardswish),
    (aten.mish.default, {}, F.mish),
    (F.softsign, {}, F.softsign),
    (quick_gelu, {}, quick_gelu),
    (aten.softplus.default, {}, F.softplus),
)

_LARGEST = 16
"""The largest number of operations in a cone."""


@Pass
def recognise_activations(program: Program) -> Program:
    """Replace every cone that computes a known activation, largest cones first."""
    graph = program.graph
    for node in reversed(list(graph.nodes)):
        if node.target not in ELEMENTWISE or not node.users:
            continue
        matches = [(source, cone, found) for source, cone in _cones(node) if (found := _match(source, cone))]
        if not matches:
            continue
        source, cone, (target, keywords) = matches[-1]  # the largest
        with graph.inserting_before(node):
            fresh = graph.call_function(target, (source,), dict(keywords))
        fresh.meta = dict(node.meta)
        node.replace_all_uses_with(fresh)
        for member in cone:  # from the result back to the source
            if not member.users:
                graph.erase_node(member)
    erase_dead(program)
    return program


def _cones(result: fx.Node) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """For every x that `result` is an elementwise function of: x, and the operations in between, the last one first."""
    value = result.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    cone: list[fx.Node] = [result]
    while len(cone) <= _LARGEST:
        inside = set(cone)
        outside = list(dict.fromkeys(o for member in cone for o in member.all_input_nodes if o not in inside))
        if len(cone) > 1 and len(outside) == 1 and _same_shape(outside[0], value):
            yield outside[0], list(cone)
        grown = next((o for o in outside if o.target in ELEMENTWISE and all(user in inside for user in o.users)), None)
        if grown is None:
            return
        cone.append(grown)


def _same_shape(node: fx.Node, value: Tensor) -> bool:
    other = node.meta.get("val")
    return isinstance(other, Tensor) and other.shape == value.shape and other.dtype == value.dtype


def _match(source: fx.Node, cone: list[fx.Node]) -> tuple[Callable[..., object], dict[str, str]] | None:
    grid = torch.linspace(-12, 12, 481, dtype=torch.float64, device="cpu")
    values: dict[fx.Node, Tensor] = {source: grid}
    try:
        for member in _in_order(source, cone):
            args, kwargs = fx.map_arg((member.args, member.kwargs), values.__getitem__)
            values[member] = member.target(*args, **kwargs)  # type: ignore[operator]
    except (KeyError, RuntimeError, TypeError):
        return None
    computed = values[cone[0]]
    if computed.shape != grid.shape:
        return None
    for target, keywords, function in _KNOWN:
        if torch.allclose(computed, function(grid), rtol=1e-6, atol=1e-6):
            return target, keywords
    return None


def _in_order(source: fx.Node, cone: list[fx.Node]) -> list[fx.Node]:
    order: list[fx.Node] = []
    done = {source}
    pending = list(reversed(cone))
    while pending:
        ready = [member for member in pending if all(o in done for o in member.all_input_nodes)]
        if not ready:
            raise KeyError("the cone reads another value")
        order.extend(ready)
        done.update(ready)
        pending = [member for member in pending if member not in done]
    return order
