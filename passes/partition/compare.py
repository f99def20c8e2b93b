"""Compare plans: the differences between two plans, the effect of other settings, and sweeps over settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ffebm_compiler.driven import driven_places
from ffebm_compiler.errors import HardwareError, PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import ALWAYS_JOIN, Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.decide import Partition, conversions, partition, tiles_of, too_large
from ffebm_compiler.passes.partition.placement import place_layers
from ffebm_compiler.passes.partition.prices import prices_for
from ffebm_compiler.plan_data import PlanData

__all__ = ["PlanDiff", "SweepRow", "advise", "diff_plans", "sweep"]

_FORCED = "force_digital asks for it"


@dataclass(frozen=True)
class PlanDiff:
    """The differences between two plans of one model."""

    moved: Mapping[str, tuple[str, str]]
    """Layer -> its place before and after: the layers that it settles with, or why it is digital."""
    conversions: tuple[int, int]
    """DAC and ADC values per sample, before and after."""
    blocks: tuple[int, int]
    tiles: tuple[int, int]

    def __bool__(self) -> bool:
        """Whether anything is different."""
        return bool(self.moved) or any(a != b for a, b in (self.conversions, self.blocks, self.tiles))

    def __str__(self) -> str:
        """A line per number that changed and per layer that moved."""
        if not self:
            return "the plans are equal"
        lines = [
            f"{what}: {before} -> {after} ({after - before:+d})"
            for what, (before, after) in (
                ("conversions per sample", self.conversions),
                ("energy blocks", self.blocks),
                ("tiles", self.tiles),
            )
            if before != after
        ]
        lines += [f"{path}: {before} -> {after}" for path, (before, after) in self.moved.items()]
        return "\n".join(lines)


def _neighbours(plan: PlanData) -> dict[str, tuple[str, frozenset[str]]]:
    """Layer -> a text about its place, and the layers of its block."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for block in plan.blocks:
        for layer in block.layers:
            others = [other for other in block.layers if other != layer]
            shown = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
            found[layer] = (f"{block.name} with {shown}" if others else f"{block.name} alone", frozenset(block.layers))
    for layer, reason in plan.rejected.items():
        found.setdefault(layer, (f"digital ({reason})", frozenset()))
    return found


def diff_plans(before: PlanData, after: PlanData) -> PlanDiff:
    """The differences of the second plan to the first. See `Plan.diff`."""
    old, new = _neighbours(before), _neighbours(after)
    if old and not set(old) & set(new):
        raise PlanError(
            f"the plans have no layer in common (one is of {before.model}, the other of {after.model}): compare two "
            "plans of one model"
        )
    moved = {}
    for path in dict.fromkeys([*old, *new]):
        was, now = old.get(path, ("absent", frozenset())), new.get(path, ("absent", frozenset()))
        if was[1] != now[1] or (not was[1] and was[0] != now[0]):
            moved[path] = (was[0], now[0])
    old, new = (
        driven_places(plan.graph, [(block.name, block.operations, block.driven) for block in plan.blocks])
        for plan in (before, after)
    )
    for path in dict.fromkeys([*old, *new]):
        was, now = (places.get(path, ("no driven state", frozenset())) for places in (old, new))
        if was[1] != now[1]:
            moved[path] = (was[0], now[0])
    return PlanDiff(
        moved,
        (before.conversions, after.conversions),
        (len(before.blocks), len(after.blocks)),
        (sum(block.tiles for block in before.blocks), sum(block.tiles for block in after.blocks)),
    )


def _partition_again(plan: PlanData, hardware: Hardware, block_ops: Sequence[str] | None = None) -> Partition:
    """The partition of a plan's graph for other settings."""
    layers = (op for op in plan.graph.operations if op.role is Role.WEIGHT)
    forced = {op.name: _FORCED for op in layers if plan.rejected.get(op.path or op.name) == _FORCED}
    kinds, prices = block_ops or plan.options.block_ops, prices_for(plan.graph, hardware, plan.options)
    return partition(plan.graph, hardware, kinds, forced, plan.options.digital_drive, prices)


def _total(graph: OperationGraph, blocks: Sequence[Sequence[str]]) -> int:
    users = graph.users()
    return sum(sum(conversions(graph, block, users)) for block in blocks)


