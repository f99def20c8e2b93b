"""Default tolerances of the phases."""

from __future__ import annotations

import torch

__all__ = ["error_rtol", "free_rtol"]


def free_rtol(dtype: torch.dtype, certified: bool) -> float:
    """Relative error of a layer at which a free phase stops.

    With a certificate the error that is left is bounded by the last change; without one there is
    only the change to look at, and the iteration goes on to what the dtype resolves.
    """
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32:
        return 1e-4 if certified else 1e-6
    return 1e-2


def error_rtol(dtype: torch.dtype, certified: bool) -> float:
    """Relative error of an error current at which a nudged or adjoint phase stops.

    An error of the states is amplified by 1/β and by every later block; one of the error currents enters the
    gradient once and relatively. With a certified bound of 1e-2 the gradients of a 15-layer network are off by
    about 5e-3, a cosine of 0.99999 (`benchmarks/gradient_accuracy.py`).
    """
    if dtype == torch.float64:
        return 1e-11 if certified else 1e-12
    if dtype == torch.float32:
        return 1e-2 if certified else 1e-4
    return 1e-2
