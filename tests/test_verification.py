"""Conversion compares the hybrid with its source, and knows where a comparison says nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.reports.verification import verify_feedforward


class Normed(nn.Module):
    """Batch norm over two samples at one position: of equal features it returns their round-off at full size."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16, eps=1e-12), nn.Linear(16, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(1 + self.scale * x)))


@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_a_source_that_returns_round_off_converts(scale: float) -> None:
    hybrid = ffebm.convert(seeded(lambda: Normed(scale)).train(), noise(2, 8))
    assert hybrid.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_deviation_is_a_defect_that_is_told(dtype: torch.dtype) -> None:
    model, x = seeded(lambda: Normed(1.0)).to(dtype), noise(6, 8).to(dtype)
    hybrid = ffebm.convert(model, x)
    other = copy.deepcopy(hybrid.to_digital())
    with torch.no_grad():
        other.last.weight.mul_(1.001)
    hybrid.__dict__["_source"] = other
    with pytest.raises(ffebm.FFEBMError, match=r"deviates from the source by .* in eval mode.*defect of the compiler"):
        verify_feedforward(hybrid, (x,), {})


class AsksForGradients(nn.Module):
    """Computes something else where no gradient is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if torch.is_grad_enabled() else 2 * self.layer(x)


def test_a_source_that_computes_something_else_without_gradients_is_refused() -> None:
    with pytest.raises(ffebm.UnsupportedError, match=r"in eval mode the source computes something else where no grad"):
        ffebm.convert(AsksForGradients(), noise(5, 8))


class AsksForTheType(nn.Module):
    """Computes something else for a subclass of `torch.Tensor`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if type(x) is Tensor else 2 * self.layer(x)


@pytest.mark.parametrize("asks", ["is_compiling", "is_exporting"])
def test_a_source_that_computes_something_else_where_it_is_compiled_is_refused_as_that(asks: str) -> None:
    class AsksForTheCompiler(AsksForTheType):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * (2 if getattr(torch.compiler, asks)() else 1)

    with pytest.raises(ffebm.UnsupportedError, match=r"in eval mode .* where it is compiled or exported .*setting"):
        ffebm.convert(AsksForTheCompiler(), noise(5, 8))


def test_a_source_that_asks_for_the_exact_type_of_a_tensor_is_refused_as_that() -> None:
    with pytest.raises(ffebm.UnsupportedError, match=r"in eval mode .* tensors of another class .*isinstance"):
        ffebm.convert(AsksForTheType(), noise(5, 8))
