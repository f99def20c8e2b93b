"""Explicit casts: the casts that autocast makes inside its regions become operations of the graph.

An operation in `with torch.autocast(...):` computes in another dtype than its operands have. To find which
operands torch casts, and to what, the operation is run on its captured (fake) values
with autocast on, and the copies that it makes are watched. The checks of dtypes that `torch.export`
records beside every `.to(...)` are removed, since they hold for the dtype at capture only.

Promise: the graph computes, outside any autocast region, what the source computes inside its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ffebm_compiler.ir import Pass, Program
from ffebm_compiler.passes.emit import on_fakes
from ffebm_compiler.passes.inline_regions import AUTOCAST, Autocast
from ffebm_compiler.runtime.feedforward.casts import autocast_to, under_autocast

__all__ = ["explicit_casts"]

aten = torch.ops.aten


@Pass
def explicit_casts(program: Program) -> Program:
    """Write the casts of every operation in an autocast region; drop recorded checks of dtypes."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            continue
        region = node.meta.get(AUTOCAST)
        if isinstance(region, Autocast) and region.enabled and isinstance(node.target, torch._ops.OpOverload):
            _cast_operands(graph, node, region)
    graph.lint()
    return program


def _cast_operands(graph: fx.Graph, node: fx.Node, region: Autocast) -> None:
    casts = _casts(node, region)
    if casts is None:  # torch casts inside the operation, so that the operation keeps its autocast
        node.args = (region.device, region.dtype, node.target, *node.args)  # type: ignore[arg-type]
        node.target = under_autocast
        return
    if not casts:
        return
    fresh: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for operand, dtype in casts.items():
            cast = graph.call_function(autocast_to, (operand, dtype))
            cast.meta = dict(node.meta)
            with on_fakes(operand.meta["val"].fake_mode):
                cast.meta["val"] = operand.meta["val"].to(dtype)
            fresh[operand] = cast
    node.args = fx.map_arg(node.args, lambda operand: fresh.get(operand, operand))
    node.kwargs = fx.map_arg(node.kwargs, lambda operand: fresh.get(operand, operand))


class _Copies(TorchDispatchMode):
    """Notes which tensors are copied into another dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[torch.Tensor, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation if it is a copy, then run it."""
        kwargs = kwargs or {}
        if func is aten._to_copy.default and isinstance(kwargs.get("dtype"), torch.dtype):
            self.made.append((args[0], kwargs["dtype"]))
        return func(*args, **kwargs)


def _casts(node: fx.Node, region: Autocast) -> dict[fx.Node, torch.dtype] | None:
    """Operand -> dtype that autocast gives it; None where torch casts inside the operation."""
    operands = {
        id(value): operand
        for operand in node.all_input_nodes
        if isinstance(value := operand.meta.get("val"), torch.Tensor)
    }
    if not any(operand.meta["val"].is_floating_point() for operand in operands.values()):
        return {}
    plain, cast = (_copies(node, region, enabled) for enabled in (False, True))
    if len(plain) == len(cast):
        return {}
    name = node.target.name()  # type: ignore[union-attr]
    key = f"Autocast{ {'cpu': 'CPU', 'cuda': 'CUDA'}.get(region.device, region.device.upper()) }"
    direct = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    if not direct or plain or any(id(tensor) not in operands for tensor, _ in cast):
        return None
    return {operands[id(tensor)]: dtype for tensor, dtype in cast}


def _copies(node: fx.Node, region: Autocast, enabled: bool) -> list[tuple[torch.Tensor, torch.dtype]]:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: operand.meta.get("val"))
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with on_fakes(mode), torch.no_grad(), torch.autocast(region.device, region.dtype, enabled), _Copies() as copies:
        try:
            node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:
            if enabled:
                raise
            # Operands of two dtypes: the operation runs only under autocast.
    return copies.made
