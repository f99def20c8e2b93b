"""Max pooling inside an energy block, as `block_ops` allows it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.MaxPool2d(3, 2, 1),
        nn.Hardtanh(0, 1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def test_it_stays_digital_by_default() -> None:
    plan = ffebm.plan(_network(), torch.randn(2, 2, 8, 8))
    assert len(plan.blocks) == 3
    assert "max_pool" in plan.explain("1")


@pytest.mark.parametrize("feedback", [1e-6, 0.1, 0.4])
def test_it_joins_on_request(feedback: float) -> None:
    torch.manual_seed(1)
    model, x = _network(), torch.randn(6, 2, 8, 8)
    hybrid = ffebm.convert(model, x, block_ops=("add", "reshape", "max_pool"), feedback=feedback)
    assert len(hybrid.plan.blocks) == 1
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
    if feedback < 1e-3:
        torch.testing.assert_close(hybrid(x), model(x), rtol=1e-3, atol=1e-4)
    report = ffebm.check_gradients(hybrid, x, lambda output: output.square().mean())
    for estimator in ("ep", "implicit", "unrolled"):
        assert report.worst(estimator)[1].cosine > 0.999


def test_ties_do_not_go_on_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    """Rectified maps tie at zero in most windows; winners that change places would never settle."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
    )
    with torch.no_grad():
        model[0].bias.fill_(-1.0)
    x = torch.randn(8, 3, 17, 17)
    hybrid = ffebm.convert(model, x, block_ops=("max_pool",), feedback=0.8)
    assert hybrid.blocks[0].module.program.coupled
    for _ in range(2):
        hybrid(x).square().mean().backward()
    last = hybrid.blocks[0].module.last
    assert last is not None
    assert last.converged
    # A certificate of one choice of winners is none, and who relies on the equilibrium is told, once.
    assert hybrid.blocks[0].module.contraction is None
    (record,) = [record for record in caplog.records if record.name == "ffebm_compiler.runtime.block"]
    assert "block_1 settled with the winners of its max pooling held after 30 sweeps" in record.getMessage()
    assert all(bool(torch.isfinite(p.grad).all()) for p in hybrid.parameters() if p.grad is not None)
