"""Make a `Program` (see `ir`) of an `ExportedProgram` of `torch.export`. A tied weight becomes one placeholder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ffebm_compiler.errors import CaptureError
from ffebm_compiler.ir import Program
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.code_when_run import graph_module_without_code
from ffebm_compiler.passes.containers import PLAIN, Form, Recipe
from ffebm_compiler.passes.held import held_tensors

__all__ = ["batch_of", "module_of", "place_of", "program_of"]


def program_of(
    exported: ExportedProgram,
    source: nn.Module,
    note: str,
    inputs: Recipe = PLAIN,
    outputs: Recipe = PLAIN,
    outside: Sequence[torch.Tensor] = (),
    copied: bool = False,
) -> Program:
    """The program of an exported module.

    Args:
        exported: the module as it was exported.
        source: the module, which owns the tensors.
        note: a note for the plan, or an empty text.
        inputs: how to build the containers of the inputs from plain ones.
        outputs: how to build the containers of the outputs from plain ones.
        outside: tensors with `requires_grad` that the forward reads and no module registers.
        copied: whether the passes get a copy of the graph, since they rewrite it and the exported module is the user's.
    """
    graph_module = exported.graph_module
    _complete_users(graph_module)
    first = {id(tensor): name for name, tensor in [*source.named_parameters(), *source.named_buffers()]}
    tensors = dict(source.named_parameters(remove_duplicate=False))
    places = {place_of(tensors[name]): first[id(tensors[name])] for name in tensors}
    lifted: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    trained: dict[str, torch.Tensor] = {}
    held = {place_of(tensor) for tensor in held_tensors(source)}
    outside_places = {place_of(tensor) for tensor in outside}
    names: list[str] = []
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            target = str(spec.target)  # of a tied weight, the first name
            lifted[name] = first.get(id(tensors[target]), target) if target in tensors else target
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            constant = exported.constants[str(spec.target)]
            if place_of(constant) in places:  # it is a parameter, which a function of the model closes over
                lifted[name] = places[place_of(constant)]
            else:
                shared = place_of(constant) in held  # the model's attributes hold it, so that it may change with them
                constants[name] = constant.detach() if shared else constant.detach().clone()
                if constant.requires_grad or place_of(constant) in outside_places:
                    trained[name] = constant
        elif spec.kind == InputKind.USER_INPUT:
            names.append(name)
        else:
            raise CaptureError(
                f"the captured graph takes {name!r} of kind {spec.kind.name.lower()}, and only tensors and plain "
                "values can be converted: take it out of forward, or convert the submodules around it"
            )
    symbol, hint = batch_of(graph_module, names)
    graph = _copy_of(graph_module.graph) if copied else graph_module.graph
    program = Program(
        graph_module=graph_module_without_code(graph_module, graph),
        source=source,
        lifted=lifted,
        constants=constants,
        outside=trained,
        inputs=tuple(names),
        in_spec=Form(exported.call_spec.in_spec, inputs),
        out_spec=Form(exported.call_spec.out_spec, outputs),
        batch_symbol=symbol,
        batch_hint=hint,
    )
    if note:
        program.note(note)
    return program


def _complete_users(graph_module: fx.GraphModule) -> None:
    """Note every user of every value, since the exporter forgets users without a result when it dissolves a region."""
    for module in graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            for operand in node.all_input_nodes:
                operand.users.setdefault(node)


def _copy_of(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes have the same names. fx names them anew, and calls an `input` `input_1`."""
    copied = copy.deepcopy(graph)
    for node, twin in zip(graph.nodes, copied.nodes, strict=True):
        twin.name = node.name
    return copied


def place_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """A key that is the same for all names of one tensor: its memory and layout, or itself if it has no memory."""
    has_memory = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not has_memory or tensor.device.type == "meta" or not tensor.numel():
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def batch_of(graph_module: fx.GraphModule, inputs: list[str]) -> tuple[str | None, int]:
    """The batch size: its symbol, or None where it is fixed, and its size in the example.

    It is the first input's leading dimension, or the only one that is free. Where the layers take the inputs of one
    sample without a batch, it is 1.
    """
    for node in graph_module.graph.nodes:
        if node.op != "placeholder" or node.name not in inputs:
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.dim():
            continue
        symbolic = [isinstance(size, torch.SymInt) and not size.node.expr.is_number for size in value.shape]
        free = [dimension for dimension, is_free in enumerate(symbolic) if is_free]
        if free[:1] == [0] or len(free) == 1:
            size: Any = value.shape[free[0]]
            return str(size.node.expr), int(size.node.hint)
        return None, 1 if _has_no_batch(graph_module.graph) else int(value.shape[0])
    return None, 1


def _has_no_batch(graph: fx.Graph) -> bool:
    """Whether the first layer takes one sample without a leading dimension, as `linear(features)` does."""
    for node in graph.nodes:
        name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
        wanted = _DIMENSIONS_OF_ONE_SAMPLE.get(name.removeprefix("aten::"))
        if wanted is not None:
            return bool(node.args[0].meta["val"].dim() == wanted)
    return False


_DIMENSIONS_OF_ONE_SAMPLE = {
    "linear": 1,
    **{f"{kind}{count}d": count + 1 for kind in ("conv", "conv_transpose") for count in (1, 2, 3)},
}


def module_of(exported: ExportedProgram) -> nn.Module:
    """A plain module tree that holds an exported program's parameters and buffers by name."""
    root = nn.Module()
    for name, tensor in exported.state_dict.items():
        *parents, leaf = name.split(".")
        module = root
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module_at(module, part)
        copied = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, nn.Parameter(copied, requires_grad=tensor.requires_grad))
        else:
            module.register_buffer(leaf, copied)
    return root
