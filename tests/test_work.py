"""Digital work against counts by hand, and against PyTorch's own FLOP counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.work import SERIES, Work, work_of
from ffebm_compiler.ir import Operation, OperationGraph, Role


class Attention(nn.Module):
    """Two heads, written with `scaled_dot_product_attention` or with products and a softmax."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v
        return self.out(mixed.transpose(1, 2).reshape(-1, 5, 8))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_what_torch_counts(fused: bool) -> None:
    model, x = Attention(fused), torch.randn(1, 5, 8)
    with FlopCounterMode(display=False) as counter:
        Attention(fused=False)(x)  # it does not count the fused form on a CPU
    report = ffebm.plan(model, torch.randn(2, 5, 8)).cost_report()
    assert not report.uncounted
    layers = sum(block.macs for block in report.blocks)
    assert 2 * (layers + report.digital_work.macs) == counter.get_total_flops()
    scores = 2 * 5 * 5
    assert report.digital_work.elements == (SERIES + 4) * scores + (0 if fused else scores)


def test_batch_norm_pooling_and_adds_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(self.norm(self.conv(x)) + x, 2)

    report = ffebm.plan(Net().eval(), torch.randn(2, 1, 4, 4)).cost_report()
    values, pooled = 2 * 16, 2 * 4
    assert report.digital_work == Work(
        elements=2 * values + values + values,
        traffic=(values + values) + (values + 16 + values) + (values + pooled),
    )
    assert not report.uncounted


def graph_of(target: str, shapes: dict[str, tuple[int | None, ...]]) -> OperationGraph:
    sources = [Operation(name, Role.DIGITAL, "", "cat", (), 6, shape=shape) for name, shape in shapes.items()]
    last = Operation("out", Role.DIGITAL, "", target, tuple(shapes), 6, shape=(None, 2, 3))
    return OperationGraph({}, (*sources, last), ("out",))


def test_what_has_no_row_or_no_size_is_unknown() -> None:
    for target, shapes in (
        ("no_such_operation", {"a": (None, 2, 3)}),
        ("matmul", {"a": (None, 2, 3), "b": (None, 3, 3)}),  # of a plan from before products were counted
        ("scaled_dot_product_attention", {"a": (None, 2, 3), "b": (None, 2, 3), "c": (None, 2, 3)}),
    ):
        graph = graph_of(target, shapes)
        assert work_of(graph["out"], graph) is None


def test_views_are_free_and_moves_are_traffic() -> None:
    for target, work in (("permute", Work()), ("cat", Work(traffic=12)), ("gelu", Work(0, 66, 12))):
        graph = graph_of(target, {"a": (None, 2, 3)})
        assert work_of(graph["out"], graph) == work


def test_an_unknown_operation_is_named_in_the_report() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sort(self.layer(x), dim=-1).values

    report = ffebm.plan(Net(), torch.randn(2, 4)).cost_report()
    assert report.uncounted == {"sort": 1}
    assert "not in any total, unknown and the same on both sides: sort" in str(report)
