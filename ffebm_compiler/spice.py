"""Netlists of resistive blocks for circuit simulators (SPICE).

A unit of layer m is a node `v_NAME_i` of voltage V₀ s/A_m, an amplifier of gain A_m that makes `s_NAME_i` of it, and
the lines ±s to the layers that read it. Diodes on the node make the activation. `runtime/energies/circuit.py` has the
equations. Voltages are in units of V₀, conductances in units of g₀.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.runtime.energies.circuit import Circuit, Stage
from ffebm_compiler.runtime.energies.loaded import Loaded
from ffebm_compiler.runtime.program.frame import Frame

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["LARGEST", "circuit_of_block", "export_spice", "netlist"]

LARGEST = 2_000_000
"""The most resistors that a netlist is written for."""
_SWEEPS = 100_000


def circuit_of_block(hybrid: HybridCore, block: str, inputs: tuple[Tensor, ...]) -> Circuit:
    """The circuit of a block for the first sample of the hybrid's inputs, in float64.

    Raises:
        InputError: there is no such block, or it has no feedback, or there are no inputs.
        UnsupportedError: its energy is that of no circuit.
    """
    if not inputs:
        raise InputError("inputs is empty, so that nothing drives the circuit. Pass the inputs of the network")
    names = [found.name for found in hybrid.blocks]
    if block not in names:
        raise InputError(f"there is no block {block!r}; expected one of {', '.join(map(repr, names)) or 'no block'}")
    module = hybrid.blocks[names.index(block)].module
    program = module.program
    if not program.coupled:
        raise InputError(f"{block} has one layer and no feedback, so that there is no circuit that settles")
    with torch.no_grad(), hybrid.in_mode(False), hybrid.feedforward_mode(), hybrid.recording() as record:
        hybrid(*inputs)
    operands = [None if value is None else value.detach().double().cpu() for value in record[block][0]]
    given = [value for value in operands[: program.inputs] if value is not None]
    frame = Frame(program, given, operands[program.inputs :])
    with torch.no_grad():
        frame.feedforward()
        return module.energy_function.circuit(frame, module.setting)


def settled(circuit: Circuit, currents: Mapping[str, Tensor]) -> list[Tensor]:
    """The states of a circuit by block coordinate descent on its dense matrices, to the last digit of float64."""
    stages = circuit.stages
    states = [torch.zeros_like(stage.bias) for stage in stages]
    below: list[list[tuple[int, Tensor, float]]] = [[] for _ in stages]
    loads = [torch.zeros_like(stage.bias) for stage in stages]
    for index, stage in enumerate(stages):
        for part in stage.couplings:
            if part.source >= 0:
                below[part.source].append((index, (part.plus - part.minus).T, part.reflection / stage.gain))
                loads[part.source] += part.reflection * (part.plus + part.minus).sum(0)
    sigmas = [Loaded(stage.activation, load) for stage, load in zip(stages, loads, strict=True)]
    for _ in range(_SWEEPS):
        change = 0.0
        for index, stage in enumerate(stages):
            field = stage.bias + currents.get(stage.name, torch.zeros_like(stage.bias))
            for part in stage.couplings:
                source = states[part.source] if part.source >= 0 else circuit.inputs[-1 - part.source]
                field = field + (part.plus - part.minus) @ source
            for later, transposed, gamma in below[index]:
                field = field + gamma * (transposed @ states[later])
            new = sigmas[index].value(field)
            change = max(change, float((new - states[index]).norm() / new.norm().clamp_min(1e-300)))
            states[index] = new
        if change <= 1e-14:
            break
    return states


@dataclass(frozen=True)
class _Branch:
    """A diode with a resistor in series: the current slope · (s − knot) above the knot, or below it."""

    knot: float
    slope: float
    above: bool


def _branches(stage: Stage) -> tuple[float, float, list[_Branch]]:
    """(slope, offset, branches) of ∂G(s) − s: its line where σ is steepest, and what diodes add on both sides."""
    lines = stage.activation.lines
    assert lines is not None  # a resistive energy admits no other
    values = [lines.start]
    for index in range(1, len(lines.knots)):
        values.append(values[-1] + lines.slopes[index] * (lines.knots[index] - lines.knots[index - 1]))
    extra = [1 / slope - 1 if slope else math.inf for slope in lines.slopes]
    base = min(range(len(extra)), key=lambda index: extra[index])
    right, left = extra[base:], extra[: base + 1][::-1]
    if any(b < a for side in (left, right) for a, b in pairwise(side)) or math.inf in extra[1:-1]:
        raise UnsupportedError(
            f"the activation {stage.activation.name} of layer {stage.name!r} has steeper lines outside than "
            "inside, for which the netlist has no diodes. Use ReLU, leaky ReLU, clamp, hard tanh or hard sigmoid"
        )
    knots = lines.knots or (0.0,)
    place = min(max(base - 1, 0), len(knots) - 1)
    offset = knots[place] - values[place] / lines.slopes[base]
    found = [_Branch(values[k], extra[k + 1] - extra[k], True) for k in range(base, len(lines.knots))]
    found += [_Branch(values[k], extra[k] - extra[k + 1], False) for k in range(base)]
    return extra[base], offset, found


class _Writer:
    """The lines of a netlist."""

    def __init__(self, siemens: float, volts: float) -> None:
        self.lines: list[str] = []
        self.siemens, self.volts = siemens, volts
        self._numbers = count(1)

    def resistor(self, first: str, second: str, conductance: float) -> None:
        """Of a dimensionless conductance; nothing where it is 0."""
        if conductance > 0:
            self._add("R", first, second, f"{1 / (conductance * self.siemens):.15g}")

    def current(self, node: str, value: float) -> None:
        """A current into a node."""
        if value:
            self._add("I", "0", node, f"{value * self.siemens * self.volts:.15g}")

    def source(self, node: str, value: float) -> None:
        """A voltage source."""
        self._add("V", node, "0", f"{value * self.volts:.15g}")

    def diode(self, anode: str, cathode: str) -> None:
        """One of the netlist's model."""
        self._add("D", anode, cathode, "diode")

    def _add(self, kind: str, *parts: str) -> None:
        self.lines.append(f"{kind}{next(self._numbers)} {' '.join(parts)}")


