"""Code when run: no code is made of graphs that are only rewritten, and that of a graph that is run is right."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch
from networks import noise, seeded
from running import run
from torch import Tensor, fx, nn

import ffebm_compiler as ffebm
from ffebm_compiler.passes import tracing
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.code_when_run import code_when_run, graph_module_without_code


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # a region, whose body the exporter makes a graph module of its own
            scale = self.first.weight.norm()
        return self.second(torch.relu(self.first(x) * scale))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of nodes of every graph whose code is made."""
    found: list[int] = []
    recompile = fx.GraphModule.recompile

    def noted(self: fx.GraphModule) -> object:
        found.append(len(self.graph.nodes))
        return recompile(self)

    monkeypatch.setattr(fx.GraphModule, "recompile", noted)
    return found


def test_the_code_of_a_captured_graph_is_made_once(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))), noise(2, 4)
    ffebm.convert(model, x)
    captured = [size for size in sizes if size > 20]
    sizes.clear()
    monkeypatch.setattr(tracing, "code_when_run", contextlib.nullcontext)
    ffebm.convert(model, x)
    assert len([size for size in sizes if size > 20]) == len(captured) + 5  # the tracer's module, and its passes
    assert len(captured) == 2  # the exported program's own module, and the lowered graph


def test_a_captured_graph_that_is_run_computes_the_source() -> None:
    model, x = seeded(Net).eval(), noise(2, 4)
    torch.testing.assert_close(run(capture(model, (x,), {}), x), model(x))


def graph() -> fx.Graph:
    return fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.Tanh())).graph


def test_a_torch_without_lazy_modules_makes_the_code_at_once(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    root, x = nn.Sequential(nn.ReLU(), nn.Tanh()), noise(2, 4)
    lazy = graph_module_without_code(root, graph())
    sizes.clear()
    torch.testing.assert_close(lazy(x), root(x))
    assert len(sizes) == 1
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    sizes.clear()
    with code_when_run():
        ready = graph_module_without_code(root, graph())
    assert len(sizes) == 2  # that of `symbolic_trace`, and this one
    torch.testing.assert_close(ready(x), root(x))
