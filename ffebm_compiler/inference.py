"""Inference mode: a network is compiled outside of it, since its tensors take no part in gradients ever after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

__all__ = ["ordinary", "outside_inference"]


@contextmanager
def outside_inference() -> Iterator[None]:
    """Leave the caller's `torch.inference_mode()` while the context is open."""
    if not torch.is_inference_mode_enabled():  # leaving it would also turn gradients on
        yield
        return
    with torch.inference_mode(False):
        yield


def ordinary(values: Any) -> Any:
    """Values with a copy of every tensor that was made in inference mode."""
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.clone() if leaf.is_inference() else leaf, values)
