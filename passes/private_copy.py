"""The private copy of the model, which the hybrid owns: the user's own model is never touched.

Promise: a deep copy that shares no tensor with the model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ffebm_compiler.errors import CaptureError

__all__ = ["private_copy"]

_REGISTERED = ("_parameters", "_modules")


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy; results of earlier calls that a module caches as attributes are copied without their history."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for leaf in pytree.tree_leaves([value for key, value in vars(module).items() if key not in _REGISTERED]):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model {type(model).__name__} cannot be copied ({type(error).__name__}: {error}); the converter "
            "works on a copy so that the source stays as it is: make it deep-copyable (no open files, no locks)"
        ) from error
