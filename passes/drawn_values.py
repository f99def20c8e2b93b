"""Drawn values: a branch on random numbers, such as layers that are dropped, is refused by its cause.

A graph holds one way through the forward. Where numbers that the forward draws choose the way, none of them is the
source's.

Promise: a Python branch on, or a Python number of, what was computed from draws, constants and buffers alone raises
`NotTraceable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ffebm_compiler.passes.explain_capture import NotTraceable

__all__ = ["DrawnValues"]

_DRAWS = (
    "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal", "bernoulli",
    "multinomial", "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "geometric_", "log_normal_",
)  # fmt: skip
"""Functions whose result depends on random numbers and, at most, on what their distribution is."""

_DECIDES = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, torch.is_nonzero)


class DrawnValues:
    """Follows what a traced forward computes from random numbers."""

    def __init__(self, knows: Callable[[Tensor], bool]) -> None:
        self._knows = knows
        self._drawn: dict[int, Tensor] = {}

    def call(self, func: Any, args: tuple[Any, ...]) -> None:
        """Refuse a branch on a random number.

        Raises:
            NotTraceable: saying what to do instead.
        """
        if func in _DECIDES and id(args[0]) in self._drawn:
            raise NotTraceable(
                "random numbers that the forward draws decide here what runs, and a graph holds one way; multiply the "
                "result of the branch by a random 0 or 1 instead (stochastic depth), or set the rate to 0"
            )

    def computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note a result that was computed from random numbers and known values alone."""
        draws = getattr(func, "__name__", "") in _DRAWS
        if not draws and not self._drawn:
            return
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        random = [operand for operand in operands if id(operand) in self._drawn]
        follows = bool(random) and all(id(operand) in self._drawn or self._knows(operand) for operand in operands)
        if follows or draws:
            self._drawn |= {id(leaf): leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
