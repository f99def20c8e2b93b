"""Plans: the partition of a network as data.

A `Plan` says which operation is in which energy block, what each block takes of the hardware and
what crosses its converters, and why every digital operation is digital. It holds the operations
it was made of, so that it can be printed, stored, compared and edited without the model.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffebm_compiler.checked_json import clipped, read_json
from ffebm_compiler.errors import PlanError
from ffebm_compiler.hardware import Hardware
from ffebm_compiler.hardware_layers import matches
from ffebm_compiler.ir import ALWAYS_JOIN, Operation, OperationGraph, Role
from ffebm_compiler.whole_files import write_whole

if TYPE_CHECKING:
    import networkx

    from ffebm_compiler.costs_report import CostReport
    from ffebm_compiler.plan_compare import PlanDiff
    from ffebm_compiler.plan_placement import TilePlacement

__all__ = ["BlockPlan", "DigitalPart", "Placement", "Plan", "PlanOptions", "fingerprint"]

SCHEMA = 2
"""Of the files that `to_json` writes."""


@dataclass(frozen=True)
class BlockPlan:
    """One energy block."""

    name: str
    layers: tuple[str, ...]
    """Module paths of its weight-stationary layers, in topological order."""
    weights: tuple[str, ...]
    """Names of the parameters that its layers read."""
    operations: tuple[str, ...]
    inputs: tuple[str, ...]
    """Operations or network inputs whose values are converted into the block."""
    outputs: tuple[str, ...]
    tiles: int
    dac: int
    """Values per sample that enter through DACs."""
    adc: int
    """Values per sample that leave through ADCs."""
    neurons: int
    macs: int
    """Multiply-accumulates per sample of one pass through its layers."""

    @property
    def conversions(self) -> int:
        """DAC and ADC values per sample."""
        return self.dac + self.adc


@dataclass(frozen=True)
class DigitalPart:
    """One feedforward block."""

    name: str
    operations: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Where a parameter went."""

    block: str | None
    """Name of the energy block, or None where it stays digital."""
    reason: str


@dataclass(frozen=True)
class PlanOptions:
    """The settings of `convert` that decide the graph and the partition."""

    block_ops: tuple[str, ...] = ("add", "reshape")
    fold_batchnorm: bool = False
    force_digital: tuple[str, ...] = ()
    force_analog: tuple[str, ...] = ()


