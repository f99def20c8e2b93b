"""The activations of energy blocks as ONNX nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ffebm_compiler.errors import ExportError
from ffebm_compiler.onnx.emit import Writer
from ffebm_compiler.runtime.activations.table import (
    CELU,
    ELU,
    GELU,
    SELU,
    Activation,
    Clamp,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    Identity,
    LeakyReLU,
    LogSigmoid,
    Mish,
    PReLU,
    QuickGELU,
    ReLU,
    Sigmoid,
    SiLU,
    SlopedClamp,
    Softplus,
    Softshrink,
    Softsign,
    SplitReLU,
    Tanh,
)

__all__ = ["activation_nodes"]


def activation_nodes(
    writer: Writer, activation: Activation, h: str, parameters: Sequence[str] = (), rank: int = 2
) -> str:
    """Write σ(h) and return the name of the result. `parameters` are the names of σ's weights, `rank` is the rank of h.

    Raises:
        ExportError: the activation has no ONNX form here.
    """
    if isinstance(activation, PReLU):  # its slopes lie along the second dimension, ONNX's along the last
        shape = writer.ints([-1, *[1] * (rank - 2)])
        return writer.op("PRelu", h, writer.op("Reshape", parameters[0], shape))
    write = _TABLE.get(type(activation))
    if write is None:
        raise ExportError(f"activation {activation!r} has no ONNX form: convert again with its layer in force_digital")
    return write(writer, activation, h)


def _clamp(writer: Writer, activation: Any, h: str) -> str:
    low = "" if math.isinf(activation.lo) else writer.number(activation.lo)
    high = "" if math.isinf(activation.hi) else writer.number(activation.hi)
    if not low and not high:
        return writer.op("Identity", h)
    return writer.op("Clip", h, low, *([high] if high else []))


def _elu(writer: Writer, activation: Any, h: str) -> str:
    inner = writer.scaled(h, activation.input_scale)
    below = writer.op("Elu", inner, alpha=activation.alpha)
    if activation.input_scale != 1:
        positive = writer.op("Greater", h, writer.number(0.0))
        below = writer.op("Where", positive, h, below)
    return writer.scaled(below, activation.scale)


def _softplus(writer: Writer, activation: Any, h: str) -> str:
    inner = writer.scaled(h, activation.beta)
    soft = writer.scaled(_softplus_of(writer, inner), 1 / activation.beta)
    linear = writer.op("Greater", inner, writer.number(activation.threshold))
    return writer.op("Where", linear, h, soft)


def _softplus_of(writer: Writer, z: str) -> str:
    """log(1 + eᶻ) = max(z, 0) + log(1 + e^{−|z|}), which does not overflow."""
    small = writer.op("Exp", writer.op("Neg", writer.op("Abs", z)))
    return writer.op("Add", writer.op("Relu", z), writer.op("Log", writer.op("Add", small, writer.number(1.0))))


def _gelu(writer: Writer, activation: Any, h: str) -> str:
    return writer.op("Gelu", h, approximate=activation.approximate)


def _softshrink(writer: Writer, activation: Any, h: str) -> str:
    return writer.op("Shrink", h, lambd=activation.lambd, bias=activation.lambd)


def _hardswish(writer: Writer, activation: Any, h: str) -> str:
    return writer.op("Mul", h, writer.op("HardSigmoid", h, alpha=1 / 6, beta=0.5))


def _celu(writer: Writer, activation: Any, h: str) -> str:
    scaled = writer.scaled(h, 1 / activation.alpha)
    below = writer.scaled(writer.op("Elu", scaled, alpha=1.0), activation.alpha)
    return writer.op("Where", writer.op("Greater", h, writer.number(0.0)), h, below)


def _split_relu(writer: Writer, activation: Any, h: str) -> str:
    signs = np.ones((activation.above + activation.below, *[1] * (-1 - activation.dim)), dtype=writer.dtype)
    signs[activation.above :] = -1
    name = writer.constant(signs)
    return writer.op("Mul", writer.op("Relu", writer.op("Mul", h, name)), name)


def _mish(writer: Writer, activation: Any, h: str) -> str:
    return writer.op("Mul", h, writer.op("Tanh", _softplus_of(writer, h)))


_TABLE: Mapping[type[Activation], Callable[[Writer, Any, str], str]] = {
    Identity: lambda writer, _, h: h,
    ReLU: lambda writer, _, h: writer.op("Relu", h),
    Hardtanh: _clamp,
    Clamp: _clamp,
    SlopedClamp: lambda writer, a, h: _clamp(writer, a, writer.scaled(h, a.slope)),
    LeakyReLU: lambda writer, a, h: writer.op("LeakyRelu", h, alpha=a.negative_slope),
    Softshrink: _softshrink,
    Hardsigmoid: lambda writer, _, h: writer.op("HardSigmoid", h, alpha=1 / 6, beta=0.5),
    Hardswish: _hardswish,
    ELU: _elu,
    SELU: lambda writer, _, h: writer.op("Selu", h),
    CELU: _celu,
    Sigmoid: lambda writer, _, h: writer.op("Sigmoid", h),
    Tanh: lambda writer, _, h: writer.op("Tanh", h),
    Softsign: lambda writer, _, h: writer.op("Softsign", h),
    SplitReLU: _split_relu,
    Softplus: _softplus,
    LogSigmoid: lambda writer, _, h: writer.op("Neg", _softplus_of(writer, writer.op("Neg", h))),
    SiLU: lambda writer, _, h: writer.op("Mul", h, writer.op("Sigmoid", h)),
    QuickGELU: lambda writer, a, h: writer.op("Mul", h, writer.op("Sigmoid", writer.scaled(h, a.alpha))),
    Mish: _mish,
    GELU: _gelu,
}
