"""The smallest and the largest networks and numbers: they work, or a sentence says why not."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def scaled(factor: float, *middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), *(middle or (nn.ReLU(),)), nn.Linear(8, 4))
    for parameter in model.parameters():
        parameter.data.mul_(factor)
    return model


ONE = {
    "one weight": (nn.Linear(1, 1, bias=False), noise(1, 1)),
    "two weights": (nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)), noise(1, 1)),
    "one pixel": (nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1)), noise(1, 1, 1, 1)),
    "weights of zero": (scaled(0.0), noise(1, 4)),
    "weights near the smallest number": (scaled(1e-38), noise(3, 4)),
}


@pytest.mark.parametrize("case", ONE)
@pytest.mark.parametrize("feedback", [0.1, "symmetric"])
def test_the_smallest(case: str, feedback: float | str, tmp_path: Path) -> None:
    model, x = ONE[case]
    hybrid = ffebm.convert(model, x, feedback=feedback)
    out = hybrid.train()(x)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in hybrid.parameters())
    hybrid.eval().save(tmp_path / "saved")
    assert torch.equal(ffebm.load(tmp_path / "saved", model).eval()(x), hybrid(x))
    assert hybrid.cost_report().inference.low > 0


class Empty(nn.Module):
    """A layer of no inputs, or of no outputs, beside an ordinary one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: initialising it is a no-op
            self.empty = nn.Linear(inputs, outputs)
        self.full = nn.Linear(4, 2)
        self.inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.empty(x[:, : self.inputs]), self.full(x)], 1)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (4, 0), (0, 0)])
def test_layers_without_weights_stay_digital(inputs: int, outputs: int) -> None:
    model, x = Empty(inputs, outputs), noise(3, 4)
    hybrid = ffebm.convert(model, x)
    assert torch.equal(hybrid(x), model(x))
    assert hybrid.plan.rejected["empty"].startswith(f"its weight is empty (shape {(outputs, inputs)})")
    with pytest.raises(ffebm.UnsupportedError, match="no weight-stationary layer"):
        ffebm.convert(model.empty, x[:, :inputs])


def test_numbers_whose_squares_overflow() -> None:
    for model, x in ((scaled(1e10), noise(3, 4)), (scaled(1.0), noise(3, 4) * 1e20), (scaled(1e30), noise(3, 4))):
        with pytest.raises(ffebm.InputError, match=r"state \d of block_1 reaches .* without any feedback.*double\(\)"):
            ffebm.convert(model, x)(x)
    assert ffebm.convert(scaled(1e10).double(), noise(3, 4).double())(noise(3, 4).double()).isfinite().all()
    saturated = scaled(1e18, nn.Tanh())
    assert ffebm.convert(saturated, noise(3, 4))(noise(3, 4)).isfinite().all()


def test_a_feedback_gain_beyond_the_dtype() -> None:
    hybrid = ffebm.convert(scaled(1e-3), noise(3, 4))
    assert hybrid(noise(3, 4)).isfinite().all()
    with pytest.raises(ffebm.InputError, match=r"feedback gain γ of block_1 is .*torch\.float16 ends at 6\.6e\+04"):
        hybrid.half()(noise(3, 4).half())
    assert hybrid.bfloat16()(noise(3, 4).bfloat16()).isfinite().all()
    with pytest.raises(ffebm.InputError, match=r"feedback gain γ of block_1 is .*torch\.float32 ends at"):
        ffebm.convert(scaled(1e-20), noise(3, 4))(noise(3, 4))


def test_a_feedback_that_fades_beyond_the_dtype() -> None:
    """γ = 0.01 from each layer to the one before it, three times, and float16 ends at 6.6e4."""
    layers = [module for _ in range(3) for module in (nn.Linear(4, 4), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(4, 4)), noise(3, 4)
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=0.01, hardware=ffebm.Hardware(layers_per_block=4))
    with pytest.raises(ffebm.InputError, match=r"feedback of block_1 to its first layer is 1e\+06 times smaller"):
        hybrid.half()(x.half())
    assert hybrid.bfloat16()(x.bfloat16()).isfinite().all()


@pytest.fixture
def pythons_limit() -> Iterator[None]:
    """Python's own limit of calls inside each other, which packages raise for good when they are used."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("pythons_limit")
def test_modules_deeper_than_python_calls() -> None:
    model: nn.Module = nn.Linear(4, 4)
    for _ in range(300):
        model = nn.Sequential(model)
    with pytest.raises(ffebm.CaptureError, match=r"lie deeper inside each other than Python's limit of \d+ calls"):
        ffebm.convert(model, noise(1, 4))


def test_reports_of_a_deep_network_do_not_recurse() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(60) for layer in (nn.Linear(4, 4), nn.Tanh())]
    hybrid = ffebm.convert(nn.Sequential(*layers), noise(1, 4), hardware=ffebm.Hardware(layers_per_block=2))
    assert len(hybrid.blocks) == 30
    for parameter in hybrid.parameters():  # so that the loop gain is measured anew
        parameter.data.mul_(0.9)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 70)
    try:
        assert hybrid.operands_of("block_30")[1][0] is not None
    finally:
        sys.setrecursionlimit(before)
    assert 0.08 < hybrid.blocks[-1].loop_gain <= 0.1


class Masked(nn.Module):
    """Scores of which some are masked by minus infinity, and one is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = scaled(1.0)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.body(x).masked_fill(torch.tensor([True, False, False, False]), float("-inf"))
        return torch.cat([scores, scores[:, :1] - scores[:, :1]], 1)


def test_outputs_that_are_not_finite_are_those_of_the_source() -> None:
    model, x = Masked(), noise(3, 4)
    hybrid = ffebm.convert(model, x)
    assert torch.equal(hybrid(x)[:, 0], model(x)[:, 0])
    assert hybrid(x)[:, -1].isnan().all()
    assert hybrid(x)[:, 1:4].isfinite().all()
