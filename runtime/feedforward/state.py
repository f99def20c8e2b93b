"""State that a forward writes, such as counters, moving averages or renormalised weights, and reads afterwards."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["ReadState", "WriteInput", "WriteState"]


class WriteState(nn.Module):
    """Write a value into a parameter or buffer of the source, as its forward does.

    Later operations read the result. That is the parameter itself, with its gradient, or the value written to a
    buffer.
    """

    operation: ClassVar[str] = "write_state"
    _is_impure = True  # fx must not remove it as dead code

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @property
    def reason(self) -> str:
        """Why the operation is digital, as a sentence fragment."""
        return f"it writes {self.name!r}, the model's own state"

    def forward(self, state: Tensor, value: Tensor, *before: Tensor) -> Tensor:
        """Write `value` into `state`. `before` makes sure that copies of the old state are taken first."""
        with torch.no_grad():
            state.copy_(value)
        return state if state.requires_grad else value


class ReadState(nn.Module):
    """Read a buffer of the source after other operations have run, as its forward does."""

    operation: ClassVar[str] = "read_state"

    def __init__(self, name: str, live: bool) -> None:
        super().__init__()
        self.name = name
        self.live = live
        """Whether it hands on the buffer itself, so that it can be written to."""

    @property
    def reason(self) -> str:
        """Why the operation is digital, as a sentence fragment."""
        return f"it reads {self.name!r}, the model's own state, after it was updated"

    def forward(self, state: Tensor, *after: Tensor) -> Tensor:
        """The state once `after` is known."""
        return state if self.live else state.clone()


class WriteInput(nn.Module):
    """Write a value into an input, as the source's forward does."""

    operation: ClassVar[str] = "write_input"
    _is_impure = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.enabled = True
        """Whether it writes. While a hybrid is measured or compared, its inputs stay as they are."""

    @property
    def reason(self) -> str:
        """Why the operation is digital, as a sentence fragment."""
        return f"it writes into the input {self.name!r}"

    def forward(self, given: Tensor, value: Tensor, *before: Tensor) -> Tensor:
        """Write `value` into `given`. `before` makes sure that a copy of what was given is taken first."""
        if self.enabled:
            with torch.no_grad():
                given.copy_(value)
        return given
