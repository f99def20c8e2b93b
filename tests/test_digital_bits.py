"""Digital parts of few bits: their values, gradients and training, and how they are calibrated, kept and refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import digits_cnn, noise, seeded, transformer, warmed
from onnxruntime.quantization.quant_utils import compute_scale_zp
from same_as_source import relative
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, QuantisedBackprop
from ffebm_compiler.digital_bits import digital_ranges, quantisers
from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.feedforward.quantised_backprop import largest_step, quantised_error, symmetric
from ffebm_compiler.runtime.feedforward.quantiser import Quantiser

INT8 = Devices(digital_bits=8)


class Small(nn.Module):
    """A digital linear layer with ReLU, a block of two layers, a digital linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(5, 3)
        self.block = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(torch.relu(self.first(x))))


def small(**others: Any) -> tuple[ffebm.HybridModel, nn.Module, Tensor]:
    model, x = seeded(Small), noise(32, 6)
    return ffebm.convert(model, x, force_digital=("first", "last"), **others), model, x


def calibrated(hybrid: ffebm.HybridModel, *batches: Any, devices: Devices = INT8) -> ffebm.HybridModel:
    hybrid.set_devices(devices)
    hybrid.calibrate_digital(batches)
    return hybrid


# -- the law ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.floats(-50, 0), st.floats(0, 50), st.integers(2, 16), st.integers(0, 100))
def test_levels_are_those_of_onnxruntime(low: float, high: float, bits: int, seed: int) -> None:
    """Range of any size and bits: step, zero and values of onnxruntime's law; half a step at most, and 0 exactly."""
    quantiser = Quantiser("part", bits, frozenset())
    low, high = float(np.float32(low)), float(np.float32(high))
    quantiser.ranges["x"] = (low, high)
    step, zero = quantiser.levels((low, high))
    half = 2 ** (bits - 1)
    wanted = compute_scale_zp(
        np.array(low, np.float32), np.array(high, np.float32), np.array(-half, np.int32), np.array(half - 1, np.int32)
    )
    assert (zero, step) == (int(wanted[0]), pytest.approx(float(wanted[1]), rel=1e-6))
    x = torch.cat([noise(200, seed=seed) * 20, torch.zeros(1), torch.tensor([low, high])]).requires_grad_()
    found = quantiser.value("x", x)
    integers = np.clip(np.rint(x.detach().double().numpy() / step) + zero, -half, half - 1)
    assert torch.allclose(found.double(), torch.tensor((integers - zero) * step), atol=1.01 * step, rtol=1e-5)
    assert float((found.double() - torch.tensor((integers - zero) * step)).abs().gt(0.01 * step).sum()) <= 2  # ties
    assert found[200] == 0
    if high - low < 1e-30:  # it is 0 wherever it was seen, and has no range
        return
    inside = (x >= low) & (x <= high)
    assert float((found - x).detach()[inside].abs().max()) <= 0.51 * step + 1e-5 * max(high, -low)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    well_inside = (x > low + step) & (x < high - step)
    outside = (x < low - step) | (x > high + step)
    assert bool((gradient[well_inside] == 1).all())
    assert bool((gradient[outside] == 0).all())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(2, 16), st.integers(-4, 3), st.integers(0, 9))
