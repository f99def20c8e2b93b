"""Split: a layer larger than a core becomes several layers that each fit one.

    y = W x + b   becomes   y = concat_i( Σ_j W[i, j] x[j] + b[i] )

over ranges i of output channels, as few as possible. If a single column of the matrix is
longer than a core, it is split into ranges j of input channels too, and the partial sums are added
digitally (or in the block, if `add` may join). A grouped convolution is split between its
groups first. The weights stay the source's own, and each part reads a slice of them. Layers of
`force_digital` are left whole.

Promise: the graph computes what it computed, up to the order of the additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.layers import matches
from ffebm_compiler.ir import Operation, OperationGraph, Program, Role
from ffebm_compiler.passes.dead_code import erase_dead
from ffebm_compiler.passes.dialect import WEIGHTS
from ffebm_compiler.passes.emit import emit_like
from ffebm_compiler.passes.partition.decide import too_large
from ffebm_compiler.runtime.program.contraction import letters_of

__all__ = ["split_large"]

aten = torch.ops.aten
_MOST_PARTS = 256
"""The largest number of parts of a layer. A layer that needs more stays digital."""


@dataclass(frozen=True)
class _Shape:
    """What a split needs to know of a layer: the channels of one group, and rows and columns per channel."""

    groups: int
    inputs: int
    """Input channels of a group."""
    outputs: int
    """Output channels of a group."""
    rows: int
    """Rows of the matrix for one input channel."""
    cols: int
    """Columns of the matrix for one output channel."""


@dataclass(frozen=True)
class _Cut:
    """Size of each part: a number of whole groups, or a number of inputs and outputs within one group."""

    groups: int
    inputs: int
    outputs: int


def split_large(program: Program, graph: OperationGraph, hardware: Hardware, keep: Sequence[str] = ()) -> bool:
    """Split every layer that is larger than a core.

    Args:
        program: the annotated network; its graph is changed.
        graph: its operations, as `annotate` gave them.
        hardware: the capacities.
        keep: glob patterns on module paths of layers to leave whole.

    Returns:
        Whether anything was split. If so, the graph has to be annotated again.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    changed = False
    for op in graph.operations:
        if op.role is not Role.WEIGHT or not too_large(op, hardware) or matches(op.path, keep):
            continue
        node = nodes[op.name]
        shape = _shape(node, op)
        cut = None if shape is None else _cut(op, shape, hardware)
        if shape is None or cut is None:
            continue
        parts = _Splitting(program, node).run(shape, cut)
        program.note(
            f"layer {op.path or op.name!r} is larger than a core ({too_large(op, hardware)}) and split into {parts} "
            "layers"
        )
        changed = True
    if changed:
        erase_dead(program)
    return changed


