"""Failed calls: what in a call of a hybrid made torch fail, said in the hybrid's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffebm_compiler.errors import FFEBMError, InputError, UnsupportedError

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts

__all__ = ["explained_failure", "refuse_transforms"]


def refuse_transforms() -> None:
    """Refuse callers that trace a hybrid or transform it, since how long it settles depends on the values.

    Raises:
        UnsupportedError: `torch.export` or a transform of `torch.func` calls the hybrid.
    """
    if torch.compiler.is_exporting():
        raise UnsupportedError(
            "torch.export cannot take a hybrid, since its values decide how long it settles: write it with "
            "hybrid.export_onnx('hybrid.onnx'), or export hybrid.to_digital(), a plain module with its weights"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "a hybrid cannot be called inside a transform of torch.func (vmap, grad, jacrev, jvp): call it on a batch "
            "and use torch.autograd, or transform hybrid.to_digital(), a plain module with its weights"
        )


def explained_failure(hybrid: HybridParts, names: Sequence[str], leaves: Sequence[Any], error: Exception) -> Exception:
    """The error of a failed call: an `InputError` where inputs and weights are of two devices or dtypes, else itself.

    Args:
        hybrid: the hybrid that was called.
        names: names of the inputs.
        leaves: the inputs.
        error: what was raised.
    """
    weight = next((tensor for tensor in hybrid.parameters() if tensor.is_floating_point()), None)
    if weight is None or isinstance(error, FFEBMError):
        return error
    if weight.is_meta:
        return InputError(
            "the hybrid is on the meta device, where weights have no values to compute with: move it back with "
            "to_empty(device=...) and load_state_dict(...), or use hybrid.plan, which needs no weights"
        )
    for name, value in zip(names, leaves, strict=True):
        if not isinstance(value, Tensor):
            continue
        if value.device != weight.device:
            return InputError(
                f"input {name!r} is on {value.device} and the hybrid's weights are on {weight.device}: move one of "
                f"them, e.g. by {name}.to({str(weight.device)!r})"
            )
        if value.is_floating_point() and value.dtype != weight.dtype:
            return InputError(
                f"input {name!r} is {value.dtype} and the hybrid's weights are {weight.dtype}, which its layers do not "
                f"mix: cast one of them, by {name}.to({weight.dtype}) or hybrid.to({value.dtype})"
            )
    return error
