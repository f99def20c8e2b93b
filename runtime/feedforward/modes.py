"""Operations that compute something else in train mode, by the flag of a module.

The two captures of a network, in eval and in train mode, agree except in some places. At each of
them the lowered graph has a `ModeSwitch`, which runs the operations of one or the other capture.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.runtime.feedforward.blocks import ReboundOperation

__all__ = ["ModeSwitch", "TrainingMask", "other_modes"]


def other_modes(first: str, training: bool, second: str) -> str:
    """The sentence that refuses two modules in different modes. `training` is the flag of the first one."""
    one, other = (f"module {path!r}" if path else "the model itself" for path in (first, second))
    return (
        f"{one} is in {'train' if training else 'eval'} mode and {other} is not, but what one of them computes in that "
        "mode depends on the other: put both in one mode"
    )


class ModeSwitch(ReboundOperation):
    """y = E(x) if the owner is in eval mode, T(x) if it is in train mode.

    E and T take the same operands and return the same number of results. An operand or result that
    exists in one mode alone is None in the other.
    """

    operation: ClassVar[str] = "mode_switch"

    def __init__(
        self,
        owners: dict[str, nn.Module],
        evaluation: fx.GraphModule,
        training: fx.GraphModule,
        reason: str,
        random: bool,
        writes: bool,
        joined: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(next(iter(owners.values())))
        self.paths = tuple(owners)
        """Paths of the owner, and of other modules that must be in the same mode."""
        self.__dict__["_linked"] = tuple(owners.values())
        self.joined_paths = tuple(joined or ())
        """Paths of modules that hand one value to it. They must be in the same mode unless `checked` is true."""
        self.__dict__["_joined"] = tuple((joined or {}).values())
        self.checked = False
        self.evaluation = evaluation
        self.training_part = training
        self.reason = reason
        """What differs, as a sentence fragment."""
        self.random = random
        """Whether it draws random numbers."""
        self.writes = writes
        """Whether it writes state of the source."""

    def follow(self, old: nn.Module, new: nn.Module) -> None:
        """If one of the modules is `old`, read the flags of `new` instead."""
        super().follow(old, new)
        for key in ("_linked", "_joined"):
            self.__dict__[key] = tuple(new if owner is old else owner for owner in self.__dict__[key])

    @property
    def joined(self) -> tuple[nn.Module, ...]:
        """The modules at `joined_paths`."""
        joined: tuple[nn.Module, ...] = self.__dict__["_joined"]
        return joined

    def forward(self, *operands: Any) -> Any:
        """The results of the present mode: a tuple, or the value itself if there is only one.

        Raises:
            UnsupportedError: modules are in different modes that were captured only in the same mode.
        """
        active = self.active
        others = list(zip(self.paths, self.__dict__["_linked"], strict=True))
        if not self.checked:
            others += zip(self.joined_paths, self.joined, strict=True)
        for path, owner in others:
            if owner.training != active:
                raise UnsupportedError(other_modes(self.paths[0], active, path))
        return (self.training_part if active else self.evaluation)(*operands)


class TrainingMask(ReboundOperation):
    """y = x · m in the owner's train mode, with a factor m that depends only on the shape of x (stochastic depth)."""

    operation: ClassVar[str] = "training_mask"

    def __init__(self, owner: nn.Module, training: fx.GraphModule, reason: str, rate: float) -> None:
        super().__init__(owner)
        self.rate = rate
        """The largest factor is 1/(1 − rate)."""
        self.training_part = training
        self.reason = reason
        """What differs, as a sentence fragment."""

    @property
    def drawing(self) -> bool:
        """Whether a mask is drawn in the owner's present mode, also one whose factors are 0 and 1, at a rate of 0."""
        return self.active

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself in eval mode."""
        return self.training_part(x) if self.active else x

    def mask(self, x: Tensor) -> Tensor | None:
        """The factor that `x` is multiplied by, drawn once; None in eval mode."""
        return self.training_part(torch.ones_like(x)) if self.active else None
