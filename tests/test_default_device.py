"""torch's default device is the user's: nothing of the package is made on it.

The default is a device that holds no values. Whatever is made there, or mixed with what is, fails.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import networks
import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.energies.choice import ENERGIES
from ffebm_compiler.runtime.estimators.choice import ESTIMATORS


def source(energy: str) -> nn.Module:
    with torch.device("cpu"):
        model = networks.seeded(
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
                nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 6), nn.Dropout(0.2),
                nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3),
            )
        )  # fmt: skip
    if ENERGIES[energy].nonnegative:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.abs_()
    return model


X = networks.noise(4, 1, 8, 8)


def gradients(hybrid: ffebm.HybridModel) -> list[Tensor]:
    hybrid.train()
    hybrid.zero_grad()
    torch.manual_seed(0)
    hybrid(X).square().sum().backward()
    return [parameter.grad.clone() for parameter in hybrid.parameters() if parameter.grad is not None]


def trained(hybrid: ffebm.HybridModel) -> list[Tensor]:
    optimizer = torch.optim.SGD(hybrid.parameters(), 1e-2)
    for _ in range(3):
        gradients(hybrid)
        optimizer.step()
    hybrid.eval()
    return [hybrid(X).detach(), *(parameter.detach().clone() for parameter in hybrid.parameters())]


def on_devices(hybrid: ffebm.HybridModel) -> list[Tensor]:
    hybrid.set_devices("pcm")
    hybrid.program_devices(3)
    hybrid.age(1e3)
    hybrid.calibrate_converters(X)
    return gradients(hybrid)


def saved(hybrid: ffebm.HybridModel, folder: Path, energy: str) -> list[Tensor]:
    hybrid.save(folder / "saved")
    return gradients(ffebm.load(folder / "saved", source(energy)))


def same(run: Callable[[], list[Tensor]]) -> None:
    """Compare a run with one that has meta as the default device, bit for bit."""
    wanted = run()
    with torch.device("meta"):
        found = run()
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("energy", ENERGIES)
def test_conversion_training_copies_and_files(energy: str, tmp_path: Path) -> None:
    same(lambda: trained(ffebm.convert(source(energy), X, energy=energy)))
    same(lambda: gradients(copy.deepcopy(ffebm.convert(source(energy), X, energy=energy))))
    same(lambda: saved(ffebm.convert(source(energy), X, energy=energy), tmp_path, energy))


@pytest.mark.parametrize("kind", ESTIMATORS, ids=lambda kind: kind.__name__)
def test_estimators(kind: type) -> None:
    same(lambda: gradients(ffebm.convert(source("hopfield"), X, gradient=kind())))


@pytest.mark.parametrize("solver", [ffebm.Anderson(), ffebm.Anderson(termination="sample")], ids=["batch", "sample"])
def test_solvers(solver: ffebm.Solver) -> None:
    same(lambda: gradients(ffebm.convert(source("hopfield"), X, solver=solver)))


def test_devices() -> None:
    same(lambda: on_devices(ffebm.convert(source("hopfield"), X)))


def test_reports_and_projections() -> None:
    def run() -> list[Tensor]:
        hybrid = ffebm.convert(source("hopfield"), X, feedback="symmetric")
        limits = hybrid.project(0.5)
        compared = hybrid.compare(X)
        report = ffebm.check_gradients(hybrid.eval(), X, lambda y: y.square().sum())
        angles = [report[name]["ep"].cosine for name in report.agreements]
        numbers = [*limits.values(), compared.output, *compared.blocks.values(), *angles]
        assert "block_1" in str(hybrid.diagnose(X))
        return [torch.tensor(numbers, device="cpu"), hybrid.to_digital()(X)]

    same(run)
