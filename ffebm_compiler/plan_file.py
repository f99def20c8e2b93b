"""Make a plan from JSON values, and check every value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ffebm_compiler.errors import HardwareError, PlanError
from ffebm_compiler.files.checked_json import Malformed, short, typed, typed_fields
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import OperationGraph
from ffebm_compiler.passes.planning import describe_block
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
        return PlanData(
            model=file.model,
            hardware=hardware,
            options=file.options,
            blocks=_blocks(file.blocks, file.graph, hardware),
            digital_parts=file.digital_parts,
            weights=file.weights,
            rejected=file.rejected,
            notes=_notes(file.notes, data),
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


def _blocks(items: tuple[Any, ...], graph: OperationGraph, hardware: Hardware) -> tuple[BlockPlan, ...]:
    """The blocks of a file. A block that gives only its name and operations is completed."""
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
    return tuple(blocks)
