"""`Ngspice`: a fabric that settles resistive blocks in the circuit simulator ngspice.

One netlist a block, whose sources are altered sample by sample within one run of ngspice: `alter`, `op`, `wrdata`. A
copy of the circuit for each sample would be an order of magnitude slower.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.circuit_elements import Writer, check_positive, check_size, elements, models, names_of, output_node
from ffebm_compiler.errors import FabricError, InputError
from ffebm_compiler.ngspice_runs import Job, in_parts, missing
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.runtime.energies.circuit import Circuit
from ffebm_compiler.runtime.solvers.fabric import FabricBlock

__all__ = ["Ngspice"]


class Ngspice:
    """The equilibria of resistive blocks as operating points of their circuits, found by ngspice.

    The circuit is that of `HybridModel.export_spice`, at any inputs and any currents into its nodes. Diodes follow
    I = I_s (exp(V/(n V_T)) − 1) with V_T = 25.9 mV. So the voltages matter: the smaller a unit of a state is in volts,
    the less the diodes are switches. Tolerances are reltol 1e-9, abstol 1e-16 A, vntol 1e-12 V and gmin 1e-16 S.

    As a fabric: `hybrid.set_solver(ffebm.Measured(ffebm.Ngspice()))`.

    Args:
        emission: the emission coefficient n of the diodes. 1 is silicon, small is ideal.
        saturation: their saturation current I_s, in amperes.
        executor: an executor of `concurrent.futures`, such as a process pool, whose workers simulate parts of a batch.
            The results are those without one. A part whose worker is lost is simulated here, which is logged.
        volts: of a unit of a state.
        siemens: of a unit of a weight.
        parts: into how many parts a batch is split for the executor; None is one for each processor.
        timeout: seconds after which a run of ngspice is ended as failed.
        command: the program.

    Raises:
        InputError: a number is not positive, or the executor is none.
        FabricError: ngspice is not installed; later, where a circuit has no operating point or a run takes too long.
        UnsupportedError: later, for a block whose energy is that of no circuit.
    """

    def __init__(
        self,
        emission: float = 1.0,
        saturation: float = 1e-12,
        executor: Executor | None = None,
        *,
        volts: float = 1.0,
        siemens: float = 1e-3,
        parts: int | None = None,
        timeout: float = 600.0,
        command: str = "ngspice",
    ) -> None:
        check_positive(emission=emission, saturation=saturation, volts=volts, siemens=siemens, timeout=timeout)
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise InputError(
                f"executor is a {type(executor).__name__}; expected an executor of concurrent.futures, such as a "
                "ProcessPoolExecutor, or None"
            )
        parts = plain(parts)
        if parts is not None and (isinstance(parts, bool) or not isinstance(parts, int) or parts < 1):
            raise InputError(f"parts is {parts!r}; expected a positive integer, or None")
        if shutil.which(command) is None:
            raise missing(command)
        self.emission, self.saturation, self.volts, self.siemens = emission, saturation, volts, siemens
        self.executor, self.timeout, self.command = executor, timeout, command
        self.parts = parts or os.cpu_count() or 1
        self._last: _Programmed | None = None

    def __repr__(self) -> str:
        """The diodes."""
        return f"Ngspice(emission={self.emission:g}, saturation={self.saturation:g})"

    def __getstate__(self) -> dict[str, object]:
        """For pickles: everything but the executor, which stays in its process."""
        return {**self.__dict__, "executor": None, "_last": None}

    def program(self, block: FabricBlock, weights: Sequence[Tensor | None]) -> _Programmed:
        """Write the netlist of a block. The result settles it, and holds its states."""
        self._last = _Programmed(self, block)
        return self._last

    def settle(self, inputs: Sequence[Tensor], nudge: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """The states of the block that was programmed last.

        Raises:
            FabricError: no block was programmed yet.
        """
        if self._last is None:
            raise FabricError("no block was programmed: call program(block, weights) first")
        return self._last.settle(inputs, nudge)


class _Programmed:
    """The circuit of one block."""

    def __init__(self, fabric: Ngspice, block: FabricBlock) -> None:
        self._fabric, self._block = fabric, block
        self._netlists: dict[tuple[int, ...], _Driven] = {}

    def settle(self, inputs: Sequence[Tensor], nudge: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """The states for a batch of inputs, with the currents of a nudge into the nodes."""
        netlist = self._netlist(())
        columns = self._input_columns(netlist, inputs)
        for names, current in zip(netlist.currents, nudge or [None] * len(netlist.currents), strict=True):
            if current is not None:
                columns += [(names, self._rows(current) * netlist.amperes)]
        return self._simulated(netlist, columns)

    def hold(self, inputs: Sequence[Tensor], held: Sequence[Tensor | None]) -> list[Tensor]:
        """The states for a batch of inputs, some of them held by voltage sources."""
        netlist = self._netlist(tuple(index for index, state in enumerate(held) if state is not None))
        columns = self._input_columns(netlist, inputs)
        for names, state, stage in zip(netlist.held, held, self._block.circuit.stages, strict=True):
            if state is not None:
                columns += [(names, self._rows(state) * netlist.volts / stage.gain)]
        return self._simulated(netlist, columns)

    def _netlist(self, held: tuple[int, ...]) -> _Driven:
        if held not in self._netlists:
            self._netlists[held] = _driven(self._block.circuit, self._block.name, self._fabric, held)
        return self._netlists[held]

    def _rows(self, value: Tensor) -> np.ndarray:
        """A row for each sample; one row where samples are not independent."""
        flat = value.reshape(len(value), -1) if self._block.program.resizable else value.reshape(1, -1)
        return np.asarray(flat.numpy(), dtype=np.float64)

    def _input_columns(self, netlist: _Driven, inputs: Sequence[Tensor]) -> list[tuple[tuple[str, ...], np.ndarray]]:
        """(sources, a value of each for every sample)."""
        columns = []
        for (sources, inverted), value in zip(netlist.inputs, inputs, strict=True):
            volts = self._rows(value) * netlist.volts
            columns += [(sources, volts), (inverted, -volts)] if inverted else [(sources, volts)]
        return columns

    def _simulated(self, netlist: _Driven, columns: list[tuple[tuple[str, ...], np.ndarray]]) -> list[Tensor]:
        names = [name for group, _ in columns for name in group]
        values = np.concatenate([rows for _, rows in columns], axis=1)
        nodes = [node for layer in netlist.nodes for node in layer]
        fabric = self._fabric
        job = Job(netlist.text, tuple(names), tuple(nodes), fabric.timeout, fabric.command, self._block.name)
        found = job(values) if fabric.executor is None else in_parts(fabric.executor, job, values, fabric.parts)
        pieces = np.split(found / netlist.volts, np.cumsum([len(layer) for layer in netlist.nodes])[:-1], axis=1)
        lead = (len(values),) if self._block.program.resizable else ()
        return [
            torch.from_numpy(piece.copy()).reshape(*lead, *shape)
            for piece, shape in zip(pieces, self._block.shapes, strict=True)
        ]


@dataclass(frozen=True)
class _Driven:
    """The netlist of a circuit whose sources are altered, and the names in it."""

    text: str
    """The title, the elements and the options, without a control section."""
    inputs: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """For each input of the block, the sources of +x and those of −x, in volts; none where no layer reads −x."""
    currents: tuple[tuple[str, ...], ...]
    """For each layer and unit, the source of the current into its node, in amperes."""
    held: tuple[tuple[str, ...], ...]
    """For each layer and unit, the source that holds its node; empty for a free layer."""
    nodes: tuple[tuple[str, ...], ...]
    """For each layer and unit, the node whose voltage is its state."""
    volts: float
    """Of a unit of a state."""
    amperes: float
    """Of a unit of a field."""


def _driven(circuit: Circuit, title: str, fabric: Ngspice, held: Sequence[int]) -> _Driven:
    """The netlist of a circuit for any inputs, any currents into its nodes, and any voltages of the layers `held`."""
    check_size(circuit, title)
    names = names_of(circuit)
    writer = Writer(fabric.siemens, fabric.volts)
    elements(writer, circuit, names, {})
    units = [(name, range(stage.bias.numel())) for name, stage in zip(names, circuit.stages, strict=True)]
    for index, (name, own) in enumerate(units):
        for unit in own:
            writer.current(f"v_{name}_{unit}", 0.0, f"nudge_{name}_{unit}")
            if index in held:
                writer.source(f"v_{name}_{unit}", 0.0, f"hold_{name}_{unit}")
    return _Driven(
        text="\n".join([title, *writer.lines, *models(fabric.emission, fabric.saturation, 1e-16)]),
        inputs=tuple(
            (
                tuple(f"Vx{index}_{unit}" for unit in range(values.numel())),
                tuple(f"Vx{index}_{unit}n" for unit in range(values.numel()) if circuit.inverts(index)),
            )
            for index, values in enumerate(circuit.inputs)
        ),
        currents=tuple(tuple(f"Inudge_{name}_{unit}" for unit in own) for name, own in units),
        held=tuple(
            tuple(f"Vhold_{name}_{unit}" for unit in own) if index in held else ()
            for index, (name, own) in enumerate(units)
        ),
        nodes=tuple(
            tuple(output_node(circuit, names, index, unit) for unit in own) for index, (_, own) in enumerate(units)
        ),
        volts=fabric.volts,
        amperes=fabric.siemens * fabric.volts,
    )
