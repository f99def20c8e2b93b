"""`hybrid.diagnose`: residuals fall as the certificate says, and the energy falls to a minimum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm


@pytest.mark.parametrize("feedback", [0.05, 0.4])
def test_relaxation_of_a_monotone_block(feedback: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 9), nn.Sigmoid(), nn.Linear(9, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    hybrid = ffebm.convert(model, x, feedback=feedback)
    block = hybrid.diagnose(x, sweeps=15)["block_1"]
    assert block.radius**2 == pytest.approx(feedback, rel=1e-3)
    assert len(block.residuals) == 15
    assert len(block.energies) == 16
    assert block.monotone
    # Gauss-Seidel updates are exact minimisations over one layer: the energy never rises.
    assert all(later <= earlier + 1e-12 for earlier, later in zip(block.energies, block.energies[1:], strict=False))
    assert block.energies[0] > block.energies[-1]
    assert 0 < block.rate <= feedback * 1.05
    assert block.predicted is not None
    assert block.sweeps <= block.predicted
    assert "tanh" not in str(hybrid.diagnose(x))
    assert "block_1" in str(hybrid.diagnose(x))


def test_the_energy_of_a_float32_block_never_rises_not_even_in_its_last_digits() -> None:
    """E is summed in float64: the last sweeps change it by less than a float32 sum resolves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))
    x = torch.randn(64, 30)
    block = ffebm.convert(model, x, feedback=0.3).diagnose(x, sweeps=30)["block_1"]
    lowest = min(block.energies)
    span = block.energies[0] - lowest
    assert span > 0
    assert all(
        later <= earlier + 1e-9 * span for earlier, later in zip(block.energies, block.energies[1:], strict=False)
    )
    assert block.energies[-1] - lowest <= 1e-9 * span


def test_a_block_of_one_layer_has_nothing_to_settle() -> None:
    hybrid = ffebm.convert(nn.Linear(3, 2), torch.randn(2, 3))
    block = hybrid.diagnose(torch.randn(4, 3))["block_1"]
    assert block.residuals == ()
    assert block.radius == 0
    assert block.predicted == 0


def test_it_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4))
    hybrid = ffebm.convert(model, torch.randn(5, 6)).train()
    before = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    hybrid.diagnose(torch.randn(5, 6))
    assert hybrid.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in hybrid.state_dict().items())


def test_a_layer_of_zero_weights_settles_at_once() -> None:
    """Zero-initialised residual branches (γ = 0 of the last batch norm, folded) have no loop gain at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[2].weight.zero_()
    x = torch.randn(5, 4)
    hybrid = ffebm.convert(model, x)
    assert hybrid.blocks[0].loop_gain == 0
    assert hybrid.diagnose(x)["block_1"].predicted == 1
    torch.testing.assert_close(hybrid(x), model(x))
    hybrid(x).sum().backward()
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(hybrid.get_parameter(name).grad, parameter.grad)
