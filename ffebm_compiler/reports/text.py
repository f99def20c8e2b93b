"""Tables for the terminal: plans and summaries as text."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ffebm_compiler.errors import PlanError
from ffebm_compiler.gradient_choice import gradient_lines
from ffebm_compiler.passes.partition.chips import floor_plan_of
from ffebm_compiler.passes.partition.placement import placement_of

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import BlockPlan, PlanData

__all__ = ["block_facts", "count", "plan_text", "summary_text", "table_text", "terminal_width"]

_NARROWEST, _WIDEST = 40, 160
_GAP = 2
"""Characters between two columns."""


def count(value: float) -> str:
    """A count as text: 950, 12.3 k, 4.56 M, 7.89 G."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{value:g}"


def terminal_width() -> int:
    """Characters in a line: of the terminal or the variable COLUMNS, else 80, and between 40 and 160."""
    return min(max(shutil.get_terminal_size((80, 24)).columns, _NARROWEST), _WIDEST)


def table_text(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> str:
    """A table as plain text, with numbers aligned to the right.

    Text is wrapped to fit the width. Columns that do not fit even so are printed below, each time behind the first one.
    """
    width = terminal_width() if width is None else width
    body = [[str(cell) for cell in row] for row in rows]
    numeric = [index > 0 and _all_numbers([row[index] for row in body]) for index in range(len(columns))]
    least = [_least_width(column, [row[index] for row in body], numeric[index]) for index, column in enumerate(columns)]
    tables = []
    for group in _column_groups(least, width - 2):
        names = [columns[index] for index in group]
        cells = [[row[index] for index in group] for row in body]
        kinds = [numeric[index] for index in group]
        tables.append(_table(names, cells, kinds, [least[index] for index in group], width - 2))
    return "\n".join([*([f"{title}\n"] if title else []), "\n\n".join(tables)])


def _least_width(column: str, cells: Sequence[str], numeric: bool) -> int:
    """The least width of a column: numbers are never broken, nor are words of up to 24 letters."""
    if numeric:
        return max(map(len, [*cells, *column.split()]))
    return max(min(24, max(map(len, cell.split()), default=0)) for cell in [column, *cells])


def _all_numbers(cells: Sequence[str]) -> bool:
    return bool(cells) and all(not cell or (cell[0] in "0123456789-+." and ", " not in cell) for cell in cells)


def _column_groups(least: Sequence[int], width: int) -> list[list[int]]:
    """Which columns stand beside each other. The first one is in every group."""
    groups: list[list[int]] = [[0]]
    for index in range(1, len(least)):
        taken = sum(least[other] + _GAP for other in groups[-1])
        if taken + least[index] > width and len(groups[-1]) > 1:
            groups.append([0])
        groups[-1].append(index)
    return groups


def _table(
    columns: Sequence[str], body: Sequence[Sequence[str]], numeric: Sequence[bool], least: Sequence[int], width: int
) -> str:
    cells = [[row[index] for row in body] for index in range(len(columns))]
    widths = [max(map(len, [column, *own])) for column, own in zip(columns, cells, strict=True)]
    while sum(widths) + _GAP * (len(widths) - 1) > width:
        widest = max(range(len(widths)), key=lambda index: (widths[index] > least[index], widths[index]))
        if widths[widest] <= least[widest]:
            break
        widths[widest] -= 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column, number, size in zip(columns, numeric, widths, strict=True):
        table.add_column(column, justify="right" if number else "left", overflow="fold", width=size)
    for row in body:
        table.add_row(*(_broken(cell, size).replace("[", r"\[") for cell, size in zip(row, widths, strict=True)))
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


def _broken(cell: str, width: int) -> str:
    """A text whose words fit the width: long ones are broken behind dots, slashes and underscores where they can be."""
    words = []
    for word in cell.split(" "):
        pieces = []
        while len(word) > width:
            end = max(word.rfind(sign, 0, width) for sign in "./_") + 1 or width
            pieces.append(word[:end])
            word = word[end:]
        words.append("\n".join([*pieces, word]))
    return " ".join(words)


def plan_text(plan: PlanData) -> str:
    """The plan's table, the digital parts, what was rejected, and the notes."""
    hardware = plan.hardware
    core = "unlimited" if hardware.tiles_per_core is None else str(hardware.tiles_per_core)
    drives = any(block.driven for block in plan.blocks)
    rows = [_block_row(plan, group, drives) for group in _groups_of_split_layers(plan.blocks)]
    columns = ("block", *(["driven"] if drives else []), "layers", "tiles", "DAC", "ADC", "MACs")
    lines = [
        f"{plan.model} on {hardware.name} ({core} tiles per core): {_counted(len(plan.blocks), 'energy block')}, "
        f"{_counted(len(plan.digital_parts), 'digital part')}",
        table_text("", columns, rows) if rows else "no energy blocks",
        f"conversions per sample: {plan.conversions}; "
        f"analog MACs: {100 * plan.analog_share:.1f} % of {count(plan.total_macs)}",
    ]
    if hardware.row_sums == "digital":
        added = sum(block.partial_sums for block in plan.blocks)
        lines.append(f"conversions that digital row sums add to one pass: {added}")
    if plan.blocks:
        lines.append(_fabric_line(plan))
    for part in plan.digital_parts:
        targets = [plan.graph[name].target for name in part.operations]
        shown = ", ".join(f"{t} x{targets.count(t)}" if targets.count(t) > 1 else t for t in dict.fromkeys(targets))
        lines.append(f"{part.name}: {shown}")
    if plan.rejected:
        lines.append("stayed digital:")
        lines.extend(f"  {path}: {reason}" for path, reason in plan.rejected.items())
    lines.extend(f"note: {note}" for note in plan.notes)
    return "\n".join(lines)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _groups_of_split_layers(blocks: Sequence[BlockPlan]) -> list[list[BlockPlan]]:
    """Group neighbouring blocks that hold parts of the same layers, which were split because they exceed a core."""
    return [list(run) for _, run in itertools.groupby(blocks, key=lambda block: dict.fromkeys(block.layers).keys())]


def _block_row(plan: PlanData, group: Sequence[BlockPlan], drives: bool) -> tuple[str, ...]:
    """A row of the plan's table, with states driven by digital values. The numbers of several blocks are summed."""
    name = group[0].name
    if len(group) > 1:
        name = f"{name}..{group[-1].name} ({len(group)} blocks)"
    held = [layer for block in group for layer in block.layers]
    layers = [f"{path} x{held.count(path)}" if held.count(path) > 1 else path for path in dict.fromkeys(held)]
    sums = (sum(block.dac for block in group), sum(block.adc for block in group), sum(block.macs for block in group))
    states = ", ".join(plan.graph[state].target for block in group for state in block.driven)
    return (
        name,
        *([states] if drives else []),
        ", ".join(layers),
        str(sum(block.tiles for block in group)),
        *map(count, sums),
    )


def _fabric_line(plan: PlanData) -> str:
    """The tiles and cores of the blocks, and how full they are."""
    hardware = plan.hardware
    try:
        placed = placement_of(plan)
    except PlanError as error:  # the plan was edited by hand, and the table should still be shown
        return f"no placement: {error}"
    of = "" if hardware.cores is None else f" of {hardware.cores}"
    text = f"{_counted(placed.tiles, 'tile')} on {_counted(placed.cores, 'core')}{of}"
    if hardware.cores_per_chip is not None:
        floor = floor_plan_of(plan)
        text += f" of {_counted(len(floor.chips), 'chip')}, {count(floor.crossing)} values per sample between chips"
    if hardware.tile_rows is None and hardware.tile_cols is None:
        return text
    return f"{text}; {100 * placed.utilisation:.1f} % of the tiles' devices hold a weight"


def block_facts(hybrid: HybridCore) -> list[dict[str, Any]]:
    """For each block: its feedback, its sweeps, its solver and gradient, as JSON values.

    `loop_gain`, `radius`, `solver` are null where a block has no feedback, `predicted_sweeps` where no bound is known,
    and `sweeps` before the first forward.
    """
    facts = []
    for block in hybrid.blocks:
        module, certificate = block.module, block.certificate
        rtol = module.free_rtol(next((w.dtype for w in block.weights if w is not None), torch.float32))
        facts.append(
            {
                "block": block.name,
                "layers": list(block.layers),
                "states": len(module.program.layers),
                "loop_gain": None if certificate is None else certificate.loop_gain,
                "radius": None if certificate is None else certificate.radius,
                "predicted_sweeps": 0 if certificate is None else certificate.sweeps(rtol),
                "sweeps": None if module.last is None else module.last.sweeps,
                "solver": None if certificate is None else type(module.active_solver).__name__,
                "gradient": "exact" if certificate is None else module.active_estimator.name,
                "stationary_only": list(
                    dict.fromkeys(
                        layer.activation.name for layer in module.program.layers if not layer.activation.monotone
                    )
                ),
            }
        )
    return facts


def summary_text(hybrid: HybridCore) -> str:
    """The plan, and how each block settles."""
    rows: list[tuple[str, ...]] = [
        (
            fact["block"],
            str(fact["states"]),
            "none" if fact["loop_gain"] is None else f"{fact['loop_gain']:.3g}",
            "" if fact["radius"] is None else f"{fact['radius']:.3g}",
            "unknown" if fact["predicted_sweeps"] is None else str(fact["predicted_sweeps"]),
            "not run" if fact["sweeps"] is None else str(fact["sweeps"]),
            fact["solver"] or "none",
            fact["gradient"],
            ", ".join(fact["stationary_only"]),
        )
        for fact in block_facts(hybrid)
    ]
    columns = ["block", "states", "loop gain", "rho", "predicted", "last", "solver", "gradient", "stationary only"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    table = table_text("equilibria (sweeps predicted and in the last forward)", columns, rows)
    return "\n".join(
        [
            plan_text(hybrid.plan),
            table,
            *_energy_lines(hybrid),
            *_device_lines(hybrid),
            *gradient_lines(hybrid),
            *_solver_lines(hybrid),
        ]
    )


def _device_lines(hybrid: HybridCore) -> list[str]:
    """The devices that hold the weights, and how gradients are read from them."""
    devices = hybrid.devices
    if devices is None:
        return []
    age = "new" if not hybrid.device_age else f"{hybrid.device_age:.4g} s old"
    lines = [f"devices (modelled): {devices.name}, seed {devices.seed}, {age}"]
    if devices.source:
        lines.append(f"  source: {devices.source}")
    if devices.noisy or devices.adc_bits is not None:
        used = dict.fromkeys(str(block.module.active_estimator) for block in hybrid.blocks if block.loop_gain)
        lines += [f"  states are read in literal form: {each}" for each in used]
        lines += [
            f"  {block.name}: an error passes {block.module.program.distance} layers, and each leaves about κ = "
            f"{block.loop_gain:.3g} of it: ffebm.check_gradients tells what of it is still read. A larger feedback, or "
            "fewer layers in a block, leave more"
            for block in hybrid.blocks
            if block.loop_gain and block.module.program.distance > 1 and block.module.active_estimator.compares_states
        ]
    return lines


def _energy_lines(hybrid: HybridCore) -> list[str]:
    """The energy of the blocks with feedback, and the feedback that they hold."""
    blocks = [block.module for block in hybrid.blocks if block.certificate is not None]
    return list(
        dict.fromkeys(module.energy_function.describe(module.feedback, module.program.symmetric) for module in blocks)
    )


def _solver_lines(hybrid: HybridCore) -> list[str]:
    """Which blocks settle with which solver, and why."""
    groups: dict[str, list[str]] = {}
    for block in hybrid.blocks:
        if block.certificate is not None:
            groups.setdefault(str(block.module.chosen), []).append(block.name)
    return [f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}: {why}" for why, names in groups.items()]
