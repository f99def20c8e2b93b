"""Plans as data: the partition of a network.

`PlanData` says which operation is in which energy block, how much hardware each block needs and how many values
cross its converters, and why every digital operation is digital. It holds the operations
it was made of, so that it can be printed, stored, compared and edited without the model. `plan.py` adds
the methods that users call.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ffebm_compiler.driven import UNDRIVEN, driven_sentence
from ffebm_compiler.errors import PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.layers import matches
from ffebm_compiler.ir import ALWAYS_JOIN, Operation, OperationGraph, Role

if TYPE_CHECKING:
    import networkx


__all__ = ["SCHEMA", "BlockPlan", "DigitalPart", "Placement", "PlanData", "PlanOptions", "fingerprint"]

SCHEMA = 2
"""Schema version of the files that `to_json` writes."""


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
    driven: tuple[str, ...] = ()
    """Its states that a digital value drives, which are activations without a layer (`digital_drive`)."""
    partial_sums: int = 0
    """Conversions that digital row sums add to one pass through it (`Hardware.row_sums`)."""

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
    """The place of a parameter, and the reason for it."""

    block: str | None
    """Name of the energy block; None if it stays digital."""
    reason: str


@dataclass(frozen=True)
class PlanOptions:
    """The settings of `convert` that decide the graph and the partition."""

    block_ops: tuple[str, ...] = ("add", "reshape")
    fold_batchnorm: bool = False
    force_digital: tuple[str, ...] = ()
    force_analog: tuple[str, ...] = ()
    digital_drive: bool = False
    objective: Literal["conversions", "energy"] = "conversions"
    for_: Literal["inference", "training"] = "inference"
    loop_gain: float = 0.1
    """κ from which the sweeps of `objective="energy"` are predicted."""


def fingerprint(graph: OperationGraph) -> str:
    """A digest of the operations, which ties a plan to its model. Fields of later versions are left out."""
    data = graph.to_dict()
    later = ("product_macs", "sizes", "call")
    data["operations"] = [{key: op[key] for key in op if key not in later} for op in data["operations"]]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PlanData:
    """The partition of one network for one hardware."""

    model: str
    hardware: Hardware
    options: PlanOptions
    blocks: tuple[BlockPlan, ...]
    digital_parts: tuple[DigitalPart, ...]
    weights: Mapping[str, Placement]
    """Parameter of two or more dimensions -> its placement."""
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
    def weight_macs(self) -> int:
        """Multiply-accumulates per sample in weight-stationary layers."""
        return sum(operation.macs for operation in self.graph.operations if operation.role is Role.WEIGHT)

    @property
    def total_macs(self) -> int:
        """Multiply-accumulates per sample of the network: in layers, and in products of activations (attention)."""
        return self.weight_macs + sum(operation.product_macs for operation in self.graph.operations)

    @property
    def analog_share(self) -> float:
        """Share of all multiply-accumulates that energy blocks do, 0 to 1; 0 if there are none."""
        return self.analog_macs / self.total_macs if self.total_macs else 0.0

    def explain(self, path: str) -> str:
        """One sentence on a module path or a parameter name.

        Raises:
            PlanError: the model has neither. Gives the closest names.
        """
        if not isinstance(path, str):
            raise PlanError(f"path is a {type(path).__name__}; expected a module path or a parameter name, a text")
        if path in self.weights:
            placement = self.weights[path]
            return (
                f"analog, {placement.block}: {placement.reason}" if placement.block else f"digital: {placement.reason}"
            )
        reading = [op for op in self.graph.operations if path in op.weights]
        if reading:  # a parameter of one dimension, such as a bias or the weight of a norm
            return "; ".join(dict.fromkeys(self._explain_operation(op) for op in reading))
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
            if own:  # the module only computes from parameters, or other modules read its parameters
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
            if operation.name in block.driven:
                source = self._home.get(operation.inputs[0], "")
                return f"analog, {home}: {driven_sentence(self.graph, block.operations, operation, source)}"
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
            why = f"no layer's product reaches {operation.target} alone within a block"
            return f"{why}, and {UNDRIVEN}" if self.options.digital_drive else why
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

    def to_networkx(self) -> networkx.DiGraph[str]:
        """The quotient DAG, with values per sample on its edges. One without tensors is read for its sizes alone."""
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
                if source not in edge["tensors"] and source not in operation.sizes:
                    edge["tensors"][source] = list(self.graph[source].shape) if source in self.graph else []
                    edge["values"] += self.graph.values(source)
        return quotient

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
