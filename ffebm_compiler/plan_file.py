"""Make a plan from JSON values, and check every value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from ffebm_compiler.errors import HardwareError, PlanError
from ffebm_compiler.files.checked_json import Malformed, short, typed, typed_fields
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import OperationGraph
from ffebm_compiler.passes.plan_notes import other_notes, plan_notes
from ffebm_compiler.passes.planning import describe_block, placements
from ffebm_compiler.plan_data import SCHEMA, BlockPlan, DigitalPart, Placement, PlanData, PlanOptions

__all__ = ["plan_from"]


@dataclass(frozen=True)
class _PlanFile:
    """The content of a file. Hardware and blocks are read one by one."""

    schema: int
    graph: OperationGraph
    hardware: Mapping[str, Any]
    model: str
    options: PlanOptions
    blocks: tuple[Any, ...]
    digital_parts: tuple[DigitalPart, ...]
    weights: Mapping[str, Placement]
    rejected: Mapping[str, str]
    notes: tuple[str, ...]
    modules: tuple[str, ...]
    fingerprint: str


def plan_from(data: Any) -> PlanData:
    """The plan of JSON values, not validated.

    Raises:
        PlanError: something is missing or malformed; names the place.
    """
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if isinstance(schema, bool) or schema != SCHEMA:
        found = short(schema) if isinstance(data, Mapping) else repr(type(data).__name__)
        raise PlanError(f"not a plan of schema {SCHEMA} (found {found}): make it again with ffebm.plan()")
    try:
        file = typed(_PlanFile, data)
        hardware = Hardware.from_dict(file.hardware)
        blocks, edited = _blocks(file.blocks, file.graph, hardware)
        notes = (*other_notes(file.notes), *plan_notes(blocks, file.graph, hardware)) if edited else file.notes
        return PlanData(
            model=file.model,
            hardware=hardware,
            options=file.options,
            blocks=blocks,
            digital_parts=file.digital_parts,
            weights=_places(file, blocks) if edited else file.weights,
            rejected=file.rejected,
            notes=_notes(notes, data),
            modules=file.modules,
            graph=file.graph,
            fingerprint=file.fingerprint,
        )
    except HardwareError as error:
        raise PlanError(f"the plan is malformed (hardware, {error}): make it again") from error
    except Malformed as error:
        raise PlanError(f"the plan is malformed ({error}): make it again") from error


_UNCOUNTED = (
    "the plan is of an earlier version, which did not count multiply-accumulates between activations: make it again to "
    "see them"
)


def _notes(notes: tuple[str, ...], data: Mapping[str, Any]) -> tuple[str, ...]:
    counted = all("product_macs" in operation for operation in data["graph"]["operations"])
    return notes if counted or _UNCOUNTED in notes else (*notes, _UNCOUNTED)


def _places(file: _PlanFile, blocks: tuple[BlockPlan, ...]) -> Mapping[str, Placement]:
    """The places of the weights in blocks that were edited, as they follow from the operations."""
    reasons = {
        op.name: file.rejected[path] for op in file.graph.operations if (path := op.path or op.name) in file.rejected
    }
    return placements(file.weights, file.graph, blocks, reasons)


def _blocks(items: tuple[Any, ...], graph: OperationGraph, hardware: Hardware) -> tuple[tuple[BlockPlan, ...], bool]:
    """The blocks of a file, and whether one was edited: one that gives its name and operations alone is completed."""
    counted = {field.name for field in fields(BlockPlan) if field.default is MISSING}
    edited = False
    users = graph.users()
    order = {op.name: index for index, op in enumerate(graph.operations)}
    blocks = []
    for index, item in enumerate(items):
        given = typed_fields(BlockPlan, item, f"blocks[{index}]", required=("name", "operations"))
        unknown = [name for name in given["operations"] if name not in graph]
        if unknown:
            raise PlanError(f"{given['name']} holds {unknown[0]!r}, which is no operation of the plan's graph")
        try:
            full = asdict(describe_block(graph, hardware, users, order, given["name"], given["operations"]))
        except HardwareError as error:
            raise Malformed(f"a layer of blocks[{index}]: {error}") from error
        blocks.append(BlockPlan(**{**full, **given}))
        edited = edited or not counted <= set(given)
    return tuple(blocks), edited
