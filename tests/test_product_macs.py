"""Multiply-accumulates of products of activations, against torch's own count of an eager forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import digits_cnn, mlp, seeded, transformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ffebm_compiler as ffebm
from ffebm_compiler.plan import Plan


def counted(model: nn.Module, *inputs: Tensor, **named: Any) -> float:
    """Multiply-accumulates per sample of an eager forward, attention written out as two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs, **named)
    return counter.get_total_flops() / 2 / inputs[0].shape[0]


class Products(nn.Module):
    """Every spelling of a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = torch.einsum("bid,bjd->bij", q, k) + torch.einsum("bi...,bj...->bij", q, v)
        mixed = torch.baddbmm(v, scores.softmax(-1), v) + torch.bmm(scores, v)
        joined = torch.einsum("bij,bjd,bjd->bid", scores, k, v)
        return (mixed * torch.sigmoid(joined)) @ v.mT


class Kernels(nn.Module):
    """A convolution whose kernel depends on the input: no layer, but multiply-accumulates."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(4, 2 * 3 * 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.make(x.mean((0, 2, 3)).repeat(2)[:4]).view(2, 3, 3, 3), padding=1)


@pytest.mark.parametrize("make", [transformer, mlp, digits_cnn])
def test_shared_networks(make: Any) -> None:
    model, x = make()
    assert ffebm.plan(model, x).total_macs == counted(model, x)


def test_every_spelling_of_a_product() -> None:
    x = torch.randn(2, 5, 6)
    model = seeded(Products)
    plan = ffebm.plan(model, x)
    assert plan.total_macs == counted(model, x)
    assert plan.weight_macs == plan.analog_macs == 3 * 5 * 6 * 8
    assert plan.analog_share == plan.analog_macs / plan.total_macs < 1


def test_a_kernel_that_depends_on_the_input() -> None:
    x = torch.randn(1, 3, 6, 6)
    model = seeded(Kernels)
    plan = ffebm.plan(model, x, dynamic_shapes=None)
    assert plan.total_macs == counted(model, x)


class OwnKernels(nn.Module):
    """Kernels of every sample's own, made from it or mixed from the layer's, applied as groups of one convolution."""

    def __init__(self, rank: int, transposed: bool, mixed: bool) -> None:
        super().__init__()
        self.rank, self.transposed = rank, transposed
        count = 4 * 2 * 3**rank  # from 4 channels to 4, in 2 groups
        self.make = nn.Linear(4, 3 if mixed else count)
        self.kernels = nn.Parameter(torch.randn(3, count)) if mixed else None

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.make(x.flatten(2).mean(-1))
        if self.kernels is not None:
            kernels = kernels.softmax(-1) @ self.kernels
        kernels = kernels.view(4 * x.shape[0], 2, *[3] * self.rank)
        names = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d") if self.transposed else (
            "conv1d", "conv2d", "conv3d"
        )  # fmt: skip
        y = getattr(F, names[self.rank - 1])(x.reshape(1, -1, *x.shape[2:]), kernels, padding=1, groups=2 * x.shape[0])
        return y.view(x.shape[0], 4, *y.shape[2:])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_groups_that_are_as_many_as_samples(rank: int, transposed: bool, mixed: bool) -> None:
    model = seeded(lambda: OwnKernels(rank, transposed, mixed))
    x = torch.randn(2, 4, *[5] * rank)
    hybrid = ffebm.convert(model, x)
    assert hybrid.plan.total_macs == counted(model, x)
    other = torch.randn(3, 4, *[5] * rank)
    torch.testing.assert_close(hybrid(other), model(other))


class GroupedQueries(nn.Module):
    """Attention in which two heads of queries share one of keys and values, under a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 16), nn.Linear(6, 8), nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for layer, heads in ((self.query, 4), (self.key, 2), (self.value, 2))
        )
        mask = x.mean(-1)[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def test_grouped_queries_and_a_mask() -> None:
    x = torch.randn(2, 5, 6)
    model = seeded(GroupedQueries)
    assert ffebm.plan(model, x).total_macs == counted(model, x)


def test_the_share_is_told_in_the_terminal_in_the_picture_and_in_sweeps() -> None:
    from ffebm_compiler.drawing.scene import totals_words
    from ffebm_compiler.passes.partition.compare import sweep

    plan = ffebm.plan(*transformer())
    share = f"{100 * plan.weight_macs / counted(*transformer()):.1f} %"
    assert share != "100.0 %"
    assert f"analog MACs: {share} of" in str(plan)
    assert f"{share} of" in totals_words(plan)
    (row,) = sweep(plan, {"tiles_per_core": [64]})
    assert row.analog_macs == pytest.approx(plan.analog_share)


def test_a_plan_keeps_its_fingerprint_and_an_earlier_file_says_what_it_did_not_count() -> None:
    plan = ffebm.plan(*transformer())
    data = plan.to_dict()
    for operation in data["graph"]["operations"]:
        for field in ("product_macs", "sizes", "call"):
            del operation[field]
    earlier = Plan.from_dict(data)
    assert earlier.fingerprint == plan.fingerprint
    assert earlier.total_macs == plan.weight_macs
    assert any("multiply-accumulates between activations" in note for note in earlier.notes)
    assert Plan.from_dict(plan.to_dict()) == plan
