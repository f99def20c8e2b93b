"""`torch.inference_mode()` around the calls that make networks: what they make can be trained all the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import networks
import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm

X = networks.noise(4, 1, 8, 8)


def source() -> nn.Module:
    return networks.seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 6), nn.ReLU(),
            nn.Linear(6, 3),
        )
    )  # fmt: skip


def steps(network: nn.Module) -> list[Tensor]:
    """Outputs before and after two steps, in train and eval mode."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-2)
    outputs = []
    torch.manual_seed(0)  # devices are read with noise
    for _ in range(2):
        optimizer.zero_grad()
        outputs.append(network.train()(X))
        outputs[-1].square().sum().backward()
        optimizer.step()
    return [*outputs, network.eval()(X)]


def loaded(folder: Path) -> ffebm.HybridModel:
    ffebm.convert(source(), X).save(folder / "saved")
    return ffebm.load(folder / "saved", source())


def on_devices(folder: Path) -> ffebm.HybridModel:
    torch.manual_seed(1)  # noise of reads reaches the running statistics
    hybrid = ffebm.convert(source(), X)
    hybrid.set_devices("pcm")
    hybrid.program_devices(1)
    hybrid.age(10.0)
    hybrid(X)
    return hybrid


def changed(folder: Path) -> ffebm.HybridModel:
    hybrid = ffebm.convert(source(), X)
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(1.5)
    hybrid.project(0.05)
    hybrid.train()(X)
    return hybrid


MADE: dict[str, Callable[[Path], nn.Module]] = {
    "convert": lambda folder: ffebm.convert(source(), X),
    "an example of inference mode": lambda folder: ffebm.convert(source(), X.clone()),
    "load": loaded,
    "devices": on_devices,
    "changed weights": changed,
    "to_digital": lambda folder: ffebm.convert(source(), X).to_digital(),
}


@pytest.mark.parametrize("made", MADE)
def test_what_is_made_in_inference_mode_trains(made: str, tmp_path: Path) -> None:
    wanted = steps(MADE[made](tmp_path))
    with torch.inference_mode():
        network = MADE[made](tmp_path)
        assert torch.is_inference_mode_enabled()
    for found, other in zip(steps(network), wanted, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


def test_plans_and_reports() -> None:
    plan = ffebm.plan(source(), X)
    hybrid = ffebm.convert(source(), X)
    report = ffebm.check_gradients(hybrid, X, lambda y: y.square().sum())
    with torch.inference_mode():
        assert ffebm.plan(source(), X.clone()).fingerprint == plan.fingerprint
        again = ffebm.check_gradients(hybrid, X.clone(), lambda y: y.square().sum())
    assert again.agreements == report.agreements


def test_without_gradients_stays_without() -> None:
    with torch.no_grad():
        hybrid = ffebm.convert(source(), X)
        assert not torch.is_grad_enabled()
    assert len(steps(hybrid)) == 3
