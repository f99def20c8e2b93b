"""Emit: write a sequence of ONNX nodes from Python, with constants and static shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from ffebm_compiler.errors import ExportError
from ffebm_compiler.onnx.packages import package

__all__ = ["Free", "Names", "Shape", "Writer", "fixed"]


class Free(NamedTuple):
    """A free size, given by its values in two evaluations. Sizes with equal values are the same size."""

    first: int
    second: int


Shape = tuple[int | Free, ...]
"""Sizes of a value. A fixed size is a number."""


def fixed(shape: Shape, dim: int) -> int:
    """A size that has to be a number.

    Raises:
        ExportError: the size is free.
    """
    size = shape[dim]
    if isinstance(size, Free):
        raise ExportError(
            f"dimension {dim} of a value of shape {shape} is free where an energy block needs its size: fix all sizes "
            "but the batch"
        )
    return size


class Names:
    """Fresh names for the values of one function."""

    def __init__(self) -> None:
        self._counter = count()
        self._owner = ""

    def fresh(self, stem: str) -> str:
        """A name that was not used before. It begins with the path of the layer that is being written."""
        return f"{self._owner}/{stem}_{next(self._counter)}" if self._owner else f"{stem}_{next(self._counter)}"

    @contextmanager
    def of(self, owner: str) -> Iterator[None]:
        """Names that are made inside belong to this layer."""
        before, self._owner = self._owner, owner
        try:
            yield
        finally:
            self._owner = before


class Writer:
    """A list of ONNX nodes under construction.

    Args:
        names: shared by a function and the bodies inside it.
        dtype: NumPy name of the floating dtype, `"float32"` or `"float64"`.
        outside: the writer of the enclosing scope, which takes the constants.
    """

    def __init__(self, names: Names, dtype: str, outside: Writer | None = None) -> None:
        self.names = names
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.weight_shapes: dict[str, tuple[int, ...]] = outside.weight_shapes if outside is not None else {}
        self._outside = outside
        self._transposes: dict[str, str] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def op(self, kind: str, *operands: str, stem: str = "", **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        name = self.names.fresh(stem or kind.lower())
        self.nodes.append(package("onnx").helper.make_node(kind, list(operands), [name], name=name, **attributes))
        return name

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        """The name of a constant. Equal constants are written once, outside of loops."""
        if self._outside is not None:
            return self._outside.constant(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = package("onnx").numpy_helper.from_array(array)
            with self.names.of(""):
                self._constants[key] = self.op("Constant", value=tensor, stem="const")
        return self._constants[key]

    def number(self, value: float) -> str:
        """A floating scalar."""
        return self.constant(np.array(value, dtype=self.dtype))

    def ints(self, values: Sequence[int]) -> str:
        """A vector of integers."""
        return self.constant(np.array(values, dtype=np.int64))

    def setting(self, name: str, kind: str) -> str:
        """The value of an attribute of the enclosing function: `kind` is `"float"`, `"floats"` or `"int"`."""
        onnx = package("onnx")
        name_of_value = self.names.fresh(name)
        node = onnx.helper.make_node("Constant", [], [name_of_value], name=name_of_value)
        attribute = node.attribute.add(name=f"value_{kind}", ref_attr_name=name)
        attribute.type = getattr(onnx.AttributeProto, kind.upper())
        self.nodes.append(node)
        if kind != "int" and self.dtype != "float32":
            return self.op("Cast", node.output[0], to=self.elem_type)
        return str(node.output[0])

    def turned(self, weight: str) -> str:
        """The transpose of a weight matrix, computed once, outside of loops."""
        if self._outside is not None:
            return self._outside.turned(weight)
        if weight not in self._transposes:
            with self.names.of(""):
                self._transposes[weight] = self.op("Transpose", weight, perm=[1, 0], stem=f"{weight}_turned")
        return self._transposes[weight]

    def kernel_of(self, weight: str) -> tuple[int, ...]:
        """The kernel sizes of a convolution's weight."""
        return self.weight_shapes[weight][2:]

    @property
    def elem_type(self) -> int:
        """ONNX's number of the floating dtype."""
        return int(package("onnx").helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))

    def scaled(self, value: str, factor: float) -> str:
        """factor · value."""
        return value if factor == 1 else self.op("Mul", value, self.number(factor))

    def added(self, values: Sequence[str]) -> str:
        """The sum of one or more values of one shape."""
        total = values[0]
        for value in values[1:]:
            total = self.op("Add", total, value)
        return total

    def reshaped(self, value: str, before: Shape, after: Shape) -> str:
        """The value in another shape. Free sizes are copied or inferred.

        Raises:
            ExportError: several sizes are free and not in their old places.
        """
        if before == after:
            return value
        if [size for size in before if size != 1] == [size for size in after if size != 1]:
            ones = [[index for index, size in enumerate(shape) if size == 1] for shape in (before, after)]
            flat = self.op("Squeeze", value, self.ints(ones[0])) if ones[0] else value
            return self.op("Unsqueeze", flat, self.ints(ones[1])) if ones[1] else flat
        target = list[int]()
        for index, size in enumerate(after):
            kept = before[: index + 1] == after[: index + 1]
            target.append(size if not isinstance(size, Free) else 0 if kept else -1)
        if sum(size == -1 for size in target) > 1:
            raise ExportError(f"a reshape from {before} to {after} has several free sizes: fix all but the batch")
        return self.op("Reshape", value, self.ints(target))

    def padded(self, value: str, rank: int, dim: int, before: int, after: int) -> str:
        """The value with zeros before and after along one dimension."""
        if not before and not after:
            return value
        pads = [0] * (2 * rank)
        pads[dim], pads[rank + dim] = before, after
        return self.op("Pad", value, self.ints(pads))
