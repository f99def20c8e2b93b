"""Metrics that the workers of a process pool import by name."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["mean_of_outputs"]


def mean_of_outputs(net: Any) -> float:
    """Of ten inputs with six values."""
    return float(net(torch.linspace(-1, 1, 60).reshape(10, 6)).mean())
