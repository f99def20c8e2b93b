"""The elements of a netlist: sources, resistors, diodes and amplifiers of a `Circuit`, as lines for SPICE.

A unit of layer m is a node `v_NAME_i` of voltage V₀ s/A_m, an amplifier of gain A_m that makes `s_NAME_i` of it, and
the lines ±s to the layers that read it. A layer that needs no amplifiers has nodes alone. Diodes on the node make the
activation. `runtime/energies/circuit.py` has the equations. Voltages are in units of V₀, conductances in units of g₀.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count, pairwise

from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.runtime.activations.base import Lines
from ffebm_compiler.runtime.energies.circuit import Circuit, Coupling, Stage

__all__ = [
    "LARGEST",
    "Characteristic",
    "Writer",
    "characteristic",
    "check_positive",
    "check_size",
    "elements",
    "models",
    "names_of",
    "output_node",
]

LARGEST = 2_000_000
"""The most resistors that a netlist is written for."""


@dataclass(frozen=True)
class Branch:
    """A diode with a resistor in series: the current slope · (s − knot) above the knot, or below it."""

    knot: float
    slope: float
    above: bool


@dataclass(frozen=True)
class Characteristic:
    """∂G(s) − s of an activation as elements at a node: what of the current of a field they take."""

    slope: float
    """Of the line where σ is steepest: a resistor to ground."""
    offset: float
    """A current."""
    branches: tuple[Branch, ...]
    """Diodes with resistors in series, on both sides of that line."""
    steps: tuple[tuple[float, float], ...] = ()
    """(knot, width) of currents ½ width · sign(s − knot), which a bridge of four diodes around a source limits."""


def characteristic(stage: Stage, lines: Lines) -> Characteristic:
    """The elements that make an activation.

    Raises:
        UnsupportedError: its lines are steeper outside than inside.
    """
    lines, steps = _without_steps(lines)
    values = _values(lines)
    extra = [1 / slope - 1 if slope else math.inf for slope in lines.slopes]
    base = min(range(len(extra)), key=lambda index: extra[index])
    right, left = extra[base:], extra[: base + 1][::-1]
    if any(b < a for side in (left, right) for a, b in pairwise(side)):
        raise UnsupportedError(
            f"the activation {stage.activation.name} of layer {stage.name!r} has steeper lines outside than "
            "inside, for which the netlist has no diodes. Use ReLU, leaky ReLU, clamp, hard tanh, hard sigmoid or "
            "softshrink"
        )
    knots = lines.knots or (0.0,)
    place = min(max(base - 1, 0), len(knots) - 1)
    offset = knots[place] - values[place] / lines.slopes[base] + sum(width for _, width in steps) / 2
    found = [Branch(values[k], extra[k + 1] - extra[k], True) for k in range(base, len(lines.knots))]
    found += [Branch(values[k], extra[k] - extra[k + 1], False) for k in range(base)]
    return Characteristic(extra[base], offset, tuple(found), steps)


def _values(lines: Lines) -> list[float]:
    """σ at every knot; at 0 if there are none."""
    values = [lines.start]
    for index in range(1, len(lines.knots)):
        values.append(values[-1] + lines.slopes[index] * (lines.knots[index] - lines.knots[index - 1]))
    return values


def _without_steps(lines: Lines) -> tuple[Lines, tuple[tuple[float, float], ...]]:
    """Lines without flat ones between others, where ∂G jumps, and (value, width) of these jumps."""
    values, steps = _values(lines), []
    knots, slopes, moved = [], [lines.slopes[0]], 0.0
    for index, knot in enumerate(lines.knots):
        inner = index + 1 < len(lines.knots) and lines.slopes[index + 1] == 0
        if inner:
            width = lines.knots[index + 1] - knot
            steps.append((values[index], width))
        else:
            knots.append(knot - moved)
            slopes.append(lines.slopes[index + 1])
        moved += width if inner else 0.0
    return Lines(tuple(knots), tuple(slopes), lines.start), tuple(steps)


class Writer:
    """The lines of a netlist."""

    def __init__(self, siemens: float, volts: float) -> None:
        self.lines: list[str] = []
        self.siemens, self.volts = siemens, volts
        self._numbers = count(1)

    def resistor(self, first: str, second: str, conductance: float) -> None:
        """Of a dimensionless conductance; nothing where it is 0."""
        if conductance > 0:
            self._add("R", first, second, f"{1 / (conductance * self.siemens):.15g}")

    def current(self, node: str, value: float, name: str = "") -> None:
        """A current into a node. One without a name is left out where it is 0."""
        if value or name:
            self._add("I", "0", node, f"{value * self.siemens * self.volts:.15g}", name=name)

    def source(self, node: str, value: float, name: str = "") -> None:
        """A voltage source."""
        self._add("V", node, "0", f"{value * self.volts:.15g}", name=name)

    def diode(self, anode: str, cathode: str) -> None:
        """One of the netlist's model."""
        self._add("D", anode, cathode, "diode")

    def limiter(self, label: str, node: str, reference: str, current: float) -> None:
        """A bridge around a current source: it passes any current from −`current` to `current`, and no more."""
        top, bottom = f"t_{label}", f"b_{label}"
        for anode, cathode in ((node, top), (bottom, node), (reference, top), (bottom, reference)):
            self.diode(anode, cathode)
        self._add("I", top, bottom, f"{current * self.siemens * self.volts:.15g}")

    def _add(self, kind: str, *parts: str, name: str = "") -> None:
        self.lines.append(f"{kind}{name or next(self._numbers)} {' '.join(parts)}")


def check_positive(**numbers: float) -> None:
    """Refuse anything but finite positive numbers.

    Raises:
        InputError: one is not; names it.
    """
    for name, given in numbers.items():
        value = plain(given)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"{name} is {value!r}; expected a positive number")


