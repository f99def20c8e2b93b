"""The cost model: its arithmetic by hand, unknown figures that stay unknown, and a source for every constant."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import HardwareError, InputError
from ffebm_compiler.hardware.costs import Quantity, constants_of, unknown
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.work import Work
from ffebm_compiler.plan import Plan
from ffebm_compiler.reports.costs import predicted_sweeps
from ffebm_compiler.runtime.estimators.choice import EquilibriumPropagation

COSTS = {"adc_pj": 2.0, "dac_pj": 1.0, "cell_pj": 0.5, "digital_mac_pj": 3.0, "traffic_pj": 0.25, "element_pj": 0.5}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softmax(-1), nn.Linear(5, 2))


def network_plan(**settings: Any) -> Plan:
    return ffebm.plan(network(), torch.randn(3, 4), hardware=Hardware(**settings))


def test_the_arithmetic_by_hand() -> None:
    report = network_plan(costs=COSTS).cost_report(feedback=0.1, rtol=1e-3)
    pair, single = report.blocks
    assert (pair.macs, pair.sweeps, pair.dac, pair.adc) == (24 + 30, 3, 4, 5)
    assert pair.reads == 24 + 2 * 3 * 30
    analog = 204 * 2 * 0.5
    assert pair.analog == Quantity(analog, analog, "pJ")
    assert pair.converters == Quantity(14.0, 14.0, "pJ")
    traffic = 9 * 0.25
    assert pair.traffic == Quantity(traffic, traffic, "pJ")
    assert pair.inference == Quantity(analog + 14 + traffic, analog + 14 + traffic, "pJ")
    step = 2 * analog + 14 + 13 + 2 * traffic
    assert pair.training == Quantity(step, step, "pJ")
    # Outer products of two phases, whose 11 states are read; inputs, states and gradients pass through memory.
    gradients = 3.0 * 2 * 54 + 2.0 * 2 * 11 + 0.25 * (22 + 4 + 22 + 54)
    assert pair.gradients == Quantity(gradients, gradients, "pJ")
    # Two layers and a tanh of 10 elementary operations; values in, out and the weights pass through memory.
    digital = 3.0 * 54 + 0.5 * 10 * 6 + 0.25 * ((4 + 6 + 24) + (6 + 6) + (6 + 5 + 30))
    assert pair.digital == Quantity(digital, digital, "pJ")
    softmax = 0.5 * 12 * 5 + 0.25 * (5 + 5)
    assert report.digital_parts == Quantity(softmax, softmax, "pJ")
    last = 3.0 * 10 + 0.25 * (5 + 2 + 10)
    assert (single.sweeps, single.reads) == (1, 10)
    alone = 3.0 * 10 + 0.25 * (5 + 2 + 10)  # of a layer that does not settle: error and input are digital
    assert single.gradients == Quantity(alone, alone, "pJ")
    assert report.gradients == pair.gradients + single.gradients
    assert report.inference.low == pytest.approx(pair.inference.low + single.inference.low + softmax)
    assert report.digital_inference.low == pytest.approx(digital + softmax + last)
    assert report.digital_training.low == pytest.approx(3 * (digital + softmax + last))
    assert report.gpu_training == Quantity(38.0 * 3 * 64, 38.0 * 3 * 64, "pJ")
    assert not report.uncounted


def test_digital_layers_are_on_both_sides() -> None:
    plan = network_plan(costs=COSTS).move("4", "digital")
    report = plan.cost_report()
    assert report.digital_macs == 10
    digital = 30.0 + 0.5 * 12 * 5 + 0.25 * (5 + 5 + 5 + 2 + 10)
    assert report.digital_work == Work(macs=10, elements=60, traffic=27)
    assert report.inference == report.blocks[0].inference + Quantity(digital, digital, "pJ")
    assert report.training == report.blocks[0].training + Quantity(3 * digital, 3 * digital, "pJ")


def test_unknown_stays_unknown() -> None:
    report = network_plan().cost_report()
    assert not report.chip_inference.known
    assert not report.chip_training.known
    assert "(this hardware has none)" in str(report)
    assert not report.latency.known
    assert not any(cost.latency.known for cost in report.blocks)
    ideal = ffebm.plan(network(), torch.randn(3, 4), hardware="ideal").cost_report()
    assert not ideal.inference.known
    assert ideal.digital_inference.known
    text = str(ideal)
    assert "adc_pj: one analog-to-digital conversion: unknown (no number of bits is given)" in text


def test_times_that_are_given() -> None:
    timed = {**COSTS, "read_ns": 100.0, "adc_ns": 10.0, "dac_ns": 1.0, "converters": 2.0}
    report = network_plan(costs=timed).cost_report(feedback=0.1, rtol=1e-3)
    expected = 100.0 * (1 + 2 * 3) + 1.0 * 2 + 10.0 * 3
    assert report.blocks[0].latency == Quantity(expected, expected, "ns")
    assert report.block_latency == report.blocks[0].latency + report.blocks[1].latency
    softmax = report.latency.low - report.block_latency.low, report.latency.high - report.block_latency.high
    assert softmax == pytest.approx((60 * 2e3 / 15.7e6, 60 * 2 / 32.2), rel=0.01)  # a V100 and Vega at their peaks
    whole = network_plan(costs={**timed, "digital_ns": 2.0}).cost_report(feedback=0.1, rtol=1e-3)
    assert whole.latency == whole.block_latency + Quantity(2.0 * 60, 2.0 * 60, "ns")
    alone = ffebm.plan(nn.Linear(4, 6), torch.randn(3, 4), hardware=Hardware(costs=timed)).cost_report()
    assert str(alone.latency) == "132 ns"


def test_convolutions_are_read_once_per_position() -> None:
    timed = {**COSTS, "read_ns": 1.0, "adc_ns": 0.0, "dac_ns": 0.0, "converters": 1.0}
    model, x = nn.Conv2d(1, 2, 3), torch.randn(2, 1, 5, 5)
    serial = ffebm.plan(model, x, hardware=Hardware(costs=timed)).cost_report()
    assert serial.latency == Quantity(9.0, 9.0, "ns")
    at_once = ffebm.plan(model, x, hardware=Hardware(costs=timed, conv_mapping="unrolled")).cost_report()
    assert at_once.latency == Quantity(1.0, 1.0, "ns")


def test_the_table_says_what_it_is() -> None:
    text = str(network_plan().cost_report(nudged_phases=2))
    assert text.startswith("modelled costs per sample of Sequential on custom (nothing here is measured)")
    assert "a training step has one free and 2 nudged phases" in text
    assert "bottom-up adds the figures of parts, and chip level takes the published energy" in text
    for constant in constants_of(Hardware()).values():
        assert constant.source
        assert f"  {constant.name}: " in text
        assert constant.source in text


def test_a_plan_without_blocks_has_a_report() -> None:
    report = network_plan(cores=1, tiles_per_core=1, costs=COSTS).move("0", "digital")
    for path in ("2", "4"):
        if path not in report.rejected:
            report = report.move(path, "digital")
    costs = report.cost_report()
    assert costs.inference == costs.digital_inference
    assert "no energy blocks" in str(costs)


def test_json() -> None:
    data = json.loads(json.dumps(network_plan().cost_report().to_dict()))
    assert data["note"] == "modelled, per sample"
    assert data["latency"] == {"low": None, "high": None, "unit": "ns"}


def test_a_hybrid_uses_its_certificates() -> None:
    x = torch.randn(3, 4)
    hybrid = ffebm.convert(network(), x, feedback=0.3)
    slow = hybrid.cost_report()
    hybrid.set_feedback(0.01)
    fast = hybrid.cost_report()
    assert slow.blocks[0].sweeps is not None
    assert fast.blocks[0].sweeps is not None
    assert slow.blocks[0].sweeps > fast.blocks[0].sweeps
    assert fast.nudged_phases == 1
    hybrid.set_gradient(EquilibriumPropagation(variant="centered", beta=0.1))
    assert hybrid.cost_report().nudged_phases == 2


def test_without_a_certificate_the_sweeps_are_unknown() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(50)  # type: ignore[union-attr]
    report = ffebm.convert(model, torch.randn(3, 4), feedback="symmetric").cost_report()
    assert report.blocks[0].sweeps is None
    assert not report.inference.known
    assert "unknown" in str(report)


def test_bits_scale_the_converters() -> None:
    eight, four = constants_of(Hardware()), constants_of(Hardware(adc_bits=4, dac_bits=4))
    assert eight["adc_pj"].value.low == pytest.approx(0.865536)
    assert eight["adc_pj"].value.high == pytest.approx(1.56)
    assert four["adc_pj"].value.low == pytest.approx(0.400256)
    assert four["dac_pj"].value.high == pytest.approx(0.2)
    assert "scaled to the bits" in four["adc_pj"].source


def test_an_unknown_constant_is_refused() -> None:
    with pytest.raises(HardwareError, match=r"costs names 'adc_pJ', which .* did you mean 'adc_pj'\?"):
        network_plan(costs={"adc_pJ": 1.0}).cost_report()
    with pytest.raises(HardwareError, match="does not have: it has adc_pj, dac_pj"):
        network_plan(costs={"zzz": 1.0}).cost_report()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feedback": 1.0}, "feedback is 1.0; expected a number strictly between 0 and 1"),
        ({"feedback": "symmetric"}, "feedback is 'symmetric'"),
        ({"rtol": 0.0}, "rtol is 0.0; expected a number"),
        ({"nudged_phases": 0}, "nudged_phases is 0; expected a whole number of at least 1"),
        ({"nudged_phases": True}, "nudged_phases is True"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        network_plan().cost_report(**settings)


def test_predicted_sweeps() -> None:
    assert [predicted_sweeps(k, 1e-4) for k in (0.5, 0.1, 1e-5)] == [14, 4, 1]


def test_quantities() -> None:
    one = Quantity(1.0, 2.0, "pJ")
    assert one + one == one * 2
    assert (one + unknown("pJ")) == unknown("pJ")
    assert unknown("pJ") * 0 == Quantity(0.0, 0.0, "pJ")
    assert unknown("pJ") * 2 == unknown("pJ")
    assert one.ratio(unknown("pJ")) is None
    assert one.ratio(one) == (0.5, 2.0)
    assert str(replace(one, low=2500.0, high=2500.0)) == "2.5 nJ"
    assert str(one) == "1–2 pJ"
    assert str(Quantity(5e9, 5e9, "ns")) == "5 s"
    with pytest.raises(HardwareError, match="cannot add ns to pJ"):
        _ = one + unknown("ns")


def test_counts_are_per_sample_where_the_batch_is_another_dimension() -> None:
    batch_first = ffebm.plan(network(), torch.randn(2, 7, 4))
    tokens_first = ffebm.plan(network(), torch.randn(7, 2, 4), dynamic_shapes=({1: torch.export.Dim("batch")},))
    counts = [[(b.dac, b.adc, b.macs) for b in plan.blocks] for plan in (batch_first, tokens_first)]
    assert counts[0] == counts[1]
    assert counts[0][0] == (7 * 4, 7 * 5, 7 * 54)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(6, 11), (6,)), (nn.Conv2d(6, 4, 3), (6, 9, 9)), (nn.Conv1d(6, 4, 3), (6, 9))]
)
def test_counts_of_a_sample_without_a_batch_are_its_own(layer: nn.Module, shape: tuple[int, ...]) -> None:
    alone, batched = (ffebm.plan(layer, torch.randn(size)).blocks[0] for size in (shape, (1, *shape)))
    assert (alone.dac, alone.adc, alone.macs) == (batched.dac, batched.adc, batched.macs)
