"""Netlists of resistive blocks for circuit simulators (SPICE).

`circuit_elements.py` writes the elements. Here are the states that they are expected to settle to, and the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffebm_compiler.circuit_elements import Writer, check_positive, check_size, elements, models, names_of, output_node
from ffebm_compiler.errors import InputError
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.runtime.energies.circuit import Circuit
from ffebm_compiler.runtime.energies.operating_point import settled
from ffebm_compiler.runtime.program.frame import Frame

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.runtime.block import EnergyBlock

__all__ = ["circuit_of_block", "export_spice", "netlist", "recorded_circuit", "settled"]


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
        if not names:
            raise InputError("the plan has no energy block, since every layer is digital: print(hybrid.plan) says why")
        raise InputError(f"there is no block {block!r}; expected one of {', '.join(map(repr, names))}")
    module = hybrid.blocks[names.index(block)].module
    if not module.program.coupled:
        raise InputError(
            f"{block} has one layer and no feedback, so that there is no circuit that settles: name another block"
        )
    with torch.no_grad(), hybrid.in_mode(False), hybrid.recording() as record:
        hybrid(*inputs)
    return recorded_circuit(module, record[block][0])[0]


def recorded_circuit(module: EnergyBlock, operands: Sequence[Tensor | None]) -> tuple[Circuit, list[Tensor]]:
    """(the circuit for the first sample, the inputs of all samples) of a block that was called with these operands.

    With devices, the conductances are those that they hold.

    Raises:
        UnsupportedError: its energy is that of no circuit.
    """
    count, wide = module.program.inputs, torch.float64
    given = [value.detach().to("cpu", wide) for value in operands[:count] if value is not None]
    with torch.no_grad():
        weights = [None if w is None else w.detach().to("cpu", wide) for w in module.held(operands[count:])]
        frame = Frame(module.program, given, weights)
        frame.feedforward()
        return module.energy_function.circuit(frame, module.setting), given


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
    check_positive(emission=emission, volts=volts, siemens=siemens)
    nudges = _checked(circuit, currents or {})
    check_size(circuit, title)
    states = settled(circuit, nudges)
    names = names_of(circuit)
    largest = max(float((s / stage.gain).abs().max()) for s, stage in zip(states, circuit.stages, strict=True))
    strongest = max(float((p.plus + p.minus).max()) for stage in circuit.stages for p in stage.couplings)
    writer = Writer(siemens / strongest, volts / (largest or 1.0))
    elements(writer, circuit, names, nudges)
    expected = [
        (node, value * writer.volts)
        for index, (name, state) in enumerate(zip(names, states, strict=True))
        for unit, value in enumerate(state.tolist())
        for node, value in {
            f"v_{name}_{unit}": value / circuit.stages[index].gain,
            output_node(circuit, names, index, unit): value,
        }.items()
    ]
    head = [
        f"{title}: a resistive block as a circuit, written by ffebm-compiler",
        f"* a unit of a state is {writer.volts:.12g} V, a unit of a weight is {writer.siemens:.12g} S",
        *(f"* expected v({node}) = {value:.12g}" for node, value in expected),
    ]
    tail = [
        *models(emission, 1e-14, 1e-15),
        ".control",
        "set numdgt=12",
        "op",
        *(f"print v({node})" for node, _ in expected),
        "quit",
        ".endc",
        ".end",
    ]
    return "\n".join([*head, *writer.lines, *tail]) + "\n"


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
