"""Widest: the floating-point type in which sums and small differences are computed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["widest"]


def widest(value: Tensor) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if value.device.type == "mps" else torch.float64
