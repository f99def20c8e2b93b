"""Flex attention as a module: attention with a score function and a mask function of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn

__all__ = ["FlexAttention"]


class FlexAttention(nn.Module):
    """softmax(score(q kᵀ/√d), masked) v, with the captured graphs of score and mask.

    The arguments of torch's operator are kept as a template, in which operands and graphs are numbered.
    On a CPU torch has no gradient for it.
    """

    operation: ClassVar[str] = "flex_attention"
    reason: ClassVar[str] = "attention multiplies activations by activations"

    @dataclass(frozen=True)
    class Operand:
        """Stands for an operand of the call."""

        index: int

    @dataclass(frozen=True)
    class Function:
        """Stands for a captured graph."""

        index: int

    def __init__(
        self, operator: Callable[..., Any], args: Any, kwargs: Any, functions: Sequence[fx.GraphModule]
    ) -> None:
        super().__init__()
        self.operator = operator
        self.template = (args, kwargs)
        self.functions = nn.ModuleList(functions)

    def __deepcopy__(self, memo: dict[int, object]) -> FlexAttention:
        """Itself: it holds nothing that changes."""
        return self

    def forward(self, *operands: Tensor) -> Any:
        """What torch's operator gives: the attended values and what it saves for the backward pass."""

        def filled(argument: Any) -> Any:
            if isinstance(argument, FlexAttention.Operand):
                return operands[argument.index]
            if isinstance(argument, FlexAttention.Function):
                return self.functions[argument.index]
            return argument

        args, kwargs = fx.node.map_aggregate(self.template, filled)
        return self.operator(*args, **kwargs)
