"""An energy block as an ONNX function: a `Loop` that settles the free phase.

    s_l = σ_l(h_l),   h_l = d_l + Σ_{m>l} γ_{l,m} (∂d_m/∂s_l)ᵀ s_m ,   γ_{l,m} = c_m/c_l

The states start at their feedforward values. One pass of the body is one Gauss–Seidel sweep of
`runtime.phases.free_phase.FreePhase`, over-relaxed by `relaxation`. The loop ends by the runtime's own rule
(`stopping_nodes.py`), or after `max_sweeps`. Values that depend only on the inputs
are computed before the loop. An ONNX function cannot raise an error, so the outputs of a block that did
not settle are NaN.

If the energy is one of conductances, the loads on the states are computed from the weights before the loop, and a state
is σ under its load (`load_nodes.py`). Blocks of one structure share one function. γ, the amplifiers' gains and the
limits are attributes of the call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ffebm_compiler.errors import ExportError
from ffebm_compiler.onnx.activation_nodes import activation_nodes
from ffebm_compiler.onnx.emit import Names, Writer
from ffebm_compiler.onnx.load_nodes import LoadedActivation
from ffebm_compiler.onnx.manifest import energy_name, settling_of
from ffebm_compiler.onnx.operators import adjoint_nodes, apply_nodes
from ffebm_compiler.onnx.packages import OPSET, package
from ffebm_compiler.onnx.program_json import program_to_json
from ffebm_compiler.onnx.shapes import register_shapes
from ffebm_compiler.onnx.steps import Step
from ffebm_compiler.onnx.stopping_nodes import Progress, Stopping
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.energies.conductive import Conductive
from ffebm_compiler.runtime.energies.loads import multiplying_weights
from ffebm_compiler.runtime.energies.passive import GROUNDED
from ffebm_compiler.runtime.program.block_program import BlockProgram, Instruction
from ffebm_compiler.runtime.solvers.base import update_order

__all__ = ["DOMAIN", "BlockFunction", "block_function", "inner_paths"]

DOMAIN = "ffebm.energy"
"""The ONNX domain of the functions. A vendor may replace them by a kernel in this domain."""
VERSION = 1


@dataclass(frozen=True)
class BlockFunction:
    """A function and the attributes of the call of one block."""

    name: str
    proto: Any
    attributes: Mapping[str, float | int | list[float]]


def block_function(step: Step) -> BlockFunction:
    """The function of an energy block.

    Raises:
        ExportError: an operator or activation has no ONNX form; names the layer's module path.
    """
    block = step.module
    assert isinstance(block, EnergyBlock)
    energy_name(step.name, block)  # one that has no ONNX form is refused
    dtype = step.outputs[0].dtype
    if dtype not in ("float32", "float64"):
        raise ExportError(
            f"{step.name} computes in {dtype}: export hybrid.float(), which onnxruntime's CPU kernels run"
        )
    return _Builder(step, block, dtype).build()


def inner_paths(paths: Sequence[str]) -> list[str]:
    """Module paths without the modules that all of them lie in: `["up", "down"]` of `layers.0.up` and `layers.0.down`.

    So that the blocks of equal layers of a network have one function. The last name of a path always stays.
    """
    split = [path.split(".") for path in paths]
    common = 0
    while all(len(names) > common + 1 for names in split) and len({names[common] for names in split}) == 1:
        common += 1
    return [".".join(names[common:]) for names in split]


@dataclass
class _Builder:
    step: Step
    block: EnergyBlock
    dtype: str
    main: Writer = field(init=False)

    def __post_init__(self) -> None:
        self.program: BlockProgram = self.block.program
        self.shapes = register_shapes(self.step, self.block)
        self.main = Writer(Names(), self.dtype)
        self.labels = inner_paths([layer.name for layer in self.program.layers])
        self.weights = [f"w{index}" for index in range(self.program.weights)]
        for name, operand in zip(self.weights, self.step.operands[self.program.inputs :], strict=True):
            tensor: Tensor | None = operand.tensor
            if tensor is None:
                raise ExportError(
                    f"a weight of {self.step.name} depends on the network's input, and the file holds constant "
                    "weights: convert again with its layer in force_digital"
                )
            self.main.weight_shapes[name] = tuple(tensor.shape)
        self.settling = settling_of(self.block, self.dtype)
        shares = self.block.gain.error_shares if self.settling["schedule"] == "forward" else None
        self.stopping = Stopping(
            self.main,
            self.settling["contraction"],
            self.block.gain.setting.typical,
            None if shares is None else shares.numpy(),
            relaxed=self.settling["relaxation"] != 1,
            first_alone=self.settling["relaxed_sweeps"] == 1,
        )
        self.relaxed = self.stopping.relaxed
        self.coupled = self.program.coupled and self.block.enabled
        self.gammas = {
            (index, later): f"gamma_{index}_{later}"
            for index in range(len(self.program.layers))
            for later in self.program.downstream[index]
            if self.coupled
        }
        self.amplifiers = {
            index: f"amplifier_{index}" for index, _ in enumerate(self.block.setting.amplifiers) if self.coupled
        }
        """Names of the gains of the amplifiers, by layer."""
        energy = self.block.energy_function
        self.energy = energy if isinstance(energy, Conductive) and self.coupled else None

    def build(self) -> BlockFunction:
        onnx = package("onnx")
        inputs = [f"x{index}" for index in range(self.program.inputs)]
        outputs = [f"y{index}" for index in range(len(self.program.outputs))]
        fixed = dict(enumerate(inputs))
        states, fields = self._feedforward(fixed)
        settled = ""
        if self.coupled:
            states, settled = self._loop(fixed, states, fields if self.relaxed else [])
        registers = fixed | {layer.state: state for layer, state in zip(self.program.layers, states, strict=True)}
        for instruction in self.program.readout:
            registers[instruction.output] = self._apply(self.main, instruction, registers, self.program.name)
        for name, register in zip(outputs, self.program.outputs, strict=True):
            value = registers[register]
            if settled and self.settling["on_failure"] != "warn":
                value = self.main.op("Where", settled, value, self.main.number(float("nan")))
            self.main.nodes.append(onnx.helper.make_node("Identity", [value], [name], name=f"{name}/Identity"))
        attributes = self._attributes()
        name = f"EnergyBlock_{self._readable()}_{self._structure_digest()}"
        proto = onnx.helper.make_function(
            DOMAIN,
            name,
            [*inputs, *self.weights],
            outputs,
            self.main.nodes,
            [onnx.helper.make_opsetid("", OPSET)],
            attributes=list(attributes),
            doc_string=f"{len(self.program.layers)} layers, settled by Gauss-Seidel sweeps" if self.coupled else "",
        )
        return BlockFunction(name, proto, attributes)

    def _attributes(self) -> dict[str, float | int | list[float]]:
        if not self.coupled:
            return {}
        scales = self.block.scales
        attributes: dict[str, float | int | list[float]] = {
            "largest_change": float(self.settling["largest_change"]),
            "min_sweeps": int(self.settling["min_sweeps"]),
            "max_sweeps": int(self.settling["max_sweeps"]),
            "relaxation": float(self.settling["relaxation"]),
            **self.stopping.attributes(),
        }
        for (index, later), name in self.gammas.items():
            attributes[name] = scales[later] / scales[index]
        for index, name in self.amplifiers.items():
            attributes[name] = self.block.setting.amplifiers[index]
        return attributes

    def _readable(self) -> str:
        """The layers' names in letters that ONNX recommends, and no more than 48 of them."""
        words = "_".join(self.labels)
        return "".join(letter if letter.isalnum() else "_" for letter in words)[:48].rstrip("_")

    def _structure_digest(self) -> str:
        """A hash of the structure. Blocks that differ only in weights, γ and tolerances share a function."""
        structure = program_to_json(self.program)
        for layer in structure["layers"]:
            del layer["name"]
        key = [
            structure,
            self.labels,
            sorted(self.shapes.items()),
            [self.main.weight_shapes[name] for name in self.weights],
            self.dtype,
            self.coupled,
            self.settling["schedule"],
            self.settling["on_failure"],
            self.stopping.structure(),
            *([] if self.energy is None else [self.energy.name]),
        ]
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]

    def _feedforward(self, fixed: dict[int, str]) -> tuple[list[str], list[str]]:
        """(states, drives) without feedback. Adds the registers that depend only on the inputs to `fixed`."""
        states: list[str] = []
        drives: list[str] = []
        for index, layer in enumerate(self.program.layers):
            registers = dict(fixed) | self._by_register(states)
            with self.main.names.of(self.labels[index]):
                drive = self._drive(self.main, index, registers)
            for instruction in layer.instructions:
                if not self.program.from_states[instruction.output]:
                    fixed[instruction.output] = registers[instruction.output]
            with self.main.names.of(self.labels[index]):
                states.append(self._activate(self.main, index, drive))
            drives.append(drive)
        return states, drives

    def _by_register(self, states: Sequence[str]) -> dict[int, str]:
        return {layer.state: state for layer, state in zip(self.program.layers, states, strict=False)}

    def _drive(self, writer: Writer, index: int, registers: dict[int, str]) -> str:
        layer = self.program.layers[index]
        for instruction in layer.instructions:
            if instruction.output not in registers:
                registers[instruction.output] = self._apply(writer, instruction, registers, layer.name)
        return registers[layer.drive]

    def _apply(
        self,
        writer: Writer,
        instruction: Instruction,
        registers: Mapping[int, str],
        owner: str,
        weights: Sequence[str | None] | None = None,
    ) -> str:
        try:
            return apply_nodes(
                writer,
                instruction.operator,
                [registers[register] for register in instruction.operands],
                self._weights(instruction) if weights is None else weights,
                [self.shapes[register] for register in instruction.operands],
                self.shapes[instruction.output],
            )
        except ExportError as error:
            raise ExportError(f"{self.step.name}, layer {owner}: {error}") from error

    def _weights(self, instruction: Instruction) -> list[str | None]:
        return [None if index is None else self.weights[index] for index in instruction.weights]

    def _activate(self, writer: Writer, index: int, value: str) -> str:
        layer = self.program.layers[index]
        try:
            parameters = [str(self.weights[place]) for place in layer.parameters]
            return activation_nodes(writer, layer.activation, value, parameters, len(self.shapes[layer.state]))
        except ExportError as error:
            raise ExportError(f"{self.step.name}, layer {layer.name}: {error}") from error

    def _loop(self, fixed: Mapping[int, str], states: Sequence[str], fields: Sequence[str]) -> tuple[list[str], str]:
        """The settled states, and whether they settled. `fields` are those of over-relaxed layers."""
        onnx = package("onnx")
        names = self.main.names
        body = Writer(names, self.dtype, outside=self.main)
        gammas = {key: self.main.setting(name, "float") for key, name in self.gammas.items()}
        limit, most = self.main.setting("largest_change", "float"), self.main.setting("max_sweeps", "int")
        start = self.stopping.start(self.main.setting("relaxation", "float"))
        sweep = names.fresh("sweep")
        loaded = {} if self.energy is None else self._loaded(states, gammas, amplified=self.energy.amplified)
        carried, relaxed = ([names.fresh(stem) for _ in kept] for stem, kept in (("s", states), ("h", fields)))
        now = Progress(
            *(names.fresh(name) for name in ("omega", "previous", "measured", "next", "slowest", "residual"))
        )
        present, potentials = list(carried), list(relaxed)
        pulled: dict[str, dict[int, str]] = {}
        changes: dict[int, tuple[str, str]] = {}
        for index in self._update_order():
            with names.of(self.labels[index]):
                before = present[index]
                registers = dict(fixed) | self._by_register(present)
                terms = [self._drive(body, index, registers)]
                for later in self.program.downstream[index]:
                    if present[later] not in pulled:
                        pulled[present[later]] = self._pullback(body, later, present[later], self.program.back)
                    part = pulled[present[later]].get(self.program.layers[index].state)
                    if part is not None:
                        terms.append(body.op("Mul", part, gammas[index, later]))
                field = body.added(terms)
                if relaxed:
                    moved = body.op("Mul", body.op("Sub", field, potentials[index]), now.omega)
                    potentials[index] = field = body.op("Add", potentials[index], moved)
                present[index] = (
                    loaded[index].value(body, field) if index in loaded else self._activate(body, index, field)
                )
                changes[index] = self._norms(body, before, present[index])
        more, after = self.stopping.after(body, now, sweep, most, limit, [changes[index] for index in sorted(changes)])
        unchanged = {*carried, *relaxed}
        finals = [
            body.op("Identity", value, stem="kept") if value in unchanged else value
            for value in (*present, *potentials)
        ]
        kind, info = self.main.elem_type, onnx.helper.make_tensor_value_info
        kinds = [kind, kind, onnx.TensorProto.INT64, onnx.TensorProto.INT64, kind, kind]
        progress = [astuple(part) for part in (now, after, start)]
        graph = onnx.helper.make_graph(
            body.nodes,
            "sweep",
            [
                info(sweep, onnx.TensorProto.INT64, []),
                info(names.fresh("go_on"), onnx.TensorProto.BOOL, []),
                *(info(name, kind, None) for name in (*carried, *relaxed)),
                *(info(name, each, []) for name, each in zip(progress[0], kinds, strict=True)),
            ],
            [
                info(more, onnx.TensorProto.BOOL, []),
                *(info(name, kind, None) for name in finals),
                *(info(name, each, []) for name, each in zip(progress[1], kinds, strict=True)),
            ],
        )
        results = [names.fresh("settled") for _ in (*carried, *relaxed)]
        ends = [names.fresh("end") for _ in kinds]
        go_on = self.main.constant(np.array(True))
        self.main.nodes.append(
            onnx.helper.make_node(
                "Loop", [most, go_on, *states, *fields, *progress[2]], [*results, *ends], name="settle", body=graph
            )
        )
        return results[: len(states)], self.main.op("LessOrEqual", ends[-1], limit)

    def _loaded(
        self, states: Sequence[str], gammas: Mapping[tuple[int, int], str], amplified: bool
    ) -> dict[int, LoadedActivation]:
        """The activations of the layers that have a load, with D^l = 1 + Σ_m γ_{l,m} A_m |J_{ml}|ᵀ 1.

        Without amplifiers |J_l| 1 is in the place of 1, and A_m is 1.
        """
        parts: dict[int, list[str]] = {}
        magnitudes: list[str | None] = list(self.weights)
        for place in multiplying_weights(self.program):
            magnitudes[place] = name = self.main.op("Abs", self.weights[place])
            self.main.weight_shapes[name] = self.main.weight_shapes[self.weights[place]]
        one = self.main.number(1.0)
        for later, state in enumerate(states):
            gain = self.main.setting(self.amplifiers[later], "float") if amplified else one
            ones = self._filled(state, gain)
            found = self._pullback(self.main, later, ones, self.program.absolute, magnitudes)
            for index in self.program.upstream[later]:
                part = found[self.program.layers[index].state]
                parts.setdefault(index, []).append(self.main.op("Mul", part, gammas[index, later]))
        if not amplified:
            self._add_row_sums(states, magnitudes, parts)
        loaded = {}
        for index, terms in parts.items():
            diagonal = self.main.added([*terms, one] if amplified else terms)
            if not amplified:
                least = self.main.number(float(np.finfo(self.main.dtype).tiny))
                reached = self.main.op("GreaterOrEqual", diagonal, least)
                diagonal = self.main.op("Where", reached, diagonal, self.main.number(GROUNDED))
            loaded[index] = LoadedActivation(self.main, self.program.layers[index].activation, diagonal)
        return loaded

    def _add_row_sums(
        self, states: Sequence[str], magnitudes: Sequence[str | None], parts: dict[int, list[str]]
    ) -> None:
        """|J_l| 1 of every layer: the drives at inputs and states of ones, at |θ| and without biases."""
        one = self.main.number(1.0)
        ones = {register: self._filled(f"x{register}", one) for register in range(self.program.inputs)}
        ones |= {
            layer.state: self._filled(state, one) for layer, state in zip(self.program.layers, states, strict=True)
        }
        multiplying = multiplying_weights(self.program)
        for index, layer in enumerate(self.program.absolute.layers):
            registers = dict(ones)
            for item in layer.instructions:
                if item.output not in registers:
                    weights = [None if w not in multiplying else magnitudes[w] for w in item.weights]
                    registers[item.output] = self._apply(self.main, item, registers, layer.name, weights)
            parts.setdefault(index, []).append(registers[layer.drive])

    def _filled(self, like: str, value: str) -> str:
        """A number in the shape of a value."""
        return self.main.op("Expand", value, self.main.op("Shape", like))

    def _update_order(self) -> list[int]:
        return update_order(self.settling["schedule"], len(self.program.layers))

    def _norms(self, writer: Writer, before: str, after: str) -> tuple[str, str]:
        """(‖after − before‖, ‖after‖)."""
        moved = writer.op("ReduceL2", writer.op("Sub", after, before), keepdims=0)
        return moved, writer.op("ReduceL2", after, keepdims=0)

    def _pullback(
        self,
        writer: Writer,
        index: int,
        cotangent: str,
        program: BlockProgram | None = None,
        weights: Sequence[str | None] = (),
    ) -> dict[int, str]:
        """Register of each state that the drive of a layer reads -> its part of J_lᵀ p.

        Of the block itself, or of a program of the same registers, maybe at other weights.
        """
        layer = (program or self.program).layers[index]
        pending: dict[int, list[str]] = {layer.drive: [cotangent]}
        for instruction in reversed(layer.instructions):
            if instruction.output not in pending:
                continue
            wanted = [self.program.from_states[register] for register in instruction.operands]
            arriving = writer.added(pending.pop(instruction.output))
            if not any(wanted):
                continue
            try:
                parts = adjoint_nodes(
                    writer,
                    instruction.operator,
                    arriving,
                    [None if place is None else (weights or self.weights)[place] for place in instruction.weights],
                    [self.shapes[register] for register in instruction.operands],
                    self.shapes[instruction.output],
                    wanted,
                )
            except ExportError as error:
                raise ExportError(f"{self.step.name}, layer {layer.name}: {error}") from error
            for register, part, want in zip(instruction.operands, parts, wanted, strict=True):
                if want and part is not None:
                    pending.setdefault(register, []).append(part)
        return {register: writer.added(parts) for register, parts in pending.items()}
