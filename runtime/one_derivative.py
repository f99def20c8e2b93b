"""Functions whose gradients are found by other means than autograd: what cannot be asked of these gradients is refused.

Such a gradient is settled or measured for one error at a time, and what autograd would record of it is no derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ffebm_compiler.errors import UnsupportedError

__all__ = ["IN_A_BLOCK", "IN_A_PART", "refuse_batched", "refuse_forward_mode", "without_derivative"]

IN_A_BLOCK = (
    "call the hybrid inside `with hybrid.feedforward_mode():`, or use hybrid.to_digital(), both of which autograd "
    "differentiates as it does the source"
)
"""What to do about an energy block."""

IN_A_PART = "call hybrid.set_gradient(..., feedforward='backprop'), or use hybrid.to_digital()"
"""What to do about a digital part that is perturbed."""


class _WithoutDerivative(torch.autograd.Function):
    """The identity of gradients. Its backward says that they have no derivative."""

    @staticmethod
    def forward(ctx: Any, name: str, remedy: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.called, ctx.remedy = name, remedy
        return tuple(None if value is None else value.clone() for value in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *errors: Tensor | None) -> NoReturn:
        raise UnsupportedError(
            f"the gradient of {ctx.called} has no derivative, whatever its gradient method is, so that a second "
            "derivative (a gradient penalty, a Hessian, a Hessian-vector product) cannot go through it. For that, "
            f"{ctx.remedy}, or take differences of gradients"
        )


def without_derivative(
    name: str, remedy: str, gradients: Sequence[Tensor | None], operands: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of a backward with `create_graph=True`. To differentiate them raises an error.

    Args:
        name: what was differentiated.
        remedy: what to do.
        gradients: its gradients, which autograd does not know the origin of.
        operands: tensors that lead to what the gradients depend on.
    """
    linked = [value for value in operands if value is not None and value.requires_grad]
    found: tuple[Tensor | None, ...] = _WithoutDerivative.apply(name, remedy, len(gradients), *gradients, *linked)  # type: ignore[no-untyped-call]
    return found


def refuse_batched(name: str, remedy: str, errors: Sequence[Tensor | None]) -> None:
    """Refuse a backward that torch runs for several errors at once.

    Raises:
        UnsupportedError: an error is a batch of errors.
    """
    of_vmap = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor
    if any(error is not None and any(batched(error) for batched in of_vmap) for error in errors):
        raise UnsupportedError(
            f"the gradient of {name} is found for one error at a time, so that torch cannot vectorise it "
            f"(is_grads_batched=True, functional.jacobian(..., vectorize=True)): leave these arguments out, or {remedy}"
        )


def refuse_forward_mode(name: str, remedy: str) -> NoReturn:
    """Refuse derivatives in forward mode.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        f"{name} has gradients in reverse mode only, not in forward mode (torch.autograd.forward_ad, "
        f"strategy='forward-mode'): use reverse mode, or {remedy}"
    )