def test_weights_have_a_step_for_each_channel(shape: list[int], bits: int, axis: int, seed: int) -> None:
    """Any shape: the largest of a channel is its last level, all are within half a step, gradients come through."""
    axis = axis % len(shape)
    weight = noise(*shape, seed=seed).requires_grad_()
    step = largest_step(weight, bits, axis)
    assert step.shape == (shape[axis],)
    found = symmetric(weight, step, bits, axis)
    most = 2 ** (bits - 1) - 1
    for channel in range(shape[axis]):
        own, have = weight.detach().select(axis, channel), found.detach().select(axis, channel)
        integers = torch.round(own.double() / (own.double().abs().max() / most))
        assert torch.allclose(have.double(), integers * (own.double().abs().max() / most), atol=1e-6 * most)
        assert have.abs().max() == pytest.approx(float(own.abs().max()), rel=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    assert bool((gradient == 1).all())
    assert torch.equal(
        symmetric(torch.zeros(2, 3), largest_step(torch.zeros(2, 3), bits, 0), bits, 0), torch.zeros(2, 3)
    )


def by_hand(hybrid: ffebm.HybridModel, part: str, name: str) -> tuple[float, int]:
    quantiser = quantisers(hybrid)[part]
    limits = quantiser.ranges[name]
    assert limits is not None
    return quantiser.levels(limits)


def test_a_layer_is_integer_arithmetic() -> None:
    """The first layer in int64, with the steps of the simulation."""
    hybrid, model, x = small()
    hybrid = calibrated(hybrid.eval(), x)
    part = hybrid.feedforward_blocks["digital_1"]
    weight, bias = model.get_submodule("first").weight.detach(), model.get_submodule("first").bias.detach()
    (x_step, x_zero), (y_step, y_zero) = (by_hand(hybrid, "digital_1", name) for name in ("x", "relu"))
    q_x = (torch.round(x / x_step).long() + x_zero).clamp(-128, 127)
    step = weight.abs().amax(1) / 127
    q_w = torch.round(weight / step[:, None]).long()
    y = ((q_x - x_zero) @ q_w.T) * (x_step * step) + bias
    q_y = (torch.round(y.clamp_min(0) / y_step).long() + y_zero).clamp(-128, 127)
    (found,) = part(x, weight, bias)
    difference = ((found / y_step).round().long() + y_zero - q_y).abs()
    assert int(difference.max()) <= 1  # a tie, in float32
    assert float(difference.float().mean()) < 0.01
    assert set(quantisers(hybrid)["digital_1"].ranges) == {"x", "relu"}  # the sum before ReLU is a wide accumulator


# -- in networks --------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Operations of other kinds: functional calls, transposed and grouped convolutions, contractions, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv1d(4, 8, 3, padding=1, groups=2), nn.ConvTranspose1d(8, 6, 2, 2)
        self.norm, self.table = nn.GroupNorm(2, 6), nn.Embedding(3, 6)
        self.kernel = nn.Parameter(torch.randn(6, 6, 1) / 3)
        self.heads = nn.Parameter(torch.randn(2, 6, 5) / 3)
        self.out = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.gelu(self.norm(self.up(self.a(x)))), 0.0, self.training)
        y = F.conv1d(y, self.kernel) + y
        y = F.avg_pool1d(y, 2) * self.table((x[:, :1] > 0).long().squeeze(1)).transpose(1, 2)
        y = torch.einsum("bcn,hcd->bhnd", y, self.heads)
        y = torch.cat([y.amax(2).flatten(1), y.mean(2).flatten(1)], 1)
        return torch.addmm(self.out.bias, y, self.out.weight.T)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor, Any]]] = {
    "cnn": lambda: (*digits_cnn(), ()),
    "cnn, digital convolutions": lambda: (*digits_cnn(), "block*"),
    "cnn, all digital": lambda: (*digits_cnn(nn.SiLU), "*"),
    "transformer": lambda: (*transformer(0.1), ()),
    "transformer, a digital layer": lambda: (*transformer(), "layers.0*"),
    "mixed, all digital": lambda: (seeded(Mixed), noise(8, 4, 12), "*"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_more_bits_are_nearer_to_the_exact_network(name: str) -> None:
    model, x, digital = NETWORKS[name]()
    x = noise(16, *x.shape[1:])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hybrid = ffebm.convert(model, x, force_digital=digital).eval()
    if not hybrid.feedforward_blocks:
        pytest.skip("no digital part")
    for training in (False, True):
        hybrid.train(training)
        statistics = {name: buffer.clone() for name, buffer in hybrid.named_buffers()}
        torch.manual_seed(0)
        with hybrid.feedforward_mode():
            plain = hybrid(x)
        hybrid.set_devices(None)
        torch.manual_seed(0)
        expected = hybrid(x)
        errors = []
        for bits in (6, 12):
            hybrid.set_devices(Devices(digital_bits=bits))
            before = {name: buffer.clone() for name, buffer in hybrid.named_buffers()}
            hybrid.calibrate_digital([x[:8], x[8:], x])
            assert all(torch.equal(buffer, before[name]) for name, buffer in hybrid.named_buffers())
            torch.manual_seed(0)
            errors.append(relative(hybrid(x), expected))
            with hybrid.feedforward_mode():
                torch.manual_seed(0)
                assert torch.equal(hybrid(x), plain)
        assert 8 * errors[1] < errors[0] < 0.5, errors
        hybrid.set_devices(None)
        torch.manual_seed(0)
        assert torch.equal(hybrid(x), expected)
        if not training:
            assert all(torch.equal(buffer, statistics[name]) for name, buffer in hybrid.named_buffers())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Masked(nn.Module):
    """Attention by hand with a causal mask of −∞, and a norm by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), 1)
        y = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5 + mask, -1) @ v
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.out(y)


def test_masks_and_norms_by_hand_stay_finite_and_causal() -> None:
    model, x = seeded(Masked), noise(4, 5, 8)
    hybrid = calibrated(ffebm.convert(model, x).eval(), x)
    found = hybrid(x)
    assert relative(found, model(x)) < 0.05
    later = x.clone()
    later[:, 3:] = 0
    assert torch.equal(hybrid(later)[:, :3], found[:, :3])


class Positions(nn.Module):
    """Positions that are counted in floating point, as OPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones(x.shape[:2])
        places = (ones.cumsum(1) * ones - 1).long()
        y = x + self.table(places)
        return self.b(torch.where(self.a(y) > 0, y, y.detach()))


def test_indices_counted_in_floating_point_stay_exact() -> None:
    model, x = seeded(Positions), noise(3, 37, 6)
    hybrid = calibrated(ffebm.convert(model, x).eval(), x, devices=Devices(digital_bits=12))
    assert relative(hybrid(x), model(x)) < 5e-3
    ranges = [value for part in digital_ranges(hybrid).values() for value in part.items()]
    assert {name for name, limits in ranges if limits is None} >= {"cumsum", "mul"}


def test_values_of_a_mask_stay_as_they_are() -> None:
    quantiser = Quantiser("part", 8, frozenset())
    quantiser.observing = True
    mask = torch.tensor([0.0, float("-inf"), 1.0])
    for value in (noise(3), mask, noise(3)):
        assert quantiser.value("mask", value) is value
    quantiser.observing = False
    assert quantiser.ranges == {"mask": None}
    assert quantiser.value("mask", mask) is mask
    assert quantiser.value("never seen", torch.zeros(0, 3)).shape == (0, 3)


# -- gradients ----------------------------------------------------------------------------------


def through(value: Tensor, step: Tensor | float, zero: int = 0, low: int = -128, high: int = 127) -> Tensor:
    """A quantised value, straight through inside its range: plain torch, by its own definition."""
    integers = torch.round(value / step) + zero
    inside = (integers >= low) & (integers <= high)
    result = (integers.clamp(low, high) - zero) * step
    return torch.where(inside, value + (result - value).detach(), result.detach())


def reference(hybrid: ffebm.HybridModel, model: nn.Module, x: Tensor) -> Tensor:
    """`Small`, all of its layers feedforward, with the steps of the simulation."""
    layers = dict(model.named_modules())

    def weight(name: str) -> Tensor:
        found: Any = layers[name].weight
        step = found.detach().abs().amax(1, keepdim=True) / 127
        return through(found, step, 0, -127, 127)

    def value(y: Tensor, part: str, name: str) -> Tensor:
        return through(y, *by_hand(hybrid, part, name))

    names = list(quantisers(hybrid)["digital_2"].ranges)
    y = F.linear(value(x, "digital_1", "x"), weight("first"), layers["first"].bias)  # type: ignore[arg-type]
    y = layers["block"](value(torch.relu(y), "digital_1", "relu"))
    y = F.linear(value(y, "digital_2", names[0]), weight("last"), layers["last"].bias)  # type: ignore[arg-type]
    return value(y, "digital_2", names[1])


def gradients(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["ep", "implicit"])
def test_gradients_go_straight_through(gradient: str) -> None:
    """Inside of every range, 0 outside: inputs that are larger than those of the calibration are clipped."""
    hybrid, model, x = small(gradient=gradient, feedback=1e-6)
    hybrid = calibrated(hybrid.train(), x)
    found = gradients(hybrid, hybrid(1.3 * x))
    expected = gradients(model, reference(hybrid, model, 1.3 * x))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(found[name], value) < 2e-3, name


def test_errors_and_weight_gradients_are_quantised() -> None:
    hybrid, _, x = small()
    hybrid = calibrated(hybrid.train(), x)
    plain = gradients(hybrid, hybrid(x))
    worst = []
    for bits in (4, 8, 12):
        hybrid.set_gradient("ep", feedforward=QuantisedBackprop(bits))
        found = gradients(hybrid, hybrid(x))
        for name in ("first.weight", "last.weight"):
            for channel in found[name]:
                step = channel.abs().max() / (2 ** (bits - 1) - 1)
                assert torch.allclose(channel / step, (channel / step).round(), atol=1e-3)
        worst.append(max(relative(found[name], value) for name, value in plain.items()))
    assert worst[0] > 8 * worst[1] > 64 * worst[2] > 0
    value = noise(50).requires_grad_()
    quantised_error(value, QuantisedBackprop(3)).backward(noise(50, seed=1))
    assert value.grad is not None
    assert 2 < len(value.grad.unique()) <= 7


def test_scaling_is_that_of_integer_weights() -> None:
    """With QAS a step of the weights is a step of the integers by s⁻² times their gradient; without it by 1 times.

    The integers are trained by hand: W̄ = W/s and b̄ = b/(s s_x) are the parameters of a layer in plain torch, and their
    gradients are what torch finds.
    """
    hybrid, model, x = small(feedback=1e-6)
    hybrid = calibrated(hybrid.train(), x)
    layer: Any = model.get_submodule("last")
    (x_step, _), quantiser = (
        by_hand(hybrid, "digital_2", next(iter(quantisers(hybrid)["digital_2"].ranges))),
        quantisers(hybrid)["digital_2"],
    )
    names = list(quantiser.ranges)
    step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    integers = (layer.weight.detach() / step).requires_grad_()
    bias = (layer.bias.detach() / (step[:, 0] * x_step)).requires_grad_()
    recorded: list[Tensor] = []
    hook = hybrid.energy_blocks["block_1"].register_forward_hook(lambda module, args, out: recorded.append(out[0]))
    output = hybrid(x)
    hook.remove()
    inner = through(recorded[0].detach(), *by_hand(hybrid, "digital_2", names[0]))
    y = F.linear(inner, through(integers, 1.0, 0, -127, 127) * step, bias * step[:, 0] * x_step)
    y = through(y, *by_hand(hybrid, "digital_2", names[1]))
    y.square().sum().backward()
    assert integers.grad is not None
    assert bias.grad is not None
    hybrid.set_gradient("ep", feedforward=QuantisedBackprop(16))
    scaled = gradients(hybrid, hybrid(x))
    hybrid.set_gradient("ep", feedforward=QuantisedBackprop(16, scaling=False))
    plain = gradients(hybrid, hybrid(x))
    assert relative(hybrid(x), output) == 0
    # W ← W − η G is W̄ ← W̄ − η G/s, and G/s is s⁻² times the gradient of W̄.
    assert relative(scaled["last.weight"] / step, integers.grad / step**2) < 1e-3
    assert relative(plain["last.weight"] / step, integers.grad) < 1e-3
    assert relative(scaled["last.bias"] / (step[:, 0] * x_step), bias.grad / (step[:, 0] * x_step) ** 2) < 1e-3
    assert relative(plain["last.bias"] / (step[:, 0] * x_step), bias.grad) < 1e-3
    assert relative(plain["block.0.weight"], scaled["block.0.weight"]) < 1e-3  # analog weights are no integers


def test_check_gradients_compares_with_straight_through() -> None:
    hybrid, _, x = small()
    hybrid = calibrated(hybrid.train(), x)
    hybrid.set_gradient("ep", feedforward="quantised")
    report = ffebm.check_gradients(hybrid, x, lambda y: y.square().sum())
    assert report.own == "ep, quantised"
    assert report.worst("ep")[1].cosine > 0.9999
    assert 0.99 < report.worst("ep, quantised")[1].cosine < 0.99999
    assert min(each.cosine for each in report.ideal.values()) > 0.98
    assert "gradients of digital parts are quantised: QuantisedBackprop(bits=8, scaling=True)" in str(hybrid.summary())


@pytest.mark.parametrize("gradient", ["ep", "implicit", "unrolled", "coupled"])
@pytest.mark.parametrize("feedforward", ["backprop", "zeroth-order", "quantised"])
def test_every_gradient_and_optimizer_runs(gradient: str, feedforward: str) -> None:
    model, x = (
        seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))),
        noise(9, 6),
    )
    hybrid = ffebm.convert(model, x, force_digital="0").train()
    hybrid = calibrated(hybrid, x, devices=replace(ffebm.device_presets()["pcm"], digital_bits=8))
    hybrid.set_gradient(gradient, feedforward=feedforward)
    for optimizer in (torch.optim.SGD(hybrid.parameters(), 1e-3), torch.optim.AdamW(hybrid.parameters(), 1e-3)):
        optimizer.zero_grad()
        hybrid(x).square().mean().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in hybrid.parameters())
        optimizer.step()


