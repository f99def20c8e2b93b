"""How many examples hypothesis tries: few in the tests of every day, as many as asked for in a `make` target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

__all__ = ["often"]


def often(usual: int, wanted: int) -> Callable[[Any], Any]:
    """`usual` examples, always the same; or, unless it is 0, `wanted` ones that are new in every run."""
    return settings(
        max_examples=wanted or usual,
        deadline=None,
        database=None,
        derandomize=not wanted,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
