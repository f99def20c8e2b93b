"""Export a whole hybrid as one ONNX file that plain onnxruntime runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ffebm_compiler.device_state import age_of
from ffebm_compiler.errors import ExportError
from ffebm_compiler.files.paths import path_of
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.onnx.digital import part_models
from ffebm_compiler.onnx.functions import DOMAIN, VERSION, BlockFunction, block_function
from ffebm_compiler.onnx.mode import warn_of_train_mode, warn_of_written_state
from ffebm_compiler.onnx.model_file import write_model
from ffebm_compiler.onnx.packages import package
from ffebm_compiler.onnx.steps import Step, Steps, Value, refuse_complex
from ffebm_compiler.onnx.trace import Trace
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.feedforward.casts import without_autocast
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["export_whole"]

_LARGE = 1 << 30
"""If the tensors have more bytes, they go to a file beside the model (one protobuf holds 2 GiB)."""


class _BlockNode(nn.Module):
    """Stands for an energy block while tracing. It becomes one node of our domain."""

    def __init__(self, block: EnergyBlock, function: BlockFunction, metadata: Mapping[str, str]) -> None:
        super().__init__()
        self.__dict__["_block"] = block
        self._function = function
        self._metadata = dict(metadata)

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """The node. The feedforward values only give dtypes and shapes, and are removed as dead code."""
        program = self.__dict__["_block"].program
        frame = Frame(program, operands[: program.inputs], operands[program.inputs :])
        like = frame.read(dict(enumerate(frame.feedforward())))
        results = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{self._function.name}",
            operands,
            attrs=dict(self._function.attributes),
            dtypes=[value.dtype for value in like],
            shapes=[value.shape for value in like],
            version=VERSION,
            metadata_props=self._metadata,
        )
        return tuple(results)


@without_autocast()
def export_whole(
    hybrid: HybridCore,
    path: str | Path,
    *,
    fuse_batchnorm: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the whole hybrid, in eval mode, as one checked ONNX file with a free batch size.

    Each energy block is a function of the domain `ffebm.energy` whose body settles it. Its outputs are
    NaN if it does not settle. Large tensors go to `<file>.data` beside the model.

    Args:
        hybrid: the hybrid, which is not changed.
        path: the file. An older one is replaced, or left as it is if writing fails.
        fuse_batchnorm: let the exporter fuse batch norm into digital convolutions.
        progress: called with the name of each of the two steps.

    Returns:
        The path.

    Raises:
        ExportError: where onnx is not installed, an operation has no ONNX form, an input or output is complex, or the
            path cannot be written.
        InputError: the path is none.
    """
    target = path_of(path, "the file to write, such as 'hybrid.onnx'")
    package("onnx")
    package("onnxscript")
    warn_of_train_mode(hybrid)
    warn_of_written_state(hybrid)
    progress("tracing")
    steps = Steps.of(hybrid)
    refuse_complex(steps, between=False)
    functions = {step.name: block_function(step) for step in steps.steps if step.energy}
    try:
        model = _trace(hybrid, steps, functions).export(fuse_batchnorm)
    except ExportError:
        part_models(steps, hybrid, fuse_batchnorm)  # this raises an error with the part's name if a part is the cause
        raise
    progress("writing")
    _complete(model, hybrid, functions)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    write_model(target, model, tensors_beside=size > _LARGE)
    return target


def _trace(hybrid: HybridCore, steps: Steps, functions: Mapping[str, BlockFunction]) -> Trace:
    trace = Trace()
    nodes: dict[str, fx.Node] = {value.name: trace.input(value.name, value) for value in steps.inputs}

    def node_of(value: Value) -> fx.Node:
        return nodes[value.name]

    for step in steps.steps:
        operands = [trace.operand(operand, node_of) for operand in step.operands]
        if step.energy:
            assert isinstance(step.module, EnergyBlock)
            symbol = _BlockNode(step.module, functions[step.name], _metadata(hybrid, step))
            results = trace.module(step.name, symbol, operands, len(step.outputs))
        else:
            results = trace.feedforward(step, operands)
        nodes.update({value.name: node for value, node in zip(step.outputs, results, strict=True)})
    for index, operand in enumerate(steps.outputs):
        node = trace.operand(operand, node_of)
        assert node is not None
        trace.output(f"output_{index}", node)
    return trace


def _metadata(hybrid: HybridCore, step: Step) -> dict[str, str]:
    plan = hybrid.plan.block(step.name)
    assert isinstance(step.module, EnergyBlock)
    return {
        "ffebm.block": step.name,
        "ffebm.layers": ", ".join(plan.layers),
        "ffebm.tiles": str(plan.tiles),
        "ffebm.loop_gain": f"{step.module.loop_gain:.6g}",
        "ffebm.feedback": str(step.module.feedback),
    }


def _complete(model: Any, hybrid: HybridCore, functions: Mapping[str, BlockFunction]) -> None:
    """Add the blocks' functions and the metadata to the traced model."""
    ir = package("onnx_ir")
    for function in functions.values():
        body = ir.serde.deserialize_function(function.proto)
        model.functions[body.identifier()] = body
    if functions:
        model.graph.opset_imports[DOMAIN] = VERSION
    model.graph.name = hybrid.plan.model
    model.producer_name = "ffebm-compiler"
    model.producer_version = None
    model.metadata_props.update({"ffebm.model": hybrid.plan.model, "ffebm.mode": "eval"})
    if hybrid.devices is not None and not hybrid.devices.only_digital:
        told = f"{hybrid.devices.name}, seed {hybrid.devices.seed}, {age_of(hybrid):g} s after programming"
        model.metadata_props["ffebm.devices"] = told
