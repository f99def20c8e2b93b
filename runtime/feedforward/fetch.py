"""`Fetch`: a parameter or buffer of the source, read where it is needed.

An engine that shards weights gathers those of one part of a network at a time. So the graph of a hybrid reads each
tensor just before the block that needs it, and does not hold it longer.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

__all__ = ["Fetch", "Owner"]


class Owner(Protocol):
    """An object that has tensors by name, such as a hybrid."""

    def _tensor(self, name: str) -> Tensor:
        """The present tensor of this name."""
        ...


class Fetch(nn.Module):
    """Reads the present tensor of one name from the hybrid that it is part of.

    The reference to the hybrid is no registered submodule. `copy.deepcopy` copies the two together.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        """The source's name of the parameter or buffer, such as `layer1.0.conv1.weight`."""

    def follow(self, owner: Owner) -> None:
        """Read from this hybrid from now on."""
        self.__dict__["_owner"] = owner

    def forward(self) -> Tensor:
        """The tensor."""
        owner: Owner = self.__dict__["_owner"]
        return owner._tensor(self.name)

    def extra_repr(self) -> str:
        """For printing."""
        return self.name
