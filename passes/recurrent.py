"""Recurrent: cells and recurrent layers become their linear layers and gates.

    RNN    h' = tanh or relu (a + b)                              a = W_ih x + b_ih,  b = W_hh h + b_hh
    GRU    r = σ(a_r + b_r), z = σ(a_z + b_z), n = tanh(a_n + r b_n), h' = n + z (h − n)
    LSTM   i, f, o = σ(a + b), g = tanh(a + b), c' = f c + i g, h' = o tanh(c')      (h' ← W_hr h' with a projection)

A layer is unrolled over its steps, with the products W_ih x of all steps in one operation. The other weights are
read once a step, like those of a module that is called at each step. A layer stays one digital operation if it has
more than `_MOST_STEPS` steps, over all levels and directions, or packed sequences.

Promise: the graph computes what it computed, up to the order of sums.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ffebm_compiler.ir import Pass, Program
from ffebm_compiler.passes.emit import emit_like

__all__ = ["recurrent"]

aten = torch.ops.aten
_MOST_STEPS = 64
"""The largest number of steps that a layer is unrolled into."""
States = tuple[fx.Node, ...]


@Pass
def recurrent(program: Program) -> Program:
    """Take every recurrent cell and layer apart."""
    for node in list(program.graph.nodes):
        if node.target in _CELLS:
            kind = _CELLS[node.target]
            states = node.args[1]
            taken = tuple(states) if isinstance(states, list | tuple) else (states,)
            with program.graph.inserting_before(node):
                cell = _Cell(program.graph, node, kind, [*node.args[2:], *[None] * (6 - len(node.args))])
                results: Sequence[fx.Node] = cell.step(cell.linear(node.args[0], 0), taken)
        elif node.target in _LAYERS and _is_short(node):
            with program.graph.inserting_before(node):
                results = _unrolled(program.graph, node, _LAYERS[node.target])
        else:
            continue
        _replace(program.graph, node, results)
    program.graph.lint()
    return program


def _replace(graph: fx.Graph, node: fx.Node, results: Sequence[fx.Node]) -> None:
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(results[0])
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)


@dataclass(frozen=True)
class _Cell:
    """One cell: its weights, and its step."""

    graph: fx.Graph
    like: fx.Node
    kind: str
    weights: Sequence[object]
    """W_ih, W_hh, b_ih, b_hh and W_hr; None for a bias that it does not have."""

    def emit(self, target: Callable[..., object], *args: object) -> fx.Node:
        return emit_like(self.graph, self.like, target, *args)

    def linear(self, value: object, which: int) -> fx.Node:
        """W_ih x + b_ih if `which` is 0, W_hh h + b_hh if it is 1."""
        return self.emit(aten.linear.default, value, self.weights[which], self.weights[2 + which])

    def step(self, fed: fx.Node, states: States) -> States:
        """The next states, h first. `fed` is a = W_ih x + b_ih."""
        add, mul = aten.add.Tensor, aten.mul.Tensor
        recurring = self.linear(states[0], 1)
        if self.kind in ("tanh", "relu"):
            return (self.emit(getattr(aten, self.kind).default, self.emit(add, fed, recurring)),)
        if self.kind == "gru":
            a, b = self.parts(fed, 3), self.parts(recurring, 3)
            reset, update = (self.emit(aten.sigmoid.default, self.emit(add, a[k], b[k])) for k in (0, 1))
            new = self.emit(aten.tanh.default, self.emit(add, a[2], self.emit(mul, reset, b[2])))
            kept = self.emit(mul, update, self.emit(aten.sub.Tensor, states[0], new))
            return (self.emit(add, kept, new),)
        gates = self.parts(self.emit(add, fed, recurring), 4)
        taken, kept, shown = (self.emit(aten.sigmoid.default, gates[k]) for k in (0, 1, 3))
        offered = self.emit(aten.tanh.default, gates[2])
        memory = self.emit(add, self.emit(mul, kept, states[1]), self.emit(mul, taken, offered))
        hidden = self.emit(mul, shown, self.emit(aten.tanh.default, memory))
        if len(self.weights) > 4 and self.weights[4] is not None:
            hidden = self.emit(aten.linear.default, hidden, self.weights[4])
        return hidden, memory

    def parts(self, value: fx.Node, count: int) -> list[fx.Node]:
        """Split a value into equal parts along its last dimension."""
        dim = value.meta["val"].dim() - 1
        size = int(value.meta["val"].shape[dim]) // count
        return [self.emit(aten.slice.Tensor, value, dim, k * size, (k + 1) * size) for k in range(count)]


def _is_short(node: fx.Node) -> bool:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    levels, both, first = int(node.args[4]), bool(node.args[7]), bool(node.args[8])  # type: ignore[arg-type]
    steps = value.meta["val"].shape[1 if first else 0]
    return isinstance(steps, int) and 0 < steps * levels * (2 if both else 1) <= _MOST_STEPS


def _unrolled(graph: fx.Graph, node: fx.Node, kind: str) -> list[fx.Node]:
    """The output sequence, and the last states of all levels and directions."""
    value, given, parameters, biases, levels, rate, training, both, first = node.args

    def emit(target: Callable[..., object], *args: object) -> fx.Node:
        return emit_like(graph, node, target, *args)

    assert isinstance(value, fx.Node)
    assert isinstance(parameters, list | tuple)
    assert isinstance(levels, int)
    states = list(given) if isinstance(given, list | tuple) else [given]
    directions = 2 if both else 1
    each = len(parameters) // (levels * directions)
    sequence = emit(aten.transpose.int, value, 0, 1) if first else value
    last: list[States] = []
    for level in range(levels):
        outputs: list[list[fx.Node]] = []
        for direction in range(directions):
            index = level * directions + direction
            own = list(parameters[index * each : (index + 1) * each])
            weights = own if biases else [*own[:2], None, None, *own[2:]]
            cell = _Cell(graph, node, kind, weights)
            fed = cell.linear(sequence, 0)
            present: States = tuple(emit(aten.select.int, state, 0, index) for state in states)
            steps = range(int(sequence.meta["val"].shape[0]))
            found: dict[int, fx.Node] = {}
            for step in reversed(steps) if direction else steps:
                present = cell.step(emit(aten.select.int, fed, 0, step), present)
                found[step] = present[0]
            outputs.append([found[step] for step in steps])
            last.append(present)
        joined = [emit(aten.cat.default, list(row), 1) if both else row[0] for row in zip(*outputs, strict=True)]
        sequence = emit(aten.stack.default, joined)
        if rate and level < levels - 1:
            sequence = emit(aten.dropout.default, sequence, rate, training)
    result = emit(aten.transpose.int, sequence, 0, 1) if first else sequence
    return [result, *(emit(aten.stack.default, list(column)) for column in zip(*last, strict=True))]


_CELLS = {
    aten.rnn_tanh_cell.default: "tanh",
    aten.rnn_relu_cell.default: "relu",
    aten.gru_cell.default: "gru",
    aten.lstm_cell.default: "lstm",
}
_LAYERS = {
    aten.rnn_tanh.input: "tanh",
    aten.rnn_relu.input: "relu",
    aten.gru.input: "gru",
    aten.lstm.input: "lstm",
}
