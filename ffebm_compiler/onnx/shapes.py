"""Shapes: find the sizes of all values that an energy block computes, and which of them are free."""

from __future__ import annotations

import torch

from ffebm_compiler.onnx.emit import Free, Shape
from ffebm_compiler.onnx.steps import Step
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["register_shapes"]


def register_shapes(step: Step, block: EnergyBlock) -> dict[int, Shape]:
    """Register -> its shape. A size that changes with the free sizes is `Free`."""
    found: list[dict[int, torch.Size]] = []
    for other in (False, True):
        tensors = [
            operand.value.zeros(other) if operand.value is not None else operand.tensor for operand in step.operands
        ]
        count = block.program.inputs
        inputs = [tensor for tensor in tensors[:count] if tensor is not None]
        with torch.no_grad():
            frame = Frame(block.program, inputs, tensors[count:])
            states = frame.feedforward()
            shapes = dict(frame.shapes)
            for layer, state in zip(block.program.layers, states, strict=True):
                shapes[layer.state] = state.shape
            frame.read(dict(enumerate(states)))
            found.append(shapes | frame.shapes)
    return {
        register: tuple(a if a == b else Free(a, b) for a, b in zip(shape, found[1][register], strict=True))
        for register, shape in found[0].items()
    }
