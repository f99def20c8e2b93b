"""`KeptGradients`: the gradients of a hybrid as they were before a backward, for a measurement that fails in it.

Backward reaches the blocks one after the other, and the parameters behind the first of them have their gradient when a
later one is measured. If that fails, a training step that is tried again must not find half of the gradients added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffebm_compiler.runtime.solvers.measured import Measured

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts
    from ffebm_compiler.runtime.block import EnergyBlock

__all__ = ["KeptGradients", "keeping_gradients", "measured_blocks"]


def measured_blocks(hybrid: HybridParts) -> list[EnergyBlock]:
    """The blocks with feedback whose equilibria a fabric measures."""
    blocks = hybrid.energy_blocks.values()
    return [block for block in blocks if isinstance(block.solver, Measured) and block.program.coupled]


class KeptGradients:
    """The gradients of parameters, noted when a backward reaches the outputs of a hybrid."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._noted: list[Tensor | None] = []
        self._backward = -1

    def watch(self, outputs: Iterable[Any]) -> None:
        """Note the gradients in every backward that reaches one of these outputs."""
        for output in outputs:
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._note)

    def _note(self, _: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self._noted = [None if p.grad is None else p.grad.detach().clone() for p in self._parameters]

    def restore(self) -> None:
        """Put the gradients back, if the present backward went through the outputs."""
        if self._backward != torch._C._current_graph_task_id():
            return
        for parameter, noted in zip(self._parameters, self._noted, strict=True):
            if noted is None or parameter.grad is None:
                parameter.grad = noted
            else:  # in its own memory, which an engine may have made a view
                parameter.grad.detach().copy_(noted)


@contextmanager
def keeping_gradients(hybrid: HybridParts) -> Iterator[KeptGradients | None]:
    """Let the blocks that are measured in this forward restore the gradients where a backward of it fails."""
    blocks = measured_blocks(hybrid) if torch.is_grad_enabled() else []
    kept = KeptGradients(hybrid.parameters()) if blocks else None
    try:
        for block in blocks:
            block.kept_gradients = kept
        yield kept
    finally:
        for block in blocks:
            block.kept_gradients = None
