"""What a network returns while `evaluate` calls it, and how far that is from what the source returns.

An accuracy moves in steps of one example, so that the loss of most layers alone is zero or noise. The deviation of the
outputs does not: with y the outputs on devices, y₀ the source's and ȳ₀ their mean,

    deviation = Σ (y − y₀)² / Σ (y₀ − ȳ₀)²

and independent errors of layers add up in it, as long as they are small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ffebm_compiler.accuracy.journal import is_moderate

__all__ = ["deviation", "recorded"]

_MOST = 1 << 16
"""Values that are kept of one output, evenly spaced."""
_CALLS = 256
"""Calls of which outputs are kept."""


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """The floating-point outputs of the model's calls, in their order, on the CPU."""
    outputs: list[Tensor] = []
    calls = 0

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls <= _CALLS:
            outputs.extend(_some(each) for each in pytree.tree_leaves(output) if _real(each))

    handle = model.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def _real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta and value.numel() > 0


def _some(value: Tensor) -> Tensor:
    flat = value.detach().reshape(-1)
    return flat[:: -(-flat.numel() // _MOST)].to("cpu", torch.float32, copy=True)


def deviation(outputs: Sequence[Tensor], source: Sequence[Tensor]) -> float | None:
    """How far outputs are from the source's, as a share of how much these vary.

    None if they do not compare: `evaluate` does not call the network itself, or makes other calls than with the source.
    """
    if not source or [each.shape for each in outputs] != [each.shape for each in source]:
        return None
    error = sum(float((a - b).double().square().sum()) for a, b in zip(outputs, source, strict=True))
    varied = sum(float((b - b.mean()).double().square().sum()) for b in source)
    found = error / varied if varied > 0 else float("inf")
    return found if is_moderate(found) else None
