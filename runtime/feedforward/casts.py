"""The casts of an autocast region as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_to", "under_autocast"]


def autocast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`. As under autocast, float64 stays as it is."""
    return x if x.dtype is torch.float64 else x.to(dtype)


def under_autocast(device: str, dtype: torch.dtype, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The operator's value with autocast to `dtype` on."""
    with torch.autocast(device, dtype):
        return operator(*args, **kwargs)