def check_size(circuit: Circuit, title: str) -> None:
    """Refuse a circuit of too many resistors.

    Raises:
        InputError: it has more than `LARGEST` pairs.
    """
    resistors = sum(part.plus.numel() for stage in circuit.stages for part in stage.couplings)
    if resistors > LARGEST:
        raise InputError(
            f"{title} has {resistors} pairs of resistors; a netlist is written for at most {LARGEST}. Convert with a "
            "smaller core (Hardware(tiles_per_core=...)) or fewer layers a block"
        )


def models(emission: float, saturation: float, abstol: float) -> tuple[str, str]:
    """The diodes, and the tolerances of the simulator."""
    return (
        f".model diode d(is={saturation:.6g} n={emission:.6g} rs=0)",
        f".options reltol=1e-9 abstol={abstol:.6g} vntol=1e-12 gmin=1e-16 itl1=2000",
    )


def elements(writer: Writer, circuit: Circuit, names: list[str], nudges: Mapping[str, Tensor]) -> None:
    """The sources of the inputs, and every layer."""
    for index, values in enumerate(circuit.inputs):
        writer.lines.append(f"* input {index}")
        for unit, value in enumerate(values.tolist()):
            writer.source(f"x{index}_{unit}", value, f"x{index}_{unit}")
            if circuit.inverts(index):
                writer.source(f"x{index}_{unit}n", -value, f"x{index}_{unit}n")
    for index, stage in enumerate(circuit.stages):
        kind = "no amplifiers" if circuit.direct(index) else f"amplifiers of gain {stage.gain:.6g}"
        writer.lines.append(f"* layer {stage.name}: {stage.activation.name}, {kind}")
        _stage(writer, circuit, index, names, nudges.get(stage.name))


def names_of(circuit: Circuit) -> list[str]:
    """A name for each layer, from its module path: SPICE knows no capitals, and few signs."""
    found: list[str] = []
    for stage in circuit.stages:
        plain = re.sub(r"[^a-z0-9]+", "_", stage.name.lower()).strip("_") or "state"
        others = (f"{plain}_again{k}" for k in count(2))
        name = next(other for other in chain([plain], others) if other not in found)
        found.append(name)
    return found


def output_node(circuit: Circuit, names: list[str], index: int, unit: int) -> str:
    """The node whose voltage is the state of a unit."""
    return f"{'v' if circuit.direct(index) else 's'}_{names[index]}_{unit}"


def _stage(writer: Writer, circuit: Circuit, index: int, names: list[str], nudge: Tensor | None) -> None:
    stage, name = circuit.stages[index], names[index]
    bias = stage.bias if nudge is None else stage.bias + nudge
    later, direct = circuit.readers(index), circuit.direct(index)
    made: dict[Lines, Characteristic] = {}
    references: dict[float, str] = {0.0: "0"}
    for unit, of_unit in enumerate(stage.activation.unit_lines(stage.shape)):
        if of_unit not in made:
            made[of_unit] = characteristic(stage, of_unit)
        elements_of = made[of_unit]
        for knot in (*(side.knot for side in elements_of.branches), *(knot for knot, _ in elements_of.steps)):
            if knot not in references:
                references[knot] = f"k_{name}_{len(references)}"
                writer.source(references[knot], knot / stage.gain)
        node, out = f"v_{name}_{unit}", f"s_{name}_{unit}"
        writer.resistor(node, "0", float(stage.pads[unit]) + elements_of.slope * stage.gain)
        writer.current(node, float(bias[unit]) - elements_of.offset)
        for branch, side in enumerate(elements_of.branches):
            reference, inner = references[side.knot], node
            if side.slope < math.inf:
                inner = f"d_{name}_{unit}_{branch}"
                writer.resistor(node, inner, side.slope * stage.gain)
            writer.diode(*((inner, reference) if side.above else (reference, inner)))
        for step, (knot, width) in enumerate(elements_of.steps):
            writer.limiter(f"{name}_{unit}_{step}", node, references[knot], width / 2)
        if not direct:
            _amplify(writer, node, out, stage.gain, [(f"{name}_{unit}_{names[m]}", p, unit) for m, p in later])
        for part in stage.couplings:
            for sign, matrix in (("p", part.plus), ("n", part.minus)):
                for source, conductance in _above_zero(matrix[unit]):
                    if part.source < 0:
                        line = f"x{-1 - part.source}_{source}{'n' if sign == 'n' else ''}"
                    elif circuit.direct(part.source):
                        line = f"v_{names[part.source]}_{source}"
                    else:
                        line = f"{sign}_{names[part.source]}_{source}_{name}"
                    writer.resistor(line, node, conductance)


def _amplify(writer: Writer, node: str, out: str, gain: float, readers: Sequence[tuple[str, Coupling, int]]) -> None:
    """The amplifiers of a unit: they drive its lines, and draw a part of the lines' currents from its node."""
    writer.lines.append(f"E_{out} {out} 0 {node} 0 {gain:.15g}")
    for label, part, unit in readers:
        for sign, matrix in (("p", part.plus), ("n", part.minus)):
            if not bool((matrix[:, unit] > 0).any()):
                continue
            line, start, reflection = f"{sign}_{label}", out, part.reflection
            if sign == "n":
                start, reflection = f"m_{label}", -reflection
                writer.lines.append(f"E_{start} {start} 0 {node} 0 {-gain:.15g}")
            writer.lines.append(f"V_{line} {start} {line} 0")
            writer.lines.append(f"F_{line} {node} 0 V_{line} {reflection:.15g}")


def _above_zero(row: Tensor) -> Iterator[tuple[int, float]]:
    for place in row.nonzero().flatten().tolist():
        yield place, float(row[place])
