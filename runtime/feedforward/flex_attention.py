"""Flex attention as a module: attention with the user's own score and mask functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn

__all__ = ["FlexAttention"]


class FlexAttention(nn.Module):
    """softmax(score(q kᵀ/√d), masked) v, with the captured graphs of score and mask.

    The arguments of torch's operator are kept as a template with numbered operands and graphs.
    On a CPU, torch has no gradient for it.
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
        """Itself, since it never changes."""
        return self

    def forward(self, *operands: Tensor) -> Any:
        """The result of torch's operator: the attended values, and the values that it saves for the backward pass."""

        def filled(argument: Any) -> Any:
            if isinstance(argument, FlexAttention.Operand):
                return operands[argument.index]
            if isinstance(argument, FlexAttention.Function):
                return self.functions[argument.index]
            return argument

        args, kwargs = fx.node.map_aggregate(self.template, filled)
        return self.operator(*args, **kwargs)
