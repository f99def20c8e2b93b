"""The notes of a plan that follow from its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import OperationGraph
from ffebm_compiler.plan_data import BlockPlan

__all__ = ["other_notes", "plan_notes"]

_SHARED = (
    "several convolutions together; with conv_mapping='im2col' one set of tiles serves all output positions in turn, "
    "while settling needs every position at once: conv_mapping='unrolled' counts the tiles for that"
)
_POOLED = (
    "max pooling: its winners can switch under the nudge, and the certificate counts one choice of winners, so that it "
    "is an estimate (docs/mathematics.md); 'avg_pool' instead has neither limit"
)


def plan_notes(blocks: Sequence[BlockPlan], graph: OperationGraph, hardware: Hardware) -> tuple[str, ...]:
    """Notes about properties of the blocks."""
    notes = []
    convolutions = [
        [op for name in block.operations if (op := graph[name]).kind.startswith("conv")] for block in blocks
    ]
    sharing = sum(
        len(layers) > 1 and any(hardware.for_layer(op.path).conv_mapping == "im2col" for op in layers)
        for layers in convolutions
    )
    if sharing:
        notes.append(f"{'1 block settles' if sharing == 1 else f'{sharing} blocks settle'} {_SHARED}")
    pooling = [block.name for block in blocks if any(graph[name].kind == "max_pool" for name in block.operations)]
    if pooling:
        named = f"{', '.join(pooling[:4])}{', ...' if len(pooling) > 4 else ''}"
        notes.append(f"{named} {'holds' if len(pooling) == 1 else 'hold'} {_POOLED}")
    return tuple(notes)


def other_notes(notes: Iterable[str]) -> tuple[str, ...]:
    """The notes of a plan that do not follow from its blocks, which stay when these change."""
    return tuple(note for note in notes if not note.endswith((_SHARED, _POOLED)))
