"""How many examples hypothesis tries: few in the tests of every day, as many as asked for in a `make` target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

__all__ = ["in_slices", "often", "slices"]


def slices(wanted: int) -> int:
    """In how many tests of equal size so many examples are tried, so that workers can share them."""
    return math.gcd(wanted, 8)  # few: each begins with small examples


def often(usual: int, wanted: int) -> Callable[[Any], Any]:
    """`usual` examples, always the same; or, unless it is 0, `wanted` ones that are new in every run, in slices."""
    return settings(
        max_examples=wanted // slices(wanted) if wanted else usual,
        deadline=None,
        database=None,
        derandomize=not wanted,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def in_slices(metafunc: pytest.Metafunc, wanted: int) -> None:
    """For a module's `pytest_generate_tests`: each test with hypothesis as often as `often` has slices."""
    if wanted and is_hypothesis_test(metafunc.function):
        metafunc.fixturenames.append("part")
        metafunc.parametrize("part", range(slices(wanted)))
