"""Lower one block: make a `BlockProgram` of the nodes of an energy block.

Every activation is a state. If a layer's output reaches another layer, leaves the block or is
read twice without an activation in between, it gets a state with the identity as activation. So
each path of a drive holds one weight-stationary layer.

Promise: run feedforward, the program computes what the nodes compute. Every state owns a layer
or is driven by a value from outside (`partition/rules.py`). So a block of one layer without such a driven state has one
state and no feedback.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.ir import Program, Role, info
from ffebm_compiler.passes.dialect import WEIGHTS, WIRING, activation_of
from ffebm_compiler.passes.operators import convolution_operator
from ffebm_compiler.runtime.activations.table import Identity
from ffebm_compiler.runtime.program.block_program import BlockProgram, Instruction, Layer
from ffebm_compiler.runtime.program.contraction import Contraction, contraction, letters_of
from ffebm_compiler.runtime.program.operators import Gain, Linear, Mask, Operator

__all__ = ["LoweredBlock", "lower_block"]

aten = torch.ops.aten
_FIXED = (Role.LIFTED, Role.STATIC)


@dataclass(frozen=True)
class LoweredBlock:
    """A block program, and the nodes of its operands and results."""

    program: BlockProgram
    inputs: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def lower_block(
    program: Program, name: str, nodes: list[fx.Node], outside: set[fx.Node], driven: Collection[str] = ()
) -> LoweredBlock:
    """Build the program of a block.

    Args:
        program: the captured network.
        name: the block's name.
        nodes: its nodes, in topological order.
        outside: the nodes of the block that are read outside of it.
        driven: names of the activations that are states driven by a value from outside of the block.
    """
    return _Builder(program, name, nodes, outside, frozenset(driven)).build()


class _Builder:
    def __init__(
        self, program: Program, name: str, nodes: list[fx.Node], outside: set[fx.Node], driven: frozenset[str]
    ) -> None:
        self.program = program
        self.driven = driven
        self.name = name
        self.nodes = nodes
        self.inside = set(nodes)
        self.outside = outside
        self.inputs: dict[fx.Node, int] = {}
        self.weights: dict[fx.Node, int] = {}
        self.drawn: dict[fx.Node, tuple[int, list[Instruction]]] = {}
        """Node that draws a mask -> register of the mask, and the instructions in which it is drawn first."""

    def build(self) -> LoweredBlock:
        states = self._states()
        outputs = [node for node in self.nodes if node in self.outside]
        for node in self.nodes:  # registers of inputs come first, in a fixed order
            for operand in _value_operands(node):
                if operand not in self.inside:
                    self.inputs.setdefault(operand, len(self.inputs))
        register = dict(self.inputs)
        for state in states:
            register[state] = len(register)
        counter = [len(register)]
        layers = []
        for state in states:
            activation = activation_of(state) if info(state).role is Role.ACTIVATION else None
            drive = _value_operands(state)[0] if activation is not None else state
            instructions: list[Instruction] = []
            local: dict[fx.Node, int] = {}
            where = self._emit(drive, state if activation is None else None, register, local, instructions, counter)
            alone = state.name in self.driven and drive not in self.inside
            if not alone and all(not i.weights or isinstance(i.operator, Gain) for i in instructions):
                raise FFEBMError(
                    f"{self.name} would hold the state {state.name!r} of {info(state).path!r}, whose drive holds no "
                    "layer, so that its feedback would change the states before it: move it to a digital part"
                )
            layers.append(
                Layer(
                    self._layer_name(drive, state),
                    activation or Identity(),
                    tuple(instructions),
                    where,
                    register[state],
                    tuple(self.weights.setdefault(w, len(self.weights)) for w in _parameters(state)),
                )
            )
        readout: list[Instruction] = []
        shared: dict[fx.Node, int] = {}
        results = tuple(self._emit(node, None, register, shared, readout, counter) for node in outputs)
        batched = self._is_batched(states)
        block = BlockProgram(
            name=self.name,
            inputs=len(self.inputs),
            weights=len(self.weights),
            layers=tuple(layers),
            readout=tuple(readout),
            outputs=results,
            batched=batched,
            resizable=batched and isinstance(states[0].meta["val"].shape[0], torch.SymInt),
            draws=tuple(_instructions_for(*self.drawn[node]) for node in self.nodes if node in self.drawn),
        )
        return LoweredBlock(block, tuple(self.inputs), tuple(self.weights), tuple(outputs))

    def _states(self) -> list[fx.Node]:
        """The nodes whose values are states, in topological order."""
        states = {node for node in self.nodes if info(node).role is Role.ACTIVATION}
        while True:
            without_state = self._without_state(states)
            found = next((node for node in self.nodes if without_state[node] and self._must_settle(node)), None)
            if found is None:
                return [node for node in self.nodes if node in states]
            states.add(self._before_reshapes(found, without_state))

    def _without_state(self, states: set[fx.Node]) -> dict[fx.Node, bool]:
        """Whether a node's value comes from a layer without a state in between."""
        without_state: dict[fx.Node, bool] = {}
        for node in self.nodes:
            fed = any(without_state.get(operand, False) for operand in _value_operands(node))
            without_state[node] = node not in states and (info(node).role is Role.WEIGHT or fed)
        return without_state

    def _must_settle(self, node: fx.Node) -> bool:
        users = [user for user in node.users if user in self.inside]
        if node in self.outside or len(users) > 1:
            return True
        return any(info(user).role is Role.WEIGHT for user in users)

    def _before_reshapes(self, node: fx.Node, without_state: dict[fx.Node, bool]) -> fx.Node:
        """The node before all reshapes, since the state is the value that the layer computes."""
        while info(node).kind in ("reshape", "copy", "dropout"):
            operand = _value_operands(node)[0]
            if not without_state.get(operand, False) or len(operand.users) > 1:
                break
            node = operand
        return node

    def _layer_name(self, drive: fx.Node, state: fx.Node) -> str:
        """Module path of the last layer that feeds the drive."""
        stack, seen = [drive], set()
        while stack:
            node = stack.pop(0)
            if node in seen or node not in self.inside:
                continue
            seen.add(node)
            if info(node).role is Role.WEIGHT:
                return info(node).path or node.name
            if info(node).role is not Role.ACTIVATION:
                stack.extend(_value_operands(node))
        return info(state).path or state.name

    def _emit(
        self,
        node: fx.Node,
        root: fx.Node | None,
        register: dict[fx.Node, int],
        local: dict[fx.Node, int],
        instructions: list[Instruction],
        counter: list[int],
    ) -> int:
        """Emit the instructions of a value, and return its register. `root` is expanded even if it is a state."""
        if node is not root and node in register:
            return register[node]
        if node in local:
            return local[node]
        operands = tuple(
            self._emit(operand, None, register, local, instructions, counter) for operand in _value_operands(node)
        )
        if info(node).kind == "copy":
            local[node] = operands[0]
            return operands[0]
        operator, weights = self._operator(node)
        local[node] = counter[0]
        counter[0] += 1
        indices = tuple(
            None if weight is None else self.weights.setdefault(weight, len(self.weights)) for weight in weights
        )
        kept, _ = self.drawn.setdefault(node, (local[node], instructions)) if operator.draws else (local[node], None)
        first = None if kept == local[node] else kept
        operation = node.name if operator.product else ""
        instructions.append(Instruction(operator, operands, indices, local[node], first, operation))
        return local[node]

    def _operator(self, node: fx.Node) -> tuple[Operator, tuple[fx.Node | None, ...]]:
        if node.op == "call_module":
            return Mask(self.program.graph_module.get_submodule(str(node.target))), ()
        if info(node).kind == "gain":
            return Gain(), tuple(operand for operand in node.all_input_nodes if info(operand).role in _FIXED)
        if node.target not in WEIGHTS:
            build = WIRING[node.target].build
            assert build is not None
            return build(node), ()
        form = WEIGHTS[node.target]
        _, weight, bias = form.operands(node)
        if form.kind == "linear":
            return Linear(transposed=node.target is not aten.linear.default), (weight, bias)
        if form.kind == "contraction":
            return Contraction(str(node.args[2])), (weight,)
        return convolution_operator(node), (weight, bias)

    def _is_batched(self, states: list[fx.Node]) -> bool:
        """Whether the leading dimension of all states and inputs counts the same independent samples."""
        sizes = {str(node.meta["val"].shape[0]) if node.meta["val"].dim() > 1 else "" for node in states}
        sizes |= {str(node.meta["val"].shape[0]) if node.meta["val"].dim() > 1 else "" for node in self.inputs}
        sizes |= {str(node.meta["val"].shape[0]) if node.meta["val"].dim() > 1 else "" for node in self.nodes}
        return len(sizes) == 1 and "" not in sizes and not any(_mixes_leading(node) for node in self.nodes)


