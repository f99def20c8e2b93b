"""Devices: every source of error against its law, the tiles that scale them, and settings that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import noise
from torch import Tensor

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, Drift, FlickerNoise, LogLaw, Relaxation
from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.runtime.devices.array import Array
from ffebm_compiler.runtime.devices.converters import Converters, quantised
from ffebm_compiler.runtime.devices.tiling import Tiling
from ffebm_compiler.runtime.program.contraction import Contraction
from ffebm_compiler.runtime.program.operators import Convolution, Linear, Operator

SIDE = 1000
"""A million draws on one tile."""


def _array(devices: Devices, each: int = 2, rows: int = SIDE, cols: int = SIDE, **tiles: Any) -> Array:
    return Array("block_1/layer", Tiling.of(rows, cols, devices=each, **tiles), devices)


def _constant(share: float) -> Tensor:
    """Weights of one value, with a largest one of 1 that sets the scale."""
    matrices = torch.full((1, SIDE, SIDE), share, dtype=torch.float64)
    matrices[0, 0, 0] = 1.0
    return matrices


def _within(found: float, expected: float, tolerance: float = 0.02) -> bool:
    return abs(found - expected) <= tolerance * abs(expected)


# -- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [0.05, (0.01, 0.08, -0.05), ffebm.device_presets()["pcm"].programming])
def test_programming_errors_have_the_standard_deviation_of_the_polynomial(law: Any) -> None:
    g = 0.5
    array = _array(Devices(programming=law))
    held = array.conductances(array.targets(_constant(g), torch.ones(1, 1, 1, dtype=torch.float64)), 0.0)
    expected = law if isinstance(law, float) else sum(c * g**order for order, c in enumerate(law))
    assert _within(float(held[0].std()), expected)
    assert _within(float(held[0].mean()), g, 0.001)


def test_a_weight_has_the_errors_of_both_its_devices() -> None:
    """σ_w = w_max √(σ(g⁺)² + σ(g⁻)²), where no conductance would be negative."""
    array = _array(Devices(programming=0.02, on_off=10.0))
    held = array.held(_constant(0.3), 0.0).forward
    assert _within(float(held.std()), math.sqrt(2) * 0.02 / 0.9)
    assert _within(float(held.mean()), 0.3, 0.005)


def test_single_devices_err_twice_as_much() -> None:
    """w = (2g − 1) w_max."""
    held = _array(Devices(programming=0.02), each=1).held(_constant(0.3), 0.0).forward
    assert _within(float(held.std()), 0.04)
    assert _within(float(held.mean()), 0.3, 0.005)


def test_two_pairs_halve_the_variance() -> None:
    held = _array(Devices(programming=0.02, on_off=10.0), each=4).held(_constant(0.3), 0.0).forward
    assert _within(float(held.std()), 0.02 / 0.9)


def test_drift_exponents_and_their_spread() -> None:
    law = Drift(0.06, 0.01, start=20.0)
    array = _array(Devices(drift=law))
    target = torch.full((2, 1, SIDE, SIDE), 0.5, dtype=torch.float64)
    day = array.conductances(target, 86400.0)[0]
    exponents = -(day / 0.5).log() / math.log(86400 / 20)
    assert _within(float(exponents.mean()), 0.06)
    assert _within(float(exponents.std()), 0.01)


def test_phase_change_drift_is_that_of_the_conductance() -> None:
    array = _array(
        replace(ffebm.device_presets()["pcm"], programming=0.0, drift=replace(_pcm_drift(), compensated=False))
    )
    for g in (0.05, 0.4, 0.9):
        target = torch.full((2, 1, SIDE, SIDE), g, dtype=torch.float64)
        exponents = -(array.conductances(target, 3600.0)[0] / g).log() / math.log(3600 / 20)
        mean = min(max(-0.0155 * math.log(g) + 0.0244, 0.049), 0.1)
        spread = min(max(-0.0125 * math.log(g) - 0.0059, 0.008), 0.045)
        assert _within(float(exponents.median()), mean)
        quartiles = torch.quantile(exponents.flatten()[:100000], torch.tensor([0.25, 0.75], dtype=torch.float64))
        assert _within(float(quartiles.diff()), 1.349 * spread)


def _pcm_drift() -> Drift:
    drift = ffebm.device_presets()["pcm"].drift
    assert isinstance(drift, Drift)
    return drift


def test_nothing_drifts_before_its_start_and_compensation_keeps_the_total() -> None:
    array = _array(Devices(drift=Drift(0.1, 0.02, compensated=True)), tile_rows=300, tile_cols=500)
    weights = noise(1, SIDE, SIDE).double()
    assert torch.equal(array.held(weights, 20.0).forward, weights)
    largest = array.tiling.largest(weights)
    targets = array.targets(weights, largest)
    aged = array.conductances(targets, 1e6)
    assert not torch.allclose(aged, targets)
    for before, now in zip(
        array.tiling.total(targets.sum(0)).flatten(), array.tiling.total(aged.sum(0)).flatten(), strict=True
    ):
        assert _within(float(now), float(before), 1e-9)


def test_relaxation_interpolates_in_the_logarithm_of_time() -> None:
    law = Relaxation((100.0, 10000.0), (0.04, (0.02, 0.08)), start=1.0)
    array = _array(Devices(programming=0.02, drift=law))
    target = torch.full((2, 1, SIDE, SIDE), 0.5, dtype=torch.float64)
    for age, sigma in ((0.0, 0.02), (10.0, 0.03), (100.0, 0.04), (1000.0, 0.05), (1e9, 0.06)):
        held = array.conductances(target, age)[0]
        assert _within(float(held.std()), sigma)
        assert _within(float(held.mean()), 0.5, 0.001)


def test_shares_of_stuck_devices() -> None:
    array = _array(Devices(stuck_off=0.03, stuck_on=0.01, on_off=20.0))
    held = array.conductances(torch.full((2, 1, SIDE, SIDE), 0.5, dtype=torch.float64), 0.0)
    assert _within(float((held == 0.05).double().mean()), 0.03)
    assert _within(float((held == 1).double().mean()), 0.01)
    assert _within(float((held == 0.5).double().mean()), 0.96)


def test_mismatch_of_both_directions_is_independent() -> None:
    found = _array(Devices(mismatch=0.03)).held(_constant(0.2) * 5, 0.0)
    forward, backward = (part - 1.0 for part in (found.forward, found.backward))
    for part in (forward, backward):
        assert _within(float(part[0, 1:].std()), 0.15)  # of a largest weight of 5
    assert abs(float((forward * backward)[0, 1:].mean())) < 0.02 * 0.15**2


@pytest.mark.parametrize("law", [0.01, FlickerNoise()])
def test_read_noise_of_a_sum_is_that_of_its_devices(law: Any) -> None:
    """W x is read with Var = Σ_i x_i² w_max² Σ_devices (dw/dg)² σ(g)²."""
    model = torch.nn.Linear(40, 500, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.full((500, 40), 0.3))
        model.weight[0] = 1.0
    one_tile = ffebm.Hardware(tile_rows=None, tile_cols=None)
    hybrid = ffebm.convert(model, torch.ones(2, 40), hardware=one_tile, devices=Devices(read_noise=law))
    x = torch.linspace(-1, 1, 40)
    with torch.no_grad():
        read = hybrid(x.expand(2000, 40))[:, 1:] - (model.weight @ x)[1:]
    g = torch.tensor([0.3, 0.0])
    sigma = torch.full((2,), law) if isinstance(law, float) else law.sigma(g, 0.0)
    assert read.numel() > 9e5
    assert _within(float(read.std()), float((sigma.square().sum() * x.square().sum()).sqrt()))
    assert abs(float(read.mean())) < 0.01 * float(read.std())


def test_flicker_noise_grows_with_the_logarithm_of_age() -> None:
    law = FlickerNoise()
    for g in (0.05, 0.5, 1.0):
        for age in (20.0, 3600.0, 86400.0):
            expected = g * min(0.0088 / g**0.65, 0.2) * math.sqrt(math.log((age + 250e-9) / (2 * 250e-9)))
            assert float(law.sigma(torch.tensor([g], dtype=torch.float64), age)) == pytest.approx(expected, rel=1e-9)


def test_levels_of_a_weight() -> None:
    weights = torch.linspace(-1, 1, SIDE * SIDE, dtype=torch.float64).reshape(1, SIDE, SIDE)
    held = _array(Devices(weight_bits=4)).held(weights, 0.0).forward
    assert torch.allclose(held, (weights * 7).round() / 7, atol=1e-12)
    assert len(held.unique()) == 15


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(2, 12), low=st.sampled_from([0.0, -1.5, -0.3]), span=st.floats(1e-3, 1e3))
def test_a_quantiser_rounds_to_the_nearest_level_and_passes_gradients_inside(
    bits: int, low: float, span: float
) -> None:
    limits = (low and -span, span)
    value = (torch.linspace(-2, 2, 1001, dtype=torch.float64) * span).requires_grad_()
    found = quantised(value, bits, limits)
    steps = 2**bits - 1 if limits[0] >= 0 else 2 ** (bits - 1) - 1
    levels = found.detach() / (span / steps)
    assert torch.allclose(levels, levels.round(), atol=1e-6)
    inside = (value >= limits[0]) & (value <= limits[1])
    assert float((found - value)[inside].detach().abs().max()) <= span / steps / 2 * (1 + 1e-9)
    assert set(found.detach().unique().tolist()) >= {0.0}
    found.sum().backward()
    assert value.grad is not None
    assert torch.equal(value.grad, inside.double())


def test_ranges_come_from_the_first_data_and_from_calibration() -> None:
    converters = Converters(4, None)
    first = torch.tensor([0.0, 0.4, 1.0])
    assert torch.allclose(converters.enter(0, first), (first * 15).round() / 15)
    assert torch.equal(converters.enter(0, torch.tensor([9.0])), torch.tensor([1.0]))  # clipped to the range
    assert torch.equal(converters.leave(0, first), first)
    converters.observing = True
    assert torch.equal(converters.enter(0, torch.tensor([-2.0])), torch.tensor([-2.0]))
    assert converters.ranges == {"dac 0": (-2.0, 2.0)}
    assert torch.equal(converters.enter(1, torch.tensor([3])), torch.tensor([3]))  # indices are no analog values


# -- tiles --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 30),
    groups=st.integers(1, 4),
    tile=st.tuples(st.integers(1, 20), st.integers(2, 21)),
    devices=st.sampled_from([1, 2, 4]),
)
def test_each_weight_is_scaled_by_the_largest_of_its_tile(
    rows: int, cols: int, groups: int, tile: tuple[int, int], devices: int
) -> None:
    tiling = Tiling.of(rows, cols, groups, tile_rows=tile[0], tile_cols=tile[1], devices=devices)
    matrices = noise(groups, rows, cols, seed=rows * cols)
    found = tiling.spread(tiling.largest(matrices))
    home = [index * devices // tile[1] for index in range(cols)]  # tile of a weight's first column
    for group in range(groups):
        for row in range(rows):
            for col in range(cols):
                same = torch.tensor([other == home[col] for other in home])
                down = row // tile[0] * tile[0]
                own = matrices[group, down : down + tile[0]][:, same].abs().max()
                assert found[group, row, col] == own


def test_groups_that_share_a_tile_share_its_scale() -> None:
    tiling = Tiling.of(3, 2, 5, tile_rows=256, tile_cols=256, groups_per_tile=2)
    matrices = noise(5, 3, 2)
    found = tiling.largest(matrices).flatten().tolist()
    assert found == [float(matrices[a:b].abs().max()) for a, b in ((0, 2), (2, 4), (4, 5))]


@pytest.mark.parametrize(
    ("operator", "shape", "matrices"),
    [
        (Linear(), (5, 7), (1, 7, 5)),
        (Linear(transposed=True), (7, 5), (1, 7, 5)),
        (Convolution(torch.conv2d, (), (1, 1), (0, 0), (1, 1), groups=2), (6, 4, 3, 3), (2, 36, 3)),
        (
            Convolution(torch.conv_transpose2d, (), (1, 1), (0, 0), (1, 1), transposed=True, groups=2),
            (6, 4, 3, 3),
            (2, 3, 36),
        ),
        (Contraction("bnd,hde->bhne"), (4, 8, 3), (1, 8, 12)),
        (Contraction("gnk,gkm->gnm"), (4, 8, 3), (4, 8, 3)),
    ],
)
def test_matrices_of_a_weight_and_back(operator: Operator, shape: tuple[int, ...], matrices: tuple[int, ...]) -> None:
    weight = noise(*shape)
    found = operator.matrices(weight)
    assert found.shape == matrices
    assert torch.equal(operator.weight_of(found, weight.shape), weight)


def test_matrices_of_a_grouped_convolution_are_those_of_im2col() -> None:
    operator = Convolution(torch.conv2d, (), (1, 1), (0, 0), (1, 1), groups=2)
    weight, x = noise(6, 4, 3, 3), noise(2, 8, 5, 5, seed=3)
    columns = torch.nn.functional.unfold(x, 3).reshape(2, 2, 36, 9)  # batch, group, rows, positions
    found = torch.einsum("bgrp,grc->bgcp", columns, operator.matrices(weight)).reshape(2, 6, 3, 3)
    assert torch.allclose(found, torch.conv2d(x, weight, groups=2), atol=1e-5)


# -- seeds --------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_devices_and_another_seed_others() -> None:
    settings_ = replace(ffebm.device_presets()["pcm"], seed=3)
    weights = noise(2, 30, 20)
    first, again = (Array("a", Tiling.of(30, 20, 2), settings_).held(weights, 1e5).forward for _ in range(2))
    assert torch.equal(first, again)
    for other in (
        Array("a", Tiling.of(30, 20, 2), replace(settings_, seed=4)),
        Array("b", Tiling.of(30, 20, 2), settings_),
    ):
        assert not torch.allclose(other.held(weights, 1e5).forward, first)


def test_a_kind_of_error_has_draws_of_its_own() -> None:
    """Turning one kind off leaves the others as they are."""
    weights = noise(1, 30, 20).double()
    with_stuck = Array("a", Tiling.of(30, 20), Devices(programming=0.1, stuck_on=0.1)).held(weights, 0.0).forward
    without = Array("a", Tiling.of(30, 20), Devices(programming=0.1)).held(weights, 0.0).forward
    assert 0.7 < float((with_stuck == without).double().mean()) < 0.9


def test_precision_changes_only_round_off() -> None:
    array = Array("a", Tiling.of(30, 20), replace(ffebm.device_presets()["reram"], mismatch=0.02))
    weights = noise(1, 30, 20)
    narrow, wide = array.held(weights, 9e4), array.held(weights.double(), 9e4)
    assert torch.allclose(narrow.forward.double(), wide.forward, atol=1e-5)
    assert torch.allclose(narrow.backward.double(), wide.backward, atol=1e-5)


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ffebm.device_presets())
def test_presets_have_sources_and_survive_json(name: str) -> None:
    preset = ffebm.device_presets()[name]
    assert preset.name == name
    assert preset.source
    assert Devices.from_dict(json.loads(json.dumps(preset.to_dict()))) == preset


def test_ideal_devices_are_exact() -> None:
    weights = noise(1, 30, 20)
    assert torch.equal(Array("a", Tiling.of(30, 20), Devices()).held(weights, 1e9).forward, weights)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bits": 1}, "weight_bits is 1; expected a whole number from 2"),
        ({"adc_bits": 25}, "adc_bits is 25; expected a whole number from 2"),
        ({"dac_bits": 7.5}, "dac_bits is 7.5; expected a whole number"),
        ({"adc_bits": True}, "adc_bits is True"),
        ({"programming": -0.1}, "programming is -0.1; expected a finite number of at least 0"),
        ({"programming": (0.1, -0.5)}, "a polynomial that falls to -0.4"),
        ({"programming": ()}, "programming is empty"),
        ({"programming": "high"}, "programming is 'high'; expected a finite number"),
        ({"programming": (0.1, math.nan)}, r"programming\[1\] is nan"),
        ({"mismatch": math.inf}, "mismatch is inf"),
        ({"read_noise": -1e-3}, "read_noise is -0.001; .* or a FlickerNoise"),
        ({"drift": "fast"}, "drift is 'fast'; expected an exponent, a Drift, a Relaxation"),
        ({"drift": -0.1}, "nu is -0.1"),
        ({"seed": -1}, "seed is -1; expected an integer of at least 0"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"stuck_off": 1.5}, "stuck_off is 1.5; .* at most 1"),
        ({"stuck_off": 0.6, "stuck_on": 0.6}, "shares of the devices that sum to at most 1"),
        ({"on_off": 1.0}, "on_off is 1.0; expected a finite number above 1"),
        ({"name": 3}, "name is 3; expected a text"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Devices(**values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Drift(spread=-1.0), "spread is -1.0; .* or a LogLaw"),
        (lambda: Drift(start=0.0), "start is 0.0; expected a finite number above 0"),
        (lambda: Drift(compensated=1), "compensated is 1; expected True or False"),
        (lambda: LogLaw(0.1, 0.1, 0.5, 0.2), "high is 0.2; expected a finite number of at least 0.5"),
        (lambda: LogLaw(math.nan, 0.1, 0.1, 0.2), "slope is nan"),
        (lambda: Relaxation((10.0, 5.0), (0.1, 0.1)), r"times\[1\] is 5.0; expected a finite number above 10"),
        (lambda: Relaxation((10.0,), (0.1, 0.1)), "sigmas has 2 entries for 1 times"),
        (lambda: Relaxation((), ()), "sigmas has 0 entries for 0 times"),
        (lambda: FlickerNoise(amplitude=-1), "amplitude is -1"),
        (lambda: FlickerNoise(earliest=0.0), "earliest is 0.0"),
        (lambda: Devices.from_dict({"colour": 1}), r"devices cannot be made of \['colour'\]"),
        (lambda: Devices.from_dict([]), "devices are described by a list"),
        (lambda: Devices.from_dict({"drift": {"kind": "Magic"}}), "a law of devices is of kind 'Magic'"),
    ],
)
def test_laws_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_three_devices_hold_no_difference() -> None:
    with pytest.raises(UnsupportedError, match="devices_per_weight is 3, and a weight is the difference"):
        _array(Devices(), each=3, rows=2, cols=2)
