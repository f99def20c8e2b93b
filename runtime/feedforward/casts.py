"""The casts of an autocast region as functions, and code that runs outside of any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_to", "under_autocast", "without_autocast"]


@contextmanager
def without_autocast() -> Iterator[None]:
    """Run outside of the autocast regions that the caller is in."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def autocast_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`. As under autocast, float64 stays as it is."""
    return x if x.dtype is torch.float64 else x.to(dtype)


def under_autocast(device: str, dtype: torch.dtype, operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The operator's value with autocast to `dtype` on."""
    with torch.autocast(device, dtype):
        return operator(*args, **kwargs)
