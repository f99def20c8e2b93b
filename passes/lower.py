"""Lower: make an fx graph of energy blocks and feedforward blocks from a program and its plan.

The lowered graph takes the network's inputs, in the captured order, and calls one module per block. It fetches the
source's parameters and buffers just before the block that reads them. Static operations (folded or transposed weights)
stay in the lowered graph itself, between the parameters and the blocks that read them.

Promise: with feedback off, the lowered graph computes what the captured graph computes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from ffebm_compiler.ir import Program, Role, info
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.lower_block import lower_block
from ffebm_compiler.passes.order_of_draws import in_order_of_draws
from ffebm_compiler.passes.order_of_state import RUNS_FIRST
from ffebm_compiler.plan_data import BlockPlan, PlanData
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.feedforward.block_graph import OPERANDS, BlockGraph
from ffebm_compiler.runtime.feedforward.blocks import FeedforwardBlock
from ffebm_compiler.runtime.feedforward.fetch import Fetch
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch
from ffebm_compiler.runtime.feedforward.state import WriteState
from ffebm_compiler.runtime.program import pointwise
from ffebm_compiler.runtime.program.block_program import BlockProgram

__all__ = ["FeedbackPlace", "Lowered", "lower"]

aten = torch.ops.aten
_SAFE: dict[object, Callable[..., torch.Tensor]] = {
    aten.conv2d.default: pointwise.conv2d,
    aten.conv2d.padding: pointwise.conv2d,
    aten.conv_transpose2d.input: pointwise.conv_transpose2d,
    aten.convolution.default: pointwise.convolution,
}
"""Convolution whose autograd may call a faulty kernel -> function that computes the same without it."""


@dataclass(frozen=True)
class FeedbackPlace:
    """Feedback weights that the lowered graph fetches, and the forward weight that they belong to."""

    name: str
    """Name of the parameter that holds them, beside that of the forward weight."""
    block: str
    weight: int
    """Index of the forward weight among the block's weights."""
    parameter: str | None
    """Name of the parameter behind that weight, which may be a view or a multiple of it; None for a constant."""


@dataclass
class Lowered:
    """The lowered graph and its parts."""

    graph_module: fx.GraphModule
    energy: dict[str, EnergyBlock]
    feedforward: dict[str, FeedforwardBlock]
    draws_in_order: bool = True
    """Whether random numbers are drawn in the source's order, so that one seed gives the same draws."""
    feedback: tuple[FeedbackPlace, ...] = ()
    """Feedback weights that a hybrid has to hold beside the source's tensors."""


def lower(program: Program, plan: PlanData, own_feedback: bool = False) -> Lowered:
    """Build the graph of blocks.

    Args:
        program: the captured network.
        plan: which operation is in which block.
        own_feedback: whether the feedback of the blocks goes through weights of its own, which are operands beside the
            forward ones.
    """
    return _Lowering(program, plan, own_feedback).run()


