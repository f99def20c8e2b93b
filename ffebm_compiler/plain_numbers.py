"""Numbers of numpy and of other packages as Python's own, which can be compared, computed with and stored."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

__all__ = ["plain", "plain_fields"]


def plain(value: Any) -> Any:
    """A whole or a real number as an int or a float. Truth values and what is no number stay as they are."""
    if isinstance(value, bool | int | float) and type(value) in (bool, int, float):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    try:
        return int(value) if isinstance(value, Integral) else float(value)
    except OverflowError:  # it is beyond the largest float
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def plain_fields(settings: Any) -> None:
    """Make the numbers in the fields of a dataclass plain ones, before they are checked. It may be frozen."""
    for name in settings.__dataclass_fields__:
        value = getattr(settings, name, None)
        if value is not plain(value):
            object.__setattr__(settings, name, plain(value))