def _shape(node: fx.Node, op: Operation) -> _Shape | None:
    """Channels of a layer; None if its operands do not have the usual number of dimensions."""
    form = WEIGHTS[node.target]
    value, weight, bias = form.operands(node)
    size = weight.meta["val"].shape
    if bias is not None and bias.meta["val"].dim() != 1:
        return None
    if form.kind == "linear":
        return _Shape(1, op.rows, op.cols, 1, 1)
    if form.kind == "contraction":
        axes = _letters_to_cut(node)
        if axes is None:
            return None
        of = letters_of(str(node.args[2]))
        sizes = dict(zip(of.weight, map(int, size), strict=True))
        groups, inputs, outputs = (sizes.get(name, 1) for name in axes)
        return _Shape(groups, inputs, outputs, op.rows // inputs, op.cols // outputs)
    if value.meta["val"].dim() != len(size):
        return None
    kernel = int(size[2:].numel())
    if form.kind == "conv_transpose":
        return _Shape(op.groups, op.rows, op.cols // kernel, 1, kernel)
    return _Shape(op.groups, op.rows // kernel, op.cols, kernel, 1)


def _letters_to_cut(node: fx.Node) -> tuple[str, str, str] | None:
    """Letters to cut a contraction along: the group's, an input's, an output's; None if the group has several."""
    _, weight, _ = WEIGHTS[node.target].operands(node)
    of = letters_of(str(node.args[2]))
    size = dict(zip(of.weight, map(int, weight.meta["val"].shape), strict=True))
    if len(of.groups) > 1:
        return None
    inputs, outputs = (max(letters, key=size.__getitem__, default="") for letters in (of.inputs, of.outputs))
    return of.groups, inputs, outputs


def _cut(op: Operation, shape: _Shape, hardware: Hardware) -> _Cut | None:
    """The split into the fewest parts that each fit a core; None if there is none."""
    hardware = hardware.for_layer(op.path)
    bias = op.bias and hardware.bias_row
    per_output = op.values // (shape.groups * shape.outputs)

    def fits(groups: int, inputs: int, outputs: int) -> bool:
        tiles = hardware.tiles(inputs * shape.rows, outputs * shape.cols, groups, op.positions, bias)
        return (hardware.tiles_per_core is None or tiles <= hardware.tiles_per_core) and (
            hardware.neurons_per_block is None or per_output * groups * outputs <= hardware.neurons_per_block
        )

    if fits(1, shape.inputs, shape.outputs):
        groups = _largest_count(shape.groups, lambda count: fits(count, shape.inputs, shape.outputs))
        return _Cut(groups, shape.inputs, shape.outputs) if -(-shape.groups // groups) <= _MOST_PARTS else None
    best: tuple[int, _Cut] | None = None
    for parts in range(1, min(shape.inputs, _MOST_PARTS) + 1):
        inputs = -(-shape.inputs // parts)
        if not fits(1, inputs, 1):
            continue
        outputs = _largest_count(shape.outputs, lambda count, inputs=inputs: fits(1, inputs, count))  # type: ignore[misc]
        total = shape.groups * -(-shape.inputs // inputs) * -(-shape.outputs // outputs)
        if best is None or total < best[0]:
            best = (total, _Cut(1, inputs, outputs))
        if outputs == shape.outputs:
            break
    return best[1] if best is not None and best[0] <= _MOST_PARTS else None


def _largest_count(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to a limit that fits, made smaller so that all parts are about equal."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return -(-limit // -(-limit // low))


def _ranges(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(size, start + step)


class _Splitting:
    """The rewriting of one layer."""

    def __init__(self, program: Program, node: fx.Node) -> None:
        self.graph = program.graph
        self.node = node
        self.form = WEIGHTS[node.target]
        self.value, self.weight, self.bias = self.form.operands(node)
        self.slices: dict[tuple[fx.Node, int, int, int], fx.Node] = {}

    def run(self, shape: _Shape, cut: _Cut) -> int:
        """Replace the layer; returns the number of parts."""
        parts = 0
        pieces: list[fx.Node] = []
        contracted = self.form.kind == "contraction"
        axis = self._output_axis()
        with self.graph.inserting_before(self.node):
            for first, last in _ranges(shape.groups, cut.groups):
                row: list[fx.Node] = []
                for start, stop in _ranges(shape.outputs, cut.outputs):
                    terms = [
                        self._part(shape, (first, last), rows, (start, stop))
                        for rows in _ranges(shape.inputs, cut.inputs)
                    ]
                    parts += len(terms)
                    total = terms[0]
                    for term in terms[1:]:
                        total = self._emit(aten.add.Tensor, total, term)
                    row.append(total)
                if contracted and len(row) > 1:
                    row = [self._emit(aten.cat.default, row, axis)]
                pieces += row
            if contracted:
                axis = self._group_axis()
            whole = self._emit(aten.cat.default, pieces, axis) if len(pieces) > 1 else pieces[0]
        self.node.replace_all_uses_with(whole)
        self.graph.erase_node(self.node)
        return parts

    def _output_axis(self) -> int:
        """The dimension of the result that holds the output channels."""
        if self.form.kind == "contraction":
            axes = _letters_to_cut(self.node)
            return letters_of(str(self.node.args[2])).result.find(axes[2]) if axes and axes[2] else 0
        return int(self.node.meta["val"].dim()) - 1 if self.form.kind == "linear" else 1

    def _group_axis(self) -> int:
        of = letters_of(str(self.node.args[2]))
        return of.result.find(of.groups) if of.groups else self._output_axis()

    def _contracted(self, groups: tuple[int, int], inputs: tuple[int, int], outputs: tuple[int, int]) -> fx.Node:
        """One part of a contraction, with slices along the letters of the cut."""
        axes, of = _letters_to_cut(self.node), letters_of(str(self.node.args[2]))
        assert axes is not None
        value, weight = self.value, self.weight
        for name, (start, stop) in zip(axes, (groups, inputs, outputs), strict=True):
            if name and name in of.value:
                value = self._slice(value, of.value.index(name), start, stop)
            if name:
                weight = self._slice(weight, of.weight.index(name), start, stop)
        return self._emit(self.node.target, value, weight, *self.node.args[2:])

    def _part(
        self, shape: _Shape, groups: tuple[int, int], inputs: tuple[int, int], outputs: tuple[int, int]
    ) -> fx.Node:
        """One part of a layer: the given channels of the given groups."""
        if self.form.kind == "contraction":
            return self._contracted(groups, inputs, outputs)
        count = groups[1] - groups[0]
        read = (groups[0] * shape.inputs + inputs[0], (groups[1] - 1) * shape.inputs + inputs[1])
        written = (groups[0] * shape.outputs + outputs[0], (groups[1] - 1) * shape.outputs + outputs[1])
        linear = self.form.kind == "linear"
        value = self._slice(self.value, self.value.meta["val"].dim() - 1 if linear else 1, *read)
        weight = self.weight
        if self.node.target is aten.linear.default:
            weight = self._slice(self._slice(weight, 0, *written), 1, *inputs)
        elif linear:
            weight = self._slice(self._slice(weight, 0, *inputs), 1, *outputs)
        elif self.form.kind == "conv_transpose":
            weight = self._slice(self._slice(weight, 0, *read), 1, *outputs)
        else:
            weight = self._slice(self._slice(weight, 0, *written), 1, *inputs)
        bias = None
        if self.bias is not None and inputs[0] == 0:
            bias = self._slice(self.bias, 0, *written)
        arguments = list(self.node.args)
        target = self.node.target
        if target is aten.addmm.default and bias is None:
            return self._emit(aten.mm.default, value, weight)
        arguments[self.form.value], arguments[self.form.weight] = value, weight
        if self.form.bias is not None and len(arguments) > self.form.bias:
            arguments[self.form.bias] = bias
        if not linear and len(arguments) > 6:
            arguments[6] = count
        return self._emit(target, *arguments, keywords=dict(self.node.kwargs))

    def _slice(self, node: fx.Node, axis: int, start: int, stop: int) -> fx.Node:
        if start == 0 and stop == int(node.meta["val"].shape[axis]):
            return node
        key = (node, axis, start, stop)
        if key not in self.slices:
            self.slices[key] = self._emit(aten.slice.Tensor, node, axis, start, stop)
        return self.slices[key]

    def _emit(self, target: object, *args: object, keywords: dict[str, object] | None = None) -> fx.Node:
        return emit_like(self.graph, self.node, target, *args, keywords=keywords)  # type: ignore[arg-type]