class _Lowering:
    def __init__(self, program: Program, plan: PlanData, own_feedback: bool) -> None:
        self.program = program
        self.own_feedback = own_feedback
        self.feedback: list[FeedbackPlace] = []
        self.plan = plan
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.operands = nn.Module()
        self.root.add_module(OPERANDS, self.operands)
        self.env: dict[fx.Node, fx.Node] = {}
        self.by_name = {node.name: node for node in program.graph.nodes}
        self.energy: dict[str, EnergyBlock] = {}
        self.feedforward: dict[str, FeedforwardBlock] = {}

    def run(self) -> Lowered:
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node.name in self.program.inputs:
                fresh = self.graph.placeholder(node.name)
                fresh.meta = dict(node.meta)
                self.env[node] = fresh
        for node in self.program.graph.nodes:
            if node.name in self.program.constants:
                self.root.register_buffer(node.name, self.program.constants[node.name], persistent=False)
                self.env[node] = self.graph.get_attr(node.name)
                self.env[node].meta = dict(node.meta)
        for node in self.program.graph.nodes:
            if RUNS_FIRST in node.meta:
                self._value(node)
        blocks = [list(block.operations) for block in self.plan.blocks]
        parts = [list(part.operations) for part in self.plan.digital_parts]
        order = in_order_of_draws(self.plan.graph, [*blocks, *parts])
        for place in order.groups:
            if place < len(blocks):
                self._energy_block(self.plan.blocks[place])
            else:
                self._feedforward_block(self.plan.digital_parts[place - len(blocks)].name, parts[place - len(blocks)])
        for node in self.program.graph.nodes:
            if info(node).role is Role.STATIC and self._writes(node):
                self._value(node)  # it is emitted even if nothing reads it
        output = next(node for node in self.program.graph.nodes if node.op == "output")
        self.graph.output(fx.map_arg(output.args[0], self._value))
        self.graph.lint()
        module = BlockGraph(self.root, self.graph, "Lowered")
        _constants_are_no_state(module)
        module._register_deepcopy_hook(_constants_are_no_state)
        return Lowered(module, self.energy, self.feedforward, order.kept, tuple(self.feedback))

    def _value(self, node: fx.Node) -> fx.Node:
        """The lowered node of a value. Static operations and shapes are emitted when they are first read.

        A parameter or buffer is fetched again for each block that reads it.
        """
        if node in self.env:
            return self.env[node]
        if node.op == "placeholder":
            return self._fetch(node)
        fresh = self.graph.node_copy(node, self._value)
        fresh.meta = dict(node.meta)
        if node.op == "call_module":
            self.root.add_module(str(node.target), self.program.graph_module.get_submodule(str(node.target)))
        self.env[node] = fresh
        return fresh

    def _fetch(self, node: fx.Node) -> fx.Node:
        target = f"{OPERANDS}.{node.name}"
        if node.name not in self.operands._modules:
            self.operands.add_module(node.name, Fetch(self.program.lifted[node.name]))
        fresh = self.graph.call_module(target)
        fresh.meta = dict(node.meta)
        return fresh

    def _writes(self, node: fx.Node) -> bool:
        """Whether a node writes state of the source."""
        module = self.program.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(module, WriteState) or (isinstance(module, ModeSwitch) and module.writes)

    def _read_outside(self, nodes: list[fx.Node]) -> set[fx.Node]:
        inside = set(nodes)
        return {node for node in nodes if any(not _reads_inside(user, inside) for user in node.users)}

    def _call(self, name: str, module: nn.Module, operands: list[fx.Node], outputs: list[fx.Node]) -> None:
        self.root.add_module(name, module)
        call = self.graph.call_module(name, tuple(operands))
        call.meta["val"] = tuple(node.meta.get("val") for node in outputs)
        for index, node in enumerate(outputs):
            fresh = self.graph.call_function(operator.getitem, (call, index))
            fresh.meta = dict(node.meta)
            self.env[node] = fresh

    def _energy_block(self, plan: BlockPlan) -> None:
        name, nodes = plan.name, [self.by_name[operation] for operation in plan.operations]
        lowered = lower_block(self.program, name, nodes, self._read_outside(nodes), plan.driven)
        operands = [self._value(node) for node in (*lowered.inputs, *lowered.weights)]
        program = lowered.program
        if self.own_feedback and program.coupled:
            program = self._with_feedback(program, lowered.weights, operands)
        block = EnergyBlock(program)
        self.energy[name] = block
        self._call(name, block, operands, list(lowered.outputs))

    def _with_feedback(
        self, program: BlockProgram, weights: Sequence[fx.Node], operands: list[fx.Node]
    ) -> BlockProgram:
        """The program with one more operand for every weight between its states, whose fetches join `operands`."""
        own: list[tuple[int, int]] = []
        for weight in program.coupling_weights:
            behind = self._parameter_behind(weights[weight])
            beside = behind or f"{program.name}_{weights[weight].name}"
            place = FeedbackPlace(self._feedback_name(beside), program.name, weight, behind)
            key = f"feedback_{len(self.feedback)}"
            while key in self.by_name:
                key += "_"
            self.operands.add_module(key, Fetch(place.name))
            fresh = self.graph.call_module(f"{OPERANDS}.{key}")
            fresh.meta = {"val": weights[weight].meta.get("val")}
            own.append((weight, program.weights + len(own)))
            operands.append(fresh)
            self.feedback.append(place)
        return replace(program, weights=program.weights + len(own), feedback_weights=tuple(own))

    def _parameter_behind(self, weight: fx.Node) -> str | None:
        while weight.name not in self.program.lifted and weight.all_input_nodes:
            # The first operand is the weight. Dimensions and factors come after it.
            weight = weight.all_input_nodes[0]
        return self.program.lifted.get(weight.name)

    def _feedback_name(self, beside: str) -> str:
        """A free name for feedback weights, made from the name of their parameter."""
        path, _, leaf = beside.rpartition(".")
        owner, name, count = module_at(self.program.source, path), f"{leaf}_feedback", 1
        prefix, taken = f"{path}." if path else "", {place.name for place in self.feedback}
        while name in owner._parameters or name in owner._buffers or name in owner._modules or prefix + name in taken:
            count += 1
            name = f"{leaf}_feedback_{count}"
        return prefix + name

    def _feedforward_block(self, name: str, names: list[str]) -> None:
        nodes = [self.by_name[operation] for operation in names]
        inside = set(nodes)
        graph = fx.Graph()
        root = nn.Module()
        env: dict[fx.Node, fx.Node] = {}
        operands: list[fx.Node] = []

        def local(node: fx.Node) -> fx.Node:
            if node in env:
                return env[node]
            if info(node).role is Role.SHAPE:  # integers are computed where they are used
                env[node] = graph.node_copy(node, local)
                env[node].meta = dict(node.meta)
                return env[node]
            raise AssertionError(f"{node.name} is no operand of {name}")

        for node in _operands(nodes, inside):
            env[node] = graph.placeholder(node.name)
            env[node].meta = dict(node.meta)
            operands.append(node)
        for node in nodes:
            env[node] = graph.node_copy(node, local)
            env[node].meta = dict(node.meta)
            env[node].target = _SAFE.get(node.target, node.target)
            if node.op == "call_module":
                root.add_module(str(node.target), self.program.graph_module.get_submodule(str(node.target)))
        outside = self._read_outside(nodes)
        outputs = [node for node in nodes if node in outside]
        graph.output(tuple(env[node] for node in outputs))
        graph.lint()
        block = FeedforwardBlock(root, graph, "FeedforwardBlock")
        self.feedforward[name] = block
        self._call(name, block, [self._value(node) for node in operands], outputs)


def _constants_are_no_state(module: fx.GraphModule) -> None:
    """Keep the source's constants out of `state_dict`, since a `GraphModule` registers them as persistent buffers."""
    module._non_persistent_buffers_set.update(module._buffers)


def _reads_inside(user: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a user of a value is in the same part. A shape belongs to the part of its readers."""
    if user in inside:
        return True
    if info(user).role is Role.SHAPE:
        return all(_reads_inside(reader, inside) for reader in user.users)
    return False


def _operands(nodes: list[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    """The nodes from outside that a part reads, directly or through shapes, each once."""
    found: dict[fx.Node, None] = {}
    stack = [operand for node in nodes for operand in node.all_input_nodes]
    seen: set[fx.Node] = set()
    for node in stack:
        pending = [node]
        while pending:
            current = pending.pop()
            if current in seen or current in inside:
                continue
            seen.add(current)
            if info(current).role is Role.SHAPE:
                pending.extend(current.all_input_nodes)
            else:
                found[current] = None
    return list(found)
