"""Prices: what a partition costs in modelled energy, operation by operation, for the search.

The prices are those of the cost report (`block_costs.py`), in the middle of their ranges. So that the search can keep
the sum up to date, each belongs to one operation or one converted value:

    a digital operation     its digital work
    a layer                 one read, or 2 n in a phase of n sweeps if it reads a state of its block
    a value                 a DAC for each block that it enters, an ADC if it leaves its own, with memory for both

In a training step with P = 1 nudged phase the reads are doubled, errors are converted the other way, digital work
counts three times, and a layer that reads a state has two outer products of states that ADCs read in the place of one.
What depends on a whole block is left out, and `planning` compares the results by the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

from ffebm_compiler.errors import HardwareError
from ffebm_compiler.hardware.costs import Quantity, constants_of
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.work import Work, work_of
from ffebm_compiler.ir import Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.block_costs import RTOL, chip_energy, digital_energy, predicted_sweeps
from ffebm_compiler.plan_data import PlanOptions

__all__ = ["Prices", "middle", "prices_for", "prices_of"]

_UNIT = 1e3
"""Units of a price in a pJ. Prices are whole numbers of fJ, so that sums do not depend on their order."""


@dataclass(frozen=True)
class Prices:
    """Prices in fJ."""

    dac: int
    """Of a value that enters a block."""
    adc: int
    """Of a value that leaves its block."""
    digital: tuple[int, ...]
    """Of each operation if it is digital."""
    outer: tuple[int, ...]
    """Of each layer that reads no state of its block; 0 for other operations."""
    inner: tuple[int, ...]
    """Of each layer that reads a state of its block."""


def middle(quantity: Quantity) -> float:
    """The middle of a range, in pJ.

    Raises:
        HardwareError: the quantity is unknown.
    """
    if quantity.low is None or quantity.high is None:
        raise HardwareError(
            "objective='energy' needs figures that this hardware does not have: give costs, such as "
            "Hardware(adc_bits=8, dac_bits=8) or costs={'adc_pj': 1.0, 'dac_pj': 0.4}"
        )
    return (quantity.low + quantity.high) / 2


def prices_for(graph: OperationGraph, hardware: Hardware, options: PlanOptions) -> Prices | None:
    """The prices that the options of a plan name; None if it minimises conversions."""
    if options.objective != "energy":
        return None
    return prices_of(graph, hardware, options.for_ == "training", predicted_sweeps(options.loop_gain, RTOL))


def prices_of(graph: OperationGraph, hardware: Hardware, training: bool, sweeps: int) -> Prices:
    """The prices of a graph on a fabric, in an inference or a training step.

    Raises:
        HardwareError: the cost model has no figure for the converters of this hardware.
    """
    constants = constants_of(hardware)
    chip = constants["chip_op_pj"].value.known
    traffic = middle(constants["traffic_pj"].value)
    dac, adc = (0.0, 0.0) if chip else (middle(constants[name].value) for name in ("dac_pj", "adc_pj"))
    reading = middle(constants["adc_pj"].value)
    phases = 1 if training else 0

    def whole(energy: float) -> int:
        return round(energy * _UNIT)

    def read(op: Operation) -> float:
        if chip:
            return middle(chip_energy(hardware, [op], constants))
        return middle(constants["cell_pj"].value) * op.macs * hardware.for_layer(op.path).devices_per_weight

    digital, outer, inner = [], [], []
    for op in graph.operations:
        work = work_of(op, graph) or Work()
        digital.append(whole(middle(digital_energy(work, constants)) * (3 if training else 1)))
        if op.role is not Role.WEIGHT:
            outer.append(0)
            inner.append(0)
            continue
        each = read(op) * (1 + phases)
        product = middle(digital_energy(Work(macs=op.macs, traffic=op.rows * op.cols * op.groups), constants)) * phases
        outer.append(whole(each + product))
        inner.append(whole(2 * sweeps * each + phases * (2 * product + 2 * op.values * reading)))
    return Prices(
        dac=whole(dac + phases * adc + (1 + phases) * traffic),
        adc=whole(adc + phases * dac + (1 + phases) * traffic),
        digital=tuple(digital),
        outer=tuple(outer),
        inner=tuple(inner),
    )
