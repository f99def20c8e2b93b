"""What if: the plan under each option that would change it, computed from the plan's own graph.

Every line is a partition made anew, with its blocks, the layers that settle together, conversions and modelled energy,
of an inference and of a training step: what both objectives of a partition minimise, whichever the plan has.
The model is not needed. Folding a batch norm takes it out of the graph, where the pass `fold_batchnorm` would fold it
(`tests/test_what_if.py` compares with plans of the model). Layers that were split for a core stay split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ffebm_compiler.driven import settles
from ffebm_compiler.errors import HardwareError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.block_costs import modelled_energy
from ffebm_compiler.passes.partition.decide import Partition
from ffebm_compiler.passes.planning import FORCED, best_plan, describe
from ffebm_compiler.plan_data import PlanData, PlanOptions
from ffebm_compiler.reports.text import count, table_text

__all__ = ["WhatIf", "WhatIfRow", "what_if"]

_PURPOSES: tuple[tuple[Literal["inference", "training"], str], ...] = (
    ("inference", "an inference"),
    ("training", "a training step"),
)
_POOLING = ("avg_pool", "max_pool")


@dataclass(frozen=True)
class WhatIfRow:
    """The plan under one option."""

    option: str
    """How the option is written in `convert`, such as `fold_batchnorm=True`."""
    meaning: str
    """What it does, as a sentence fragment."""
    blocks: int
    settling: int
    """Layers that settle together with others or with driven states: those of blocks with feedback."""
    conversions: int
    """DAC and ADC values per sample."""
    energy: str
    """Modelled energy of one inference, at chip level if the hardware is a chip, else bottom-up."""
    training: str = ""
    """The same of one training step, with one nudged phase and the weight gradients."""


@dataclass(frozen=True)
class WhatIf:
    """The plan as it is, and under every option that would change it."""

    model: str
    now: WhatIfRow
    rows: tuple[WhatIfRow, ...]
    unchanged: tuple[str, ...]
    """Options that were tried and change nothing."""

    def __str__(self) -> str:
        """A table, the plan as it is first."""
        cells = [
            (row.option, str(row.blocks), str(row.settling), count(row.conversions), row.energy, row.training)
            for row in (self.now, *self.rows)
        ]
        columns = (
            "option", "blocks", "layers that settle together", "conversions", "inference, modelled",
            "training, modelled",
        )  # fmt: skip
        lines = [table_text(f"{self.model}: what if", columns, cells)]
        lines += [f"{row.option}: {row.meaning}" for row in self.rows]
        if self.unchanged:
            lines.append(f"without effect here: {'; '.join(self.unchanged)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Option:
    name: str
    meaning: str
    graph: OperationGraph
    hardware: Hardware
    options: PlanOptions


def what_if(plan: PlanData) -> WhatIf:
    """Plan again under `fold_batchnorm`, `digital_drive`, pooling in blocks, other objectives, other cores."""
    now = _row("as planned", "", plan)
    rows, unchanged = [], []
    for option in _options(plan):
        made = _row(option.name, option.meaning, _planned(plan, option))
        same = (made.blocks, made.settling, made.conversions) == (now.blocks, now.settling, now.conversions)
        unchanged.append(option.name) if same else rows.append(made)
    return WhatIf(plan.model, now, tuple(rows), tuple(unchanged))


def _options(plan: PlanData) -> list[_Option]:
    graph, hardware, options = plan.graph, plan.hardware, plan.options
    folded = fold_graph(graph)
    found = []
    if not options.fold_batchnorm and len(folded.operations) < len(graph.operations):
        meaning = "batch norms go into the layers before them; their statistics are then frozen"
        found.append(_Option("fold_batchnorm=True", meaning, folded, hardware, replace(options, fold_batchnorm=True)))
    if not options.digital_drive:
        meaning = "an activation behind batch norm becomes a state with feedback; this changes what is computed"
        found.append(_Option("digital_drive=True", meaning, graph, hardware, replace(options, digital_drive=True)))
    kinds = {op.kind for op in graph.operations if op.role is Role.WIRING}
    pools = tuple(kind for kind in _POOLING if kind in kinds and kind not in options.block_ops)
    if pools:
        wider = replace(options, block_ops=(*options.block_ops, *pools))
        name = f"block_ops with {' and '.join(map(repr, pools))}"
        meaning = "pooling runs inside a block, on the analog values"
        found.append(_Option(name, meaning, graph, hardware, wider))
        if not options.fold_batchnorm and len(folded.operations) < len(graph.operations):
            both = replace(wider, fold_batchnorm=True)
            found.append(_Option(f"fold_batchnorm=True and {name}", "both", folded, hardware, both))
    found += [_Option(name, meaning, graph, hardware, other) for name, meaning, other in _objectives(options)]
    if any(settles(graph, block.operations, block.driven) for block in plan.blocks):
        single = replace(hardware, layers_per_block=1)
        meaning = "no layer settles with another: a phase reads each once, and errors are propagated digitally"
        found.append(_Option("hardware with layers_per_block=1", meaning, graph, single, options))
    larger = _larger(hardware)
    if larger is not None:
        core = [f"tiles_per_core={larger.tiles_per_core}"] if larger.tiles_per_core else []
        core += [f"layers_per_block={larger.layers_per_block}"] if larger.layers_per_block else []
        name = f"hardware with {', '.join(core)}"
        found.append(_Option(name, "twice the core; layers that were split stay split", graph, larger, options))
    return found


def _objectives(options: PlanOptions) -> list[tuple[str, str, PlanOptions]]:
    """The objectives that the plan does not have."""
    mine = (options.objective, options.for_ if options.objective == "energy" else "inference")
    found = []
    if options.objective != "conversions":
        meaning = "the partition has the fewest conversions, not the least modelled energy"
        found.append(("objective='conversions'", meaning, replace(options, objective="conversions")))
    for for_, what in _PURPOSES:
        if mine != ("energy", for_):
            name = "objective='energy'" + (", for_='training'" if for_ == "training" else "")
            meaning = f"the partition has the least modelled energy of {what}"
            found.append((name, meaning, replace(options, objective="energy", for_=for_)))
    return found


def _larger(hardware: Hardware) -> Hardware | None:
    limits = ("tiles_per_core", "layers_per_block", "neurons_per_block")
    twice = {name: 2 * value for name in limits if (value := getattr(hardware, name)) is not None}
    return replace(hardware, **twice) if twice else None


def fold_graph(graph: OperationGraph) -> OperationGraph:
    """The graph without the batch norms that `fold_batchnorm` would fold into the layer before them."""
    users = graph.users()
    layer_of: dict[str, str] = {}
    for op in graph.operations:
        if "batch_norm" in op.target and len(op.data) == 1 and op.data[0] in graph:
            layer = graph[op.data[0]]
            if _folds(layer, users) and layer.name not in graph.outputs:
                layer_of[op.name] = layer.name

    def renamed(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer_of.get(name, name) for name in names))

    kept = tuple(
        replace(op, inputs=renamed(op.inputs), sizes=renamed(op.sizes))
        for op in graph.operations
        if op.name not in layer_of
    )
    return OperationGraph(graph.inputs, kept, renamed(graph.outputs), graph.draws)


def _folds(layer: Operation, users: dict[str, list[str]]) -> bool:
    """Whether a batch norm behind this layer can go into its weight."""
    return (
        layer.role is Role.WEIGHT
        and (layer.target in ("conv1d", "conv2d", "conv3d") or (layer.target == "linear" and len(layer.shape) == 2))
        and len(users[layer.name]) == 1
        and not layer.computed
    )


def _planned(plan: PlanData, option: _Option) -> PlanData:
    """The network partitioned again, described as a plan."""
    forced = {
        op.name: FORCED
        for op in option.graph.operations
        if op.role is Role.WEIGHT and plan.rejected.get(op.path or op.name) == FORCED
    }

    def described(result: Partition) -> PlanData:
        return describe(
            option.graph,
            option.hardware,
            option.options,
            result,
            model=plan.model,
            modules=plan.modules,
            parameters=(),
        )

    return best_plan(option.graph, option.hardware, option.options, forced, described)


def _row(name: str, meaning: str, plan: PlanData) -> WhatIfRow:
    layers = [
        sum(plan.graph[member].role is Role.WEIGHT for member in block.operations)
        for block in plan.blocks
        if settles(plan.graph, block.operations, block.driven)
    ]
    try:
        energies = [str(modelled_energy(plan, training, plan.options.loop_gain)) for training in (False, True)]
    except HardwareError:
        energies = ["unknown", "unknown"]
    return WhatIfRow(name, meaning, len(plan.blocks), sum(layers), plan.conversions, *energies)
