"""A clamp of a product with a number is one activation where digital values may drive states, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Between
from torch import Tensor

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.activations.table import Clamp, SlopedClamp

SPELLINGS: dict[str, tuple[SlopedClamp, Callable[[Tensor], Tensor]]] = {
    "clamp(a h)": (SlopedClamp(0.5), lambda h: torch.clamp(0.5 * h, 0, 1)),
    "a quotient": (SlopedClamp(0.25, 0.0, float("inf")), lambda h: (h / 4).clamp(min=0)),
    "hardtanh": (SlopedClamp(2.0, -1.0, 1.0), lambda h: F.hardtanh(h * 2)),
    "relu": (SlopedClamp(0.5, 0.0, float("inf")), lambda h: F.relu(h * 0.5)),
}


def activations_of(function: Callable[[Tensor], Tensor], digital_drive: bool = True) -> list[object]:
    torch.manual_seed(0)
    model, x = Between(function), torch.randn(5, 6)
    hybrid = ffebm.convert(model, x, digital_drive=digital_drive, block_ops=("scale",))
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x), rtol=1e-6, atol=1e-6)
    return [layer.activation for block in hybrid.blocks for layer in block.module.program.layers]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_clamp_of_a_product_is_one_activation(spelling: str) -> None:
    activation, function = SPELLINGS[spelling]
    assert activations_of(function)[0] == activation


def test_without_digital_drive_the_product_stays_wiring() -> None:
    assert activations_of(SPELLINGS["clamp(a h)"][1], digital_drive=False)[0] == Clamp(0, 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.clamp(-0.5 * h, 0, 1),  # falling: no energy potential
        lambda h: torch.clamp(0.5 * h + 0.1, 0, 1),
        lambda h: torch.clamp(0.5 * h, 0, 1) + 0.5 * h.flip(-1),
    ],
    ids=["a falling line", "a shifted line", "another reader of h"],
)
def test_what_is_no_sloped_clamp_keeps_its_values(function: Callable[[Tensor], Tensor]) -> None:
    found = activations_of(function)
    assert sum(isinstance(activation, SlopedClamp) for activation in found) <= 1
