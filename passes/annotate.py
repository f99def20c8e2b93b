"""Annotate: give every node a role and a reason, and every dynamic node its sizes.

Promise: each node of the graph carries a `NodeInfo`. The returned `OperationGraph` holds every
dynamic node once, in topological order, with the weights it reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ffebm_compiler.ir import NodeInfo, Operation, OperationGraph, Program, Role, info, module_path, set_info
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.dead_code import for_effects_alone
from ffebm_compiler.passes.dialect import WEIGHTS, WIRING, activation_of, target_name
from ffebm_compiler.passes.order_of_draws import draws
from ffebm_compiler.passes.order_of_state import IN_ORDER
from ffebm_compiler.passes.product_macs import product_macs
from ffebm_compiler.passes.reasons import TWO_ACTIVATIONS, digital_reason
from ffebm_compiler.passes.static import drawn_nodes, static_nodes
from ffebm_compiler.runtime.feedforward.blocks import (
    ReboundAttention,
    ReboundBatchNorm,
    ReboundDropout,
    ReboundInstanceNorm,
)
from ffebm_compiler.runtime.feedforward.modes import TrainingMask

__all__ = ["annotate"]


def annotate(program: Program) -> OperationGraph:
    """Write a `NodeInfo` on every node and return the dynamic operations with their sizes."""
    alone, static = for_effects_alone(program), static_nodes(program)
    drawn = drawn_nodes(program, static)
    for node in program.graph.nodes:
        record = _classify(program, node, static, drawn)
        if node in alone and record.role in _DYNAMIC:
            kind = "weight" if record.role is Role.WEIGHT else ""
            record = NodeInfo(Role.DIGITAL, record.path, _FOR_EFFECTS_ALONE, kind)
        set_info(node, record)
    nodes = {node.name: node for node in program.graph.nodes if info(node).role in _DYNAMIC}
    calls = _calls(nodes.values())
    operations = [_operation(program, node, calls[node.name]) for node in nodes.values()]
    inputs = {
        node.name: _values(program, node)
        for node in program.graph.nodes
        if info(node).role is Role.INPUT and isinstance(node.meta.get("val"), torch.Tensor)
    }
    output = next(node for node in program.graph.nodes if node.op == "output")
    outputs = tuple(
        dict.fromkeys(n.name for n in output.all_input_nodes if info(n).role in _DYNAMIC or n.name in inputs)
    )
    ordered = tuple(
        operation.name
        for operation in operations
        if IN_ORDER in nodes[operation.name].meta or draws(program, nodes[operation.name])
    )
    return OperationGraph(inputs, tuple(operations), outputs, ordered)


_DYNAMIC = (Role.WEIGHT, Role.ACTIVATION, Role.WIRING, Role.DIGITAL)
_MOVING = (Role.INPUT, *_DYNAMIC)
_FIXED = (Role.LIFTED, Role.STATIC)
_GAIN = "it multiplies each value by a number of its own and sums none: a gain, no matrix product"
_FOR_EFFECTS_ALONE = "the output does not depend on it, only what the forward writes or draws besides"


def _classify(program: Program, node: fx.Node, static: set[fx.Node], drawn: set[fx.Node]) -> NodeInfo:
    path = module_path(node)
    if node.op == "output":
        return NodeInfo(Role.OUTPUT, path, "the network's output")
    if node.op == "placeholder":
        if node.name in program.inputs:
            return NodeInfo(Role.INPUT, path, "an input of the network")
        return NodeInfo(Role.LIFTED, path, "a parameter, buffer or constant")
    if isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat):
        return NodeInfo(Role.SHAPE, path, "an integer computed from shapes")
    if node in static:
        return NodeInfo(Role.STATIC, path, "computed from parameters alone")
    if node.op == "call_module":
        return _classify_module(program, node, path)
    if node.target in WEIGHTS:
        return _classify_weight(program, node, path)
    if _sized_at_run_time(node):
        return NodeInfo(Role.DIGITAL, path, _AT_RUN_TIME)
    if _computed_sizes(node):
        return NodeInfo(Role.DIGITAL, path, "its sizes are computed from the input's shape")
    if node.target in WIRING:
        kind = WIRING[node.target].kind_of(node)
        if kind:
            return NodeInfo(Role.WIRING, path, f"linear without weights ({kind})", kind)
    if _is_gain(node):
        return NodeInfo(Role.WIRING, path, _GAIN, "gain")
    activation = activation_of(node)
    if activation is not None and any(
        isinstance(operand, fx.Node) and info(operand).role not in _FIXED for operand in node.args[1:]
    ):
        return NodeInfo(Role.DIGITAL, path, f"a parameter of {activation.name} depends on the input")
    if activation is not None:
        return NodeInfo(Role.ACTIVATION, path, f"{activation.name} has an energy potential", activation.name)
    return NodeInfo(Role.DIGITAL, path, digital_reason(node, static, drawn))


def _is_gain(node: fx.Node) -> bool:
    """Whether a node multiplies an activation elementwise by a factor that depends on no input (layer scale)."""
    if node.target is not torch.ops.aten.mul.Tensor or not all(isinstance(operand, fx.Node) for operand in node.args):
        return False
    value, factor = sorted(node.args, key=lambda operand: info(operand).role in _FIXED)  # type: ignore[arg-type]
    if info(value).role not in _MOVING or info(factor).role not in _FIXED:  # type: ignore[arg-type]
        return False
    of, by, result = (operand.meta["val"] for operand in (value, factor, node))  # type: ignore[union-attr]
    return of.is_floating_point() and of.dtype == by.dtype == result.dtype and tuple(of.shape) == tuple(result.shape)


def _classify_module(program: Program, node: fx.Node, path: str) -> NodeInfo:
    module = program.graph_module.get_submodule(str(node.target))
    if isinstance(module, ReboundDropout) and module.kind not in ("alpha_dropout", "feature_alpha_dropout"):
        return NodeInfo(Role.WIRING, path, "dropout scales by a mask drawn once a forward", "dropout")
    if isinstance(module, TrainingMask):
        return NodeInfo(Role.WIRING, path, "it scales by a mask drawn once a forward", "dropout")
    if isinstance(module, ReboundBatchNorm):
        return NodeInfo(Role.DIGITAL, path, "batch norm is digital (fold_batchnorm=True folds one behind a layer)")
    if isinstance(module, ReboundInstanceNorm):
        return NodeInfo(Role.DIGITAL, path, "normalisation divides by statistics of its input")
    if isinstance(module, ReboundDropout):
        return NodeInfo(Role.DIGITAL, path, "alpha dropout adds a shift to what it drops: it is not linear")
    if isinstance(module, ReboundAttention):
        return NodeInfo(Role.DIGITAL, path, "attention multiplies activations by activations")
    return NodeInfo(Role.DIGITAL, path, getattr(module, "reason", f"{type(module).__name__} has no energy form"))


def _classify_weight(program: Program, node: fx.Node, path: str) -> NodeInfo:
    layer = WEIGHTS[node.target]
    _, weight, _ = layer.operands(node)
    if info(weight).role not in _FIXED:
        if layer.kind.startswith("conv"):
            return NodeInfo(Role.DIGITAL, path, "its kernel depends on the input, so that it is no weight")
        return NodeInfo(Role.DIGITAL, path, TWO_ACTIVATIONS)
    owner = _layer_path(program, weight, path)
    if not weight.meta["val"].numel():
        shape = tuple(weight.meta["val"].shape)
        return NodeInfo(
            Role.DIGITAL, owner, f"its weight is empty (shape {shape}), so that no device holds it", "weight"
        )
    if not node.meta["val"].is_floating_point():
        kind = str(node.meta["val"].dtype).removeprefix("torch.")
        return NodeInfo(Role.DIGITAL, owner, f"its values are {kind} and energy blocks are real numbers", "weight")
    if _sized_at_run_time(node):
        return NodeInfo(Role.DIGITAL, owner, _AT_RUN_TIME, "weight")
    if _computed_sizes(node):
        reason = "its stride, padding or dilation is computed from the input's shape"
        return NodeInfo(Role.DIGITAL, owner, reason, "weight")
    return NodeInfo(Role.WEIGHT, owner, f"{layer.kind} with a static weight", layer.kind)


_AT_RUN_TIME = "how many values it has is known at run time only (it depends on data)"


def _sized_at_run_time(node: fx.Node) -> bool:
    """Whether a size of a node's value depends on data, as after `nonzero`, a boolean mask or `repeat_interleave`."""
    return any(free_unbacked_symbols(tensor) for tensor in _tensors(node))


