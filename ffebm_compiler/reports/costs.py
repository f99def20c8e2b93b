"""The modelled energy and latency of a plan, per block and in total, against an all-digital baseline.

Let a block have outer layers, which read its inputs alone, and inner ones, which read states of
the block. A phase (free or nudged) that takes n sweeps reads

    M = Σ_outer MACs + 2 n Σ_inner MACs

weights. Outer layers are read once, since their drive does not change while the block settles. An inner layer is
read forward and backward in every sweep. A block without inner layers has n = 1 and settles at
once. With R = devices_per_weight:

    E_inference = M R E_cell + DAC E_dac + ADC E_adc
    E_step      = E_inference + P (M R E_cell + ADC E_dac + DAC E_adc) + updates

for P nudged phases. In each of them the errors enter at the outputs through DACs and leave at
the inputs through ADCs. Figures that no source gives (programming a device, times) are unknown unless
`Hardware.costs` gives them. Every figure is modelled, none is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ffebm_compiler.errors import InputError
from ffebm_compiler.hardware.costs import Constant, Quantity, constants_of, unknown
from ffebm_compiler.ir import Role
from ffebm_compiler.plan_data import BlockPlan, PlanData
from ffebm_compiler.reports.text import count, table_text

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["BlockCost", "CostReport", "cost_report", "cost_report_of", "predicted_sweeps"]


@dataclass(frozen=True)
class BlockCost:
    """The modelled costs of one block, per sample."""

    block: str
    macs: int
    """Multiply-accumulates of one pass through its layers."""
    sweeps: int | None
    """Sweeps of a phase; None if no certificate predicts them."""
    reads: int | None
    """Weights read in one phase: M above."""
    dac: int
    adc: int
    analog: Quantity
    """Energy of the crossbars in one inference."""
    converters: Quantity
    """Energy of DACs and ADCs in one inference."""
    inference: Quantity
    training: Quantity
    """Energy of one training step without the weight update."""
    latency: Quantity
    """Time of one inference."""
    digital: Quantity
    """Energy of the same layers in digital arithmetic, one inference."""


@dataclass(frozen=True)
class CostReport:
    """Modelled energy and latency per sample; `print` it."""

    model: str
    hardware: str
    blocks: tuple[BlockCost, ...]
    nudged_phases: int
    digital_macs: int
    """Multiply-accumulates of layers that stayed digital."""
    uncounted: Mapping[str, int]
    """Digital operations whose energy is unknown. It is the same in the baseline."""
    inference: Quantity
    """Energy of crossbars, converters and the layers that stayed digital."""
    training: Quantity
    update: Quantity
    """Energy of programming every analog weight once."""
    latency: Quantity
    digital_inference: Quantity
    """Energy of the baseline, with all layers in digital arithmetic."""
    digital_training: Quantity
    gpu_inference: Quantity
    constants: Mapping[str, Constant]

    def to_dict(self) -> dict[str, Any]:
        """JSON values. A quantity is {"low", "high", "unit"}, with null if it is unknown."""
        from dataclasses import asdict

        return {"note": "modelled, per sample", **asdict(self)}

    def __str__(self) -> str:
        """Tables of blocks and totals, and the source of every constant."""
        rows = [
            (
                cost.block,
                count(cost.macs),
                "unknown" if cost.sweeps is None else str(cost.sweeps),
                count(cost.dac + cost.adc),
                str(cost.analog),
                str(cost.converters),
                str(cost.training),
                str(cost.digital),
            )
            for cost in self.blocks
        ]
        columns = ("block", "MACs", "sweeps", "conversions", "crossbars", "converters", "step", "digital")
        totals = [
            (
                "one inference",
                str(self.inference),
                str(self.digital_inference),
                _times(self.inference, self.digital_inference),
            ),
            (
                "one training step",
                str(self.training),
                str(self.digital_training),
                _times(self.training, self.digital_training),
            ),
        ]
        lines = [
            f"modelled costs per sample of {self.model} on {self.hardware} (nothing here is measured)",
            table_text("", columns, rows) if rows else "no energy blocks",
            table_text("", ("total", "hybrid", "all digital, 45 nm", "digital / hybrid"), totals),
            f"latency of one inference: {self.latency}; one inference on a V100 at peak: {self.gpu_inference}",
            f"a training step has one free and {self.nudged_phases} nudged phases; its weight update: {self.update}",
        ]
        if self.uncounted:
            listed = ", ".join(f"{name} x{times}" if times > 1 else name for name, times in self.uncounted.items())
            lines.append(f"not in any total, unknown and the same on both sides: {listed}")
        lines.append("constants:")
        lines += [f"  {c.name}: {c.what}: {c.value} ({c.source})" for c in self.constants.values()]
        return "\n".join(lines)


def _times(hybrid: Quantity, digital: Quantity) -> str:
    ratio = digital.ratio(hybrid)
    return "unknown" if ratio is None else f"{ratio[0]:.2g}–{ratio[1]:.2g}"


def predicted_sweeps(feedback: float, rtol: float) -> int:
    """Sweeps of a block of loop gain κ to a relative change of `rtol`: ⌈log rtol / log κ⌉, at least 1.

    Raises:
        InputError: where κ or `rtol` is not strictly between 0 and 1.
    """
    for name, value in (("feedback", feedback), ("rtol", rtol)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise InputError(f"{name} is {value!r}; expected a number strictly between 0 and 1")
    return max(1, math.ceil(math.log(rtol) / math.log(feedback)))


def cost_report(
    plan: PlanData,
    *,
    feedback: float = 0.1,
    rtol: float = 1e-4,
    nudged_phases: int = 1,
    sweeps: Mapping[str, int | None] | None = None,
) -> CostReport:
    """Model the costs of a plan.

    Args:
        plan: the partition.
        feedback: the loop gain κ that the sweeps of a phase are predicted from.
        rtol: relative change at which a phase stops.
        nudged_phases: 1 for one-sided equilibrium propagation (the default), 2 for centered.
        sweeps: sweeps per block, which replace the predicted ones (`HybridModel.cost_report` gives them).

    Raises:
        InputError: for a feedback, tolerance or number of phases out of range.
        HardwareError: where `costs` of the hardware names an unknown constant.
    """
    expected = predicted_sweeps(feedback, rtol)
    if isinstance(nudged_phases, bool) or not isinstance(nudged_phases, int) or nudged_phases < 1:
        raise InputError(f"nudged_phases is {nudged_phases!r}; expected a whole number of at least 1")
    constants = constants_of(plan.hardware)
    known = dict(sweeps or {})
    blocks = tuple(
        _block_cost(plan, block, known.get(block.name, expected), nudged_phases, constants) for block in plan.blocks
    )
    analog = {name for block in plan.blocks for name in block.operations}
    staying = [op for op in plan.graph.operations if op.name not in analog]
    digital_macs = sum(op.macs for op in staying if op.role is Role.WEIGHT)
    uncounted: dict[str, int] = {}
    for op in staying:
        if op.role is not Role.WEIGHT:
            uncounted[op.target] = uncounted.get(op.target, 0) + 1
    mac = constants["digital_mac_pj"].value
    zero = Quantity(0.0, 0.0, "pJ")
    weights = sum(op.rows * op.cols * op.groups for op in plan.graph.operations if op.name in analog)
    latency = Quantity(0.0, 0.0, "ns") if not staying else unknown("ns")
    return CostReport(
        model=plan.model,
        hardware=plan.hardware.name,
        blocks=blocks,
        nudged_phases=nudged_phases,
        digital_macs=digital_macs,
        uncounted=uncounted,
        inference=sum((cost.inference for cost in blocks), mac * digital_macs),
        training=sum((cost.training for cost in blocks), mac * (3 * digital_macs)),
        update=constants["update_pj"].value * weights,
        latency=sum((cost.latency for cost in blocks), latency),
        digital_inference=zero + mac * plan.total_macs,
        digital_training=zero + mac * (3 * plan.total_macs),
        gpu_inference=constants["gpu_mac_pj"].value * plan.total_macs,
        constants=constants,
    )


def cost_report_of(hybrid: HybridCore) -> CostReport:
    """The report of a hybrid, with sweeps from each block's certificate and phases from its estimator."""
    sweeps: dict[str, int | None] = {}
    phases = 1
    for block in hybrid.blocks:
        if block.certificate is not None:
            dtype = next((weight.dtype for weight in block.weights if weight is not None), torch.float32)
            sweeps[block.name] = block.certificate.sweeps(block.module.free_rtol(dtype))
        if getattr(block.module.active_estimator, "variant", "") == "centered":
            phases = 2
    return cost_report(hybrid.plan, nudged_phases=phases, sweeps=sweeps)


