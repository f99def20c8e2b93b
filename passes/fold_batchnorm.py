"""Fold batch norm: eval-mode batch norm goes into the weights of the layer before it.

    W' = W · γ/√(v + ε),    b' = (b − m) · γ/√(v + ε) + β

W' and b' are static operations of the graph, so that W, γ, β and the running statistics stay the source's
own tensors. The function is exact in eval mode, gradients reach all of these tensors, and `state_dict` does
not change. The running statistics are then frozen in train mode too, which a note says.

Promise: eval-mode values equal the source's up to rounding. A note names every batch norm that could not be folded.
"""

from __future__ import annotations

import torch
from torch import fx

from ffebm_compiler.ir import Pass, Program, module_path
from ffebm_compiler.passes.dead_code import erase_dead
from ffebm_compiler.passes.emit import on_fakes
from ffebm_compiler.runtime.feedforward.blocks import ReboundBatchNorm

__all__ = ["fold_batchnorm"]

aten = torch.ops.aten
_CONVS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv2d.padding,
    aten.conv1d.padding,
)


@Pass
def fold_batchnorm(program: Program) -> Program:
    """Fold every batch norm that follows a convolution or a linear of its own."""
    folded = 0
    paths = {module: path for path, module in program.source.named_modules()}
    for node in list(program.graph.nodes):
        rebound = _rebound(program, node)
        if rebound is None and not _frozen(node):
            continue
        reason = _obstacle(program, node)
        if reason:
            program.note(f"batch norm {module_path(node)!r} stays digital: {reason}")
            continue
        if rebound is not None:
            program.folded.add(paths[rebound.owner])
        _fold(program, node)
        folded += 1
    if folded:
        program.note(
            f"{folded} batch norms are folded into the layer before them: their running statistics are frozen, "
            "in train mode too"
        )
    erase_dead(program)
    return program


def _rebound(program: Program, node: fx.Node) -> ReboundBatchNorm | None:
    """The batch norm that follows the training flag of a module of the source, if the node calls one."""
    module = program.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, ReboundBatchNorm) else None


def _frozen(node: fx.Node) -> bool:
    """Whether the node is a batch norm whose mode no module decides, in eval mode: that of an exported program."""
    return node.target is aten.batch_norm.default and node.args[5] is False


def _obstacle(program: Program, node: fx.Node) -> str:
    layer, _, _, mean, _ = node.args[:5]
    if mean is None:
        return "it has no running statistics"
    if not isinstance(layer, fx.Node) or layer.target not in (*_CONVS, aten.linear.default):
        return "the operation before it is no convolution or linear"
    if len(layer.users) > 1:
        return "the layer before it is also read elsewhere"
    if layer.target is aten.linear.default and layer.meta["val"].dim() != 2:
        return "it normalises another dimension than the linear's features"
    weight = layer.args[1]
    if not isinstance(weight, fx.Node) or weight.name not in program.lifted:
        return "the weight of the layer before it is computed"
    return ""


def _fold(program: Program, node: fx.Node) -> None:
    graph = program.graph
    rebound = _rebound(program, node)
    eps = node.args[7] if rebound is None else rebound.eps
    layer, gamma, beta, mean, variance = node.args[:5]
    assert isinstance(layer, fx.Node)
    weight = layer.args[1]
    bias = layer.args[2] if len(layer.args) > 2 else None
    assert isinstance(weight, fx.Node)
    shape = [-1] + [1] * (weight.meta["val"].dim() - 1)

    def emit(target: object, *args: object) -> fx.Node:
        fresh = graph.call_function(target, args)  # type: ignore[arg-type]
        fresh.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
        with on_fakes(weight.meta["val"].fake_mode):
            fresh.meta["val"] = target(*values)  # type: ignore[operator]
        return fresh

    with graph.inserting_before(layer):
        scale = emit(aten.rsqrt.default, emit(aten.add.Scalar, variance, eps))
        if gamma is not None:
            scale = emit(aten.mul.Tensor, scale, gamma)
        folded = emit(aten.mul.Tensor, weight, emit(aten.view.default, scale, shape))
        shift = emit(aten.neg.default, mean) if bias is None else emit(aten.sub.Tensor, bias, mean)
        shift = emit(aten.mul.Tensor, shift, scale)
        if beta is not None:
            shift = emit(aten.add.Tensor, shift, beta)
    layer.args = (layer.args[0], folded, shift, *layer.args[3:])
    node.replace_all_uses_with(layer)
    graph.erase_node(node)
    if rebound is not None:
        program.graph_module.delete_submodule(str(node.target))
