"""What a forward assigns to a buffer: the hybrid has it after every call, as the source has."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
from same_as_source import assert_same_step
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import CaptureError


class Leaf(nn.Module):
    """A module with state that its forward assigns."""

    def __init__(self, assign: Callable[[Leaf, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("other", torch.linspace(1, 2, 6))
        self.weight = nn.Parameter(torch.ones(6))
        self.mean: Tensor
        self.other: Tensor
        self.assign = assign

    def forward(self, h: Tensor) -> Tensor:
        return self.assign(self, h)


def average(leaf: Leaf, h: Tensor) -> Tensor:
    leaf.mean = 0.9 * leaf.mean + 0.1 * h.detach().mean(0)
    return h - leaf.mean


def average_after(leaf: Leaf, h: Tensor) -> Tensor:
    out = h * leaf.other * leaf.mean
    leaf.other = 0.9 * leaf.other + 0.1 * out.detach().abs().mean(0)
    return out - leaf.mean + h


def in_the_table(leaf: Leaf, h: Tensor) -> Tensor:
    leaf._buffers["mean"] = leaf.mean + 1
    return h * leaf.mean


def in_train_mode(leaf: Leaf, h: Tensor) -> Tensor:
    if leaf.training:
        leaf.mean = 0.5 * leaf.mean + h.detach().mean(0)
    return h - leaf.mean


def the_other(leaf: Leaf, h: Tensor) -> Tensor:
    leaf.mean = leaf.other
    leaf.other = leaf.other * 1.5
    return h * leaf.mean


def swapped(leaf: Leaf, h: Tensor) -> Tensor:
    leaf.mean, leaf.other = leaf.other, leaf.mean
    return h * leaf.mean + leaf.other


def a_view(leaf: Leaf, h: Tensor) -> Tensor:
    leaf.other = leaf.other.flip(0)
    leaf.mean = leaf.other[torch.arange(6)]
    return h * leaf.mean


WAYS = (average, average_after, in_the_table, in_train_mode, the_other, swapped, a_view)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_hybrid_has_what_the_forward_assigns(
    way: Callable[[Leaf, Tensor], Tensor], nested: bool, training: bool
) -> None:
    def make() -> nn.Module:
        if nested:
            return nn.Sequential(nn.Linear(6, 6), nn.Sequential(Leaf(way)), nn.Linear(6, 3))
        root = Leaf(lambda leaf, x: leaf.last(way(leaf, leaf.first(x))))
        root.first, root.last = nn.Linear(6, 6), nn.Linear(6, 3)
        return root

    model = networks.seeded(make).train(training)
    hybrid = ffebm.convert(model, torch.randn(4, 6))
    with hybrid.feedforward_mode():
        for _ in range(3):
            assert_same_step(hybrid, model, torch.randn(5, 6))
            state = hybrid.state_dict()
            for name, value in model.state_dict().items():
                torch.testing.assert_close(state[name], value)


def test_state_of_another_shape_is_refused() -> None:
    def longer(leaf: Leaf, h: Tensor) -> Tensor:
        leaf.mean = torch.cat([leaf.mean, leaf.mean])
        return h + leaf.mean.mean()

    model = nn.Sequential(nn.Linear(6, 6), Leaf(longer))
    with pytest.raises(CaptureError, match=r"assigns torch\.float32 of shape \(\d+,\) to '1\.mean'"):
        ffebm.convert(model, torch.randn(4, 6))


def test_state_of_another_kind_is_refused() -> None:
    def removed(leaf: Leaf, h: Tensor) -> Tensor:
        leaf.mean = None  # type: ignore[assignment]
        return h

    model = nn.Sequential(nn.Linear(6, 6), Leaf(removed))
    with pytest.raises(CaptureError, match=r"assigns NoneType to '1\.mean'"):
        ffebm.convert(model, torch.randn(4, 6))


def test_another_parameter_is_refused() -> None:
    def replaced(leaf: Leaf, h: Tensor) -> Tensor:
        leaf.weight = nn.Parameter(0.9 * leaf.weight.detach())
        return h * leaf.weight

    model = nn.Sequential(nn.Linear(6, 6), Leaf(replaced))
    with pytest.raises(CaptureError, match=r"another tensor in the place of the parameter '1\.weight'"):
        ffebm.convert(model, torch.randn(4, 6))