def _computed_sizes(node: fx.Node) -> bool:
    return any(info(operand).role is Role.SHAPE for operand in node.all_input_nodes)


def lifted_sources(node: fx.Node) -> list[fx.Node]:
    """The placeholders of parameters and buffers that a static node is computed from."""
    found: dict[fx.Node, None] = {}
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            found[current] = None
        else:
            stack.extend(reversed(current.all_input_nodes))
    return list(found)


_MOVES = """view reshape _unsafe_view flatten unflatten permute transpose t numpy_T mT squeeze unsqueeze select slice
narrow movedim expand repeat clone contiguous alias detach index_select _to_copy to lift_fresh_copy"""


def _origin_of_values(node: fx.Node) -> fx.Node:
    """The node that computed the values, before all operations that only move them."""
    while node.op == "call_function" and target_name(node) in _MOVES.split() and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _layer_path(program: Program, weight: fx.Node, path: str) -> str:
    """Module path of a layer: the running module if it holds the weight, else a module that holds it.

    The two may differ. A tied weight is held by several modules, and `nn.MultiheadAttention` runs its output
    projection itself.
    """
    targets = [program.lifted[source.name] for source in lifted_sources(weight) if source.name in program.lifted]
    running = _submodule(program.source, path)
    for target in targets:
        holder, _, name = target.rpartition(".")
        holding = _submodule(program.source, holder)
        tensor = None if holding is None else holding._parameters.get(name, holding._buffers.get(name))
        if running is not None and any(
            held is tensor for held in (*running._parameters.values(), *running._buffers.values())
        ):
            return path
    holders = [target.rpartition(".")[0].split(".parametrizations.")[0] for target in targets if "." in target]
    return holders[0] if holders else path


