"""Modules and tensors may have the names of methods, of attributes of torch's graphs, of inputs, or no Python names."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import pytest
import torch
from same_as_source import ONE_LAYER, assert_same, deviation
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import onnx as exported


class Inner(nn.Module):
    """Modules, parameters and buffers, reached by their names alone."""

    def __init__(self, modules: list[str], parameters: list[str], buffers: list[str]) -> None:
        super().__init__()
        self.names = modules, parameters, buffers
        for name in modules:
            self._modules[name] = nn.Linear(4, 4)
        for name in parameters:
            self._parameters[name] = nn.Parameter(torch.randn(4, 4))
        for name in buffers:
            self._buffers[name] = torch.rand(4) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        for module, parameter, buffer in zip(*self.names, strict=True):
            x = torch.tanh(self._modules[module](x) @ self._parameters[parameter]) * self._buffers[buffer]
        return x


class Outer(Inner):
    """The same around the same, with the names' parts changed."""

    def __init__(self, first: list[str], second: list[str], third: list[str]) -> None:
        super().__init__(first, second, third)
        self.norm = nn.BatchNorm1d(4)
        self.inner, self.last = Inner(second, third, first), Inner(third, first, second)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.norm(super().forward(x))))


OF_MODULES = ["type", "train", "forward", "_parameters", "modules", "state_dict", "apply"]
OF_GRAPHS = ["graph", "code", "print_readable", "recompile", "_graph", "meta", "_in_spec"]
OTHERS = ["x", "plan", "blocks", "class", "a b", "0", "input_0"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Outer(OF_MODULES, OF_GRAPHS, OTHERS)


def test_the_hybrid_is_its_source_under_any_name(tmp_path: Path) -> None:
    source, x = model(), torch.randn(3, 4)
    hybrid = assert_same(copy.deepcopy(source), x, train=True, limit=1e-4)
    hybrid.eval().load_state_dict(source.eval().state_dict())
    wanted = source(x)
    assert deviation(hybrid(x), wanted) < 1e-5
    assert list(hybrid.state_dict()) == list(source.state_dict())
    assert [name for name, _ in hybrid.named_modules() if name in dict(source.named_modules())] == [
        name for name, _ in source.named_modules()
    ]
    for name, _ in source.named_modules():
        assert name == "" or hybrid.plan.explain(name)
    for name, parameter in source.named_parameters():
        assert parameter.dim() < 2 or hybrid.plan.explain(name)
    hybrid.summary(), hybrid.cost_report(), hybrid.compare(x)
    assert deviation(copy.deepcopy(hybrid).to_digital()(x), wanted) < 1e-5
    hybrid.save(tmp_path / "hybrid")
    assert deviation(ffebm.load(tmp_path / "hybrid", source)(x), wanted) < 1e-5


@pytest.mark.slow
def test_exports_hold_any_name(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    source, x = model().eval(), torch.randn(3, 4)
    hybrid = ffebm.convert(source, x, hardware=ONE_LAYER)
    hybrid.export_onnx(tmp_path / "whole.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "whole.onnx")
    found = session.run(None, {"x": x.numpy()})[0]
    numpy.testing.assert_allclose(found, source(x).detach().numpy(), rtol=1e-4, atol=1e-6)
    hybrid.export_onnx(tmp_path / "parts", parts="digital")
    (part,) = exported.run(tmp_path / "parts", [x])
    torch.testing.assert_close(part, source(x).detach(), rtol=1e-4, atol=1e-6)
