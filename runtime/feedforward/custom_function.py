"""Modules for the source's own `autograd.Function`s and its hooks on tensors, which change gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.utils._pytree as pytree
from torch import Tensor, nn

__all__ = ["CustomFunction", "GradientHook", "Slot"]


@dataclass(frozen=True)
class Slot:
    """The place of an operand among the arguments of a call."""

    index: int


class CustomFunction(nn.Module):
    """One call of an `autograd.Function` of the source: its own forward and its own backward.

    Tensors and sizes are operands. The other arguments are those of the capture.
    """

    operation: ClassVar[str] = "custom_function"

    def __init__(self, function: type, structure: Any, leaves: tuple[Any, ...], written: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.structure = structure
        """The pytree of (args, kwargs)."""
        self.leaves = leaves
        """The leaves of (args, kwargs): a `Slot` for each operand, the captured value for anything else."""
        self.written = frozenset(written)
        """Indices of the operands that the function writes in place (`mark_dirty`). It gets copies of them."""

    @property
    def reason(self) -> str:
        """Why the operation is digital, as a sentence fragment."""
        return f"the autograd.Function {self.function.__name__} has a backward of its own"

    def forward(self, *operands: Any) -> tuple[Tensor, ...]:
        """The tensors that the function returns, in order."""
        given = [value.clone() if index in self.written else value for index, value in enumerate(operands)]
        filled = [given[leaf.index] if isinstance(leaf, Slot) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(filled, self.structure)
        result = self.function.apply(*args, **kwargs)  # type: ignore[attr-defined]
        return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


class GradientHook(nn.Module):
    """The identity, with the source's hook on its gradient."""

    operation: ClassVar[str] = "gradient_hook"

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.hook = hook

    @property
    def reason(self) -> str:
        """Why the operation is digital, as a sentence fragment."""
        return "the source has a hook on its gradient (register_hook)"

    def forward(self, x: Tensor) -> Tensor:
        """A view of `x` with the hook."""
        value = x.view_as(x)
        if value.requires_grad:
            value.register_hook(self.hook)
        return value
