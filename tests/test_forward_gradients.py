"""Directional derivatives inside a forward are refused, as gradients are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

import ffebm_compiler as ffebm


def jvp(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]


def jacfwd(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacfwd(layer)(x).sum((0, 1))


def dual_numbers(layer: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


class Net(nn.Module):
    """A layer, and a derivative of it."""

    def __init__(self, derivative: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.derivative = nn.Linear(6, 6), derivative

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.derivative(self.a, x)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch itself compiles rules for dual numbers
@pytest.mark.parametrize("derivative", [jvp, jacfwd, dual_numbers])
def test_a_directional_derivative_in_the_forward_is_refused(
    derivative: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    model, x = Net(derivative), torch.randn(4, 6)
    expected = model(x)
    message = r"in module 'Net' .*a directional derivative is taken inside the forward .*, and take it outside"
    with pytest.raises(ffebm.CaptureError, match=message):
        ffebm.convert(model, x)
    torch.testing.assert_close(model(x), expected)  # torch's functions are as before