def fingerprint(graph: OperationGraph) -> str:
    """A digest of the operations and their sizes, by which a plan knows its model."""
    text = json.dumps(graph.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """The partition of one network for one hardware."""

    model: str
    hardware: Hardware
    options: PlanOptions
    blocks: tuple[BlockPlan, ...]
    digital_parts: tuple[DigitalPart, ...]
    weights: Mapping[str, Placement]
    """Every parameter of two or more dimensions."""
    rejected: Mapping[str, str]
    """Module path of every weight-stationary layer that stayed digital -> why."""
    notes: tuple[str, ...]
    modules: tuple[str, ...]
    graph: OperationGraph
    fingerprint: str = ""
    _home: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Index the operations by block or part."""
        for block in self.blocks:
            self._home.update(dict.fromkeys(block.operations, block.name))
        for part in self.digital_parts:
            self._home.update(dict.fromkeys(part.operations, part.name))

    def home(self, operation: str) -> str:
        """Name of the block or digital part of an operation."""
        return self._home[operation]

    def layers_of(self, path: str) -> list[Operation]:
        """The weight-stationary layers of a module path."""
        return [
            op
            for op in self.graph.operations
            if op.role is Role.WEIGHT and (op.path == path or op.path.startswith(f"{path}.") or op.name == path)
        ]

    def block(self, name: str) -> BlockPlan:
        """The block of that name.

        Raises:
            PlanError: if there is none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise PlanError(f"the plan has no block {name!r}; it has {', '.join(b.name for b in self.blocks)}")

    @property
    def conversions(self) -> int:
        """DAC and ADC values per sample, over all blocks."""
        return sum(block.conversions for block in self.blocks)

    @property
    def analog_macs(self) -> int:
        """Multiply-accumulates per sample in energy blocks."""
        return sum(block.macs for block in self.blocks)

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates per sample in weight-stationary layers."""
        return sum(operation.macs for operation in self.graph.operations if operation.role is Role.WEIGHT)

    def explain(self, path: str) -> str:
        """One sentence on a module path or a parameter name.

        Raises:
            PlanError: if the model has neither, with the closest names.
        """
        if path in self.weights:
            placement = self.weights[path]
            return (
                f"analog, {placement.block}: {placement.reason}" if placement.block else f"digital: {placement.reason}"
            )
        if path not in self.modules:
            close = difflib.get_close_matches(path, [*self.modules, *self.weights], n=3)
            hint = (
                f"; did you mean {', '.join(close)}?" if close else "; module paths are those of model.named_modules()"
            )
            raise PlanError(f"the model has no module or weight {path!r}{hint}")
        inside = [op for op in self.graph.operations if op.path == path]
        layers = [op for op in inside if op.role is Role.WEIGHT]
        if layers:
            inside = layers
        prefix = f"{path}." if path else ""
        if not layers and any(name.startswith(prefix) for name in self.modules if name != path):
            return self._explain_container(path)
        if not inside:
            own = [name for name in self.weights if name.rpartition(".")[0] == path]
            if own:  # it runs on parameters and constants alone, or others read its parameters
                return "; ".join(dict.fromkeys(self.explain(name) for name in own))
            return "digital: it runs no operation of its own in the captured graph"
        sentences = dict.fromkeys(self._explain_operation(op) for op in inside)
        return "; ".join(sentences)

    def _explain_operation(self, operation: Operation) -> str:
        home = self.home(operation.name)
        if any(home == block.name for block in self.blocks):
            block = self.block(home)
            if operation.role is Role.WEIGHT:
                others = len(block.layers) - 1
                company = f"with {others} other layer{'s' if others > 1 else ''}" if others else "on its own"
                return f"analog, {home}: {operation.kind} of {operation.rows}x{operation.cols}, settles {company}"
            return f"analog, {home}: {operation.reason}"
        if operation.role is Role.WEIGHT:
            return f"digital: {self.rejected.get(operation.path or operation.name, operation.reason)}"
        return f"digital: {self._digital_reason(operation)}"

    def _digital_reason(self, operation: Operation) -> str:
        if matches(operation.path, self.options.force_digital):
            return "force_digital asks for it"
        if operation.role is Role.WIRING:
            allowed = operation.kind in (*self.options.block_ops, *ALWAYS_JOIN)
            return (
                f"{operation.target} is not between two layers of one block"
                if allowed
                else f"{operation.target} is wiring of kind {operation.kind!r}, which block_ops does not list"
            )
        if operation.role is Role.ACTIVATION:
            return f"no layer's product reaches {operation.target} alone within a block"
        return operation.reason

    def _explain_container(self, path: str) -> str:
        prefix = f"{path}." if path else ""
        below = [op for op in self.graph.operations if op.path == path or op.path.startswith(prefix)]
        if not below:
            return "digital: it runs no operation of its own in the captured graph"
        names = {block.name for block in self.blocks}
        analog = sum(self.home(op.name) in names for op in below)
        domain = "analog and digital" if 0 < analog < len(below) else "analog" if analog else "digital"
        homes = list(dict.fromkeys(self.home(op.name) for op in below))
        shown = ", ".join(homes[:6]) + (", ..." if len(homes) > 6 else "")
        return f"{domain}: {len(below)} operation{'s' if len(below) > 1 else ''} in {shown}"

    def move(self, path: str, where: str) -> Plan:
        """A new plan with a layer, or all layers of a module, moved.

        What follows a layer in its block (activations, wiring) moves with it, and what would lie on
        a way out of the new block and back into it joins the block, if it may.

        Args:
            path: module path of a layer, or of a module that holds some.
            where: `"digital"`, `"analog"` (a block of its own), or the name of a block.

        Raises:
            PlanError: where there is no such layer or block, or the new plan would be over capacity,
                cyclic or against `force_digital` / `force_analog`, with the numbers.
        """
        from ffebm_compiler.passes.partition_edit import move

        return move(self, path, where)

    def validate(self) -> None:
        """Check that the plan is complete, acyclic, within capacity and free of contradictions.

        Raises:
            PlanError: naming the block, part or layer, what it says and what it should say.
        """
        from ffebm_compiler.plan_check import check_plan

        check_plan(self)

    def diff(self, other: Plan) -> PlanDiff:
        """What is different in another plan for the same model; `print` it.

        Raises:
            PlanError: if the other plan has none of this plan's layers.
        """
        from ffebm_compiler.plan_compare import diff_plans

        return diff_plans(self, other)

    def advice(self) -> tuple[str, ...]:
        """What would save conversions or place more layers, each partitioned again to get the number."""
        from ffebm_compiler.plan_compare import advise

        return advise(self)

    def placement(self) -> TilePlacement:
        """Which tile of which core holds which rows and columns of which weight, and how full they are."""
        from ffebm_compiler.plan_placement import place_layers

        layers = [[op for n in b.operations if (op := self.graph[n]).role is Role.WEIGHT] for b in self.blocks]
        return place_layers(layers, self.hardware)

    def cost_report(self, *, feedback: float = 0.1, rtol: float = 1e-4, nudged_phases: int = 1) -> CostReport:
        """Modelled energy and latency per sample, without building the hybrid; `print` it.

        Args:
            feedback: the loop gain κ that the sweeps of a phase are predicted from.
            rtol: relative change at which a phase stops.
            nudged_phases: 1 for one-sided equilibrium propagation, 2 for centered.

        Raises:
            InputError: for an argument out of range.
            HardwareError: where `costs` of the hardware names a constant that the model does not have.
        """
        from ffebm_compiler.costs_report import cost_report

        return cost_report(self, feedback=feedback, rtol=rtol, nudged_phases=nudged_phases)

    def to_networkx(self) -> networkx.DiGraph[str]:
        """The quotient DAG: a node per block and digital part, values per sample on the edges."""
        import networkx

        quotient: networkx.DiGraph[str] = networkx.DiGraph()
        for block in self.blocks:
            quotient.add_node(block.name, domain="analog", layers=list(block.layers), tiles=block.tiles)
        for part in self.digital_parts:
            quotient.add_node(part.name, domain="digital", operations=list(part.operations))
        for name, values in self.graph.inputs.items():
            quotient.add_node(name, domain="input", values=values)
        for operation in self.graph.operations:
            home = self.home(operation.name)
            for source in operation.inputs:
                origin = self._home.get(source, source)
                if origin == home:
                    continue
                if not quotient.has_edge(origin, home):
                    quotient.add_edge(origin, home, tensors={}, values=0)
                edge = quotient.edges[origin, home]
                if source not in edge["tensors"]:
                    edge["tensors"][source] = list(self.graph[source].shape) if source in self.graph else []
                    edge["values"] += self.graph.values(source)
        return quotient

    def save_html(self, path: str | Path) -> None:
        """Draw the plan as one self-contained, interactive HTML page; an existing file is replaced.

        Raises:
            PlanError: where the plan has no operation or is cyclic.
            ExportError: where the path cannot be written or the layout library is missing.
        """
        from ffebm_compiler.drawing import save_html

        save_html(self, path)

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

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "hardware": self.hardware.to_dict(),
            "options": asdict(self.options),
            "blocks": [asdict(block) for block in self.blocks],
            "digital_parts": [asdict(part) for part in self.digital_parts],
            "weights": {name: asdict(placement) for name, placement in self.weights.items()},
            "rejected": dict(self.rejected),
            "notes": list(self.notes),
            "modules": list(self.modules),
            "graph": self.graph.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`, validated.

        A block may give its name and operations alone: the rest follows from them.

        Raises:
            PlanError: where a key is missing or malformed, the schema is another, or the plan is
                incomplete, cyclic, over capacity or contradicts itself.
        """
        from ffebm_compiler.plan_file import plan_from

        plan = plan_from(data)
        plan.validate()
        return plan

    def to_json(self, path: str | Path) -> None:
        """Write the plan; an existing file is replaced, or left as it is where that fails.

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
        from ffebm_compiler.text import plan_text

        return plan_text(self)
