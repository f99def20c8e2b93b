"""`Analog`: what a gradient estimator has to know of the devices of a block."""

from __future__ import annotations

from dataclasses import dataclass

from ffebm_compiler.runtime.devices.converters import Converters
from ffebm_compiler.runtime.program.reads import Reads

__all__ = ["Analog"]


@dataclass(frozen=True)
class Analog:
    """How the states of a block are read."""

    reads: Reads | None
    """How the arrays are read while a phase settles; None if exactly."""
    errors: Reads
    """How the errors at the inputs are read."""
    converters: Converters
    sweeps: int
    """Sweeps that a phase takes where noise hides whether it has settled."""
