"""Outside parameters: refuse a forward that reads trainable tensors which no module registers.

A parameter in a plain list, in a closure or in a global variable is a constant to the trace. `parameters()`
does not list it, and the hybrid does not have it, while the source computes a gradient for it.

Promise: no gradient of an output flows to a constant of the graph that requires a gradient in the source. A
tensor that is only read detached or under `no_grad` (a frozen teacher, a moving average) may be a constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.ir import Pass, Program
from ffebm_compiler.passes.exported_program import place_of
from ffebm_compiler.passes.source_line import source_line
from ffebm_compiler.passes.training_mask import OF_SHAPE
from ffebm_compiler.runtime.feedforward.in_place import written_without_gradient

__all__ = ["outside_parameters"]


@Pass
def outside_parameters(program: Program) -> Program:
    """Refuse a constant that stands for a trainable tensor which the hybrid does not have.

    Raises:
        UnsupportedError: there is one; names the tensor and the line that reads it.
    """
    for node in program.graph.nodes:
        if node.name in program.outside and _is_trained(node):
            tensor = program.outside[node.name]
            name = next(_names_of(program.source, tensor), "")
            what = f"'{name}'" if name else f"a tensor of shape {tuple(tensor.shape)}"
            line = next((place for user in node.users if (place := source_line(user))), "")
            raise UnsupportedError(
                f"forward reads {what}{line}, which requires a gradient and is no parameter of a module, so that the "
                "hybrid would never train it; register it (an nn.Parameter as an attribute, nn.ParameterList, "
                "nn.ModuleList), compute it in forward, or detach it where it is a constant"
            )
    return program


def _is_trained(constant: fx.Node) -> bool:
    """Whether the output has a gradient with respect to a constant."""
    pending, seen = [constant], set()
    while pending:
        node = pending.pop()
        if node.op == "output":
            return True
        if node in seen:
            continue
        seen.add(node)
        pending += [user for user in node.users if _lets_gradient_through(user, node)]
    return False


def _lets_gradient_through(user: fx.Node, operand: fx.Node) -> bool:
    """Whether a gradient flows from the result of an operation to an operand."""
    if user.op == "output":
        return True
    value = user.meta.get("val")
    if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
        return False
    if user.target is torch.ops.aten.detach.default or user.target in OF_SHAPE:
        return False
    return user.target is not written_without_gradient or user.args[0] is operand


def _names_of(source: nn.Module, tensor: torch.Tensor) -> Iterator[str]:
    """The names under which the attributes of a model's modules hold a tensor."""
    place = place_of(tensor)
    for path, module in source.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                yield from _names_within(value, f"{path}.{key}" if path else key, place, 0)


def _names_within(value: Any, name: str, place: tuple[object, ...], depth: int) -> Iterator[str]:
    if isinstance(value, torch.Tensor):
        if place_of(value) == place:
            yield name
    elif isinstance(value, nn.Module):
        for leaf, parameter in value.named_parameters():
            yield from _names_within(parameter, f"{name}.{leaf}", place, depth)
    elif isinstance(value, list | tuple) and depth < 3:
        for index, item in enumerate(value):
            yield from _names_within(item, f"{name}[{index}]", place, depth + 1)
    elif isinstance(value, dict) and depth < 3:
        for key, item in value.items():
            yield from _names_within(item, f"{name}[{key!r}]", place, depth + 1)
