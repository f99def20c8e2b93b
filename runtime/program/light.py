"""Light products: a product whose rounding cannot be seen in the result is computed in bfloat16.

Without feedback a block has the products of backpropagation, and they stay in full precision. What feedback adds to
them is small: the changes of later sweeps, and the part of a weight gradient that comes from the feedback path. A
product in bfloat16 has a relative error of about 2⁻⁹, which is a small share of the tolerance once it is multiplied by
the relative size of what it adds. States, currents and sums stay as they are. A processor that multiplies bfloat16
does it two to five times as fast.

In training the result is the gradient. In evaluation it is the states: only the changes that later sweeps multiply are
light, and the error that their roundings leave counts as the error that the changes leave does.
"""

from __future__ import annotations

import math

import torch

from ffebm_compiler.runtime.program.frame import Frame
from ffebm_compiler.runtime.program.operators import Convolution

__all__ = ["ROUNDING", "full_sweeps", "light_pays"]

ROUNDING = 2.0**-9
"""Relative error of a product in bfloat16 whose roundings are independent."""
_SHARE = 0.25
"""Share of the tolerance of a phase that roundings may take."""
_SMALLEST = 1 << 15
"""Number of values of an input from which on the casts cost less than matrix products gain."""
_SMALLEST_OF_CONVOLUTIONS = 1 << 18
"""The same for convolutions, which are faster in float32."""


def light_pays(frame: Frame) -> bool:
    """Whether this device multiplies bfloat16 fast, and a block of float32 is large enough for it to pay."""
    values = frame.inputs
    device = values[0].device
    if device.type != "cpu" or any(value.dtype != torch.float32 for value in values if value.is_floating_point()):
        return False
    convolved = any(
        isinstance(item.operator, Convolution) for layer in frame.program.layers for item in layer.instructions
    )
    smallest = _SMALLEST_OF_CONVOLUTIONS if convolved else _SMALLEST
    if max(value.numel() for value in values) < smallest or frame.reads is not None or frame.autocast:
        return False
    return _multiplies_bfloat16()


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products in bfloat16."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask is not None and ask() for ask in known)


def full_sweeps(rtol: float, contraction: float) -> int:
    """Number of sweeps of a free phase before the first whose products may be light.

    If a sweep is expected to contract by r, the changes that sweep k + 1 multiplies add r^{k+1} of a state, and their
    products are wrong by 2⁻⁹ of that. It may be a quarter of the tolerance.
    """
    if not 0 < contraction < 1:
        return 1
    return max(1, math.ceil(math.log(_SHARE * rtol / ROUNDING) / math.log(contraction)) - 1)
