"""Branches on buffers: decided by what the buffers hold, told, and refused where the forward writes them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import CaptureError


class Flags(nn.Module):
    """Branches on a flag, on a threshold, and on an element of a table."""

    def __init__(self, ready: bool, limit: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("ready", torch.tensor(ready))
        self.register_buffer("limit", torch.tensor([limit, 2.0]))
        self.register_buffer("steps", torch.tensor([1, 3]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if self.ready else self.b(x)
        if self.limit[0] > 1 and not (self.steps == 2).any():
            y = y * int(self.steps.max())
        return y + self.limit.mean()


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("limit", [0.5, 1.5])
def test_branches_on_buffers_are_settings(ready: bool, limit: float) -> None:
    model = seeded(lambda: Flags(ready, limit))
    hybrid = ffebm.convert(model, noise(3, 8), hardware=ffebm.Hardware(layers_per_block=1))
    x = noise(5, 8, seed=1)
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
    notes = " ".join(hybrid.plan.notes)
    assert f"branches on buffer 'ready' ({__file__}, line " in notes
    assert f"for its value at conversion, {ready}" in notes
    assert "buffer 'limit'" in notes


def test_a_flag_that_the_forward_sets_is_refused() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("ready", torch.tensor(0))
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.ready == 0:
                self.scale.copy_(y.detach().std(0))
                self.ready.fill_(1)
            return y / self.scale

    model = seeded(Lazy)
    with pytest.raises(CaptureError, match=r"branches on buffer 'ready' .* and writes it, so that which branch"):
        ffebm.convert(model, noise(6, 8))
    assert model.ready == 0


def test_a_value_that_depends_on_the_input_is_still_unknown() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("limit", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > self.limit else x

    with pytest.raises(CaptureError, match="depends on the values of a tensor"):
        ffebm.convert(seeded(Mixed), noise(6, 8))


def test_fake_quantised_models_with_their_observers_off() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, default_weight_fake_quant

        fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        model = seeded(
            lambda: nn.Sequential(fake(), nn.Linear(8, 8), nn.ReLU(), default_weight_fake_quant(), nn.Linear(8, 3))
        )
        model(noise(16, 8))
        for module in model:
            if isinstance(module, FakeQuantize):
                module.disable_observer()
        hybrid = ffebm.convert(copy.deepcopy(model).eval(), noise(4, 8), hardware=ffebm.Hardware(layers_per_block=1))
        x = noise(4, 8, seed=1)
        found, expected = hybrid(x), model.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert any("'0.fake_quant_enabled'" in note for note in hybrid.plan.notes)
