"""A plan as the JSON record that the interactive page reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from ffebm_compiler.drawing.boundaries import ends_of, side_inputs
from ffebm_compiler.drawing.calls import calls_of
from ffebm_compiler.drawing.figures import block_costs, costs_of, curves_of, total_costs
from ffebm_compiler.drawing.floor import floor_plan
from ffebm_compiler.drawing.measurements import gains_of, gradients_of
from ffebm_compiler.drawing.overlay import Overlay
from ffebm_compiler.drawing.scene import Node, operation_words, own_feedback, scene_of, set_of, shape_words
from ffebm_compiler.drawing.timeline import timeline_of
from ffebm_compiler.ir import Operation, Role
from ffebm_compiler.reports.text import count
from ffebm_compiler.reports.what_if import what_if as options

if TYPE_CHECKING:
    from ffebm_compiler.bound_block import BoundBlock
    from ffebm_compiler.drawing.measurements import GainPoint
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import BlockPlan, PlanData
    from ffebm_compiler.reports.checks import GradientReport
    from ffebm_compiler.reports.diagnosis import Diagnosis

__all__ = ["record_of"]


def record_of(
    plan: PlanData,
    hybrid: HybridCore | None = None,
    overlays: Sequence[Overlay] = (),
    diagnosis: Diagnosis | None = None,
    what_if: bool = False,
    source: str = "",
    gradients: GradientReport | None = None,
    loop_gains: Sequence[GainPoint] = (),
) -> dict[str, Any]:
    """Everything that the page shows for a plan, as JSON values. `source` says where the plan comes from.

    Raises:
        InputError: where the diagnosis is of another plan.
        PlanError: where the plan has no operation or is cyclic.
    """
    scene = scene_of(plan, hybrid)
    driven = {name for block in plan.blocks for name in block.driven}
    own = {block.name: own_feedback(hybrid, block.name) for block in plan.blocks}
    index = {op.name: position for position, op in enumerate(plan.graph.operations)}
    index.update((name, -1 - position) for position, name in enumerate(plan.graph.inputs))
    bound = {block.name: block for block in hybrid.blocks} if hybrid is not None else {}
    blocks = {block.name: block for block in plan.blocks}
    groups = _groups(plan)
    side = side_inputs(plan)
    placed = [node for node in scene.nodes if node.domain in ("analog", "digital")]
    homes = [
        _block(plan, blocks[node.key], node, index, bound.get(node.key))
        if node.key in blocks
        else _part(plan, node, index)
        for node in placed
    ]
    costs, note = costs_of(plan, hybrid)
    curves = curves_of(plan, diagnosis)
    modelled = {} if costs is None else {cost.block: block_costs(cost) for cost in costs.blocks}
    for node, home in zip(placed, homes, strict=True):
        home["costs"] = modelled.get(node.key, [])
        home["curves"] = curves.get(node.key)
        home["gradients"] = gradients_of(blocks[node.key], gradients) if node.key in blocks else None
        if home["curves"]:  # they tell the same, of the forward that they were recorded after
            home["measured"] = [row for row in home["measured"] if row[0] not in _BESIDE_CURVES]
    tiles = sum(block.tiles for block in plan.blocks)
    totals = [
        _count_row(len(plan.blocks), "energy block"),
        _count_row(len(plan.digital_parts), "digital part"),
        _count_row(tiles, "tile"),
        (count(sum(block.dac for block in plan.blocks)), "DAC values"),
        (count(sum(block.adc for block in plan.blocks)), "ADC values per sample"),
        (f"{100 * plan.analog_share:.1f} %", f"of {count(plan.total_macs)} MACs analog"),
    ]
    return {
        "title": scene.title,
        "provenance": _provenance(plan, source),
        "totals": totals,
        "notes": [*plan.notes, *([note] if note else [])],
        "costs": None
        if costs is None
        else {**total_costs(costs), "timeline": timeline_of(plan, costs, [node.key for node in placed])},
        "floor": floor_plan(plan),
        "gains": gains_of(plan, loop_gains),
        "whatIf": _what_if(plan) if what_if else None,
        "rejected": list(plan.rejected.items()),
        "inputs": [{"name": name, "values": values} for name, values in plan.graph.inputs.items()],
        "outputs": [index[name] for name in set_of(list(plan.graph.outputs))],
        "homes": homes,
        "ops": [
            {
                **_operation(plan, op, index, own.get(plan.home(op.name), {})),
                "driven": op.name in driven,
                "group": groups[op.name],
                "side": [index[name] for name in side.get(op.name, ())],
            }
            for op in plan.graph.operations
        ],
        "overlays": [overlay.to_dict() for overlay in overlays],
    }


def _provenance(plan: PlanData, source: str) -> str:
    """Where the plan comes from, version, day and settings, in one line."""
    options, hardware = plan.options, plan.hardware
    core = "unlimited" if hardware.tiles_per_core is None else count(hardware.tiles_per_core)
    settings = [f"{hardware.name}, {core} tiles per core", f"block_ops {', '.join(options.block_ops) or 'none'}"]
    settings += ["batch norm folded"] if options.fold_batchnorm else []
    settings += ["digital drive"] if options.digital_drive else []
    settings += [f"force_digital {', '.join(options.force_digital)}"] if options.force_digital else []
    settings += [f"force_analog {', '.join(options.force_analog)}"] if options.force_analog else []
    made = f"ffebm-compiler {version('ffebm-compiler')}, {date.today().isoformat()}"
    fingerprint = [f"plan {plan.fingerprint}"] if plan.fingerprint else []
    return " · ".join([*([f"from {source}"] if source else []), made, *settings, *fingerprint])


def _what_if(plan: PlanData) -> dict[str, Any]:
    """The plan under other options, as JSON values."""
    found = options(plan)
    rows = [
        (
            row.option,
            count(row.blocks),
            count(row.settling),
            count(row.conversions),
            row.energy,
            row.training,
            row.meaning,
        )
        for row in (found.now, *found.rows)
    ]
    return {"rows": rows, "unchanged": list(found.unchanged)}


_BESIDE_CURVES = ("spectral radius ρ", "sweeps predicted", "sweeps in the last forward", "residual")


def _groups(plan: PlanData) -> dict[str, int]:
    """Operation -> number of its group within its block or part."""
    found: dict[str, int] = {}
    homes = [block.operations for block in plan.blocks] + [part.operations for part in plan.digital_parts]
    for operations in homes:
        found.update(zip(operations, calls_of([plan.graph[name] for name in operations]), strict=True))
    return found


def _count_row(number: int, noun: str) -> tuple[str, str]:
    return count(number), noun if number == 1 else f"{noun}s"


def _operation(plan: PlanData, op: Operation, index: dict[str, int], own: Mapping[str, str | None]) -> dict[str, Any]:
    return {
        "name": op.name,
        "target": op.target,
        "path": op.path,
        "in": [index[name] for name in op.data],
        "sizes": [index[name] for name in op.sizes],
        "call": op.call,
        "shape": shape_words(op.shape, op.values),
        "values": op.values,
        "macs": op.macs + op.product_macs,
        "weights": list(op.weights),
        "feedback": [name for name, parameter in own.items() if parameter in op.weights],
        "reason": plan._explain_operation(op),
        "stayed": bool(op.weights) and (op.path or op.name) in plan.rejected and plan.home(op.name) in _parts(plan),
    }


def _parts(plan: PlanData) -> set[str]:
    return {part.name for part in plan.digital_parts}


def _place_of(node: Node, operations: Sequence[str], index: dict[str, int]) -> dict[str, Any]:
    return {
        "title": node.title,
        "domain": node.domain,
        "lines": [asdict(line) for line in node.lines],
        "ops": [index[name] for name in operations],
        "layers": [],
        "weights": [],
        "measured": [],
    }


def _part(plan: PlanData, node: Node, index: dict[str, int]) -> dict[str, Any]:
    part = next(part for part in plan.digital_parts if part.name == node.key)
    return {
        **_place_of(node, part.operations, index),
        "sentence": "Feedforward block: runs digitally, one operation after the other.",
        "brief": operation_words(_telling(plan, part.operations)),
        "facts": [("operations", str(len(part.operations)))],
        "weights": set_of([weight for name in part.operations for weight in plan.graph[name].weights]),
    }


def _telling(plan: PlanData, names: Sequence[str]) -> list[Operation]:
    """The operations that compute something; all of them where they only rearrange values."""
    operations = [plan.graph[name] for name in names]
    return [op for op in operations if op.role is not Role.WIRING or op.kind not in ("reshape", "")] or operations


def _block(
    plan: PlanData, block: BlockPlan, node: Node, index: dict[str, int], bound: BoundBlock | None
) -> dict[str, Any]:
    layers = [plan.graph[name] for name in block.operations if plan.graph[name].role is Role.WEIGHT]
    settles = "its layers settle together"
    if not node.settles:
        company = "one layer" if len(layers) == 1 else f"{len(layers)} layers side by side"
        settles = f"{company}, without feedback: exactly the source's"
    elif block.driven:
        states = "a state" if len(block.driven) == 1 else f"{len(block.driven)} states"
        settles = f"its layer{'s settle' if len(layers) > 1 else ' settles'} with {states} driven by a digital value"
    facts = [
        ("tiles", f"{count(block.tiles)}{_utilisation(plan, block, layers)}"),
        ("DAC values per sample", count(block.dac)),
        ("ADC values per sample", count(block.adc)),
        *([("driven states, without weights", ", ".join(block.driven))] if block.driven else []),
        ("neurons", count(block.neurons)),
        ("MACs per sample", count(block.macs)),
        ("reads", ", ".join(block.inputs)),
        ("gives", ", ".join(block.outputs)),
    ]
    if bound is not None and node.circuit:
        facts.append(("circuit", bound.module.energy_function.elements))
    return {
        **_place_of(node, block.operations, index),
        "settles": node.settles,
        "brief": f"{' '.join(_count_row(len(layers), 'layer'))}, {' '.join(_count_row(block.tiles, 'tile'))}",
        "ends": ends_of(plan, block),
        "sentence": f"Energy block: {settles}{' as a circuit' if node.circuit else ''}.",
        "facts": facts,
        "layers": [
            (op.path or op.name, op.target, f"{op.rows}×{op.cols}", count(_tiles(plan, op)), count(op.macs))
            for op in layers
        ],
        "weights": list(block.weights),
        "measured": _measured(bound) if bound is not None else [],
    }


def _tiles(plan: PlanData, op: Operation) -> int:
    return plan.hardware.tiles(max(op.rows, 1), max(op.cols, 1), op.groups, max(op.positions, 1))


def _utilisation(plan: PlanData, block: BlockPlan, layers: Sequence[Operation]) -> str:
    """The share of a block's devices that hold a weight."""
    hardware = plan.hardware
    if hardware.tile_rows is None or hardware.tile_cols is None or not block.tiles:
        return ""
    copies = [op.positions if hardware.conv_mapping == "unrolled" else 1 for op in layers]
    weights = sum(op.rows * op.cols * op.groups * n for op, n in zip(layers, copies, strict=True))
    devices = block.tiles * hardware.tile_rows * hardware.tile_cols
    return f", {100 * weights * hardware.devices_per_weight / devices:.1f} % of their devices used"


def _dtype(bound: BoundBlock) -> torch.dtype:
    return next((weight.dtype for weight in bound.weights if weight is not None), torch.float32)


def _measured(bound: BoundBlock) -> list[tuple[str, str]]:
    certificate, last = bound.certificate, bound.module.last
    rows = []
    if certificate is None:
        rows.append(("loop gain", "0, it has no feedback"))
    else:
        rows.append(("loop gain κ", f"{certificate.loop_gain:.3g}"))
        rows.append(("spectral radius ρ", f"{certificate.radius:.3g}"))
        predicted = certificate.sweeps(bound.module.free_rtol(_dtype(bound)))
        rows.append(("sweeps predicted", "unknown, no certificate" if predicted is None else str(predicted)))
    if last is not None and last.sweeps:
        rows.append(("sweeps in the last forward", str(last.sweeps)))
        rows.append(("residual", f"{last.residual:.2e}"))
    return rows
