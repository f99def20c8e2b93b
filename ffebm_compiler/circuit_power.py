"""What the circuits of resistive blocks dissipate while they hold their equilibrium.

    P = V₀² g₀ Σ_m [ Σ w (± s_source − v_m)² + Σ pad v_m² + the leaks of activations ] ,   v_m = s_m/A_m ,

with ideal diodes, which dissipate nothing. It is not the energy that the states minimise: that has factors c_m A_m, and
the work of the biases. What flows in is the power of the voltage sources at the inputs, of the bias currents, and of
the amplifiers' outputs. What amplifiers need beyond what they deliver depends on how they are made, and is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffebm_compiler.circuit_elements import characteristic, check_positive
from ffebm_compiler.errors import InputError
from ffebm_compiler.reports.text import table_text
from ffebm_compiler.runtime.energies.circuit import Circuit, Stage
from ffebm_compiler.spice import recorded_circuit

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["BlockPower", "PowerReport", "power_report"]


@dataclass(frozen=True)
class BlockPower:
    """The mean power of one block over the samples, in watts."""

    block: str
    resistors: float
    """Dissipated in the conductances of the weights."""
    pads: float
    """Dissipated in the resistors to ground."""
    leaks: float
    """Dissipated in the resistors and current limiters of activations."""
    inputs: float
    """Delivered by the sources of the inputs."""
    biases: float
    """Delivered by the currents of the biases."""
    amplifiers: float
    """Delivered by the amplifiers and by the sources that clamps conduct to, as the rest; 0 without both."""

    @property
    def total(self) -> float:
        """Dissipated in all."""
        return self.resistors + self.pads + self.leaks


@dataclass(frozen=True)
class PowerReport:
    """What the circuits of a hybrid dissipate, computed from their states; `print` it."""

    model: str
    volts: float
    """The largest voltage of a node."""
    siemens: float
    """The conductance of the largest weight."""
    samples: int
    blocks: tuple[BlockPower, ...]

    @property
    def total(self) -> float:
        """In watts, all blocks together."""
        return sum(block.total for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, in watts."""
        from dataclasses import asdict

        return {"note": "computed with ideal diodes, mean over samples", "unit": "W", **asdict(self)}

    def __str__(self) -> str:
        """A table in milliwatts."""
        names = ("resistors", "pads", "leaks", "total", "inputs", "biases", "amplifiers")
        rows = [(block.block, *(f"{1e3 * getattr(block, name):.4g}" for name in names)) for block in self.blocks]
        return "\n".join(
            [
                f"power of the circuits of {self.model} in mW: nodes of at most {self.volts:g} V, weights of at most "
                f"{self.siemens:g} S, ideal diodes, mean of {self.samples} samples",
                table_text("", ("block", *names[:3], "dissipated", "from inputs", "biases", "amplifiers"), rows),
            ]
        )


def power_report(hybrid: HybridCore, inputs: tuple[Tensor, ...], volts: float, siemens: float) -> PowerReport:
    """See `HybridModel.power_report`."""
    check_positive(volts=volts, siemens=siemens)
    if not inputs:
        raise InputError("inputs is empty, so that nothing drives the circuits. Pass the inputs of the network")
    coupled = [block for block in hybrid.blocks if block.module.program.coupled]
    if not coupled:
        raise InputError(
            "every block has one layer and no feedback, so that there is no circuit that settles: convert with "
            "hardware whose cores hold several layers, or with fold_batchnorm=True"
        )
    with torch.no_grad(), hybrid.in_mode(False), hybrid.recording() as record:
        hybrid(*inputs)
    found = []
    for block in coupled:
        circuit, given = recorded_circuit(block.module, record[block.name][0])
        independent = block.module.program.resizable
        states = [_rows(state.double().cpu(), independent) for state in block.module.states]
        found.append(_power(block.name, circuit, [_rows(x, independent) for x in given], states, volts, siemens))
    return PowerReport(hybrid.plan.model, volts, siemens, len(inputs[0]), tuple(found))


def _rows(value: Tensor, samples: bool) -> Tensor:
    """A row for each sample; one row where samples are not independent."""
    return value.reshape(len(value), -1) if samples else value.reshape(1, -1)


def _power(
    name: str, circuit: Circuit, inputs: list[Tensor], states: list[Tensor], volts: float, siemens: float
) -> BlockPower:
    nodes = [state / stage.gain for state, stage in zip(states, circuit.stages, strict=True)]
    largest = max(float(node.abs().max()) for node in nodes) or 1.0
    strongest = max(float((p.plus + p.minus).max()) for stage in circuit.stages for p in stage.couplings)
    unit = (volts / largest) ** 2 * siemens / strongest / len(nodes[0])
    resistors = pads = leaks = delivered = biases = 0.0
    for stage, node, state in zip(circuit.stages, nodes, states, strict=True):
        for part in stage.couplings:
            line = states[part.source] if part.source >= 0 else inputs[-1 - part.source]
            for matrix, sign in ((part.plus, 1.0), (part.minus, -1.0)):
                into = sign * line @ matrix.T  # Σ_j w_ij line_j
                from_line = float((line.square() @ matrix.sum(0)).sum())
                resistors += from_line - 2 * float((node * into).sum()) + float((node.square() @ matrix.sum(1)).sum())
                if part.source < 0:
                    delivered += from_line - float((node * into).sum())
        pads += float((node.square() @ stage.pads).sum())
        leaks += _leaks(stage, node, state)
        biases += float((node @ stage.bias).sum())
    alone = all(circuit.direct(index) and stage.activation.cone for index, stage in enumerate(circuit.stages))
    amplifiers = 0.0 if alone else resistors + pads + leaks - delivered - biases
    return BlockPower(name, *(unit * value for value in (resistors, pads, leaks, delivered, biases, amplifiers)))


def _leaks(stage: Stage, node: Tensor, state: Tensor) -> float:
    """What the resistors and limiters of an activation dissipate: slope A (v − knot/A)², and ½ width |v − knot/A|."""
    total = 0.0
    for unit, lines in enumerate(stage.activation.unit_lines(stage.shape)):
        made = characteristic(stage, lines)
        total += made.slope * stage.gain * float(node[:, unit].square().sum())
        for side in made.branches:
            over = state[:, unit] - side.knot if side.above else side.knot - state[:, unit]
            if side.slope < math.inf:
                total += side.slope / stage.gain * float(over.clamp_min(0).square().sum())
        for knot, width in made.steps:
            total += 0.5 * width / stage.gain * float((state[:, unit] - knot).abs().sum())
    return total