def _submodule(source: nn.Module, path: str) -> nn.Module | None:
    try:
        return module_at(source, path)
    except AttributeError:
        return None


def _example_size(size: Any) -> int:
    if not isinstance(size, torch.SymInt):
        return int(size)
    # A size that is known only at run time counts as one: the example gives no better number.
    return int(size.node.hint) if size.node.has_hint() else 1


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, torch.Tensor)]


def _values(program: Program, node: fx.Node) -> int:
    """Values per sample of a node: its elements divided by the batch size."""
    total = 0
    for tensor in _tensors(node):
        total += _per_sample(program, tensor, math.prod(_example_size(size) for size in tensor.shape))
    return total


def _per_sample(program: Program, tensor: torch.Tensor, total: int) -> int:
    """The part of one sample of a number that counts something of a tensor; all of it if no size is the batch's."""
    batched = program.batch_symbol is None or any(
        isinstance(size, torch.SymInt) and program.batch_symbol in str(size.node.expr) for size in tensor.shape
    )
    return total // program.batch_hint if batched and total % program.batch_hint == 0 else total


def _product_macs(program: Program, node: fx.Node) -> int:
    """Multiply-accumulates per sample of a node that is no layer."""
    module = program.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    total = product_macs(node, module, _example_size)
    return _per_sample(program, node.meta["val"], total) if total else 0


def _shape(program: Program, node: fx.Node) -> tuple[int | None, ...]:
    tensors = _tensors(node)
    if not tensors:
        return ()
    return tuple(
        None if isinstance(size, torch.SymInt) and str(size.node.expr) == program.batch_symbol else _example_size(size)
        for size in tensors[0].shape
    )


def _target(program: Program, node: fx.Node) -> str:
    if node.op != "call_module":
        return target_name(node)
    module = program.graph_module.get_submodule(str(node.target))
    return str(getattr(type(module), "operation", type(module).__name__))


def _dynamic_inputs(node: fx.Node) -> tuple[str, ...]:
    """Names of the dynamic values that a node depends on, directly or through their shapes."""
    names: dict[str, None] = {}
    for operand in node.all_input_nodes:
        role = info(operand).role
        if role is Role.SHAPE:
            names.update(dict.fromkeys(_dynamic_inputs(operand)))
        elif role is Role.INPUT:
            if isinstance(operand.meta.get("val"), torch.Tensor):
                names[operand.name] = None
        elif role not in _FIXED:
            names[operand.name] = None
    return tuple(names)


def _read_for_sizes(node: fx.Node) -> tuple[str, ...]:
    """Names of those of `_dynamic_inputs` of which a node reads the sizes alone, not the values."""
    read = {operand.name for operand in node.all_input_nodes if info(operand).role is not Role.SHAPE}
    return tuple(name for name in _dynamic_inputs(node) if name not in read)


def _calls(nodes: Iterable[fx.Node]) -> dict[str, int]:
    """For each node, which call of its module made it: 0 for the first. `torch.export` marks the others `path@1`."""
    seen: dict[str, list[str]] = {}
    found = {}
    for node in nodes:
        stack = [key for key in node.meta.get("nn_module_stack") or {} if key.startswith("L__self__")]
        calls = seen.setdefault(module_path(node), [])
        call = stack[-1] if stack else ""
        if call not in calls:
            calls.append(call)
        found[node.name] = calls.index(call)
    return found


def _operation(program: Program, node: fx.Node, call: int) -> Operation:
    record = info(node)
    weights: dict[str, None] = {}
    computed: dict[str, None] = {}
    for operand in node.all_input_nodes:
        if info(operand).role in _FIXED:
            as_it_is = _origin_of_values(operand)
            for source in lifted_sources(operand):
                if source.name in program.lifted:
                    weights[program.lifted[source.name]] = None
                    if source is not as_it_is:
                        computed[program.lifted[source.name]] = None
    rows = cols = 0
    groups = positions = 1
    bias = False
    macs = _product_macs(program, node) if record.role is not Role.WEIGHT else 0
    if record.role is Role.WEIGHT:
        layer = WEIGHTS[node.target]
        value, _, bias_node = layer.operands(node)
        rows, cols, groups = layer.matrix(node)
        produced = _values(program, value if layer.transposed else node)
        positions = max(1, produced // ((rows if layer.transposed else cols) * groups))
        bias = bias_node is not None
    return Operation(
        name=node.name,
        role=record.role,
        path=record.path,
        target=_target(program, node),
        inputs=_dynamic_inputs(node),
        values=_values(program, node),
        shape=_shape(program, node),
        reason=record.reason,
        kind=record.kind,
        weights=tuple(weights),
        computed=tuple(computed),
        rows=rows,
        cols=cols,
        groups=groups,
        positions=positions,
        bias=bias,
        product_macs=macs,
        sizes=_read_for_sizes(node),
        call=call,
    )
