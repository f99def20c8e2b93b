"""Block operands: all blocks in one pass, the same values as one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import block_operands
from ffebm_compiler.block_operands import direct_weights


class Scaled(nn.Module):
    """Its first two blocks share a weight that is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.sinh(self.weight)
        h = torch.tanh(nn.functional.linear(torch.tanh(nn.functional.linear(x, weight)), weight))
        h = torch.tanh(nn.functional.linear(torch.tanh(nn.functional.linear(torch.softmax(h, 1), weight)), weight))
        return torch.tanh(self.last(torch.tanh(self.last(torch.softmax(h, 1)))))


@pytest.fixture(scope="module")
def hybrid() -> ffebm.HybridModel:
    return ffebm.convert(seeded(Scaled), noise(3, 6))


def test_one_pass_has_the_operands_of_each_block(hybrid: ffebm.HybridModel) -> None:
    names = list(hybrid.energy_blocks)
    assert len(names) == 3
    found = hybrid.operands_of_each(names)
    for name in names:
        inputs, weights = hybrid.operands_of(name)
        assert found[name][0] == inputs == (None,)
        assert all(a is b or torch.equal(a, b) for a, b in zip(found[name][1], weights, strict=True))
    assert torch.equal(found[names[0]][1][0], torch.sinh(hybrid.weight))
    assert hybrid.operands_of_each([]) == {}


def test_recertify_walks_the_graph_once(hybrid: ffebm.HybridModel, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[Any] = []
    sinh: list[Tensor] = []
    calls_of, original = block_operands.calls_of, block_operands.static_value

    def counted(lowered: Any) -> Any:
        walks.append(lowered)
        return calls_of(lowered)

    def value(run: Any, node: Any, known: Any) -> Any:
        found = original(run, node, known)
        if "sinh" in str(node):
            sinh.append(found)
        return found

    monkeypatch.setattr(block_operands, "calls_of", counted)
    monkeypatch.setattr(block_operands, "static_value", value)
    hybrid.recertify()
    assert len(walks) == 1
    assert len(sinh) == 2  # one read by each of two blocks
    assert all(one is sinh[0] for one in sinh)
    assert all(block.loop_gain == pytest.approx(0.1) for block in hybrid.blocks)


def test_direct_weights_are_parameters_themselves(hybrid: ffebm.HybridModel) -> None:
    *_, last = hybrid.energy_blocks
    (named,) = direct_weights(hybrid.lowered, hybrid.energy_blocks).items()
    assert named == (last, ("last.weight", "last.bias"))
    assert [id(hybrid._tensor(name)) for name in named[1]] == [id(w) for w in hybrid.operands_of(last)[1]]
