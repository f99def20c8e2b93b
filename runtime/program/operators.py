"""Operators: the maps that a drive is composed of.

Each is linear in its value operands for fixed weights, y = A(θ) x + b(θ). It has three
methods. `apply` computes y exactly as the source does, including the bias. `tangent` applies the linear part
(the Jacobian-vector product). `adjoint` applies the transpose of that, the
physical feedback path. Operators with weights also give the gradient of ⟨p, y⟩ by them.

All of them use differentiable torch operations, so that a relaxation can be unrolled.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffebm_compiler.runtime.program import matrix_products
from ffebm_compiler.runtime.program.pointwise import faulty, thinned
from ffebm_compiler.runtime.program.pooling import disjoint_windows, spread

__all__ = [
    "ByValue",
    "Concat",
    "Convolution",
    "Gain",
    "Linear",
    "Mask",
    "MaxPool",
    "Operator",
    "Permute",
    "Reshape",
    "Scale",
    "Sum",
    "Wiring",
    "along_columns",
    "slice_of",
]

Weights = Sequence[Tensor | None]


class Operator(ABC):
    """A map y = A(θ) x + b(θ), linear in its value operands."""

    draws: bool = False
    """Whether the operator holds a constant that it draws once a forward (a mask)."""
    product: bool = False
    """Whether it is a product of one operand with a weight, so that it may be computed in bfloat16."""
    selects: bool = False
    """Whether it holds a constant that is chosen again at every evaluation of a free phase (max pooling's winners)."""

    @abstractmethod
    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """A x + b, with the source's own torch function."""

    @abstractmethod
    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """A x. An operand that is None stands for zeros of the given shape."""

    @abstractmethod
    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Aᵀ p for each operand that is needed, of the operand's shape."""

    def weight_gradients(
        self,
        values: Sequence[Tensor],
        cotangent: Tensor,
        weights: Weights,
        needed: Sequence[bool],
        bias: bool,
    ) -> list[Tensor | None]:
        """∂⟨p, A(θ) x + b(θ)⟩/∂θ for each weight that is needed, without the bias term if `bias` is false."""
        return [None] * len(weights)

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight of a product as the matrices that crossbars hold, (groups, inputs, outputs)."""
        raise NotImplementedError(f"{type(self).__name__} multiplies by no weight")

    def weight_of(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The weight of this shape that has these matrices: the inverse of `matrices`."""
        raise NotImplementedError(f"{type(self).__name__} multiplies by no weight")

    def column_dims(self, dims: int) -> tuple[int, ...]:
        """The dimensions of a result of so many dimensions that count the matrices' groups and columns, in their order.

        A transposed convolution adds the columns of a kernel's `taps` at the positions of the result.
        """
        return (-1,)

    def taps(self, shape: torch.Size) -> int:
        """How many neighbouring columns of a weight of this shape belong to one channel of the result."""
        return 1

    def of_rows(self, value: Tensor, weight: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """(value, weight) with the product that the rows from `start` to `end` of the matrices give."""
        return value, self.only_rows(weight, start, end)

    def only_rows(self, weight: Tensor, start: int, end: int) -> Tensor:
        """The weight with zeros outside of the rows from `start` to `end` of its matrices."""
        return self._only(weight, (slice(None), slice(start, end)))

    def of_columns(self, cotangent: Tensor, weight: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """(cotangent, weight) with the transposed product that the columns from `start` to `end` give."""
        return cotangent, self._only(weight, (..., slice(start, end)))

    def of_tap(self, weight: Tensor, tap: int) -> Tensor:
        """The weight with zeros for the columns of other taps."""
        count = self.taps(weight.shape)
        return weight if count == 1 else self._only(weight, (..., slice(tap, None, count)))

    def _only(self, weight: Tensor, place: tuple[Any, ...]) -> Tensor:
        """The weight with zeros outside of a place in its matrices."""
        matrices = self.matrices(weight)
        kept = torch.zeros_like(matrices)
        kept[place] = matrices[place]
        return self.weight_of(kept, weight.shape)

    def absolute(self) -> Operator:
        """The operator of the absolute values |A| for weights |θ|. Coefficients lose their sign, and constants go."""
        return self

    def quick(self) -> Operator:
        """The same operator by the fastest products, which may round otherwise than the source's and record nothing."""
        return self

    def draw(self, values: Sequence[Tensor]) -> Tensor | None:
        """The constant of this forward, if the operator `draws` or `selects`; else None."""
        return None

    @property
    def drawing(self) -> bool:
        """Whether a forward would draw random constants now."""
        return False

    def gain(self, certain: float) -> float:
        """Factor by which the norm may exceed the measured one, because of random constants."""
        return certain


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


@dataclass(frozen=True)
class Linear(Operator):
    """y = x Wᵀ + b with x of shape (..., in), W (out, in) and b (out,).

    If it is transposed, y = x W + b with W of shape (in, out), as in `x @ W` and `addmm`.
    """

    transposed: bool = False
    fast: bool = field(default=False, repr=False)
    """Whether products are those of `matrix_products`."""
    product = True

    def _out_in(self, weights: Weights) -> Tensor:
        weight = _given(weights[0])
        return weight.t() if self.transposed else weight

    def _product(self, value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (matrix_products.linear if self.fast else F.linear)(value, weight, bias)

    def matrices(self, weight: Tensor) -> Tensor:
        """One matrix, Wᵀ, or W if it is transposed."""
        return (weight if self.transposed else weight.t()).unsqueeze(0)

    def weight_of(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrices`."""
        return matrices[0] if self.transposed else matrices[0].t()

    def quick(self) -> Operator:
        """By the faster library."""
        return replace(self, fast=True)

    def of_rows(self, value: Tensor, weight: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Features from `start` to `end`."""
        return value[..., start:end], weight[start:end] if self.transposed else weight[:, start:end]

    def of_columns(self, cotangent: Tensor, weight: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Results from `start` to `end`."""
        return cotangent[..., start:end], weight[:, start:end] if self.transposed else weight[start:end]

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """A x + b."""
        return self._product(values[0], self._out_in(weights), weights[1])

    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """A x."""
        return self._product(_given(values[0]), self._out_in(weights))

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """P W, or P Wᵀ if it is transposed."""
        return [self._product(cotangent, self._out_in(weights).t())]

    def weight_gradients(
        self,
        values: Sequence[Tensor],
        cotangent: Tensor,
        weights: Weights,
        needed: Sequence[bool],
        bias: bool,
    ) -> list[Tensor | None]:
        """(Pᵀ X, Σ P), or (Xᵀ P, Σ P) if it is transposed."""
        rows, read = _rows(cotangent), _rows(values[0])
        first, second = (read, rows) if self.transposed else (rows, read)
        return [
            self._product(first.t(), second.t()) if needed[0] else None,
            rows.sum(0) if needed[1] and bias else None,
        ]


@dataclass(frozen=True)
class Convolution(Operator):
    """Convolution of any dimension, grouped, dilated or transposed.

    x: (batch, C_in, ...), W: (C_out, C_in/groups, ...) or transposed (C_in, C_out/groups, ...).
    """

    function: Callable[..., Tensor]
    """The source's own torch function."""
    arguments: tuple[Any, ...]
    """Its arguments after input, weight and bias."""
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = (0,)
    groups: int = 1
    product = True

    def matrices(self, weight: Tensor) -> Tensor:
        """For each group, the kernel of every input channel against the output channels (im2col).

        A transposed convolution has the input channels against the kernel of every output channel.
        """
        if self.transposed:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1).transpose(1, 2)

    def weight_of(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrices`."""
        return (matrices if self.transposed else matrices.transpose(1, 2)).reshape(shape)

    def column_dims(self, dims: int) -> tuple[int, ...]:
        """The channels."""
        return (-1 - len(self.stride),)

    def taps(self, shape: torch.Size) -> int:
        """The positions of a transposed convolution's kernel."""
        return math.prod(shape[2:]) if self.transposed else 1

    def of_rows(self, value: Tensor, weight: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The input channels that have these rows, if there is one group."""
        if self.groups > 1:
            return super().of_rows(value, weight, start, end)
        each = 1 if self.transposed else math.prod(weight.shape[2:])
        first = min(start // each, weight.shape[0 if self.transposed else 1] - 1)
        count = max(-(-end // each) - first, 1)
        if start == end or start % each or end % each:
            weight = self.only_rows(weight, start, end)
        return value.narrow(-1 - len(self.stride), first, count), weight.narrow(int(not self.transposed), first, count)

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """W ∗ x + b."""
        return self.function(values[0], weights[0], weights[1], *self.arguments)

    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """W ∗ x."""
        return self.function(values[0], weights[0], None, *self.arguments)

    def _backward(
        self, cotangent: Tensor, value: Tensor, weight: Tensor, mask: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        bias_sizes = [cotangent.shape[1]] if mask[2] else None
        result: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
            cotangent,
            value,
            weight,
            bias_sizes,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            mask,
        )
        return result

    @property
    def _unstrided(self) -> Convolution:
        """The 1×1 convolution at the positions that a strided one reads."""
        ones, zeros = (1,) * len(self.stride), (0,) * len(self.stride)
        return replace(self, stride=ones, dilation=ones, output_padding=zeros)

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The transposed convolution, with the input's shape."""
        # Only the shape of this tensor is read. (An expanded tensor would be copied.)
        shape_only = cotangent
        if cotangent.shape != shapes[0] or not cotangent.is_contiguous(memory_format=_format_of(cotangent)):
            shape_only = torch.empty(
                shapes[0], dtype=cotangent.dtype, device=cotangent.device, memory_format=_format_of(cotangent)
            )
        return [self._backward(cotangent, shape_only, _given(weights[0]), [True, False, False])[0]]

    def weight_gradients(
        self,
        values: Sequence[Tensor],
        cotangent: Tensor,
        weights: Weights,
        needed: Sequence[bool],
        bias: bool,
    ) -> list[Tensor | None]:
        """The correlation of x and p, and the sum of p over batch and positions."""
        mask = [False, needed[0], needed[1] and bias]
        if not any(mask):
            return [None, None]
        value, given = values[0], _given(weights[0])
        extra = self.output_padding if self.transposed else None
        if faulty(given, self.stride, self.padding, self.groups, extra):
            offset = cotangent.sum((0, 2, 3)) if mask[2] else None
            if not needed[0]:
                return [None, offset]
            if self.transposed:
                cotangent = thinned(cotangent, self.stride)
            else:
                value = thinned(value, self.stride)
            return [self._unstrided._backward(cotangent, value, given, [False, True, False])[1], offset]
        _, weight, offset = self._backward(cotangent, value, given, mask)
        return [weight if needed[0] else None, offset]


@dataclass(frozen=True)
class Sum(Operator):
    """y = Σ_i f_i x_i + constant, operands broadcast against each other."""

    factors: tuple[float, ...]
    constant: float = 0.0

    def absolute(self) -> Sum:
        """Σ_i |f_i| x_i."""
        return Sum(tuple(abs(factor) for factor in self.factors))

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """The sum."""
        total = self._combine(values)
        return total + self.constant if self.constant else total

    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """The sum of the operands that vary, without the constant."""
        combined = self._combine([value for value in values if value is not None], values)
        if all(shape == combined.shape for shape in shapes):
            return combined
        return combined.expand(torch.broadcast_shapes(*shapes))

    def _combine(self, values: Sequence[Tensor], slots: Sequence[Tensor | None] | None = None) -> Tensor:
        factors = [f for f, slot in zip(self.factors, slots or values, strict=True) if slot is not None]
        total = values[0] if factors[0] == 1 else values[0] * factors[0]
        for factor, value in zip(factors[1:], values[1:], strict=True):
            total = torch.add(total, value, alpha=factor)
        return total

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """f_i p, summed over broadcast dimensions."""
        result: list[Tensor | None] = []
        for factor, shape, wanted in zip(self.factors, shapes, needed, strict=True):
            part = cotangent.sum_to_size(shape) if wanted and cotangent.shape != shape else cotangent
            result.append((part if factor == 1 else part * factor) if wanted else None)
        return result


class ByValue(Operator):
    """y = f ⊙ x with a factor for each value. Tangent and adjoint are the same product."""

    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """The product."""
        return self.apply([_given(values[0])], weights)

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The product."""
        return [self.apply([cotangent], weights)]


@dataclass(frozen=True)
class Scale(ByValue):
    """y = f x."""

    factor: float

    def absolute(self) -> Scale:
        """|f| x."""
        return Scale(abs(self.factor))

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """The product."""
        return values[0] * self.factor


@dataclass(frozen=True)
class Gain(ByValue):
    """y = g ⊙ x with a gain for each value. g broadcasts to the shape of x (layer scale)."""

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """The product."""
        return values[0] * _given(weights[0])

    def weight_gradients(
        self,
        values: Sequence[Tensor],
        cotangent: Tensor,
        weights: Weights,
        needed: Sequence[bool],
        bias: bool,
    ) -> list[Tensor | None]:
        """p ⊙ x, summed over the dimensions along which g was broadcast."""
        return [(cotangent * values[0]).sum_to_size(_given(weights[0]).shape) if needed[0] else None]


@dataclass(frozen=True)
class Concat(Operator):
    """Concatenation along a dimension."""

    dim: int

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """The concatenation."""
        return torch.cat(list(values), self.dim)

    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """The concatenation, with zeros for operands that do not vary."""
        like = _given(next(value for value in values if value is not None))
        full = [like.new_zeros(shape) if value is None else value for value, shape in zip(values, shapes, strict=True)]
        return torch.cat(full, self.dim)

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The parts of p that belong to the operands."""
        pieces = cotangent.split([shape[self.dim] for shape in shapes], self.dim)
        return [piece if wanted else None for piece, wanted in zip(pieces, needed, strict=True)]


@dataclass(frozen=True)
class Wiring(Operator):
    """Any other linear torch function of one operand (slices, average pooling, means)."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = field(default=())

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """f(x)."""
        return self.function(values[0], *self.arguments, **dict(self.keywords))

    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """f(x), since f is linear."""
        return self.apply([_given(values[0])], weights)

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """fᵀ(p): over the windows of an average pooling, else by the vector-Jacobian product."""
        windows = disjoint_windows(self.function, self.arguments, dict(self.keywords), shapes[0])
        if windows is not None:
            return [spread(cotangent, *windows)]
        differentiable = torch.is_grad_enabled() and cotangent.requires_grad
        with torch.enable_grad():
            value = cotangent.new_zeros(shapes[0]).requires_grad_()
            output = self.apply([value], weights)
        return list(torch.autograd.grad(output, value, cotangent, create_graph=differentiable))


@dataclass(frozen=True)
class Reshape(Wiring):
    """A function that keeps the order of the elements (view, flatten, squeeze, ...)."""

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The same elements in the operand's shape."""
        return [cotangent.reshape(shapes[0])]


@dataclass(frozen=True)
class Permute(Operator):
    """y = x permuted by `dims`."""

    dims: tuple[int, ...]

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """The permutation."""
        return values[0].permute(self.dims)

    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """The permutation."""
        return _given(values[0]).permute(self.dims)

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The inverse permutation."""
        inverse = sorted(range(len(self.dims)), key=lambda index: self.dims[index] % len(self.dims))
        return [cotangent.permute(inverse)]


@dataclass(frozen=True)
class Mask(ByValue):
    """Dropout inside a block: y = m ⊙ x with m drawn once a forward and held while the block settles."""

    source: Any
    """The rebound dropout that draws the mask. It follows the source's train mode."""
    draws = True

    @property
    def drawing(self) -> bool:
        """Whether the source drops anything in its present mode."""
        return bool(self.source.drawing)

    def draw(self, values: Sequence[Tensor]) -> Tensor | None:
        """The mask of this forward; None if dropout does nothing."""
        mask: Tensor | None = self.source.mask(values[0].detach())
        return mask

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """m ⊙ x."""
        return values[0] if weights[0] is None else values[0] * weights[0]

    def gain(self, certain: float) -> float:
        """1/(1 − p), by which a mask can increase the norm in train mode."""
        rate = float(self.source.rate)
        return certain / (1 - rate) if rate < 1 else math.inf


@dataclass(frozen=True)
class MaxPool(Operator):
    """Max pooling, y = S x with S the selection of the present winners.

    It is linear only while the winners stay. A free phase chooses them at every evaluation, and
    holds them after 30 sweeps, since they could change for ever at a tie. The nudged phases hold the winners of
    the equilibrium. So a winner that would switch under a finite nudge
    is not noticed. That is why max pooling is not in `block_ops` by default.
    """

    dims: int
    arguments: tuple[Any, ...]
    selects = True

    def draw(self, values: Sequence[Tensor]) -> Tensor | None:
        """Indices of the winners."""
        function = {1: F.max_pool1d_with_indices, 2: F.max_pool2d_with_indices, 3: F.max_pool3d_with_indices}[self.dims]
        indices: Tensor = function(values[0].detach(), *self.arguments)[1]
        return indices

    def apply(self, values: Sequence[Tensor], weights: Weights) -> Tensor:
        """The winners' values."""
        indices = _given(weights[0])
        flat = values[0].flatten(-self.dims)
        return flat.gather(-1, indices.flatten(-self.dims)).reshape(indices.shape)

    def tangent(self, values: Sequence[Tensor | None], weights: Weights, shapes: Sequence[torch.Size]) -> Tensor:
        """The winners' values."""
        return self.apply([_given(values[0])], weights)

    def adjoint(
        self, cotangent: Tensor, weights: Weights, shapes: Sequence[torch.Size], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """P at the winners, zero elsewhere."""
        indices = _given(weights[0]).flatten(-self.dims)
        zeros = cotangent.new_zeros(shapes[0]).flatten(-self.dims)
        return [zeros.scatter_add(-1, indices, cotangent.flatten(-self.dims)).reshape(shapes[0])]


def slice_of(value: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    """value[..., start:end:step, ...] along a dimension, as `aten.slice`."""
    index: list[slice] = [slice(None)] * value.dim()
    index[dim] = slice(start, end, step)
    return value[tuple(index)]


def along_columns(vector: Tensor, value: Tensor, dims: Sequence[int]) -> Tensor:
    """One number for each column of a product, in a shape that broadcasts to a value whose columns are along `dims`."""
    places = [dim % value.dim() for dim in dims]
    order = sorted(range(len(places)), key=lambda index: places[index])
    shape = [size if dim in places else 1 for dim, size in enumerate(value.shape)]
    return vector.reshape([value.shape[dim] for dim in places]).permute(order).reshape(shape)


def _format_of(value: Tensor) -> torch.memory_format:
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _given(value: Tensor | None) -> Tensor:
    if value is None:
        raise TypeError("this operand has to be given")
    return value
