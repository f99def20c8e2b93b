"""Garbage: Python's collector runs rarely inside, and as before afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from networks import noise
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.garbage import collected_rarely


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_threshold_is_high_inside_and_restored() -> None:
    gc.set_threshold(700, 10, 5)
    with collected_rarely():
        assert gc.get_threshold() == (100_000, 10, 5)
    assert gc.get_threshold() == (700, 10, 5)
    with pytest.raises(ZeroDivisionError), collected_rarely():
        raise ZeroDivisionError
    assert gc.get_threshold() == (700, 10, 5)


@pytest.mark.parametrize("threshold", [0, 500_000])
def test_the_callers_own_setting_stays(threshold: int) -> None:
    gc.set_threshold(threshold, 10, 10)
    with collected_rarely():
        assert gc.get_threshold() == (threshold, 10, 10)


def test_convert_and_plan_collect_rarely() -> None:
    seen: list[int] = []

    class Model(nn.Linear):
        """Notes the threshold."""

        def forward(self, x):  # type: ignore[no-untyped-def]
            seen.append(gc.get_threshold()[0])
            return super().forward(x)

    before = gc.get_threshold()
    model, x = Model(3, 3), noise(2, 3)
    ffebm.convert(model, x)
    ffebm.plan(model, x)
    assert set(seen) == {100_000}
    assert gc.get_threshold() == before
    assert ffebm.convert.__name__ == "convert"
