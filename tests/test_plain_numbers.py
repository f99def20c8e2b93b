"""Numbers of numpy are taken wherever a number is, and stored as plain ones. Truth values are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from networks import mlp

import ffebm_compiler as ffebm
from ffebm_compiler.plain_numbers import plain

SETTINGS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (ffebm.Devices, {"read_noise": np.float32(0.125), "programming": np.float32(0.5), "seed": np.int64(3)}),
    (ffebm.Devices, {"dac_bits": np.int64(8), "drift": np.float32(0.0625), "stuck_on": np.float16(0.25)}),
    (ffebm.Devices, {"programming": (np.float32(0.5), np.int32(1)), "on_off": Fraction(21, 2)}),
    (ffebm.Drift, {"nu": np.float32(0.0625), "start": np.int64(20)}),
    (ffebm.Relaxation, {"times": (np.float32(2), np.int64(3)), "sigmas": (np.float32(0.5), 0.25), "start": np.int8(1)}),
    (ffebm.GaussSeidel, {"rtol": np.float32(2**-10), "max_sweeps": np.int64(50), "relaxation": np.float32(1.25)}),
    (ffebm.Anderson, {"memory": np.int64(4), "rtol": np.float64(1e-3)}),
    (ffebm.EquilibriumPropagation, {"beta": np.float32(0.5), "points": np.int64(4), "reads": np.int64(2)}),
    (ffebm.CoupledLearning, {"beta": np.float32(0.5)}),
    (ffebm.ContrastiveLearning, {"scale": np.float32(2)}),
    (ffebm.CostNudge, {"beta": np.float32(0.5), "scale": np.int64(2)}),
    (ffebm.ZerothOrder, {"samples": np.int64(2), "sigma": np.float32(0.5), "seed": np.uint8(7)}),
    (ffebm.FeedbackWeights, {"seed": np.int64(3)}),
]


def _plain(value: Any) -> Any:
    return tuple(map(plain, value)) if isinstance(value, tuple) else plain(value)


@pytest.mark.parametrize(("make", "given"), SETTINGS)
def test_settings_keep_numbers_of_numpy_as_plain_ones(make: Callable[..., Any], given: dict[str, Any]) -> None:
    made = make(**given)
    assert made == make(**{name: _plain(value) for name, value in given.items()})
    json.dumps(asdict(made))


@pytest.mark.parametrize(("make", "given"), SETTINGS)
def test_truth_values_are_no_numbers(make: Callable[..., Any], given: dict[str, Any]) -> None:
    for name in given:
        with pytest.raises(ffebm.InputError, match=f"^{name}"):
            make(**{**given, name: True})


def test_arguments_of_functions() -> None:
    model, x = mlp()
    hybrid: Any = ffebm.convert(model, x, feedback=np.float32(0.25), devices=ffebm.Devices(drift=0.05))
    hybrid.age(np.float32(5))
    hybrid.project(np.float32(0.5))
    report = hybrid.plan.cost_report(feedback=np.float32(0.25), rtol=np.float32(2**-10), nudged_phases=np.int64(2))
    assert report == hybrid.plan.cost_report(feedback=0.25, rtol=2**-10, nudged_phases=2)
    assert str(hybrid.diagnose(x, sweeps=np.int64(3))) == str(hybrid.diagnose(x, sweeps=3))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (Fraction(10**400), float("inf")),
        (Fraction(-(10**400)), float("-inf")),
        (10**400, 10**400),
        (True, True),
        (None, None),
        ("1", "1"),
    ],
)
def test_plain(value: Any, expected: Any) -> None:
    assert plain(value) == expected
    assert type(plain(value)) is type(expected)
