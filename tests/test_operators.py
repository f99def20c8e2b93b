"""Operators of drives: values, tangents, adjoints and weight gradients against float64 autograd."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import noise
from torch import Tensor, nn

from ffebm_compiler.onnx.operators import ROWS, WITHOUT_FORM
from ffebm_compiler.passes import lower_block
from ffebm_compiler.runtime.feedforward.blocks import ReboundDropout
from ffebm_compiler.runtime.program.operators import (
    Concat,
    Convolution,
    Gain,
    Linear,
    Mask,
    Operator,
    Permute,
    Reshape,
    Scale,
    Sum,
    Wiring,
    slice_of,
)

aten = torch.ops.aten


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def check_operator(operator: Operator, values: list[Tensor], weights: list[Tensor | None]) -> None:
    """⟨A v, p⟩ = ⟨v, Aᵀ p⟩, A v = f(x + v) − f(x), and ∂⟨p, f(x)⟩/∂θ against autograd, in float64."""
    shapes = [value.shape for value in values]
    output = operator.apply(values, weights)
    p = noise(*output.shape, seed=51).double()
    directions = [noise(*shape, seed=52 + i).double() for i, shape in enumerate(shapes)]
    parts = operator.adjoint(p, weights, shapes, [True] * len(values))
    images = []
    for index, direction in enumerate(directions):
        alone = [direction if i == index else None for i in range(len(values))]
        image = operator.tangent(alone, weights, shapes)
        moved = [value + direction if i == index else value for i, value in enumerate(values)]
        torch.testing.assert_close(image, operator.apply(moved, weights) - output, rtol=1e-9, atol=1e-9)
        assert parts[index].shape == shapes[index]
        torch.testing.assert_close(dot(image, p), dot(direction, parts[index]), rtol=1e-9, atol=1e-9)
        images.append(image)
    torch.testing.assert_close(operator.tangent(list(directions), weights, shapes), sum(images))
    learnt = [index for index, weight in enumerate(weights) if weight is not None]
    if operator.draws or not learnt:
        return
    leaves = [None if weight is None else weight.clone().requires_grad_() for weight in weights]
    loss = dot(operator.apply(values, leaves), p)
    expected = torch.autograd.grad(loss, [leaves[i] for i in learnt])
    needed = [weight is not None for weight in weights]
    found = operator.weight_gradients(values, p, weights, needed, True)
    for index, gradient in zip(learnt, expected, strict=True):
        torch.testing.assert_close(found[index], gradient, rtol=1e-9, atol=1e-9)
    without = operator.weight_gradients(values, p, weights, needed, False)
    torch.testing.assert_close(without[0], expected[0], rtol=1e-9, atol=1e-9)
    assert all(gradient is None for gradient in without[1:])
    assert operator.weight_gradients(values, p, weights, [False] * len(weights), True) == [None] * len(weights)


sizes = st.integers(1, 4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=0, max_size=3), sizes, sizes, st.booleans(), st.booleans())
def test_linear_operator(leading: list[int], inputs: int, outputs: int, bias: bool, transposed: bool) -> None:
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    weights = [noise(*shape).double(), noise(outputs, seed=6).double() if bias else None]
    check_operator(Linear(transposed), [noise(*leading, 2, inputs, seed=7).double()], weights)


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 3), st.booleans(), st.booleans())
def test_convolution_operator(data: st.DataObject, rank: int, transposed: bool, bias: bool) -> None:
    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(rank))

    groups, kernel, stride, dilation = data.draw(st.integers(1, 2)), draw(1, 3), draw(1, 3), draw(1, 2)
    padding = tuple(min(p, (k - 1) * d) for p, k, d in zip(draw(0, 2), kernel, dilation, strict=True))
    spatial = draw(5, 6)
    inputs, outputs = 2 * groups, groups
    x = noise(2, inputs, *spatial, seed=7).double()
    offset = noise(outputs, seed=6).double() if bias else None
    if transposed:
        extra = tuple(min(1, s - 1) for s in stride)
        arguments: tuple[Any, ...] = (stride, padding, extra, groups, dilation)
        weight = noise(inputs, outputs // groups, *kernel).double()
        operator = Convolution(TRANSPOSED[rank], arguments, stride, padding, dilation, True, extra, groups)
    else:
        weight = noise(outputs, inputs // groups, *kernel).double()
        arguments = (stride, padding, dilation, groups)
        operator = Convolution(CONVOLUTIONS[rank], arguments, stride, padding, dilation, False, (0,) * rank, groups)
    check_operator(operator, [x], [weight, offset])


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(st.integers(2, 3), min_size=1, max_size=3))
def test_sum_operator_broadcasts(data: st.DataObject, shape: list[int]) -> None:
    def smaller() -> list[int]:
        kept = [size if data.draw(st.booleans()) else 1 for size in shape]
        return kept[data.draw(st.integers(0, len(kept) - 1)) :]

    second = noise(*smaller(), seed=8).double()
    factors = (data.draw(st.sampled_from([1.0, -1.0, 0.5])), data.draw(st.sampled_from([1.0, -1.0, 2.0])))
    operands = [noise(*shape, seed=7).double(), second]
    if data.draw(st.booleans()):
        operands.reverse()
    check_operator(Sum(factors, data.draw(st.sampled_from([0.0, 3.0]))), operands, [])
    check_operator(Sum((factors[0],), 2.0), operands[:1], [])


WIRING = {
    "scale": (Scale(-0.7), (2, 3)),
    "average pooling": (Wiring(F.avg_pool2d, (3, 2, 1), (("count_include_pad", False),)), (2, 3, 7, 6)),
    "adaptive pooling": (Wiring(F.adaptive_avg_pool2d, ((2, 3),)), (2, 3, 5, 7)),
    "mean": (Wiring(torch.mean, ((1, 3), True)), (2, 3, 4, 5)),
    "slice": (Wiring(slice_of, (2, 1, 4, 2)), (2, 3, 6)),
    "select": (Wiring(torch.select, (1, -1)), (2, 3, 4)),
    "flatten": (Reshape(torch.flatten, (1,)), (2, 3, 4)),
    "reshape": (Reshape(torch.reshape, ((6, -1),)), (2, 3, 4)),
    "permute": (Permute((0, -1, 1, 2)), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", WIRING)
def test_wiring_operators(name: str) -> None:
    operator, shape = WIRING[name]
    check_operator(operator, [noise(*shape, seed=7).double()], [])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_gain_operator_broadcasts(shape: list[int], data: st.DataObject) -> None:
    kept = [size if data.draw(st.booleans()) else 1 for size in shape]
    gain = noise(*kept[data.draw(st.integers(0, len(kept))) :], seed=6).double()
    check_operator(Gain(), [noise(*shape, seed=7).double()], [gain])


def test_concat_operator() -> None:
    check_operator(Concat(-1), [noise(2, 3, 4, seed=7).double(), noise(2, 3, 1, seed=8).double()], [])
    check_operator(Concat(1), [noise(2, width, seed=7 + width).double() for width in (1, 3, 2)], [])


def test_mask_operator() -> None:
    drop = nn.Dropout(0.5).train()
    operator = Mask(ReboundDropout(drop, "dropout", 0.5))
    x = noise(6, 5).double()
    mask = operator.draw([x])
    assert mask is not None
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    check_operator(operator, [x], [mask])
    assert operator.gain(3.0) == 6.0
    assert Mask(ReboundDropout(drop.eval(), "dropout", 0.5)).draw([x]) is None


def operators(kind: type[Operator] = Operator) -> set[type[Operator]]:
    """Every operator that there is."""
    own = {kind} if not inspect.isabstract(kind) and kind.__module__.startswith("ffebm_compiler") else set()
    return own.union(*(operators(child) for child in kind.__subclasses__()))


def test_every_operator_has_its_rows() -> None:
    passes = Path(lower_block.__file__).parent
    made = "".join(
        (passes / name).read_text(encoding="utf-8") for name in ("dialect.py", "operators.py", "lower_block.py")
    )
    checked = Path(__file__).read_text(encoding="utf-8")
    for operator in operators():
        name = operator.__name__
        assert (operator in ROWS) != (operator in WITHOUT_FORM), f"{name} has no row in onnx/operators.py"
        assert f"{name}(" in made, f"no pass makes a {name}: a row in passes/dialect.py"
        assert f"{name}(" in checked or name in ("MaxPool", "Contraction"), f"{name} has no case in this file"
