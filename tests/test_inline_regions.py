"""Inline regions: what runs under `no_grad` and `autocast` becomes ordinary operations, marked as what it was."""

from __future__ import annotations

import torch
from networks import noise, seeded
from running import run
from torch import Tensor, nn

from ffebm_compiler.ir import verify
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.explicit_casts import explicit_casts
from ffebm_compiler.passes.inline_regions import AUTOCAST, Autocast, inline_regions, without_gradient


class Regions(nn.Module):
    """A region without gradient around another, and one of autocast that is switched off inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = torch.tanh(self.a(x))
            with torch.enable_grad():
                live = self.b(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.c(live)
            with torch.autocast("cpu", enabled=False):
                high = torch.tanh(live)
        return frozen + low.float() + high


def test_the_bodies_of_regions_are_ordinary_operations() -> None:
    model, x = seeded(Regions), noise(3, 6)
    program = capture(model, (x,), {})
    assert any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in program.graph.nodes)
    program = inline_regions(program)
    verify(program, inline_regions.promises)
    assert all(node.op != "get_attr" for node in program.graph.nodes)
    linears = [node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert [without_gradient(node) for node in linears] == [True, False, False]
    regions = [node.meta.get(AUTOCAST) for node in linears]
    assert regions == [None, None, Autocast("cpu", torch.bfloat16, True)]
    tanh = [node for node in program.graph.nodes if node.target is torch.ops.aten.tanh.default]
    assert tanh[1].meta[AUTOCAST].enabled is False


def test_what_leaves_a_region_without_gradient_is_detached() -> None:
    model, x = seeded(Regions), noise(3, 6)
    program = explicit_casts(inline_regions(capture(model, (x,), {})))
    run(program, x).sum().backward()
    grads = {name: parameter.grad for name, parameter in program.source.named_parameters()}
    assert grads["a.weight"] is None
    assert grads["b.weight"] is not None
    assert grads["c.weight"] is not None


def test_detached_values_are_named_in_the_graphs_order() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                parts = [torch.tanh(x + i) for i in range(12)]
            return torch.stack([2 * part for part in parts]).sum(0)

    program = inline_regions(capture(Many(), (noise(3, 6),), {}))
    detached = [node.name for node in program.graph.nodes if node.target is torch.ops.aten.detach.default]
    assert detached == ["detach_default", *(f"detach_default_{i}" for i in range(1, 12))]
