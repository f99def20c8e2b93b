"""Block costs: the modelled costs of one energy block. `reports/costs.py` has the equations.

They are here and not among the reports because the partition can minimise them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ffebm_compiler.errors import InputError
from ffebm_compiler.hardware.costs import Constant, Quantity, constants_of, unknown
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.work import Work, work_of
from ffebm_compiler.ir import Operation, Role
from ffebm_compiler.passes.partition.partial_sums import PartialSums, partial_sums
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.plan_data import BlockPlan, PlanData

__all__ = [
    "RTOL",
    "BlockCost",
    "block_cost",
    "chip_energy",
    "digital_energy",
    "modelled_energy",
    "predicted_sweeps",
    "total_work",
]


RTOL = 1e-4
"""The relative change at which a phase stops, from which sweeps are predicted."""


@dataclass(frozen=True)
class BlockCost:
    """The modelled costs of one block, per sample."""

    block: str
    macs: int
    """Multiply-accumulates of one pass through its layers."""
    sweeps: int | None
    """Sweeps of a phase; None if no certificate predicts them."""
    reads: int | None
    """Weights read in one phase: M of `costs.py`."""
    dac: int
    adc: int
    summed: int | None
    """Conversions that digital row sums add to one inference; None if the sweeps are unknown."""
    analog: Quantity
    """Energy of the crossbars in one inference."""
    converters: Quantity
    """Energy of DACs and ADCs in one inference, with the digital addition of partial sums."""
    traffic: Quantity
    """Energy of memory for the values that enter and leave in one inference."""
    inference: Quantity
    training: Quantity
    """Energy of the phases of one training step, without weight gradients and update."""
    gradients: Quantity
    """Energy of computing the weight gradients digitally from the states of two phases."""
    chip_inference: Quantity
    """Energy of one inference at chip level: low if a read costs what is used of its tiles, high if it costs all."""
    chip_training: Quantity
    latency: Quantity
    """Time of one inference."""
    digital: Quantity
    """Energy of the same layers in digital arithmetic with their memory, one inference."""


def digital_energy(work: Work, constants: Mapping[str, Constant]) -> Quantity:
    """Energy of digital work: arithmetic and memory."""
    return (
        constants["digital_mac_pj"].value * work.macs
        + constants["element_pj"].value * work.elements
        + constants["traffic_pj"].value * work.traffic
    )


def total_work(plan: PlanData, operations: Iterable[Operation]) -> tuple[Work, dict[str, int]]:
    """The digital work of operations, and how many of each target have no figure."""
    total, missing = Work(), dict[str, int]()
    for op in operations:
        work = work_of(op, plan.graph)
        if work is None:
            missing[op.target] = missing.get(op.target, 0) + 1
        else:
            total += work
    return total, missing


@dataclass(frozen=True)
class _Conversions:
    """Conversions of a block beside those at its boundary, for a phase of n sweeps."""

    adc: int
    dac: int
    errors: int
    """ADCs of the errors at its inputs beside one each."""

    @classmethod
    def of(cls, sums: PartialSums, sweeps: int, settles: bool) -> _Conversions:
        """The sums of every sweep, with the feedback of a block that settles."""
        adc = sums.once - sums.spared_adc + sweeps * (sums.forward_adc + settles * sums.feedback_adc)
        dac = sweeps * (sums.forward_dac + settles * sums.feedback_dac) - sums.spared_dac
        return cls(adc, dac, sums.inputs)


def block_cost(
    plan: PlanData,
    block: BlockPlan,
    users: Mapping[str, Sequence[str]],
    sweeps: int | None,
    phases: int,
    constants: Mapping[str, Constant],
) -> BlockCost:
    """The costs of a block whose phases take so many sweeps, with so many nudged phases in a training step."""
    outer, inner = _outer_and_inner(plan, block)
    if not inner:
        sweeps = 1
    dac, adc, cell = (constants[name].value for name in ("dac_pj", "adc_pj", "cell_pj"))
    digital, _ = total_work(plan, (plan.graph[name] for name in block.operations))
    traffic = constants["traffic_pj"].value * (block.dac + block.adc)
    added = None
    reads = None
    analog = converters = back = chip = unknown("pJ")
    if sweeps is not None:
        added = _Conversions.of(partial_sums(plan.graph, plan.hardware, users, block.operations), sweeps, bool(inner))
        reads = _macs(outer) + 2 * sweeps * _macs(inner)
        analog = cell * (_cells(plan, outer) + 2 * sweeps * _cells(plan, inner))
        sums = constants["element_pj"].value * max(0, added.adc)
        converters = dac * (block.dac + added.dac) + adc * (block.adc + added.adc) + sums
        # In a nudged phase errors enter at the outputs and leave at the inputs; sums inside are those of a free phase.
        back = dac * (block.adc + added.dac) + adc * (block.dac + added.adc + added.errors) + sums
        chip = chip_energy(plan.hardware, outer, constants) + chip_energy(plan.hardware, inner, constants) * (
            2 * sweeps
        )
    return BlockCost(
        block=block.name,
        macs=block.macs,
        sweeps=sweeps,
        reads=reads,
        dac=block.dac,
        adc=block.adc,
        summed=None if added is None else added.adc + added.dac,
        analog=analog,
        converters=converters,
        traffic=traffic,
        inference=analog + converters + traffic,
        training=analog + converters + traffic + (analog + back + traffic) * phases,
        gradients=_gradients(plan, block, [*outer, *inner], bool(inner), constants),
        chip_inference=chip + traffic,
        chip_training=(chip + traffic) * (1 + phases),
        latency=_latency(plan, block, outer, inner, sweeps, added, constants),
        digital=digital_energy(digital, constants),
    )


def _outer_and_inner(plan: PlanData, block: BlockPlan) -> tuple[list[Operation], list[Operation]]:
    """The outer layers, which read only the block's inputs, and the inner ones, which read its states."""
    members = set(block.operations)
    outer: list[Operation] = []
    inner: list[Operation] = []
    for name in block.operations:
        op = plan.graph[name]
        if op.role is Role.WEIGHT:
            (inner if any(source in members for source in op.inputs) else outer).append(op)
    return outer, inner