def _macs(graph: OperationGraph, blocks: Sequence[Sequence[str]]) -> int:
    return sum(graph[name].macs for block in blocks for name in block)


def advise(plan: PlanData) -> tuple[str, ...]:
    """Changes that would save conversions or place more layers. See `Plan.advice`."""
    graph, hardware = plan.graph, plan.hardware
    sentences = [*_large_layers(plan)]
    here = _total(graph, _partition_again(plan, hardware).blocks)
    if plan.conversions > here:
        sentences.append(
            f"this plan has {plan.conversions - here} conversions per sample more than a fresh one for its hardware"
        )
    trials: list[tuple[str, Hardware, tuple[str, ...]]] = []
    if hardware.layers_per_block is not None:
        more = hardware.layers_per_block + 1
        trials += [
            (f"layers_per_block={count}", replace(hardware, layers_per_block=count), plan.options.block_ops)
            for count in (more, 2 * hardware.layers_per_block)
        ]
    if hardware.tiles_per_core is not None:
        for extra in _tile_steps(plan):
            count = hardware.tiles_per_core + extra
            what = f"{extra} more tile{'s' if extra > 1 else ''} per core"
            trials.append((what, replace(hardware, tiles_per_core=count), plan.options.block_ops))
    if hardware.neurons_per_block is not None:
        count = 2 * hardware.neurons_per_block
        trials.append(
            (f"neurons_per_block={count}", replace(hardware, neurons_per_block=count), plan.options.block_ops)
        )
    kinds = {op.kind for op in graph.operations if op.role is Role.WIRING} - {
        *plan.options.block_ops,
        *ALWAYS_JOIN,
    }
    for kind in sorted(kinds):
        trials.append((f"{kind!r} in block_ops", hardware, (*plan.options.block_ops, kind)))
    seen = set()
    for what, fabric, kinds_ in trials:
        if what in seen:
            continue
        seen.add(what)
        result = _partition_again(plan, fabric, kinds_)
        saved = here - _total(graph, result.blocks)
        if saved > 0 and _macs(graph, result.blocks) >= plan.analog_macs:
            sentences.append(
                f"{what} would remove {saved} of {here} conversions per sample ({100 * saved / here:.0f} %)"
            )
    norms = sum("batch_norm" in op.target for op in graph.operations)
    if norms and not plan.options.fold_batchnorm:
        sentences.append(
            f"{norms} batch norms are digital and separate layers: fold_batchnorm=True folds them into the layers in "
            "eval mode"
        )
    return tuple(sentences)


def _large_layers(plan: PlanData) -> list[str]:
    """One sentence for each layer that is larger than a core."""
    hardware = plan.hardware
    large: list[Operation] = [op for op in plan.graph.operations if op.role is Role.WEIGHT and too_large(op, hardware)]
    sentences = []
    for op in large[:8]:
        tiles, core = tiles_of(op, hardware), hardware.tiles_per_core
        if core is not None and tiles > core:
            sentences.append(
                f"{op.path or op.name} alone needs {tiles / core:.2g} cores ({tiles} tiles): {tiles - core} more tiles "
                f"per core would make its {op.macs} multiply-accumulates per sample analog"
            )
        else:
            sentences.append(f"{op.path or op.name} stays digital: {too_large(op, hardware)}")
    if len(large) > 8:
        sentences.append(f"{len(large) - 8} more layers are larger than a core")
    return [*sentences, *_split_groups(plan)]


def _split_groups(plan: PlanData) -> list[str]:
    """A sentence if grouped convolutions were split that would take fewer tiles if their groups shared them."""
    hardware, found, apart, together = plan.hardware, set(), 0, 0
    parts = Counter(op.path for op in plan.graph.operations if op.role is Role.WEIGHT)
    for op in plan.graph.operations:
        if op.role is not Role.WEIGHT or op.groups == 1 or parts[op.path] == 1:
            continue
        fabric = replace(hardware.for_layer(op.path), overrides=None)
        shared = tiles_of(op, replace(fabric, groups_share_tiles=True))
        if shared < tiles_of(op, fabric):
            found.add(op.path)
            apart, together = apart + tiles_of(op, fabric), together + shared
    if not found:
        return []
    what = "1 grouped convolution is" if len(found) == 1 else f"{len(found)} grouped convolutions are"
    return [
        f"{what} split into several blocks because every group has tiles of its own, {apart} in all; on a fabric with "
        f"groups_share_tiles=True the same parts would take {together}, and whole layers would fit a core"
    ]


