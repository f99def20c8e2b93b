"""On a CUDA device: what the CPU tests check, at the device's own precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ffebm_compiler as ffebm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 32),
        nn.GELU(),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize("moved", ["before", "after"])
def test_convert_and_gradients(moved: str) -> None:
    x = torch.randn(8, 3, 8, 8)
    labels = torch.randint(0, 10, (8,), device="cuda")
    if moved == "before":
        hybrid = ffebm.convert(_network().cuda(), x.cuda())
    else:
        hybrid = ffebm.convert(_network(), x).cuda()
    report = ffebm.check_gradients(hybrid, x.cuda(), lambda output: F.cross_entropy(output, labels))
    for estimator in ("ep", "implicit", "unrolled"):
        assert report.worst(estimator)[1].cosine > 0.999, report
    hybrid.recertify()
    assert hybrid.compare(x.cuda()).output < 1


def test_autocast_trains() -> None:
    x, labels = torch.randn(32, 3, 8, 8, device="cuda"), torch.randint(0, 10, (32,), device="cuda")
    hybrid = ffebm.convert(_network().cuda(), x).train()
    optimizer = torch.optim.AdamW(hybrid.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(hybrid(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
