"""The activations that an energy block can hold, and their ATen operators.

An energy block is in equilibrium where ∂G_l(s_l) = h_l, that is s_l = σ_l(h_l); see `Activation`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from numbers import Real

import torch

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.activations.learned import PReLU
from ffebm_compiler.runtime.activations.piecewise import (
    CELU,
    ELU,
    SELU,
    Clamp,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    Identity,
    LeakyReLU,
    ReLU,
    SlopedClamp,
    Softshrink,
    sloped_clamp,
)
from ffebm_compiler.runtime.activations.smooth import (
    GELU,
    LogSigmoid,
    Mish,
    QuickGELU,
    Sigmoid,
    SiLU,
    Softplus,
    Softsign,
    Tanh,
    quick_gelu,
)
from ffebm_compiler.runtime.activations.split import SplitReLU, split_relu

__all__ = [
    "ALL",
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Activation",
    "Clamp",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "PReLU",
    "QuickGELU",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "SlopedClamp",
    "Softplus",
    "Softshrink",
    "Softsign",
    "SplitReLU",
    "Tanh",
    "from_aten",
    "quick_gelu",
    "sloped_clamp",
    "split_relu",
]

ALL: tuple[Activation, ...] = (
    Identity(),
    ReLU(),
    Hardtanh(),
    Hardtanh(-0.5, 2.0),
    Hardtanh(0.0, 6.0),
    Clamp(lo=-0.75),
    Clamp(hi=1.25),
    SlopedClamp(0.5),
    SlopedClamp(2.0, -1.0, 4.0),
    LeakyReLU(),
    LeakyReLU(0.3),
    LeakyReLU(-0.2),
    Softshrink(),
    Hardsigmoid(),
    Hardswish(),
    ELU(),
    ELU(0.7, 1.3, 0.9),
    SELU(),
    CELU(0.8),
    Sigmoid(),
    Tanh(),
    Softsign(),
    Softplus(),
    Softplus(2.0, 15.0),
    LogSigmoid(),
    SiLU(),
    Mish(),
    QuickGELU(),
    GELU(),
    GELU("tanh"),
)
"""One or more instances of every activation, for tests."""


def _clamp(lo: float | None, hi: float | None) -> Activation:
    return Clamp(-inf if lo is None else lo, inf if hi is None else hi)


def _rrelu(lower: float, upper: float, training: float = 0.0, generator: object = None) -> Activation:
    if training:
        raise InputError("the slopes of a random leaky ReLU in train mode are drawn anew at every call")
    return LeakyReLU((lower + upper) / 2)


# ATen operator -> function that makes the activation of the arguments after the tensor, in the schema's order.
_FROM_ATEN: dict[str, Callable[..., Activation]] = {
    "relu": ReLU,
    "relu6": lambda: Hardtanh(0.0, 6.0),
    "hardtanh": Hardtanh,
    "clamp": _clamp,
    "clamp_min": lambda lo: Clamp(lo=lo),
    "clamp_max": lambda hi: Clamp(hi=hi),
    "leaky_relu": LeakyReLU,
    "rrelu": _rrelu,
    "softshrink": Softshrink,
    "hardsigmoid": Hardsigmoid,
    "hardswish": Hardswish,
    "elu": ELU,
    "selu": SELU,
    "celu": CELU,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "softplus": Softplus,
    "log_sigmoid": LogSigmoid,
    "silu": SiLU,
    "mish": Mish,
    "gelu": GELU,
}


def from_aten(
    name: str, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
) -> Activation | None:
    """The activation that `torch.ops.aten.<name>` computes, or None if this package has none.

    `args` and `kwargs` are the operator's arguments without its tensor. Missing ones have the defaults of
    the operator's schema. The result is None, too, if a parameter is no constant (a tensor, a graph node), is out of
    the activation's range, or does not fit the schema.
    """
    build = _FROM_ATEN.get(name)
    if build is None:
        return None
    schema = getattr(torch.ops.aten, name).default._schema.arguments[1:]
    given = dict(zip((a.name for a in schema), args, strict=False)) | dict(kwargs or {})
    if len(args) > len(schema) or not set(given) <= {a.name for a in schema}:
        return None
    values = [given.get(a.name, a.default_value) for a in schema]
    if not all(v is None or isinstance(v, Real | str) for v in values):
        return None
    try:
        return build(*(float(v) if isinstance(v, Real) else v for v in values))
    except (InputError, TypeError):  # a TypeError means that None was given for a number
        return None
