"""The operators of block programs in ONNX exports: one row each, with its nodes and its JSON.

`apply` writes A x + b, and `adjoint` writes Aᵀ p for each operand that is needed. A manifest's operators are read
back through dataclasses, which check every value, so that a file can name no Python object. `docs/extending.md` adds a
row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffebm_compiler.errors import ExportError
from ffebm_compiler.files.checked_json import Malformed, short, typed
from ffebm_compiler.onnx.emit import Shape, Writer
from ffebm_compiler.onnx.operator_json import (
    StoredConcat,
    StoredContraction,
    StoredConvolution,
    StoredGain,
    StoredLinear,
    StoredPermute,
    StoredScale,
    StoredSum,
    StoredWiring,
    contraction_from,
    convolution_from,
    convolution_to_json,
    wiring_from,
    wiring_to_json,
)
from ffebm_compiler.onnx.operator_nodes import (
    Weights,
    check_conv,
    concat_adjoint,
    conv_adjoint,
    conv_settings,
    linear,
    linear_adjoint,
    unbroadcast,
    wiring_nodes,
)
from ffebm_compiler.runtime.program.contraction import Contraction
from ffebm_compiler.runtime.program.operators import (
    Concat,
    Convolution,
    Gain,
    Linear,
    Mask,
    MaxPool,
    Operator,
    Permute,
    Reshape,
    Scale,
    Sum,
    Wiring,
)

__all__ = ["ROWS", "WITHOUT_FORM", "Row", "adjoint_nodes", "apply_nodes", "operator_from_json", "operator_to_json"]


@dataclass(frozen=True)
class Node:
    """The writer, operands and shapes with which an operator's nodes are written."""

    writer: Writer
    operator: Any
    values: Sequence[str]
    """Names of the operands. For the transpose, the name of the cotangent alone."""
    weights: Weights
    shapes: Sequence[Shape]
    """Shapes of the operands."""
    result: Shape
    needed: Sequence[bool] = ()
    """For each operand, whether its part of the transpose is needed."""


@dataclass(frozen=True)
class Row:
    """Everything that an export needs to know about one operator."""

    kind: str
    """The operator's name in a manifest."""
    stored: Any
    """The dataclass of its JSON."""
    apply: Callable[[Node], str]
    adjoint: Callable[[Node], list[str | None]]
    to_json: Callable[[Any], dict[str, Any] | None] = lambda operator: {}
    """Gives its settings without the kind; None if this operator has no form."""
    from_json: Callable[[Any, str], Operator] | None = None
    """Builds the operator from the dataclass and its place in the file; None if a manifest never names it."""
    operands: Callable[[Any, int], int] = lambda found, given: 1
    """Gives the number of operands that it must have."""
    weights: tuple[bool, ...] = ()
    """For each weight, whether it is required."""


def _conv_apply(node: Node) -> str:
    check_conv(node.operator, node.shapes[0])
    kind = "ConvTranspose" if node.operator.transposed else "Conv"
    extra: dict[str, Any] = {"output_padding": list(node.operator.output_padding)} if node.operator.transposed else {}
    operands = [node.values[0], str(node.weights[0]), *([node.weights[1]] if node.weights[1] else [])]
    return node.writer.op(kind, *operands, **conv_settings(node.operator), **extra)


def _sum_apply(node: Node) -> str:
    pairs = zip(node.values, node.operator.factors, strict=True)
    total = node.writer.added([node.writer.scaled(value, factor) for value, factor in pairs])
    constant = node.operator.constant
    return node.writer.op("Add", total, node.writer.number(constant)) if constant else total


def _sum_adjoint(node: Node) -> list[str | None]:
    return [
        node.writer.scaled(unbroadcast(node.writer, node.values[0], node.result, shape), factor) if wanted else None
        for factor, shape, wanted in zip(node.operator.factors, node.shapes, node.needed, strict=True)
    ]


def _times_weight(node: Node) -> str:
    return node.writer.op("Mul", node.values[0], str(node.weights[0]))


def _order(node: Node) -> list[int]:
    return [dim % len(node.result) for dim in node.operator.dims]


def _permute_adjoint(node: Node) -> list[str | None]:
    order = _order(node)
    return [node.writer.op("Transpose", node.values[0], perm=sorted(range(len(order)), key=order.__getitem__))]


def _einsum(node: Node, equation: str) -> str:
    return node.writer.op("Einsum", node.values[0], str(node.weights[0]), equation=equation)


