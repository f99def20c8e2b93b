"""Choose the memory layout in which a block's sweeps are fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ffebm_compiler.runtime.program.block_program import BlockProgram

__all__ = ["laid_out"]


def laid_out(program: BlockProgram, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The tensors in the memory layout in which the sweeps of a block are fastest.

    On a CPU, convolutions are up to twice as fast on channels-last tensors, and a settling
    block runs each of its convolutions many times.
    """
    if not program.convolutional or any(t is not None and t.device.type != "cpu" for t in tensors):
        return tuple(tensors)
    return tuple(
        t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t for t in tensors
    )
