"""What a forward would train, though no module registers it, is refused; what it reads as a constant is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from same_as_source import assert_same
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import UnsupportedError

OUTSIDE = nn.Parameter(torch.linspace(0.5, 1.5, 4))


class Twice(torch.autograd.Function):
    """2 x w, with its own backward."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x * w

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * gradient * w, 2 * gradient * x


class Net(nn.Module):
    """A layer, and what the case computes of its result."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor], **attributes: object) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.compute = compute
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, self.layer(x))


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.linspace(0.5, 1.5, 4))


def tensor() -> Tensor:
    return torch.linspace(0.5, 1.5, 4, requires_grad=True)


def with_table() -> nn.Module:
    """A table of a parameter that was computed before, with its gradient."""
    net = Net(lambda net, x: x @ net.table)
    net.table = net.layer.weight * 2
    return net


def closure() -> nn.Module:
    scale = parameter()
    return Net(lambda net, x: x * scale)


def layer_in_a_list() -> nn.Module:
    return Net(lambda net, x: net.layers[0](x), layers=[nn.Linear(4, 4)])


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2] *= net.scales[1][:2]
    return y


REFUSED = {
    "list": (lambda: Net(lambda net, x: x * net.scales[1], scales=[parameter(), parameter()]), r"'scales\[1\]'"),
    "dictionary": (lambda: Net(lambda net, x: x * net.scales["a"], scales={"a": parameter()}), r"'scales\['a'\]'"),
    "attribute": (lambda: Net(lambda net, x: x * net.scale, scale=tensor()), "'scale'"),
    "layer in a list": (layer_in_a_list, r"'layers\[0\].weight'"),
    "closure": (closure, r"a tensor of shape \(4,\)"),
    "global": (lambda: Net(lambda net, x: x * OUTSIDE), r"a tensor of shape \(4,\)"),
    "train mode": (lambda: Net(lambda net, x: x * OUTSIDE if net.training else x), r"a tensor of shape \(4,\)"),
    "computed": (lambda: Net(lambda net, x: x * (2 * OUTSIDE).exp()), r"a tensor of shape \(4,\)"),
    "written": (lambda: Net(in_place, scales=[parameter(), parameter()]), r"'scales\[1\]'"),
    "function": (lambda: Net(lambda net, x: Twice.apply(x, net.scales[0]), scales=[parameter()]), r"'scales\[0\]'"),
    "table": (with_table, "'table'"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_would_be_trained_is_refused_by_name_and_line(form: str) -> None:
    make, name = REFUSED[form]
    with pytest.raises(UnsupportedError, match=rf"reads {name} \(.*test_outside_parameters.py, line \d+\)"):
        ffebm.convert(make(), torch.randn(3, 4))


def without_gradient(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        factor = net.scales[0] * 2
    return x * factor


def frozen_layer() -> nn.Module:
    return Net(lambda net, x: net.layers[0](x), layers=[nn.Linear(4, 4).requires_grad_(False)])


KEPT = {
    "detached": lambda: Net(lambda net, x: x * net.scales[0].detach(), scales=[parameter()]),
    "data": lambda: Net(lambda net, x: x * net.scales[0].data, scales=[parameter()]),
    "under no_grad": lambda: Net(without_gradient, scales=[parameter()]),
    "without gradient": lambda: Net(lambda net, x: x * net.scale, scale=torch.linspace(0.5, 1.5, 4)),
    "frozen layer": frozen_layer,
    "shape": lambda: Net(lambda net, x: x * len(net.scales[0]) + torch.zeros_like(net.scales[0]), scales=[parameter()]),
    "mask": lambda: Net(lambda net, x: torch.where(net.scales[0] > 1, x, -x), scales=[parameter()]),
}


@pytest.mark.parametrize("form", KEPT)
def test_what_is_read_as_a_constant_is_one(form: str) -> None:
    assert_same(KEPT[form](), torch.randn(3, 4))


def test_a_buffer_with_a_gradient_keeps_it() -> None:
    net = Net(lambda net, x: x * net.scale)
    net.register_buffer("scale", tensor())
    hybrid = assert_same(net, torch.randn(3, 4))
    hybrid(torch.randn(3, 4)).sum().backward()
    assert hybrid.scale.grad is not None