# -- kept and refused ---------------------------------------------------------------------------


def equal(found: nn.Module, expected: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(found.eval()(x), expected.eval()(x))


def test_files_copies_pickles_and_state_dicts_keep_bits_ranges_and_gradients(tmp_path: Path) -> None:
    hybrid, model, x = small()
    hybrid = calibrated(hybrid.train(), x[:16], x[16:])
    hybrid.set_gradient("ep", feedforward=QuantisedBackprop(6, scaling=False))
    wanted = digital_ranges(hybrid)
    again = calibrated(small()[0].train(), x[:16], x[16:])
    assert digital_ranges(again) == wanted  # reproducible
    hybrid.save(tmp_path / "saved")
    fresh, other = small()[0], small()[0]
    file = io.BytesIO()
    torch.save(hybrid.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    other.load_block_state(hybrid.block_state())
    twins = [
        ffebm.load(tmp_path / "saved", model),
        copy.deepcopy(hybrid),
        pickle.loads(pickle.dumps(hybrid)),
        fresh,
        other,
    ]
    for twin in twins:
        assert twin.devices == INT8
        assert digital_ranges(twin) == wanted
        assert equal(twin, hybrid, x)
        assert quantisers(twin)["digital_1"].backprop == QuantisedBackprop(6, scaling=False)
    assert set(hybrid.state_dict()) == set(model.state_dict())
    model.load_state_dict(hybrid.state_dict())
    twins[1].calibrate_digital([2 * x])  # a copy has ranges of its own
    assert digital_ranges(hybrid) == wanted
    hybrid.load_state_dict(small()[0].state_dict())
    assert hybrid.devices is None
    assert quantisers(hybrid) == {}


def test_other_bits_and_seeds_keep_the_ranges() -> None:
    hybrid, _, x = small()
    hybrid = calibrated(hybrid.eval(), x, devices=replace(INT8, programming=0.01))
    wanted = digital_ranges(hybrid)
    hybrid.program_devices(seed=3)
    assert digital_ranges(hybrid) == wanted
    hybrid.set_devices(Devices(digital_bits=4))
    assert digital_ranges(hybrid) == wanted
    hybrid(x)


def test_converters_and_random_numbers_are_not_touched_by_a_calibration() -> None:
    hybrid, _, x = small()
    hybrid.set_devices(Devices(digital_bits=8, adc_bits=8, dac_bits=8, read_noise=1e-3))
    state = torch.get_rng_state()
    hybrid.calibrate_digital([x])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not block.arrays.converters.ranges for block in hybrid.energy_blocks.values() if block.arrays)
    before = digital_ranges(hybrid)

    def broken() -> Any:
        yield 10 * x
        raise RuntimeError("the loader fails")

    with pytest.raises(RuntimeError, match="the loader fails"):
        hybrid.calibrate_digital(broken())
    assert digital_ranges(hybrid) == before
    assert not any(each.observing for each in quantisers(hybrid).values())
    hybrid.calibrate_digital([(x,), {"x": 2 * x}])
    after = digital_ranges(hybrid)
    assert after["digital_1"]["x"] == [float(2 * x.min()), float(2 * x.max())]


def test_a_compiled_hybrid_runs_quantised_parts_eagerly() -> None:
    hybrid, _, x = small()
    hybrid = calibrated(hybrid.eval(), x)
    with torch.no_grad():
        assert torch.equal(torch.compile(hybrid, backend="eager")(x), hybrid(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    hybrid, _, x = small()
    hybrid = calibrated(hybrid.eval(), x)
    expected = hybrid(x)
    found = hybrid.to(dtype)(x.to(dtype))
    assert found.dtype is dtype
    assert relative(found.float(), expected) < (0.02 if dtype is torch.float64 else 0.1)


def test_a_digital_network_has_bits_too() -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), noise(9, 6)
    hybrid = calibrated(ffebm.convert(model, x, force_digital="*", devices=INT8), x)
    assert 0 < relative(hybrid(x), model(x)) < 0.03


@pytest.mark.parametrize("bits", [1, 17, 8.0, True, "8"])
def test_impossible_bits_are_refused(bits: Any) -> None:
    with pytest.raises(InputError, match=r"digital_bits is .*; expected a whole number from 2 .* to 16"):
        Devices(digital_bits=bits)
    with pytest.raises(InputError, match=r"bits is .*; expected a whole number from 2 to 16"):
        QuantisedBackprop(bits)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="scaling is 1; expected True or False"):
        QuantisedBackprop(scaling=1)  # type: ignore[arg-type]
    chain, x = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))), noise(9, 6)
    with pytest.raises(InputError, match="digital_bits is 8, and the plan has no digital part"):
        ffebm.convert(chain, x, devices=INT8)
    with pytest.raises(InputError, match="the plan has no analog block"):
        ffebm.convert(chain, x, force_digital="*", devices=replace(INT8, programming=0.1))
    hybrid, _, x = small()
    with pytest.raises(InputError, match="calibrate_digital needs digital parts with bits"):
        hybrid.calibrate_digital([x])
    with pytest.raises(InputError, match="quantised gradients are those of quantised digital parts"):
        hybrid.set_gradient("ep", feedforward="quantised")
    with pytest.raises(InputError, match="expected 'backprop', 'zeroth-order', 'quantised'"):
        hybrid.set_gradient("ep", feedforward="int8")
    hybrid.set_devices(INT8)
    with pytest.raises(InputError, match="digital_1 computes with 8 bits, and it has never been calibrated"):
        hybrid(x)
    with pytest.raises(InputError, match="batches is a Tensor; expected an iterable of batches"):
        hybrid.calibrate_digital(x)
    with pytest.raises(InputError, match="batches holds no batch"):
        hybrid.calibrate_digital([])
    hybrid.calibrate_digital([x])
    del quantisers(hybrid)["digital_1"].ranges["relu"]
    with pytest.raises(InputError, match="no data of that calibration came to its operation 'relu'"):
        hybrid(x)
    hybrid.set_gradient("ep", feedforward="quantised")
    with pytest.raises(InputError, match="have no digital_bits, which the quantised gradients"):
        hybrid.set_devices("pcm")
    assert hybrid.devices == INT8


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    hybrid, model, x = small()
    hybrid = calibrated(hybrid, x)
    hybrid.set_gradient("ep", feedforward="quantised")
    hybrid.save(tmp_path / "saved")
    path = tmp_path / "saved" / "hybrid.json"
    text = path.read_text(encoding="utf-8")
    low = f'"x": [\n      {float(x.min())}'
    assert low.split()[2] in text
    for old, new, message in (
        ('"digital_bits": 8', '"digital_bits": 80', "state.devices.settings: digital_bits is 80"),
        ('"digital_bits": 8', '"digital_bits": null', r"digital_bits: missing, and there are ranges or gradients"),
        (low.split()[2], "0.5", r"state\.devices\.digital\.'digital_1'\.'x': expected a range that holds 0"),
        ('"scaling": true', '"scaling": 1', r"state\.quantised\.scaling"),
        ('"scaling": true', '"scaling": true, "more": 1', r"state\.quantised"),
    ):
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            ffebm.load(tmp_path / "saved", model)


def test_batch_norm_uses_the_statistics_of_quantised_values() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    model = warmed(model, noise(20, 6))
    x = noise(64, 6, seed=2)
    hybrid = calibrated(ffebm.convert(model, x).train(), x)
    before = hybrid.get_submodule("1").running_mean.clone()
    hybrid(x)
    after = hybrid.get_submodule("1").running_mean
    exact = copy.deepcopy(model).train()
    exact(x)
    assert not torch.equal(after, before)
    assert relative(after, exact[1].running_mean) < 0.01  # type: ignore[index]