def netlist(
    circuit: Circuit,
    title: str,
    *,
    emission: float = 1e-3,
    volts: float = 5.0,
    siemens: float = 1e-3,
    currents: Mapping[str, Tensor] | None = None,
) -> str:
    """The netlist of a circuit; see `HybridModel.export_spice`."""
    for name, value in (("emission", emission), ("volts", volts), ("siemens", siemens)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{name} is {value!r}; expected a positive number")
    nudges = _checked(circuit, currents or {})
    resistors = sum(part.plus.numel() for stage in circuit.stages for part in stage.couplings)
    if resistors > LARGEST:
        raise InputError(f"{title} has {resistors} pairs of resistors; a netlist is written for at most {LARGEST}")
    states = settled(circuit, nudges)
    names = _names(circuit)
    largest = max(float((s / stage.gain).abs().max()) for s, stage in zip(states, circuit.stages, strict=True))
    strongest = max(float((p.plus + p.minus).max()) for stage in circuit.stages for p in stage.couplings)
    writer = _Writer(siemens / strongest, volts / (largest or 1.0))
    lines = writer.lines
    for index, values in enumerate(circuit.inputs):
        lines.append(f"* input {index}")
        for unit, value in enumerate(values.tolist()):
            writer.source(f"x{index}_{unit}", value)
            writer.source(f"x{index}_{unit}n", -value)
    for index, stage in enumerate(circuit.stages):
        lines.append(f"* layer {stage.name}: {stage.activation.name}, amplifiers of gain {stage.gain:.6g}")
        _stage(writer, circuit, index, names, nudges.get(stage.name))
    expected = [
        (node, value * writer.volts)
        for name, stage, state in zip(names, circuit.stages, states, strict=True)
        for unit, value in enumerate(state.tolist())
        for node, value in ((f"v_{name}_{unit}", value / stage.gain), (f"s_{name}_{unit}", value))
    ]
    head = [
        f"{title}: a resistive block as a circuit, written by ffebm-compiler",
        f"* a unit of a state is {writer.volts:.12g} V, a unit of a weight is {writer.siemens:.12g} S",
        *(f"* expected v({node}) = {value:.12g}" for node, value in expected),
    ]
    tail = [
        f".model diode d(is=1e-14 n={emission:.6g} rs=0)",
        ".options reltol=1e-9 abstol=1e-15 vntol=1e-12 gmin=1e-16 itl1=2000",
        ".control",
        "set numdgt=12",
        "op",
        *(f"print v({node})" for node, _ in expected),
        "quit",
        ".endc",
        ".end",
    ]
    return "\n".join([*head, *lines, *tail]) + "\n"


def _checked(circuit: Circuit, currents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    sizes = {stage.name: stage.bias.numel() for stage in circuit.stages}
    found = {}
    for name, value in currents.items():
        if name not in sizes:
            raise InputError(f"currents names {name!r}; expected some of {', '.join(map(repr, sizes))}")
        if value.numel() != sizes[name] or not bool(torch.isfinite(value).all()):
            raise InputError(f"currents of {name!r}: expected {sizes[name]} finite numbers, one for each unit")
        found[name] = value.detach().double().cpu().flatten()
    return found


def _names(circuit: Circuit) -> list[str]:
    """A name for each layer, from its module path: SPICE knows no capitals, and few signs."""
    found: list[str] = []
    for stage in circuit.stages:
        plain = re.sub(r"[^a-z0-9]+", "_", stage.name.lower()).strip("_") or "state"
        others = (f"{plain}_again{k}" for k in count(2))
        name = next(other for other in chain([plain], others) if other not in found)
        found.append(name)
    return found


def _stage(writer: _Writer, circuit: Circuit, index: int, names: list[str], nudge: Tensor | None) -> None:
    stage, name = circuit.stages[index], names[index]
    slope, offset, branches = _branches(stage)
    bias = stage.bias - offset if nudge is None else stage.bias - offset + nudge
    later = [(m, part) for m, s in enumerate(circuit.stages) for part in s.couplings if part.source == index]
    for branch, side in enumerate(branches):
        if side.knot:
            writer.source(f"k_{name}_{branch}", side.knot / stage.gain)
    for unit in range(stage.bias.numel()):
        node, out = f"v_{name}_{unit}", f"s_{name}_{unit}"
        writer.resistor(node, "0", float(stage.pads[unit]) + slope * stage.gain)
        writer.current(node, float(bias[unit]))
        for branch, side in enumerate(branches):
            reference, inner = f"k_{name}_{branch}" if side.knot else "0", node
            if side.slope < math.inf:
                inner = f"d_{name}_{unit}_{branch}"
                writer.resistor(node, inner, side.slope * stage.gain)
            writer.diode(*((inner, reference) if side.above else (reference, inner)))
        writer.lines.append(f"E_{out} {out} 0 {node} 0 {stage.gain:.15g}")
        for m, part in later:
            for sign, matrix in (("p", part.plus), ("n", part.minus)):
                if not bool((matrix[:, unit] > 0).any()):
                    continue
                line, start = f"{sign}_{name}_{unit}_{names[m]}", out
                if sign == "n":
                    start = f"m_{name}_{unit}_{names[m]}"
                    writer.lines.append(f"E_{start} {start} 0 {node} 0 {-stage.gain:.15g}")
                gain = part.reflection if sign == "p" else -part.reflection
                writer.lines.append(f"V_{line} {start} {line} 0")
                writer.lines.append(f"F_{line} {node} 0 V_{line} {gain:.15g}")
        for part in stage.couplings:
            for sign, matrix in (("p", part.plus), ("n", part.minus)):
                for source, conductance in _above_zero(matrix[unit]):
                    if part.source >= 0:
                        line = f"{sign}_{names[part.source]}_{source}_{name}"
                    else:
                        line = f"x{-1 - part.source}_{source}{'n' if sign == 'n' else ''}"
                    writer.resistor(line, node, conductance)


def _above_zero(row: Tensor) -> Iterator[tuple[int, float]]:
    for place in row.nonzero().flatten().tolist():
        yield place, float(row[place])


def export_spice(
    hybrid: HybridCore,
    path: str | Path,
    block: str,
    inputs: tuple[Tensor, ...],
    *,
    emission: float = 1e-3,
    volts: float = 5.0,
    siemens: float = 1e-3,
    currents: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the netlist of a block; see `HybridModel.export_spice`."""
    circuit = circuit_of_block(hybrid, block, inputs)
    text = netlist(circuit, block, emission=emission, volts=volts, siemens=siemens, currents=currents)
    write_whole(path, text, failure="the netlist cannot be written")
    return Path(path)
