"""Quantisers and additive noise against aihwkit-lightning, where its models coincide with ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, Hardware

configs: Any = pytest.importorskip("aihwkit_lightning.simulator.configs", reason="in the extra `dev`")
modules: Any = pytest.importorskip("aihwkit_lightning.nn", reason="in the extra `dev`")

ONE_TILE = Hardware(tile_rows=None, tile_cols=None)


def _analog(weight: Tensor, config: Any, limit: float | None = None) -> nn.Module:
    layer: nn.Module = modules.AnalogLinear(weight.shape[1], weight.shape[0], bias=False, rpu_config=config)
    with torch.no_grad():
        layer.get_parameter("weight").copy_(weight)
        if limit is not None:
            layer.input_range.fill_(limit)  # type: ignore[operator, union-attr]
    return layer.eval()


def _config() -> Any:
    config = configs.TorchInferenceRPUConfig()
    config.mapping.max_input_size = 10000
    return config


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_through_converters(bits: int) -> None:
    """2^bits − 2 steps over [−m, m]."""
    model, x = seeded(lambda: nn.Linear(20, 9, bias=False)), noise(50, 20)
    limit = float(x.abs().max())
    config = _config()
    config.forward.inp_res = 2**bits - 2
    config.pre_post.input_range.enable = True
    hybrid = ffebm.convert(model, x, hardware=ONE_TILE, devices=Devices(dac_bits=bits))
    hybrid.calibrate_converters(x)
    expected = _analog(model.weight.detach(), config, limit)(x)
    assert torch.allclose(hybrid(x), expected, atol=1e-6)
    assert not torch.allclose(hybrid(x), model(x), atol=1e-4)


@pytest.mark.parametrize("bits", [3, 6])
def test_levels_of_weights(bits: int) -> None:
    """2^bits − 2 steps over [−w_max, w_max] of the tile."""
    model, x = seeded(lambda: nn.Linear(20, 9, bias=False)), noise(50, 20)
    config = _config()
    config.modifier.quantization_type = configs.WeightQuantizationType.DISCRETIZE
    config.modifier.res = 2**bits - 2
    hybrid = ffebm.convert(model, x, hardware=ONE_TILE, devices=Devices(weight_bits=bits))
    expected = _analog(model.weight.detach(), config)(x)
    assert torch.allclose(hybrid(x), expected, atol=1e-6)


def test_additive_noise() -> None:
    """Weights with normal errors of σ w_max: the same law, each with draws of its own."""
    model, x = seeded(lambda: nn.Linear(300, 400, bias=False)), torch.eye(300)
    config = _config()
    config.modifier.noise_type = configs.WeightNoiseInjectionType.ADD_NORMAL
    config.modifier.std_dev = 0.04
    layer = _analog(model.weight.detach(), config).train()
    # A single device has w = (2g − 1) w_max, so that half the error of g is that of w.
    single = Hardware(tile_rows=None, tile_cols=None, devices_per_weight=1)
    hybrid = ffebm.convert(model, x, hardware=single, devices=Devices(programming=0.02))
    torch.manual_seed(0)
    theirs = (layer(x) - model(x)).detach()
    inside = model.weight.detach().T.abs() < 0.9 * model.weight.detach().abs().max()  # no conductance is negative
    ours = (hybrid(x) - model(x)).detach()[inside]
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.02)
    assert abs(float(ours.mean())) < 0.01 * float(theirs.std())
