"""Block programs: an energy block as data.

A block has L layers in topological order. Layer l has a state s_l, an activation σ_l and a drive

    d_l = d_l(s_1, ..., s_{l−1}, x; θ),

a short straight-line program of `Operator`s over numbered registers. The block's inputs x come
first, then the states, then temporaries. A drive is affine in (s, x) jointly, and the
deviation coordinates and the gradients rely on that. `runtime/program/frame.py` evaluates it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.activations.table import Activation
from ffebm_compiler.runtime.program.operators import Convolution, Operator

__all__ = ["BlockProgram", "Instruction", "Layer"]


@dataclass(frozen=True)
class Instruction:
    """register[output] = operator(register[operands]; weight[weights])."""

    operator: Operator
    operands: tuple[int, ...]
    weights: tuple[int | None, ...]
    output: int
    first: int | None = None
    """Register of an earlier instruction that draws the same mask, since several drives may read one dropped value."""
    operation: str = ""
    """Name of the plan's operation that multiplies by a weight; empty for the others."""

    @property
    def kept(self) -> int:
        """The register under which a mask or winners are kept."""
        return self.output if self.first is None else self.first


@dataclass(frozen=True)
class Layer:
    """One state of a block, with its activation and the program of its drive."""

    name: str
    activation: Activation
    instructions: tuple[Instruction, ...]
    drive: int
    """Register of the drive."""
    state: int
    """Register of the state."""
    parameters: tuple[int, ...] = ()
    """Indices of the block's weights that are parameters of the activation."""