def _block_cost(
    plan: PlanData, block: BlockPlan, sweeps: int | None, phases: int, constants: Mapping[str, Constant]
) -> BlockCost:
    outer, inner = _outer_and_inner(plan, block)
    if not inner:
        sweeps = 1
    dac, adc = constants["dac_pj"].value, constants["adc_pj"].value
    reads = None if sweeps is None else sum(outer.values()) + 2 * sweeps * sum(inner.values())
    cell = constants["cell_pj"].value
    analog = unknown("pJ") if sweeps is None else cell * (_cells(plan, outer) + 2 * sweeps * _cells(plan, inner))
    converters = dac * block.dac + adc * block.adc
    back = dac * block.adc + adc * block.dac
    return BlockCost(
        block=block.name,
        macs=block.macs,
        sweeps=sweeps,
        reads=reads,
        dac=block.dac,
        adc=block.adc,
        analog=analog,
        converters=converters,
        inference=analog + converters,
        training=analog + converters + (analog + back) * phases,
        latency=_latency(plan, block, outer, inner, sweeps, constants),
        digital=constants["digital_mac_pj"].value * block.macs,
    )


def _outer_and_inner(plan: PlanData, block: BlockPlan) -> tuple[dict[str, int], dict[str, int]]:
    """MACs of the outer layers, which read only the block's inputs, and of the inner ones, which read its states."""
    members = set(block.operations)
    outer: dict[str, int] = {}
    inner: dict[str, int] = {}
    for name in block.operations:
        op = plan.graph[name]
        if op.role is Role.WEIGHT:
            (inner if any(source in members for source in op.inputs) else outer)[name] = op.macs
    return outer, inner


def _cells(plan: PlanData, macs: Mapping[str, int]) -> int:
    """Number of devices read for these multiply-accumulates of each layer."""
    return sum(
        count * plan.hardware.for_layer(plan.graph[name].path).devices_per_weight for name, count in macs.items()
    )


def _latency(
    plan: PlanData,
    block: BlockPlan,
    outer: Mapping[str, int],
    inner: Mapping[str, int],
    sweeps: int | None,
    constants: Mapping[str, Constant],
) -> Quantity:
    """Time of all reads and conversions of a phase, one after the other (with im2col one read per position)."""
    parallel = constants["converters"].value
    if sweeps is None or not parallel.low:
        return unknown("ns")
    turns = {
        name: op.positions if plan.hardware.for_layer(op.path).conv_mapping == "im2col" else 1
        for name in (*outer, *inner)
        if (op := plan.graph[name])
    }
    reads = sum(turns[name] for name in outer) + 2 * sweeps * sum(turns[name] for name in inner)
    return (
        constants["read_ns"].value * reads
        + constants["dac_ns"].value * math.ceil(block.dac / parallel.low)
        + constants["adc_ns"].value * math.ceil(block.adc / parallel.low)
    )
