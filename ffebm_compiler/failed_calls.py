"""Failed calls: what in a call of a hybrid made torch fail, said in the hybrid's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffebm_compiler.errors import FFEBMError, InputError, UnsupportedError
from ffebm_compiler.module_paths import state_of_module

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts

__all__ = ["explained_failure", "explained_measurement", "refuse_transforms"]


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
    replaced = _replaced(hybrid)
    if replaced is not None:
        return replaced
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


def explained_measurement(hybrid: HybridParts, error: Exception) -> Exception:
    """The error of weights that could not be looked at: an `UnsupportedError` if they are not as captured."""
    return (None if isinstance(error, FFEBMError) else _replaced(hybrid)) or error


def _replaced(hybrid: HybridParts) -> UnsupportedError | None:
    """The error for a tensor that does not fit in the place of that at conversion; None if there is none.

    It is asked for after a failure, since the shapes of sharded tensors differ where nothing is wrong.
    """
    if hybrid._later_hooks.units or hasattr(hybrid, "unshard"):
        return None
    dtypes: dict[torch.dtype, tuple[str, torch.dtype]] = {}
    for name, tensor in state_of_module(hybrid, hybrid._run):
        shape, dtype = hybrid._captured.get(name, (tuple(tensor.shape), tensor.dtype))
        if tuple(tensor.shape) != shape:
            return UnsupportedError(
                f"{name!r} is of shape {tuple(tensor.shape)} and was {shape} at conversion, and a hybrid takes new "
                "tensors of the same names and shapes only: change the source and convert it again"
            )
        other, expected = dtypes.setdefault(dtype, (name, tensor.dtype))
        if tensor.dtype != expected:
            return UnsupportedError(
                f"{name!r} is {tensor.dtype} and {other!r} is {expected}, and both were {dtype} at conversion: cast "
                f"one of them, as by hybrid.to({expected}), or change the source and convert it again"
            )
    return None
