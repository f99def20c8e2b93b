"""Hand-written activations are recognised by what they compute, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Between
from torch import Tensor, nn

import ffebm_compiler as ffebm

SPELLINGS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "silu": ("silu", lambda x: x * torch.sigmoid(x)),
    "silu, turned round": ("silu", lambda x: torch.sigmoid(x) * x),
    "softsign": ("softsign", F.softsign),
    "softsign, by hand": ("softsign", lambda x: x / (1 + x.abs())),
    "gelu": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    "gelu of gpt2": ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))),
    "quick gelu": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
    "hardswish": ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    "mish": ("mish", lambda x: x * torch.tanh(F.softplus(x))),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_joins_the_block(spelling: str) -> None:
    torch.manual_seed(0)
    name, function = SPELLINGS[spelling]
    model, x = Between(function), torch.randn(5, 6)
    hybrid = ffebm.convert(model, x)
    assert len(hybrid.plan.blocks) == 1
    assert hybrid.blocks[0].module.program.layers[0].activation.name == name
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(1.5 * x),  # a gate of another slope
        lambda x: torch.relu(x) ** 2,
        lambda x: x / (1.1 + x.abs()),
        lambda x: x * torch.sigmoid(x.flip(-1)),  # not elementwise
    ],
)
def test_what_is_no_known_activation_ends_the_block(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Between(function), torch.randn(5, 6)
    hybrid = ffebm.convert(model, x)
    assert [block.layers for block in hybrid.plan.blocks] == [("first",), ("second",)]
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_intermediate_that_is_read_elsewhere_stays() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            gate = torch.sigmoid(h)
            return self.second(h * gate) + self.second(gate)

    torch.manual_seed(0)
    model, x = Gated(), torch.randn(3, 6)
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1))
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
