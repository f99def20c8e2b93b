"""Own outputs: what a hybrid returns may be written in place, as a model's own outputs may."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ffebm_compiler.runtime.block import EnergyBlock

__all__ = ["own_outputs"]


def own_outputs(outputs: Sequence[Any], blocks: Iterable[EnergyBlock]) -> list[Any]:
    """The outputs of a forward, with copies of those that share their memory with states that a block keeps.

    A block keeps states for its backward, for a warm start, and for people who read them.

    Args:
        outputs: what the lowered graph returned.
        blocks: its energy blocks.
    """
    kept = frozenset().union(*(block.memory_of_outputs for block in blocks))
    shared = {id(x): x for x in outputs if type(x) is Tensor and x.untyped_storage().data_ptr() in kept}
    copies = {place: output.clone() for place, output in shared.items()}
    return [copies.get(id(output), output) for output in outputs]
