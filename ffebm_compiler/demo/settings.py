"""The settings of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ffebm_compiler.errors import InputError

__all__ = ["DemoSettings"]


@dataclass(frozen=True)
class DemoSettings:
    """Seed, epochs and folder of the demo.

    Raises:
        InputError: a number of epochs is below one, or the seed is negative.
    """

    out: Path
    seed: int = 0
    epochs: int = 8
    """Epochs of backpropagation on the source."""
    ep_epochs: int = 5
    """Epochs of equilibrium propagation on each hybrid."""
    sweep: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.epochs < 1 or self.ep_epochs < 1:
            raise InputError(f"epochs is {self.epochs} and ep_epochs is {self.ep_epochs}; expected at least 1 of each")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected 0 or more")
