"""Private copy: copy the model for the hybrid to own, so that the user's model is never touched.

Promise: the deep copy shares no tensor with the model unless that is asked for, not even through functions that close
over it. It has the hooks of the model's parameters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ffebm_compiler.errors import CaptureError
from ffebm_compiler.passes.copied_closures import CopiedClosures

__all__ = ["private_copy"]

_REGISTERED = ("_parameters", "_modules")


def private_copy(model: nn.Module, shared: Iterable[Tensor] | None = None) -> nn.Module:
    """A deep copy. Results of earlier calls that a module caches in attributes lose their gradient history.

    Args:
        model: the module.
        shared: tensors of the model that the copy holds too, for calls that need a copy of everything else. It has no
            hooks of parameters then.

    Raises:
        CaptureError: the model cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared or ()}
    for module in model.modules():
        for leaf in pytree.tree_leaves([value for key, value in vars(module).items() if key not in _REGISTERED]):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf and id(leaf) not in memo:
                memo[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        copied = copy.deepcopy(model, memo)
    except RecursionError as error:
        raise CaptureError(
            f"the model {type(model).__name__} cannot be copied, since its modules lie deeper inside each other than "
            f"Python's limit of {sys.getrecursionlimit()} calls allows: raise it (sys.setrecursionlimit), or hold the "
            "modules in one list"
        ) from error
    except Exception as error:
        raise CaptureError(
            f"the model {type(model).__name__} cannot be copied ({type(error).__name__}, {error}), and the converter "
            "works on a copy so that the source stays as it is: make it deep-copyable (no open files, no locks)"
        ) from error
    closures = CopiedClosures(memo)
    closures.mend(copied)
    if shared is None:
        _copy_hooks(model, copied, closures)
    return copied


def _copy_hooks(model: nn.Module, copied: nn.Module, closures: CopiedClosures) -> None:
    """Copy the hooks of parameters, which a deep copy leaves out."""
    twins = dict(copied.named_parameters())
    for name, parameter in model.named_parameters():
        for hook in (parameter._backward_hooks or {}).values():
            twins[name].register_hook(closures.of(hook))
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            twins[name].register_post_accumulate_grad_hook(closures.of(hook))
