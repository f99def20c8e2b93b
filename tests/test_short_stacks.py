"""Short stacks: the exporter's own text stands on every node."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from ffebm_compiler.passes import tracing
from ffebm_compiler.passes.short_stacks import short_stacks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def helper(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)[:, :4]

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.helper(x)
            x = self.helper(x).cos()
        return self.helper(self.layers(x)).sin() + x.shape[0]


def stacks() -> dict[str, str]:
    model = Model().eval()
    with tracing.tracing(model):
        exported = torch.export.export(model, (torch.zeros(3, 4),), strict=False)
    return {node.name: node.meta.get("stack_trace", "") for node in exported.graph.nodes if node.op == "call_function"}


def test_the_text_is_the_exporters(monkeypatch: pytest.MonkeyPatch) -> None:
    short = stacks()
    monkeypatch.setattr(tracing, "short_stacks", contextlib.nullcontext)
    assert short == stacks()
    assert "return self.helper(self.layers(x)).sin()" in short["sin"]
    assert "linear.py" in short["linear"]
    assert short["cat"] == short["cat_2"] != short["cat_1"] == short["cat_3"] != short["cat_4"]


def test_torch_is_as_before() -> None:
    before = torch.fx.proxy.CapturedTraceback
    with pytest.raises(ZeroDivisionError), short_stacks():
        raise ZeroDivisionError
    assert torch.fx.proxy.CapturedTraceback is before


def test_without_a_forward_there_is_no_stack() -> None:
    with short_stacks():
        assert torch.fx.proxy.CapturedTraceback.extract().summary() == []


def test_a_torch_without_the_class_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.fx.proxy, "CapturedTraceback")
    with short_stacks():
        assert not hasattr(torch.fx.proxy, "CapturedTraceback")
    assert not hasattr(torch.fx.proxy, "CapturedTraceback")
