"""Numbers: what a function that the user gives has measured."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ffebm_compiler.errors import InputError

__all__ = ["number_of"]


def number_of(found: Any, told: str) -> float:
    """The number that `evaluate` returned: a number, or a tensor or array of one value. It need not be finite.

    Args:
        found: what it returned.
        told: what was measured, in words that go on after the type.

    Raises:
        InputError: it is something else.
    """
    count = found.numel() if isinstance(found, Tensor) else getattr(found, "size", None)
    if count == 1 and hasattr(found, "item"):
        found = found.item()
    is_number = isinstance(found, int | float) or (hasattr(found, "__float__") and not hasattr(found, "shape"))
    if isinstance(found, bool) or not is_number:
        shape = f" and shape {tuple(found.shape)}" if hasattr(found, "shape") else ""
        raise InputError(
            f"evaluate returned an object of type {type(found).__name__}{shape} {told}; expected a number such as an "
            "accuracy"
        )
    try:
        return float(found)
    except OverflowError:  # an integer beyond the largest float
        return math.inf
