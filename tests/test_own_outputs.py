"""A hybrid's outputs may be written in place where its source's may, and its blocks keep what they settled to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.own_outputs import own_outputs

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)),
    "gelu": lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.GELU()),
    "view": lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6), nn.Unflatten(1, (2, 3))),
    "no feedback": lambda: nn.Sequential(nn.Linear(8, 6)),
}
CHANGES: dict[str, Callable[[Tensor], object]] = {
    "divided": lambda output: output.div_(2.0),
    "masked": lambda output: output[:, 0].fill_(-3.0),
    "zeroed": lambda output: output.zero_(),
}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
def test_an_output_may_be_written_in_place(layers: str, change: str) -> None:
    model, x = seeded(LAYERS[layers]), noise(5, 8)
    hybrid = ffebm.convert(copy.deepcopy(model), x, feedback=1e-6, solver=ffebm.GaussSeidel(rtol=1e-6)).train()
    for network in (model, hybrid):
        output = network(x)
        CHANGES[change](output)
        output.square().sum().backward()
    for ours, theirs in zip(hybrid.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layers", LAYERS)
def test_states_stay_as_they_settled(layers: str) -> None:
    model, x = seeded(LAYERS[layers]), noise(5, 8)
    hybrid = ffebm.convert(model, x, solver=ffebm.GaussSeidel(start="last"))
    with torch.no_grad():
        output = hybrid(x)
        before = output.clone()
        states = [state.clone() for state in hybrid.blocks[0].states]
        output.fill_(float("nan"))
        assert all(torch.equal(one, other) for one, other in zip(hybrid.blocks[0].states, states, strict=True))
        torch.testing.assert_close(hybrid(x), before, rtol=1e-2, atol=1e-3)


def test_only_memory_that_a_block_needs_is_copied() -> None:
    hybrid = ffebm.convert(seeded(LAYERS["linear"]), noise(5, 8))
    blocks, other = list(hybrid.energy_blocks.values()), noise(5, 8)
    (output,) = hybrid.lowered(noise(5, 8))
    one, again, part, mine, number = own_outputs([output, output, output[1:], other, 3], blocks)
    assert one is again
    assert mine is other
    assert number == 3
    assert torch.equal(part, output[1:])
    assert len({value.untyped_storage().data_ptr() for value in (one, part, output)}) == 3
