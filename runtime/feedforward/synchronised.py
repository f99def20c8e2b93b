"""Batch norm whose statistics are those of all processes, as `torch.nn.SyncBatchNorm` computes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["group_of", "synchronised_batch_norm"]


def group_of(owner: nn.Module) -> Any:
    """The process group over which a module in train mode takes its statistics; None if it takes them alone."""
    if not (isinstance(owner, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized()):
        return None
    group = owner.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _Total(torch.autograd.Function):
    """The sum of a tensor over the processes of a group. Its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def synchronised_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    momentum: float,
    eps: float,
    group: Any,
) -> Tensor:
    """y = γ (x − m)/√(v + ε) + β with the mean m and the variance v of the batches of all processes.

    Every process of the group must call it together. The variance is the mean of squared distances from m, so that it
    takes two sums over the processes. Gradients flow through both.

    Args:
        x: values of this process, of shape (batch, channels, ...). The processes' batches may differ in size.
        weight: γ of each channel, or None for 1.
        bias: β of each channel, or None for 0.
        statistics: running mean and variance, which are moved by `momentum` towards m and v·n/(n − 1); None for none.
        momentum: weight of this batch in the running statistics.
        eps: ε.
        group: the process group.
    """
    others = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    here = wide.new_full((1,), x.numel() / x.shape[1])
    sums = _Total.apply(torch.cat((wide.sum(others), here)), group)  # type: ignore[no-untyped-call]
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    variance = _Total.apply(centred.square().sum(others), group) / count  # type: ignore[no-untyped-call]
    if statistics is not None:
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            for running, value in zip(statistics, (mean, unbiased), strict=True):
                running.lerp_(value.to(running.dtype), momentum)
    normal = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        normal = normal * weight.to(normal.dtype).view(shape)
    if bias is not None:
        normal = normal + bias.to(normal.dtype).view(shape)
    return normal.to(x.dtype)
