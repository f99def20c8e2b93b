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
        assert gc.get_threshold() == (2_000, 500, 1_000)
    assert gc.get_threshold() == (700, 10, 5)
    with pytest.raises(ZeroDivisionError), collected_rarely():
        raise ZeroDivisionError
    assert gc.get_threshold() == (700, 10, 5)


@pytest.mark.parametrize(
    ("given", "inside"),
    [((0, 10, 10), (0, 10, 10)), ((500_000, 10, 10), (500_000, 500, 1_000)), ((700, 10, 9_000), (2_000, 500, 9_000))],
)
def test_off_and_higher_thresholds_of_the_callers_stay(
    given: tuple[int, int, int], inside: tuple[int, int, int]
) -> None:
    gc.set_threshold(*given)
    with collected_rarely():
        assert gc.get_threshold() == inside
    assert gc.get_threshold() == given


def test_garbage_of_a_long_computation_is_collected() -> None:
    class Cycle:
        """Refers to itself."""

        alive = 0

        def __init__(self) -> None:
            self.me = self
            Cycle.alive += 1

        def __del__(self) -> None:
            Cycle.alive -= 1

    most = 0
    with collected_rarely():
        for _ in range(20_000):
            Cycle()
            most = max(most, Cycle.alive)
    assert most < 3_000


def test_convert_and_plan_collect_rarely() -> None:
    seen: list[int] = []
    gc.set_threshold(700, 10, 10)

    class Model(nn.Linear):
        """Notes the threshold."""

        def forward(self, x):  # type: ignore[no-untyped-def]
            seen.append(gc.get_threshold()[0])
            return super().forward(x)

    before = gc.get_threshold()
    model, x = Model(3, 3), noise(2, 3)
    ffebm.convert(model, x)
    ffebm.plan(model, x)
    assert set(seen) == {2_000}
    assert gc.get_threshold() == before
    assert ffebm.convert.__name__ == "convert"
