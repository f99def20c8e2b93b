"""Loss: what the function of a loss may return, and why it did not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.passes.containers import leaves_of

__all__ = ["checked_loss"]


def checked_loss(loss: object, output: Any) -> Tensor:
    """The loss, which has to be a finite real scalar.

    Raises:
        InputError: it is something else; says what, and why where the output is the cause.
    """
    told = "loss_fn must return a finite scalar tensor, got"
    if not isinstance(loss, Tensor):
        raise InputError(f"{told} {type(loss).__name__}: return the tensor that it computes, without item() or float()")
    if loss.numel() != 1:
        raise InputError(
            f"{told} a tensor of shape {tuple(loss.shape)}: reduce it by mean() or sum(), as "
            "cross_entropy(output, labels) does"
        )
    if loss.is_complex():
        raise InputError(f"{told} a complex number: return a real one, such as its abs()")
    if bool(torch.isfinite(loss)):
        return loss
    tensors = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]
    odd = next((index for index, tensor in enumerate(tensors) if not bool(torch.isfinite(tensor).all())), None)
    if odd is None:
        raise InputError(
            f"{told} {float(loss.detach())}, while every output of the hybrid is finite: look for what overflows, is "
            "divided by zero or is the logarithm of zero in loss_fn"
        )
    where = f"output {odd}" if len(tensors) > 1 else "the output"
    count = int((~torch.isfinite(tensors[odd])).sum())
    raise InputError(
        f"{told} {float(loss.detach())}, since {count} of the {tensors[odd].numel()} values of {where} of the hybrid "
        "are infinite or NaN: check weights and inputs if that is not meant, else leave such values out of the loss"
    )
