"""Default tolerances of the phases. They depend on the mode.

In evaluation the states are the result. In train mode only the gradient is, and a
looser tolerance gives the same gradient. If the block's solver has an `rtol`, e.g. `GaussSeidel(rtol=1e-6)`, it
replaces all of them, in both modes and both phases.
"""

from __future__ import annotations

import torch

__all__ = ["error_rtol", "free_rtol"]

_TRAINING_FREE = 5e-4
_TRAINING_KINKED = 5e-5
"""The tolerance of states if an activation has a kink.

A state on the wrong side of a kink has a wrong slope, however close it is. At 5e-4 a network of 15 layers had a
gradient with a cosine of 0.97 (`benchmarks/gradient_accuracy.py`).
"""
_TRAINING_ERROR = 3e-3
"""Estimated relative errors of states and of error currents in training.

These are about the loosest values for which the cosine with the exact gradient stays above 0.9999 for every parameter
of every network of `tests/networks.py`, fourteen activations and κ from 0.03 to 0.9
(`benchmarks/training_tolerance.py`).
"""
_COHERENT_ERROR = 1e-4
"""The tolerance of error currents that may all have one sign (`Setting.coherent`).

Batch norm behind a block subtracts their mean, which is most of them. At 3e-3 a deep resistive network had a gradient
with a cosine of 0.991 (`benchmarks/training_tolerance.py --energy drn`).
"""


def free_rtol(dtype: torch.dtype, certified: bool, training: bool = False, smooth: bool = False) -> float:
    """Relative error of a layer at which a free phase stops.

    With a certificate, the last change bounds the remaining error. In training the error is estimated from it. Without
    a certificate only the change itself is known, and the iteration goes on to the resolution of the dtype.
    """
    if dtype == torch.float64:
        return 1e-12
    if dtype == torch.float32:
        if not certified:
            return 1e-6
        if not training:
            return 1e-4
        return _TRAINING_FREE if smooth else _TRAINING_KINKED
    return 1e-2


def error_rtol(dtype: torch.dtype, certified: bool, training: bool = False, coherent: bool = False) -> float:
    """Relative error of an error current at which a nudged or adjoint phase stops.

    An error of the states is amplified by 1/β and by every later block. An error of the error currents enters the
    gradient only once, as a relative error. With a certified bound of 1e-2 the gradients of a 15-layer network are off
    by about 5e-3, a cosine of 0.99999 (`benchmarks/gradient_accuracy.py`).
    """
    if dtype == torch.float64:
        return 1e-11 if certified else 1e-12
    if dtype == torch.float32:
        if not certified:
            return 1e-4
        if coherent:
            return _COHERENT_ERROR
        return _TRAINING_ERROR if training else 1e-2
    return 1e-2
