"""The transpose of average pooling over disjoint windows, against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import noise

from ffebm_compiler.runtime.program.operators import Wiring
from ffebm_compiler.runtime.program.pooling import disjoint_windows

FIXED = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def transpose_by_autograd(pool: Wiring, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = pool.apply([x], [])
    p = noise(*y.shape, seed=3).double()
    return p, torch.autograd.grad(y, x, p)[0]


@given(st.data())
def test_any_disjoint_pooling(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    window = tuple(data.draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    outer = data.draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    shape = (2, 3, *(a * b for a, b in zip(window, outer, strict=True)))
    if data.draw(st.booleans()):
        pool = Wiring(ADAPTIVE[dims], (tuple(outer),))
    else:
        stride = data.draw(st.sampled_from([(), (None,), (window,)])) if dims > 1 else ()
        divisor = data.draw(st.sampled_from([None, 5])) if dims > 1 else None
        pool = Wiring(FIXED[dims], (window, *stride), () if divisor is None else (("divisor_override", divisor),))
    p, expected = transpose_by_autograd(pool, shape)
    assert disjoint_windows(pool.function, pool.arguments, dict(pool.keywords), shape) is not None
    torch.testing.assert_close(pool.adjoint(p, [], [torch.Size(shape)], [True])[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "arguments", "shape"),
    [
        (F.avg_pool2d, (3, 2), (2, 3, 8, 8)),  # windows overlap
        (F.avg_pool2d, (2, 2, 1), (2, 3, 8, 8)),  # padding
        (F.avg_pool2d, (2,), (2, 3, 7, 8)),  # the last row is left out
        (F.avg_pool2d, (2, None, 0, True), (2, 3, 7, 8)),  # the last window is cut
        (F.adaptive_avg_pool2d, ((3, 2),), (2, 3, 8, 8)),  # windows of several sizes
        (F.adaptive_avg_pool2d, ((None, 2),), (2, 3, 8, 8)),
        (F.avg_pool2d, (2,), (3, 8, 8)),  # no batch
        (torch.mean, ((2, 3),), (2, 3, 8, 8)),
    ],
)
def test_every_other_pooling(function: Any, arguments: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    assert disjoint_windows(function, arguments, {}, shape) is None
    pool = Wiring(function, arguments)
    p, expected = transpose_by_autograd(pool, shape)
    torch.testing.assert_close(pool.adjoint(p, [], [torch.Size(shape)], [True])[0], expected, rtol=1e-12, atol=1e-12)


def test_channels_last_stays_so() -> None:
    pool = Wiring(F.avg_pool2d, (2,))
    p = noise(2, 8, 4, 4, seed=1).contiguous(memory_format=torch.channels_last)
    (part,) = pool.adjoint(p, [], [torch.Size((2, 8, 8, 8))], [True])
    assert part.is_contiguous(memory_format=torch.channels_last)
