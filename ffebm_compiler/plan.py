"""`Plan`: the partition of a network, with the methods that users call.

The passes make its data, `PlanData`. The methods here edit, check, compare, draw and store it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffebm_compiler.errors import PlanError
from ffebm_compiler.files.checked_json import clipped, read_json
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.plan_data import BlockPlan, DigitalPart, Placement, PlanData, PlanOptions, fingerprint

if TYPE_CHECKING:
    from ffebm_compiler.passes.partition.chips import FloorPlan
    from ffebm_compiler.passes.partition.compare import PlanDiff
    from ffebm_compiler.passes.partition.placement import TilePlacement
    from ffebm_compiler.reports.costs import CostReport
    from ffebm_compiler.reports.what_if import WhatIf

__all__ = ["BlockPlan", "DigitalPart", "Placement", "Plan", "PlanOptions", "fingerprint"]


@dataclass(frozen=True)
class Plan(PlanData):
    """The partition of one network for one hardware."""

    @classmethod
    def of(cls, data: PlanData) -> Plan:
        """The plan with the data that the passes have made."""
        return cls(**{item.name: getattr(data, item.name) for item in fields(PlanData) if item.init})

    def move(self, path: str, where: str) -> Plan:
        """A new plan with a layer, or all layers of a module, moved.

        Operations that follow a layer in its block (activations, wiring) move with it. Operations that would lie on
        a path out of the new block and back into it join the block, if they may.

        Args:
            path: module path of a layer, or of a module that holds some.
            where: `"digital"`, `"analog"` (a block of its own), or the name of a block.

        Raises:
            PlanError: there is no such layer or block, or the new plan would be over capacity,
                cyclic or against `force_digital` / `force_analog`. Gives the numbers.
        """
        from ffebm_compiler.passes.partition.edit import move

        moved = Plan.of(move(self, path, where))
        moved.validate()
        return moved

    def validate(self) -> None:
        """Check that the plan is complete, acyclic, within capacity and free of contradictions.

        Raises:
            PlanError: something is wrong. Names the block, part or layer, its value, and the right value.
        """
        from ffebm_compiler.passes.partition.check import check_plan

        check_plan(self)

    def diff(self, other: PlanData) -> PlanDiff:
        """The differences to another plan for the same model, to be printed.

        Raises:
            PlanError: if the other one is no plan, or has none of this plan's layers.
        """
        from ffebm_compiler.passes.partition.compare import diff_plans

        if not isinstance(other, PlanData):
            raise PlanError(
                f"the other plan is a {type(other).__name__}; expected a Plan, from ffebm.plan() or hybrid.plan"
            )
        return diff_plans(self, other)

    def advice(self) -> tuple[str, ...]:
        """Changes that would save conversions or place more layers. Each number comes from a new partition."""
        from ffebm_compiler.passes.partition.compare import advise

        return advise(self)

    def what_if(self) -> WhatIf:
        """The plan under every option that would change it, each computed from the plan's graph, to be printed.

        The options are `fold_batchnorm`, `digital_drive`, pooling inside blocks, the other objectives of a partition,
        a block for every layer and a core of twice the size. Each has the modelled energy of an inference and of a
        training step.
        """
        from ffebm_compiler.reports.what_if import what_if

        return what_if(self)

    def placement(self) -> TilePlacement:
        """The core, tile, rows and columns of every weight, and how full the tiles are."""
        from ffebm_compiler.passes.partition.placement import placement_of

        return placement_of(self)

    def floor_plan(self) -> FloorPlan:
        """The cores of each chip, and the values that cross between chips, to be printed."""
        from ffebm_compiler.passes.partition.chips import floor_plan_of

        return floor_plan_of(self)

    def cost_report(self, *, feedback: float = 0.1, rtol: float = 1e-4, nudged_phases: int = 1) -> CostReport:
        """Modelled energy and latency per sample, without building the hybrid, to be printed.

        Args:
            feedback: the loop gain κ that the sweeps of a phase are predicted from.
            rtol: relative change at which a phase stops.
            nudged_phases: 1 for one-sided equilibrium propagation, 2 for centered.

        Raises:
            InputError: for an argument out of range.
            HardwareError: where `costs` of the hardware names a constant that the model does not have.
        """
        from ffebm_compiler.reports.costs import cost_report

        return cost_report(self, feedback=feedback, rtol=rtol, nudged_phases=nudged_phases)

    def save_html(self, path: str | Path, what_if: bool = False) -> None:
        """Draw the plan as one self-contained, interactive HTML page; an existing file is replaced.

        `what_if` adds the plan under other options, which takes a partition for each.

        Raises:
            PlanError: where the plan has no operation or is cyclic.
            ExportError: where the path cannot be written or the layout library is missing.
        """
        from ffebm_compiler.drawing import save_html

        save_html(self, path, what_if=what_if)

    def save_svg(self, path: str | Path) -> None:
        """Draw the plan as an SVG picture; an existing file is replaced.

        Raises:
            PlanError: where the plan has no operation or is cyclic.
            ExportError: where the path cannot be written.
        """
        from ffebm_compiler.drawing import save_svg

        save_svg(self, path)

    def save_image(self, path: str | Path, dpi: float = 192.0) -> None:
        """Draw the plan as a PNG or PDF picture, by the path's suffix; an existing file is replaced.

        Raises:
            InputError: for another suffix, or `dpi` that is not positive.
            PlanError: where the plan has no operation or is cyclic.
            ExportError: where matplotlib is missing or the path cannot be written.
        """
        from ffebm_compiler.drawing import save_image

        save_image(self, path, dpi)

    def to_dot(self) -> str:
        """Blocks and digital parts in Graphviz's DOT language.

        Raises:
            PlanError: where the plan has no operation or is cyclic.
        """
        from ffebm_compiler.drawing import dot_text

        return dot_text(self)

    def _repr_html_(self) -> str:
        from ffebm_compiler.drawing import notebook_html

        return notebook_html(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`, validated.

        A block may give its name and operations alone, since the rest follows from them.

        Raises:
            PlanError: a key is missing or malformed, the schema is another one, or the plan is
                incomplete, cyclic, over capacity or contradicts itself.
        """
        from ffebm_compiler.plan_file import plan_from

        plan = cls.of(plan_from(data))
        plan.validate()
        return plan

    def to_json(self, path: str | Path) -> None:
        """Write the plan. An existing file is replaced, or left as it is if writing fails.

        Raises:
            PlanError: where the path cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        write_whole(path, text, failure="the plan cannot be written", error=PlanError)

    @classmethod
    def from_json(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            PlanError: where the file cannot be read, is no JSON or no plan.
        """
        data = read_json(path, "the plan", PlanError, "make it again with ffebm.plan()")
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {clipped(str(error))}") from error

    def __str__(self) -> str:
        """A table that is enough in a terminal."""
        from ffebm_compiler.reports.text import plan_text

        return plan_text(self)
