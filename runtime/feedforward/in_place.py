"""Functions that return the value which an in-place operation writes, for graphs without in-place operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["copied", "filled", "put_through", "written_without_gradient"]


def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """The content of `target` after `target.copy_(source)`: the source in the target's shape, dtype and device."""
    return source.to(target, non_blocking=non_blocking).expand_as(target)


def filled(target: Tensor, value: Tensor | complex = 0) -> Tensor:
    """The content of `target` after `target.fill_(value)`."""
    if isinstance(value, Tensor):
        return value.to(target).expand_as(target)
    return torch.full_like(target, value)


def written_without_gradient(before: Tensor, after: Tensor) -> Tensor:
    """`after` with the gradient of `before`, as after a write under `no_grad` or through `.data`."""
    if not before.requires_grad or not torch.is_grad_enabled():
        return after.detach()
    return after.detach() + (before - before.detach())


def put_through(whole: Tensor, part: Tensor, view: Callable[..., Any], index: int | None, *args: Any) -> Tensor:
    """`whole` with `part` in place of the elements that `view(whole, *args)` shows (or its result `index`)."""
    places = torch.arange(whole.numel(), device=whole.device).reshape(whole.shape)
    shown = view(places, *args)
    if index is not None:
        shown = shown[index]
    flat = whole.reshape(-1).index_put((shown.reshape(-1),), part.reshape(-1))
    return flat.reshape(whole.shape)
