"""Drawn values: refuse a branch on random numbers, such as a layer that is dropped at random.

A graph holds one path through the forward. If random numbers choose the path at every call, no single path
is the source.

Promise: a Python branch on random numbers raises `NotTraceable`, and so does converting them to a Python number. That
includes everything computed from random numbers, constants and buffers alone.
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
"""Functions that draw their result at random; their arguments only choose the distribution."""

_READ_ONE_VALUE = (Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, torch.is_nonzero)


class DrawnValues:
    """Follows what a traced forward computes from random numbers."""

    def __init__(self, is_known: Callable[[Tensor], bool]) -> None:
        self._is_known = is_known
        self._drawn: dict[int, Tensor] = {}

    def call(self, func: Any, args: tuple[Any, ...]) -> None:
        """Refuse a branch on a random number.

        Raises:
            NotTraceable: always for such a branch; it says what to do instead.
        """
        if func in _READ_ONE_VALUE and id(args[0]) in self._drawn:
            raise NotTraceable(
                "random numbers that the forward draws decide here what runs, and a graph holds one path; multiply the "
                "result of the branch by a random 0 or 1 instead (stochastic depth), or set the rate to 0"
            )

    def computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note a result that was computed from random numbers and known values alone."""
        draws = getattr(func, "__name__", "") in _DRAWS
        if not draws and not self._drawn:
            return
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        random = [operand for operand in operands if id(operand) in self._drawn]
        follows = bool(random) and all(id(operand) in self._drawn or self._is_known(operand) for operand in operands)
        if follows or draws:
            self._drawn |= {id(leaf): leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