def _instructions_for(register: int, instructions: list[Instruction]) -> tuple[Instruction, ...]:
    """The instructions that a register's value depends on, in order. The last one computes the register itself."""
    needed, kept = {register}, []
    for instruction in reversed(instructions):
        if instruction.output in needed:
            kept.append(instruction)
            needed.update(instruction.operands)
    return tuple(reversed(kept))


def _parameters(node: fx.Node) -> list[fx.Node]:
    """The parameters of an activation."""
    if info(node).role is not Role.ACTIVATION:
        return []
    return [operand for operand in node.args[1:] if isinstance(operand, fx.Node)]


def _value_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of a node that are values, without weights, biases and an activation's parameters."""
    if info(node).role is Role.ACTIVATION:
        return [node.args[0]]  # type: ignore[list-item]
    if info(node).role is Role.WEIGHT:
        return [WEIGHTS[node.target].operands(node)[0]]
    if info(node).kind == "gain":
        return [operand for operand in node.all_input_nodes if info(operand).role not in _FIXED]
    return list(node.all_input_nodes) if node.target is not aten.cat.default else list(node.args[0])  # type: ignore[arg-type]


def _mixes_leading(node: fx.Node) -> bool:
    """Whether wiring moves the leading dimension. A reshape that keeps its size does not."""
    rank = node.args[0].meta["val"].dim() if node.args and isinstance(node.args[0], fx.Node) else 0
    arguments = node.args[1:]
    if node.target is contraction:
        of = letters_of(str(node.args[2]))
        return of.value[0] in of.weight or of.result[:1] != of.value[0]
    if node.target in (aten.numpy_T.default, aten.mT.default):
        return node.target is aten.numpy_T.default or rank == 2
    if node.target is aten.permute.default:
        dims = arguments[0]
        return isinstance(dims, list | tuple) and bool(dims[0] != 0)
    if node.target in (aten.transpose.int, aten.select.int):  # a slice that keeps the size keeps everything
        last = 2 if node.target is aten.transpose.int else 1
        return any(isinstance(dim, int) and dim % rank == 0 for dim in (arguments or (0,))[:last])
    if node.target is aten.t.default:
        return True
    if node.target in (aten.movedim.int, aten.movedim.intlist):
        return True
    if node.target is aten.cat.default:
        dim = arguments[0] if arguments else 0
        items = node.args[0]
        assert isinstance(items, list | tuple)
        assert isinstance(items[0], fx.Node)
        assert isinstance(dim, int)
        return bool(dim % items[0].meta["val"].dim() == 0)
    if node.target is aten.mean.dim:
        dims = arguments[0]
        return isinstance(dims, list | tuple) and any(isinstance(d, int) and d % rank == 0 for d in dims)
    return False