ROWS: Mapping[type[Operator], Row] = {
    Linear: Row(
        "linear", StoredLinear,
        lambda node: linear(node.writer, node.operator, node.values[0], node.weights, node.shapes[0]),
        lambda node: [linear_adjoint(node.writer, node.operator, node.values[0], str(node.weights[0]))],
        lambda operator: {"transposed": True} if operator.transposed else {},
        lambda found, place: Linear(found.transposed), weights=(True, False),
    ),
    Convolution: Row(
        "convolution", StoredConvolution, _conv_apply,
        lambda node: [
            conv_adjoint(node.writer, node.operator, node.values[0], str(node.weights[0]), node.shapes[0], node.result)
        ],
        convolution_to_json, convolution_from, weights=(True, False),
    ),
    Contraction: Row(
        "contraction", StoredContraction,
        lambda node: _einsum(node, node.operator.equation),
        lambda node: [_einsum(node, node.operator.adjoint_equation)],
        lambda operator: {"equation": operator.equation}, contraction_from, weights=(True,),
    ),
    Sum: Row(
        "sum", StoredSum, _sum_apply, _sum_adjoint,
        lambda operator: {"factors": list(operator.factors), "constant": operator.constant},
        lambda found, place: Sum(found.factors, found.constant), lambda found, given: len(found.factors),
    ),
    Scale: Row(
        "scale", StoredScale,
        lambda node: node.writer.scaled(node.values[0], node.operator.factor),
        lambda node: [node.writer.scaled(node.values[0], node.operator.factor)],
        lambda operator: {"factor": operator.factor}, lambda found, place: Scale(found.factor),
    ),
    Gain: Row(
        "gain", StoredGain, _times_weight, lambda node: [_times_weight(node)],
        from_json=lambda found, place: Gain(), weights=(True,),
    ),
    Mask: Row(  # dropout is the identity in eval mode
        "sum", StoredSum, lambda node: node.values[0], lambda node: [node.values[0]],
        lambda operator: {"factors": [1.0], "constant": 0.0},
    ),
    Concat: Row(
        "concat", StoredConcat,
        lambda node: node.writer.op("Concat", *node.values, axis=node.operator.dim % len(node.result)),
        lambda node: concat_adjoint(
            node.writer, node.operator.dim % len(node.result), node.values[0], node.shapes, node.needed
        ),
        lambda operator: {"dim": operator.dim}, lambda found, place: Concat(found.dim),
        lambda found, given: max(1, given),
    ),
    Permute: Row(
        "permute", StoredPermute,
        lambda node: node.writer.op("Transpose", node.values[0], perm=_order(node)), _permute_adjoint,
        lambda operator: {"dims": list(operator.dims)}, lambda found, place: Permute(found.dims),
    ),
    Reshape: Row(
        "reshape", StoredWiring,
        lambda node: node.writer.reshaped(node.values[0], node.shapes[0], node.result),
        lambda node: [node.writer.reshaped(node.values[0], node.result, node.shapes[0])],
        wiring_to_json, wiring_from,
    ),
    Wiring: Row(
        "wiring", StoredWiring,
        lambda node: wiring_nodes(node.operator)[0](
            node.writer, node.operator, node.values[0], node.shapes[0], node.result
        ),
        lambda node: [
            wiring_nodes(node.operator)[1](node.writer, node.operator, node.values[0], node.shapes[0], node.result)
        ],
        wiring_to_json, wiring_from,
    ),
}  # fmt: skip
"""Operator -> its row."""

WITHOUT_FORM: Mapping[type[Operator], str] = {
    MaxPool: "its winners are chosen anew at every evaluation, which the exported loop does not do",
}
"""Operators that have no row -> why."""

_READ = {row.kind: row for row in ROWS.values() if row.from_json is not None}


def apply_nodes(
    writer: Writer, operator: Operator, values: Sequence[str], weights: Weights, shapes: Sequence[Shape], result: Shape
) -> str:
    """Write A x + b and return its name.

    Args:
        writer: where the nodes go.
        operator: the operator.
        values: names of its operands.
        weights: names of its weights.
        shapes: shapes of its operands.
        result: shape of its result.

    Raises:
        ExportError: the operator has no ONNX form here.
    """
    return _row(operator).apply(Node(writer, operator, values, weights, shapes, result))


def adjoint_nodes(
    writer: Writer,
    operator: Operator,
    cotangent: str,
    weights: Weights,
    shapes: Sequence[Shape],
    result: Shape,
    needed: Sequence[bool],
) -> list[str | None]:
    """Write Aᵀ p for each operand that is needed. Arguments and errors are those of `apply_nodes`."""
    return _row(operator).adjoint(Node(writer, operator, [cotangent], weights, shapes, result, needed))


def _row(operator: Operator) -> Row:
    row = ROWS.get(type(operator))
    if row is None:
        raise ExportError(f"{operator!r} inside an energy block has no ONNX form: keep its layer digital")
    return row


def operator_to_json(operator: Operator, owner: str) -> dict[str, Any]:
    """An operator as JSON values.

    Raises:
        ExportError: the operator has no form here; names its layer's module path.
    """
    row = ROWS.get(type(operator))
    settings = None if row is None else row.to_json(operator)
    if row is None or settings is None:
        raise ExportError(
            f"{owner} uses {operator!r}, which the ONNX export does not know: keep the layer digital "
            f"(force_digital={owner!r}) or take its operation out of block_ops"
        )
    return {"kind": row.kind, **settings}


def operator_from_json(
    data: Mapping[str, Any], operands: Sequence[int], weights: Sequence[int | None], place: str
) -> Operator:
    """The inverse of `operator_to_json`. Also checks the numbers of operands and weights.

    Raises:
        Malformed: something is wrong; names the place.
    """
    inside, kind = f"{place}.operator", data.get("kind")
    if not isinstance(kind, str) or kind not in _READ:
        raise Malformed(f"{inside}: unknown operator {short(kind)}")
    row = _READ[kind]
    found = typed(row.stored, data, inside)
    expected = row.operands(found, len(operands))
    if len(operands) != expected or not expected:
        raise Malformed(f"{place}.operands: expected {max(1, expected)}, got {len(operands)}")
    missing = [needed and weight is None for needed, weight in zip(row.weights, weights, strict=False)]
    if row.weights and (len(weights) != len(row.weights) or any(missing)):
        what = "one weight" if len(row.weights) == 1 else "a weight and a bias, which may be null"
        raise Malformed(f"{place}.weights: expected {what}")
    assert row.from_json is not None
    return row.from_json(found, inside)
