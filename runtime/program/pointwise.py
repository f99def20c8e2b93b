"""Strided 1×1 convolutions of few channels, kept away from a faulty kernel of oneDNN.

On x86 the library computes the weight gradient of a dense, unpadded, strided 1×1 convolution of channels-last images
on a copy without the stride. It places the pieces of that copy by the width of a register instead of the number of
channels. With fewer channels than that (8, or 16 with AVX-512, where only large images show it) it writes past the
copy. The result is a crash, a hang, or wrong gradients (uxlfoundation/oneDNN#6035, float32 and bfloat16, version
3.12). The model does not choose this layout, since the outputs of a settled block are channels-last.

The same convolution without its stride is another kernel. With S the selection of every s-th position,

    W ∗ₛ x = W ∗ (S x)        and, transposed,        W ∗ₛᵀ x = Sᵀ (W ∗ᵀ x),

exactly. It is used if autograd may ask for the weight gradient, and for weight gradients themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv2d", "conv_transpose2d", "convolution", "faulty", "thinned"]

_REGISTER = 16
"""With this many channels, the floats in the widest register, no kernel writes past its copy."""


def thinned(value: Tensor, stride: Sequence[int]) -> Tensor:
    """S x, with every s-th position of both image dimensions."""
    return value[..., :: stride[0], :: stride[1]]


def _spread_out(value: Tensor, stride: Sequence[int]) -> Tensor:
    """Sᵀ x, with zeros between the positions and after the last one."""
    height, width = value.shape[-2:]
    apart = F.pad(value[..., :, None, :, None], (0, stride[1] - 1, 0, 0, 0, stride[0] - 1))
    return apart.reshape(*value.shape[:-2], height * stride[0], width * stride[1])


def faulty(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
    output_padding: Sequence[int] | None = None,
) -> bool:
    """Whether the faulty kernel would take the weight gradient of a convolution (transposed with `output_padding`)."""
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (1, 1) or weight.shape[1] >= _REGISTER or groups != 1:
        return False
    if max(stride) == 1 or any(padding) or weight.device.type != "cpu":
        return False
    return output_padding is None or all(extra == step - 1 for extra, step in zip(output_padding, stride, strict=True))


def _may_reach_kernel(value: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd may call the kernel, in a layout that may be channels-last.

    It does so even for the bias alone. torch takes the layout from the strides of input and weight. `is_contiguous`
    does not tell, since it ignores the strides of sizes of 1.
    """
    if not torch.is_grad_enabled() or not (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return not (_has_fresh_strides(value) and _has_fresh_strides(weight))


def _has_fresh_strides(value: Tensor) -> bool:
    """Whether the strides are those of a fresh tensor."""
    expected = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


def conv2d(
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv2d` with the right weight gradient, for x of shape (batch, C_in, H, W) or (C_in, H, W)."""
    steps = _pair(stride)
    pads = (0, 0) if isinstance(padding, str) else _pair(padding)  # "same" allows no stride, "valid" pads nothing
    if faulty(weight, steps, pads, groups) and _may_reach_kernel(value, weight, bias):
        return F.conv2d(thinned(value, steps), weight, bias)
    return F.conv2d(value, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """`F.conv_transpose2d` with the right weight gradient, for x of shape (batch, C_in, H, W) or (C_in, H, W)."""
    steps = _pair(stride)
    if faulty(weight, steps, _pair(padding), groups, _pair(output_padding)) and _may_reach_kernel(value, weight, bias):
        spread = _spread_out(F.conv_transpose2d(value, weight), steps)
        return spread if bias is None else spread + bias[:, None, None]
    return F.conv_transpose2d(value, weight, bias, stride, padding, output_padding, groups, dilation)


def convolution(
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """`torch.convolution` with the right weight gradient."""
    if weight.dim() == 4 and transposed:
        return conv_transpose2d(value, weight, bias, stride, padding, output_padding, groups, dilation)
    if weight.dim() == 4:
        return conv2d(value, weight, bias, stride, padding, dilation, groups)
    return torch.convolution(value, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
