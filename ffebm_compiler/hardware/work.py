"""The digital work of an operation: multiply-accumulates, elementary operations, and values that pass through memory.

An elementary operation is an addition, a multiplication or a comparison of two numbers. What an operation takes per
value is a count by hand, in the table below. An exponential, a root or a logarithm counts as `SERIES` of them, which is
a choice of this project. A value is read from memory for each operation that reads it, and written once. Views move
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ffebm_compiler.ir import Operation, OperationGraph, Role

__all__ = ["SERIES", "Work", "work_of"]

SERIES = 8
"""Elementary operations of an exponential, a root, a logarithm, a sine: a polynomial of degree 4 and its scaling."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VIEWS = _names(
    "view reshape flatten unflatten transpose permute t numpy_T mT movedim swapaxes squeeze unsqueeze select slice "
    "narrow unbind split split_with_sizes chunk tensor_split getitem expand expand_as broadcast_to detach alias "
    "dropout feature_dropout alpha_dropout training_mask identity"
)
_MOVES = _names(
    "cat concat stack pad constant_pad_nd roll flip contiguous clone copy repeat tile index index_select gather "
    "embedding im2col unfold pixel_shuffle pixel_unshuffle channel_shuffle to _to_copy type_as masked_fill where "
    "tril triu repeat_interleave upsample_nearest2d"
)
_REDUCING = _names(
    "mean sum amax amin max min prod cumsum argmax avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d "
    "max_pool3d max_pool2d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "adaptive_max_pool2d"
)
_PER_VALUE: dict[int, str] = {
    1: "add sub rsub mul div neg abs sign maximum minimum relu leaky_relu prelu clamp clamp_min clamp_max hardtanh "
    "relu6 split_relu eq ne lt gt le ge floor ceil round square threshold",
    2: "sloped_clamp batch_norm addcmul addcdiv lerp hardshrink softshrink hardsigmoid",
    3: "hardswish",
    4: "rms_norm",
    8: "layer_norm group_norm instance_norm exp log sqrt rsqrt pow sin cos erf reciprocal log1p expm1",
    SERIES + 2: "sigmoid tanh softplus elu selu celu log_sigmoid softsign",
    SERIES + 3: "silu gelu quick_gelu mish",
    SERIES + 4: "softmax log_softmax _softmax _log_softmax",
}
"""Elementary operations per value of the result: a layer norm sums, centres, squares, sums, then scales and shifts."""

_EACH = {name: count for count, names in _PER_VALUE.items() for name in names.split()}

_ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Work:
    """Digital work per sample."""

    macs: int = 0
    elements: int = 0
    """Elementary operations."""
    traffic: int = 0
    """Values read from memory or written to it."""

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(self.macs + other.macs, self.elements + other.elements, self.traffic + other.traffic)


def work_of(operation: Operation, graph: OperationGraph) -> Work | None:
    """The work of an operation in digital arithmetic; None where the table has no row for it, or sizes are unknown.

    A weight-stationary layer reads its weights once per sample, however often it uses them. Products of two values are
    counted where the network was captured (`Operation.product_macs`), and unknown in plans from before they were.
    """
    name, values = operation.target.rstrip("_"), operation.values
    read = sum(graph.values(source) for source in operation.data)
    if operation.role is Role.WEIGHT:
        return Work(operation.macs, 0, read + values + operation.rows * operation.cols * operation.groups)
    if name == _ATTENTION:
        return _attention(operation, graph, read)
    if operation.product_macs:
        return Work(operation.product_macs, 0, read + values)
    if name in _VIEWS:
        return Work()
    if name in _MOVES:
        return Work(traffic=2 * values)
    if name in _REDUCING:
        return Work(elements=read, traffic=read + values)
    if name in _EACH:
        return Work(elements=_EACH[name] * values, traffic=read + values)
    return None


def _attention(operation: Operation, graph: OperationGraph, read: int) -> Work | None:
    """Q Kᵀ, a softmax, and the product with V."""
    query = operation.inputs[0]
    sides = [(graph[name].shape if name in graph else ())[-1:] for name in (query, operation.name)]
    if not operation.product_macs or not all(side and side[0] for side in sides):
        return None
    scores = operation.product_macs // sum(side[0] or 0 for side in sides)
    return Work(operation.product_macs, (SERIES + 4) * scores, read + operation.values + 2 * scores)
