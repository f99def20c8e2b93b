"""The modelled energy and latency of a plan, per block and in total, against an all-digital baseline.

Let a block have outer layers, which read its inputs alone, and inner ones, which read states of
the block. A phase (free or nudged) that takes n sweeps reads

    M = Σ_outer MACs + 2 n Σ_inner MACs

weights. Outer layers are read once, since their drive does not change while the block settles. An inner layer is
read forward and backward in every sweep. A block without inner layers has n = 1 and settles at
once. With R = devices_per_weight, *bottom-up*:

    E_inference = M R E_cell + (DAC + S_d) E_dac + (ADC + S_a) E_adc + (DAC + ADC) E_traffic
    E_step      = E_inference + updates
                  + P (M R E_cell + (ADC + S_d) E_dac + (DAC + S_a) E_adc + (DAC + ADC) E_traffic)

for P nudged phases. In each of them the errors enter at the outputs through DACs and leave at
the inputs through ADCs. S_a and S_d are what digital row sums convert (`passes/partition/partial_sums.py`), 0 with
analog ones. *At chip level* the reads of a phase cost 2 M E_op, with E_op the published energy of an operation on a
full tile, up to what whole tiles cost. Backward reads are taken to cost what forward ones cost.

The weight gradients of a block are two digital outer products (one if it does not settle), of states that ADCs read.
A step that updates in place has none. Digital work (`hardware/work.py`) costs E_mac, E_element and E_traffic, three
times that in a training step. Figures that no source gives are unknown unless `Hardware.costs` gives them. Every figure
is modelled, none is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ffebm_compiler.errors import InputError
from ffebm_compiler.files.checked_json import short
from ffebm_compiler.hardware.costs import Constant, Quantity, constants_of
from ffebm_compiler.hardware.work import Work
from ffebm_compiler.ir import Role
from ffebm_compiler.passes.partition.block_costs import (
    BlockCost,
    block_cost,
    digital_energy,
    predicted_sweeps,
    total_work,
)
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.plan_data import PlanData
from ffebm_compiler.reports.text import count, table_text

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["BlockCost", "CostReport", "cost_report", "cost_report_of", "predicted_sweeps"]

_MOST_PHASES = 10**6
"""Far more than any estimator has. Energies of more would leave the range of floats at last."""


@dataclass(frozen=True)
class CostReport:
    """Modelled energy and latency per sample; `print` it."""

    model: str
    hardware: str
    blocks: tuple[BlockCost, ...]
    nudged_phases: int
    digital_macs: int
    """Multiply-accumulates of layers that stayed digital."""
    digital_work: Work
    """All that is computed digitally: `digital_macs`, products of two values, elementary operations, memory."""
    uncounted: Mapping[str, int]
    """Digital operations without a figure. They are the same in the baseline."""
    digital_parts: Quantity
    """Energy of the digital work of the hybrid, one inference."""
    inference: Quantity
    """Energy of crossbars, converters, memory and digital work, bottom-up."""
    training: Quantity
    """The phases of a training step, and three times the digital work."""
    gradients: Quantity
    """Energy of computing the weight gradients of the blocks digitally."""
    chip_inference: Quantity
    """The same with the blocks at chip level."""
    chip_training: Quantity
    update: Quantity
    """Energy of programming every analog weight once."""
    block_latency: Quantity
    """Time of the blocks, one after the other."""
    latency: Quantity
    """Time of the blocks and the digital work, one after the other."""
    digital_inference: Quantity
    """Energy of the baseline, with everything in digital arithmetic."""
    digital_training: Quantity
    gpu_inference: Quantity
    gpu_training: Quantity
    constants: Mapping[str, Constant]

    def to_dict(self) -> dict[str, Any]:
        """JSON values. A quantity is {"low", "high", "unit"}, with null if it is unknown."""
        from dataclasses import asdict

        return {"note": "modelled, per sample", **asdict(self)}

    def __str__(self) -> str:
        """Tables of blocks and totals, and the source of every constant."""
        summing = any(cost.summed for cost in self.blocks)
        rows = [
            (
                cost.block,
                count(cost.macs),
                "unknown" if cost.sweeps is None else str(cost.sweeps),
                count(cost.dac + cost.adc),
                *(["unknown" if cost.summed is None else count(cost.summed)] if summing else []),
                str(cost.analog),
                str(cost.converters),
                str(cost.training),
                str(cost.digital),
            )
            for cost in self.blocks
        ]
        columns = ("block", "MACs", "sweeps", "conversions", *(["of partial sums"] if summing else []),
                   "crossbars", "converters", "step", "digital")  # fmt: skip
        pairs = (
            ("one inference", self.inference, self.chip_inference, self.digital_inference),
            ("one training step", self.training, self.chip_training, self.digital_training),
            (
                "with weight gradients",
                self.training + self.gradients,
                self.chip_training + self.gradients,
                self.digital_training,
            ),
        )
        totals = [
            (name, str(low), _times(low, digital), str(chip), _times(chip, digital), str(digital))
            for name, low, chip, digital in pairs
        ]
        heads = (
            "total",
            "hybrid, bottom-up",
            "digital / it",
            "hybrid, chip level",
            "digital / it",
            "all digital, 45 nm",
        )
        lines = [
            f"modelled costs per sample of {self.model} on {self.hardware} (nothing here is measured)",
            table_text("", columns, rows) if rows else "no energy blocks",
            table_text("", heads, totals),
            "bottom-up adds the figures of parts, and chip level takes the published energy of a whole chip's operation"
            + ("" if self.chip_inference.known else " (this hardware has none)"),
            f"digital work of the hybrid, in both: {self.digital_parts} for {count(self.digital_work.macs)} "
            f"multiply-accumulates, {count(self.digital_work.elements)} elementary operations and "
            f"{count(self.digital_work.traffic)} values through memory",
            f"latency of one inference: {self.latency}; of its blocks: {self.block_latency} (one after the other, "
            "without the time of memory)",
            f"on a V100 at peak: one inference {self.gpu_inference}, one training step {self.gpu_training}",
            f"a training step has one free and {self.nudged_phases} nudged phases; its weight update: {self.update}",
            "weight gradients of the blocks are computed digitally, from states that ADCs read; devices that update in "
            "place need none",
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
    nudged_phases = plain(nudged_phases)
    if isinstance(nudged_phases, bool) or not isinstance(nudged_phases, int) or not 1 <= nudged_phases <= _MOST_PHASES:
        raise InputError(
            f"nudged_phases is {short(nudged_phases)}; expected a whole number of at least 1 and at most {_MOST_PHASES}"
        )
    constants = constants_of(plan.hardware)
    known = dict(sweeps or {})
    users = plan.graph.users()
    blocks = tuple(
        block_cost(plan, block, users, known.get(block.name, expected), nudged_phases, constants)
        for block in plan.blocks
    )
    analog = {name for block in plan.blocks for name in block.operations}
    staying = [op for op in plan.graph.operations if op.name not in analog]
    work, uncounted = total_work(plan, staying)
    everything, _ = total_work(plan, plan.graph.operations)
    parts, baseline = digital_energy(work, constants), digital_energy(everything, constants)
    zero = Quantity(0.0, 0.0, "pJ")
    weights = sum(op.rows * op.cols * op.groups for op in plan.graph.operations if op.name in analog)
    block_latency = sum((cost.latency for cost in blocks), Quantity(0.0, 0.0, "ns"))
    gpu = constants["gpu_mac_pj"].value
    return CostReport(
        model=plan.model,
        hardware=plan.hardware.name,
        blocks=blocks,
        nudged_phases=nudged_phases,
        digital_macs=sum(op.macs for op in staying if op.role is Role.WEIGHT),
        digital_work=work,
        uncounted=uncounted,
        digital_parts=parts,
        inference=sum((cost.inference for cost in blocks), parts),
        training=sum((cost.training for cost in blocks), parts * 3),
        gradients=sum((cost.gradients for cost in blocks), zero),
        chip_inference=sum((cost.chip_inference for cost in blocks), parts),
        chip_training=sum((cost.chip_training for cost in blocks), parts * 3),
        update=constants["update_pj"].value * weights,
        block_latency=block_latency,
        latency=block_latency + constants["digital_ns"].value * (work.macs + work.elements),
        digital_inference=zero + baseline,
        digital_training=zero + baseline * 3,
        gpu_inference=gpu * everything.macs,
        gpu_training=gpu * (3 * everything.macs),
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
