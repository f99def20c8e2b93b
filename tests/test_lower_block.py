"""Lower block: states and drives of the programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import converted, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm

aten = torch.ops.aten


STRUCTURE = {
    # name: per state (layer, activation, states that its drive reads, depth)
    "mlp": [
        ("layers.0", "tanh", (), 0),
        ("layers.1", "tanh", (0,), 1),
        ("layers.2", "tanh", (1,), 2),
        ("layers.3", "identity", (2,), 3),
    ],
    "residual": [("a", "tanh", (), 0), ("b", "tanh", (0,), 1), ("c", "identity", (1,), 2)],
    "skip": [("a", "tanh", (), 0), ("b", "tanh", (0,), 1), ("c", "identity", (1,), 2)],
    "projections": [
        ("q", "tanh", (), 0),
        ("k", "tanh", (), 0),
        ("v", "tanh", (), 0),
        ("out", "identity", (0, 1, 2), 1),
    ],
    "branches": [
        ("a", "tanh", (), 0),
        ("c", "tanh", (0,), 1),
        ("b", "tanh", (0, 1), 2),
        ("e", "identity", (2,), 3),
    ],
    "joined": [("a", "tanh", (), 0), ("b", "tanh", (), 0), ("c", "identity", (0, 1), 1)],
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_lower_block_makes_one_state_of_every_activation(case: str) -> None:
    hybrid, _ = converted(case, nn.Tanh)
    (block,) = hybrid.blocks
    program = block.module.program
    found = [
        (layer.name, layer.activation.name, above, depth)
        for layer, above, depth in zip(program.layers, program.upstream, program.depths, strict=True)
    ]
    assert sorted(found) == sorted(_renumbered(STRUCTURE[case], found))
    assert program.batched
    assert program.visible == (len(program.layers) - 1,)


def _renumbered(expected: list[tuple[Any, ...]], found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The expected states with the numbers that the found ones have: independent layers may come in any order."""
    place = {layer: index for index, (layer, *_) in enumerate(found)}
    order = [place[layer] for layer, *_ in expected]
    return [(layer, act, tuple(sorted(order[k] for k in above)), depth) for layer, act, above, depth in expected]


class Linears(nn.Module):
    """Linear layers without an activation between them, one of which also leaves the block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x).unflatten(1, (5, 1)).flatten(1)
        return torch.relu(self.b(y) + self.c(y)), y


def test_lower_block_puts_an_identity_state_between_linear_layers() -> None:
    x = noise(4, 6)
    hybrid = ffebm.convert(seeded(Linears), x, feedback=0.3)
    (block,) = hybrid.blocks
    layers = block.module.program.layers
    assert [(layer.name, layer.activation.name) for layer in layers] == [("a", "identity"), ("b", "relu")]
    found = ffebm.check_gradients(hybrid, x, lambda y: y[0].square().sum() + y[1].sin().sum())
    assert found.worst("ep")[1].cosine >= 0.9999