def _macs(layers: Iterable[Operation]) -> int:
    return sum(op.macs for op in layers)


def _cells(plan: PlanData, layers: Iterable[Operation]) -> int:
    """Number of devices read in one pass."""
    return sum(op.macs * plan.hardware.for_layer(op.path).devices_per_weight for op in layers)


def chip_energy(hardware: Hardware, layers: Iterable[Operation], constants: Mapping[str, Constant]) -> Quantity:
    """Energy of one read of the layers at chip level: what they use of their tiles, to all of every tile."""
    each = constants["chip_op_pj"].value
    total = each * 0
    for op in layers:
        fabric = hardware.for_layer(op.path)
        used = full = 2 * op.macs
        if fabric.tile_rows is not None and fabric.tile_cols is not None:
            tiles = fabric.tiles(op.rows, op.cols, op.groups, op.positions, op.bias and fabric.bias_row)
            turns = op.positions if fabric.conv_mapping == "im2col" else 1
            held = fabric.tile_rows * fabric.tile_cols / fabric.devices_per_weight
            full = max(used, round(2 * tiles * turns * held))
        if each.low is None or each.high is None:
            return unknown("pJ")
        total += Quantity(each.low * used, each.high * full, "pJ")
    return total


def _gradients(
    plan: PlanData, block: BlockPlan, layers: Sequence[Operation], settles: bool, constants: Mapping[str, Constant]
) -> Quantity:
    """Outer products in digital arithmetic: of the states of two phases, or of error and input if nothing settles.

    Both are digital already for a block that does not settle. The states of one that does are read through ADCs.
    """
    phases = 2 if settles else 1
    states = phases * block.neurons if settles else 0
    weights = sum(op.rows * op.cols * op.groups for op in layers)
    operands = sum(plan.graph.values(name) for name in block.inputs) + phases * block.neurons
    work = Work(macs=phases * block.macs, traffic=states + operands + weights)
    return constants["adc_pj"].value * states + digital_energy(work, constants)


def _latency(
    plan: PlanData,
    block: BlockPlan,
    outer: Sequence[Operation],
    inner: Sequence[Operation],
    sweeps: int | None,
    added: _Conversions | None,
    constants: Mapping[str, Constant],
) -> Quantity:
    """Time of all reads and conversions of a phase, one after the other (with im2col one read per position)."""
    parallel = constants["converters"].value
    if sweeps is None or added is None or not parallel.low:
        return unknown("ns")

    def turns(layers: Sequence[Operation]) -> int:
        return sum(op.positions if plan.hardware.for_layer(op.path).conv_mapping == "im2col" else 1 for op in layers)

    return (
        constants["read_ns"].value * (turns(outer) + 2 * sweeps * turns(inner))
        + constants["dac_ns"].value * math.ceil((block.dac + added.dac) / parallel.low)
        + constants["adc_ns"].value * math.ceil((block.adc + added.adc) / parallel.low)
    )


def predicted_sweeps(feedback: float, rtol: float) -> int:
    """Sweeps of a block of loop gain κ to a relative change of `rtol`: ⌈log rtol / log κ⌉, at least 1.

    Raises:
        InputError: where κ or `rtol` is not strictly between 0 and 1.
    """
    feedback, rtol = plain(feedback), plain(rtol)
    for name, value in (("feedback", feedback), ("rtol", rtol)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise InputError(f"{name} is {value!r}; expected a number strictly between 0 and 1")
    return max(1, math.ceil(math.log(rtol) / math.log(feedback)))


def modelled_energy(plan: PlanData, training: bool, feedback: float, rtol: float = RTOL) -> Quantity:
    """Energy per sample that the partition can minimise: at chip level if the hardware is a chip, else bottom-up.

    Args:
        plan: the partition.
        training: a step with one nudged phase and digital weight gradients; otherwise an inference.
        feedback: the loop gain κ that the sweeps are predicted from.
        rtol: relative change at which a phase stops.
    """
    constants, users = constants_of(plan.hardware), plan.graph.users()
    sweeps = predicted_sweeps(feedback, rtol)
    inside = {name for block in plan.blocks for name in block.operations}
    work, _ = total_work(plan, (op for op in plan.graph.operations if op.name not in inside))
    total = digital_energy(work, constants) * (3 if training else 1)
    for block in plan.blocks:
        cost = block_cost(plan, block, users, sweeps, 1, constants)
        if constants["chip_op_pj"].value.known:
            total += cost.chip_training + cost.gradients if training else cost.chip_inference
        else:
            total += cost.training + cost.gradients if training else cost.inference
    return total