@dataclass(frozen=True)
class BlockProgram:
    """An energy block: its layers in topological order, and its outputs.

    `readout` computes the outputs from states and inputs. It is ordinary digital wiring, and autograd
    differentiates it.
    """

    name: str
    inputs: int
    weights: int
    layers: tuple[Layer, ...]
    readout: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    batched: bool = True
    """Whether the leading dimension of every state counts independent samples."""
    resizable: bool = False
    """Whether it can be evaluated for some of its samples alone, or for several copies of them."""
    draws: tuple[tuple[Instruction, ...], ...] = ()
    """For each random mask, in the order of drawing, the instructions up to the one that draws it."""
    feedback_weights: tuple[tuple[int, int], ...] = ()
    """(weight of an edge between states, weight that its feedback goes through); empty where feedback is tied."""
    upstream: tuple[tuple[int, ...], ...] = field(init=False)
    """For each layer, the layers whose states its drive reads."""
    downstream: tuple[tuple[int, ...], ...] = field(init=False)
    depths: tuple[int, ...] = field(init=False)
    """Length of the longest path of states to each layer."""
    operand_instructions: tuple[tuple[Instruction, ...], ...] = field(init=False, repr=False)
    """For each layer, the instructions that compute the operands of its weights."""
    from_states: Mapping[int, bool] = field(init=False, repr=False)
    """Whether a register depends on a state of the same block."""
    from_inputs: Mapping[int, bool] = field(init=False, repr=False)
    states: frozenset[int] = field(init=False, repr=False)
    """Registers of the states."""

    def __post_init__(self) -> None:
        """Derive which values depend on which."""
        layer_of = {layer.state: index for index, layer in enumerate(self.layers)}
        on_states = dict.fromkeys(range(self.inputs), False) | dict.fromkeys(layer_of, True)
        on_inputs = dict.fromkeys(range(self.inputs), True) | dict.fromkeys(layer_of, False)
        upstream: list[tuple[int, ...]] = []
        for layer in self.layers:
            leaves: dict[int, None] = {}
            if layer.drive in layer_of:
                leaves[layer_of[layer.drive]] = None
            for instruction in layer.instructions:
                on_states[instruction.output] = any(on_states[r] for r in instruction.operands)
                on_inputs[instruction.output] = any(on_inputs[r] for r in instruction.operands)
                leaves.update((layer_of[r], None) for r in instruction.operands if r in layer_of)
            upstream.append(tuple(sorted(leaves)))
        downstream = [
            tuple(m for m, leaves in enumerate(upstream) if index in leaves) for index in range(len(self.layers))
        ]
        depths: list[int] = []
        for above in upstream:
            depths.append(1 + max((depths[k] for k in above), default=-1))
        for name, value in (
            ("upstream", tuple(upstream)),
            ("downstream", tuple(downstream)),
            ("depths", tuple(depths)),
            ("operand_instructions", tuple(_operand_instructions(layer) for layer in self.layers)),
            ("from_states", on_states),
            ("from_inputs", on_inputs),
            ("states", frozenset(layer_of)),
        ):
            object.__setattr__(self, name, value)

    @property
    def coupled(self) -> bool:
        """Whether any state feeds another. If not, the block equals its source's layers."""
        return any(self.upstream)

    @property
    def symmetric(self) -> bool:
        """Whether the feedback is the transpose of the drives, so that the block has an energy."""
        return not self.feedback_weights

    def check_weights(self, weights: Sequence[Tensor | None]) -> None:
        """Refuse feedback weights that have another shape than the forward weights that they go with.

        Raises:
            InputError: the shapes differ.
        """
        for first, second in self.feedback_weights:
            forward, backward = weights[first], weights[second]
            if forward is not None and backward is not None and forward.shape != backward.shape:
                raise InputError(
                    f"{self.name}: feedback weights of shape {tuple(backward.shape)} go with forward weights of shape "
                    f"{tuple(forward.shape)}. Give both one shape, since the feedback is the transpose of such a weight"
                )

    @cached_property
    def back(self) -> BlockProgram:
        """The block whose transposes are the feedback: itself, or a copy with the feedback weights between states."""
        if self.symmetric:
            return self
        own: dict[int | None, int | None] = dict(self.feedback_weights)

        def turned(item: Instruction) -> Instruction:
            if not self._multiplies_states(item):
                return item
            return replace(item, weights=tuple(own.get(weight, weight) for weight in item.weights))

        layers = tuple(replace(layer, instructions=tuple(map(turned, layer.instructions))) for layer in self.layers)
        return replace(self, layers=layers, feedback_weights=())

    @cached_property
    def coupling_weights(self) -> tuple[int, ...]:
        """Indices of the weights on the block's edges, which multiply states or values computed from them."""
        items = (item for layer in self.layers for item in layer.instructions if self._multiplies_states(item))
        return tuple(dict.fromkeys(item.weights[0] for item in items if item.weights[0] is not None))

    def _multiplies_states(self, item: Instruction) -> bool:
        return item.operator.product and any(self.from_states[register] for register in item.operands)

    @cached_property
    def monotone(self) -> bool:
        """Whether all activations are monotone. An equilibrium is then a minimum of the energy."""
        return all(layer.activation.monotone for layer in self.layers)

    @cached_property
    def smooth(self) -> bool:
        """Whether all activations are: an error of a state then makes an error of its slope no larger than itself."""
        return all(layer.activation.smooth for layer in self.layers) and not self.selects

    @cached_property
    def absolute(self) -> BlockProgram:
        """The same block with operators of absolute values, which has |J_{ml}| at weights |θ|."""
        layers = tuple(
            replace(layer, instructions=tuple(replace(i, operator=i.operator.absolute()) for i in layer.instructions))
            for layer in self.layers
        )
        return replace(self, layers=layers)

    @cached_property
    def quick(self) -> BlockProgram:
        """The same block by the fastest products, for a settling block and its gradients (`Operator.quick`)."""
        layers = tuple(
            replace(layer, instructions=tuple(replace(i, operator=i.operator.quick()) for i in layer.instructions))
            for layer in self.layers
        )
        return self if layers == self.layers else replace(self, layers=layers)

    @cached_property
    def masks(self) -> frozenset[int]:
        """The registers of random masks, drawn once a forward."""
        return frozenset(instructions[-1].kept for instructions in self.draws)

    @property
    def drawing(self) -> bool:
        """Whether a forward would draw random masks in the present modes of the source's modules."""
        return any(instruction.operator.drawing for instructions in self.draws for instruction in instructions)

    @cached_property
    def selects(self) -> bool:
        """Whether any drive holds max pooling. Its certificate is valid for one choice of winners."""
        return any(i.operator.selects for layer in self.layers for i in layer.instructions)

    @property
    def convolutional(self) -> bool:
        """Whether any drive holds a two-dimensional convolution."""
        return any(
            isinstance(i.operator, Convolution) and len(i.operator.stride) == 2
            for layer in self.layers
            for i in layer.instructions
        )

    @property
    def visible(self) -> tuple[int, ...]:
        """The layers whose states the readout reads."""
        registers = set(self.outputs).union(*(i.operands for i in self.readout))
        return tuple(index for index, layer in enumerate(self.layers) if layer.state in registers)

    @property
    def distance(self) -> int:
        """The most layers that an error must pass from the block's outputs to a state, by the shortest path to each."""
        reached, front, steps = set(self.visible), set(self.visible), 0
        while front := {k for index in front for k in self.upstream[index]} - reached:
            reached |= front
            steps += 1
        return steps


def _operand_instructions(layer: Layer) -> tuple[Instruction, ...]:
    needed: set[int] = set()
    kept = []
    for instruction in reversed(layer.instructions):
        if instruction.output in needed:
            kept.append(instruction)
            needed.update(instruction.operands)
        if any(weight is not None for weight in instruction.weights):
            needed.update(instruction.operands)
    return tuple(reversed(kept))
