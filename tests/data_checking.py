"""Forwards that check their data: `name -> forward`. Not in a test file, whose assertions pytest would rewrite."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def asserted(self: nn.Module, x: Tensor) -> Tensor:
    assert (x.abs() >= 0).all()
    assert not x.isnan().any(), "not a number"
    return self.a(x)


def chained(self: nn.Module, x: Tensor) -> Tensor:
    assert x.dim() == 2 and x.isnan().sum() == 0 and not (x.abs().max() > 1e6 or x.isinf().any()), "bad"  # noqa: PT018
    return self.a(x)


def raised(self: nn.Module, x: Tensor) -> Tensor:
    if x.isnan().any():
        kind = "NaN"
        raise ValueError(f"the input holds {kind}")
    if x.shape[1] > 1000:
        x = x[:, :1000]
    elif x.min() < -1e6:
        raise ValueError("too small")
    if x.max() < 1e6:
        x = torch.tanh(x)
    else:
        raise ValueError("too large")
    return self.a(x)


def every(self: nn.Module, x: Tensor) -> Tensor:
    assert all(x[0, :3] < 1e6)
    assert bool((x < 1e6).all())
    return self.a(x)


CHECKS: dict[Callable[[nn.Module, Tensor], Tensor], int] = {asserted: 2, chained: 1, raised: 3, every: 2}
"""Forward -> how many lines check values of the data."""


def guarded(self: nn.Module, x: Tensor) -> Tensor:
    x = self.a(x)
    if not torch.isfinite(x).all():
        x = x.clamp(-1e6, 1e6)
    if torch.isnan(x).any().item() or x.isinf().logical_not().logical_not().any():
        x = x.nan_to_num()
    return torch.tanh(x)


def in_both_ways(self: nn.Module, x: Tensor) -> Tensor:
    if x.sum() > 0:
        x = -x
    assert x.dim() == 2
    return self.a(x)


def compared(self: nn.Module, x: Tensor) -> Tensor:
    assert bool((x > 0).all()) == self.training
    return self.a(x)


def some_finite(self: nn.Module, x: Tensor) -> Tensor:
    return self.a(x) if (x.isfinite() & (x > 0)).any() else x


def handled(self: nn.Module, x: Tensor) -> Tensor:
    if x.sum() > 0:
        if x.max() > 1e6:
            raise ValueError("too large")
        x = -x
    return self.a(x)


def _check(x: Tensor) -> bool:
    return True if x.sum() > 0 else x.max() < 0  # type: ignore[return-value]


def elsewhere(self: nn.Module, x: Tensor) -> Tensor:
    assert _check(x)
    return self.a(x)


BRANCHES = (in_both_ways, compared, some_finite, handled, elsewhere)
"""Forwards whose values decide something else too."""
