"""The private copy of the model, which the hybrid owns: the user's own model is never touched.

Promise: a deep copy that shares no tensor with the model, also where functions close over it, and has
the hooks of its parameters.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ffebm_compiler.errors import CaptureError
from ffebm_compiler.passes.copied_closures import CopiedClosures

__all__ = ["private_copy"]

_REGISTERED = ("_parameters", "_modules")


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy; results of earlier calls that a module caches as attributes are copied without their history."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for leaf in pytree.tree_leaves([value for key, value in vars(module).items() if key not in _REGISTERED]):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model {type(model).__name__} cannot be copied ({type(error).__name__}: {error}); the converter "
            "works on a copy so that the source stays as it is: make it deep-copyable (no open files, no locks)"
        ) from error
    closures = CopiedClosures(memo)
    closures.mend(copied)
    _copy_hooks(model, copied, closures)
    return copied


def _copy_hooks(model: nn.Module, copied: nn.Module, closures: CopiedClosures) -> None:
    """Give the copies of parameters the hooks of their originals, which a deep copy leaves behind."""
    twins = dict(copied.named_parameters())
    for name, parameter in model.named_parameters():
        for hook in (parameter._backward_hooks or {}).values():
            twins[name].register_hook(closures.of(hook))
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            twins[name].register_post_accumulate_grad_hook(closures.of(hook))
