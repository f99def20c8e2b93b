"""Contractions: products of an activation with a weight of any number of dimensions, as one operator.

    y[g, f, m] = Σ_k x[g, f, k] W[g, k, m]

Each index may stand for several dimensions, in any order, which an einsum equation names. Every group g
(expert, head) has a matrix of its own, and f are the positions that it is applied at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffebm_compiler.runtime.program.operators import Operator, Weights

__all__ = ["Contraction", "Letters", "contraction", "letters_of"]


def contraction(value: Tensor, weight: Tensor, equation: str) -> Tensor:
    """The product of a value and a weight by an einsum equation."""
    return torch.einsum(equation, value, weight)


@dataclass(frozen=True)
class Letters:
    """The dimensions of a contraction by their kind, in the order of the weight or the value."""

    value: str
    weight: str
    result: str
    groups: str
    """Letters in value, weight and result."""
    inputs: str
    """Letters in value and weight alone, which are summed."""
    outputs: str
    """Letters in weight and result alone."""

    def matrix(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(rows, columns, groups) of the matrix of one group, from the weight's shape."""
        size = dict(zip(self.weight, map(int, shape), strict=True))
        rows, cols, groups = (
            math.prod(size[x] for x in letters) for letters in (self.inputs, self.outputs, self.groups)
        )
        return rows, cols, groups


def letters_of(equation: str) -> Letters:
    """The dimensions of an equation such as `"bnd,hde->bhne"`."""
    operands, result = equation.split("->")
    value, weight = operands.split(",")
    return Letters(
        value,
        weight,
        result,
        groups="".join(x for x in weight if x in value and x in result),
        inputs="".join(x for x in weight if x in value and x not in result),
        outputs="".join(x for x in weight if x not in value),
    )


@dataclass(frozen=True)
class Contraction(Operator):
    """y = einsum(equation, x, W), e.g. "gnk,gkm->gnm". No dimension is summed or broadcast in one operand alone."""

    equation: str
    product = True

    @property
    def adjoint_equation(self) -> str:
        """The equation of Aᵀ p, for the operands p and W."""
        of = letters_of(self.equation)
        return f"{of.result},{of.weight}->{of.value}"

    def matrices(self, weight: Tensor) -> Tensor:
        """The matrix of every group."""
        rows, cols, groups = letters_of(self.equation).matrix(weight.shape)
        return weight.permute(self._order).reshape(groups, rows, cols)

    def weight_of(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrices`."""
        inverse = sorted(range(len(shape)), key=lambda index: self._order[index])
        return matrices.reshape([shape[index] for index in self._order]).permute(inverse)

    def column_dims(self, dims: int) -> tuple[int, ...]:
        """The dimensions of the result that the groups and the outputs are along."""
        of = letters_of(self.equation)
        return tuple(of.result.index(letter) for letter in of.groups + of.outputs)

    @property
    def _order(self) -> list[int]:
        """The dimensions of the weight in the order of its matrices: groups, inputs, outputs."""
        of = letters_of(self.equation)
        return [of.weight.index(letter) for letter in of.groups + of.inputs + of.outputs]

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """A x."""
        return self.tangent(values, weights, ())

    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """A x."""
        value, weight = values[0], weights[0]
        assert value is not None
        assert weight is not None
        return contraction(value, weight, self.equation)

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Σ_m p[g, f, m] W[g, k, m]."""
        weight = weights[0]
        assert weight is not None
        return [contraction(cotangent, weight, self.adjoint_equation)]

    def weight_gradients(
        self, values: Sequence[Tensor], cotangent: Tensor, weights: Weights, needed: Sequence[bool], bias: bool
    ) -> list[Tensor | None]:
        """Σ_f x[g, f, k] p[g, f, m]."""
        of = letters_of(self.equation)
        return [contraction(values[0], cotangent, f"{of.value},{of.result}->{of.weight}") if needed[0] else None]
