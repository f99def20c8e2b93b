"""Metrics of networks: one that the workers of a process pool import by name, a distance, and one that stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["interrupted_at", "mean_of_outputs", "minus_distance"]


def mean_of_outputs(net: Any) -> float:
    """Of ten inputs with six values."""
    return float(net(torch.linspace(-1, 1, 60).reshape(10, 6)).mean())


def minus_distance(net: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> float:
    """Minus the mean squared distance from the source, so that every error counts."""
    with torch.no_grad():
        return -float((net(x) - model(x)).square().mean().double())


def interrupted_at(call: int, evaluate: Callable[[Any], float], calls: list[int]) -> Callable[[Any], float]:
    """`evaluate` with an entry in `calls` for each call, and Ctrl-C at one of them."""

    def interrupted(net: Any) -> float:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return evaluate(net)

    return interrupted
