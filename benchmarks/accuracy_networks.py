"""Networks with a metric each, for the benchmark of planning by accuracy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trained_models import MissingPackage, digit_recognizer, framed_digits, mnist1d

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from which_layers import NETWORKS as LARGE
from which_layers import Case, right

__all__ = ["NETWORKS", "MissingPackage"]


class _Residual(nn.Module):
    """Two convolutions with batch norm around an identity."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Of any size."""
        found: Tensor = F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))) + self.skip(x))
        return found


def residual_digits(quick: bool, widths: Sequence[int]) -> Case:
    """Residual blocks of these widths, trained here on scikit-learn's digits; norm folded."""
    x, y = scanned_digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks: list[nn.Module] = [
            nn.Sequential(*([nn.AvgPool2d(2)] if after > before > 1 else []), _Residual(before, after))
            for before, after in zip([1, *widths], widths, strict=False)
        ]
        model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
        optimizer = torch.optim.Adam(model.parameters(), 4e-3)
        epochs = 2 if quick else 8
        steps = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 22)
        for _ in range(epochs):
            for rows in torch.randperm(1400).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                steps.step()
    evaluate = partial(right, x=x[1400:], y=y[1400:])
    return Case(model.eval(), x[:2], evaluate, "test accuracy", {"fold_batchnorm": True})


def scanned_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, [1797, 1, 8, 8] in 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def recognizer(quick: bool) -> Case:
    """digit-recognizer-py's trained CNN on scikit-learn's digits, scaled and framed."""
    x, y = (each[:: 30 if quick else 3] for each in scanned_digits())
    x = framed_digits(x)
    return Case(digit_recognizer(), x[:8], partial(right, x=x, y=y), "accuracy")


def mnist1d_cnn(quick: bool) -> Case:
    """A CNN trained here on MNIST-1D."""
    job = mnist1d(quick)
    return Case(job.networks["net"], job.examples["net"], partial(_scored, job=job), "test accuracy")


def _scored(net: Any, job: Any) -> float:
    return float(job.says(job.work({"net": net})).split()[0]) / 100


NETWORKS: dict[str, Callable[[bool], Case]] = {
    "digits, 9 layers": partial(residual_digits, widths=(8, 8, 16, 32)),
    "digits, 17 layers": partial(residual_digits, widths=(8, 8, 8, 16, 16, 16, 32, 32)),
    "digit-recognizer": recognizer,
    "mnist1d": mnist1d_cnn,
    **LARGE,
}