def _tile_steps(plan: PlanData) -> list[int]:
    """How many more tiles would let two neighbouring blocks fit one core: the smallest number and the median."""
    core = plan.hardware.tiles_per_core
    assert core is not None
    homes = {name: block for block in plan.blocks for name in block.operations}
    extra = set()
    for block in plan.blocks:
        for source in block.inputs:
            other = homes.get(source)
            if other is not None and block.tiles + other.tiles > core:
                extra.add(block.tiles + other.tiles - core)
    steps = sorted(extra)
    return sorted({steps[0], steps[len(steps) // 2]}) if steps else []


@dataclass(frozen=True)
class SweepRow:
    """One point of a sweep over the hardware."""

    settings: Mapping[str, Any]
    blocks: int
    conversions: int
    """DAC and ADC values per sample."""
    tiles: int
    cores: int
    utilisation: float
    """Devices that hold a weight, of all devices of the tiles that are used; 1 is full."""
    analog_macs: float
    """Share of all multiply-accumulates that is analog; those of attention are not."""


def sweep(
    plan: PlanData, settings: Mapping[str, Sequence[Any]], replan: Callable[[Hardware], PlanData] | None = None
) -> list[SweepRow]:
    """Partition a plan's network for every combination of hardware settings.

    Args:
        plan: a plan of the network. Its hardware gives the settings that are not swept.
        settings: field of `Hardware` -> the values to try, e.g. `{"tile_rows": [64, 128, 256]}`.
        replan: plans the model again, e.g. `lambda fabric: ffebm.plan(model, x, hardware=fabric)`. Without it there is
            no model whose layers could be split. Split layers stay as they are, and a layer that is too large for a
            point stays digital. With it, the model is captured and planned again at points where layers are larger
            than a core, and at all points of a plan with split layers.

    Returns:
        A row for each combination, in order, the last setting changing fastest.

    Raises:
        HardwareError: for an unknown field or a value that it refuses.
    """
    from itertools import product

    base = plan.hardware.to_dict()
    if not isinstance(settings, Mapping):
        raise HardwareError(f"sweep needs fields with lists of values, as {{'tile_rows': [64, 128]}}, got {settings!r}")
    for name, choices in settings.items():
        if isinstance(choices, str | bytes) or not isinstance(choices, Iterable):
            raise HardwareError(f"sweep needs a list of values for {name!r}, got {choices!r}")
    rows = []
    split = _has_parts(plan.graph)
    for values in product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        fabric = Hardware.from_dict({**base, **chosen})
        if replan is not None and (
            split or any(op.role is Role.WEIGHT and too_large(op, fabric) for op in plan.graph.operations)
        ):
            fresh = replan(fabric)
            graph, blocks = fresh.graph, [block.operations for block in fresh.blocks]
        else:
            graph, blocks = plan.graph, [tuple(block) for block in _partition_again(plan, fabric).blocks]
        rows.append(_sweep_row(chosen, graph, fabric, blocks))
    return rows


def _sweep_row(
    settings: Mapping[str, Any], graph: OperationGraph, fabric: Hardware, blocks: Sequence[Sequence[str]]
) -> SweepRow:
    placed = place_layers([[op for n in block if (op := graph[n]).role is Role.WEIGHT] for block in blocks], fabric)
    macs = sum(op.macs + op.product_macs for op in graph.operations)
    return SweepRow(
        settings,
        len(blocks),
        _total(graph, blocks),
        placed.tiles,
        placed.cores,
        placed.utilisation,
        _macs(graph, blocks) / macs if macs else 0.0,
    )


def _has_parts(graph: OperationGraph) -> bool:
    """Whether a layer may have been split: a module with several layers."""
    paths = [op.path for op in graph.operations if op.role is Role.WEIGHT]
    return len(set(paths)) < len(paths)
