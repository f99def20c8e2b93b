"""Fabrics for tests: a bench that settles circuits by itself in numpy, and faulty ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.runtime.solvers.fabric import FabricBlock

__all__ = ["Bench", "Boards"]

Rows = np.ndarray


class Bench:
    """Settles circuits of projecting activations by coordinate descent on their conductances, in numpy.

    It holds one block. `calls` has the methods that were called, `fault` changes what they return.
    """

    def __init__(self, fault: Callable[[str, Any], Any] | None = None) -> None:
        self.calls: list[str] = []
        self.fault = fault

    def program(self, block: FabricBlock, weights: Sequence[Tensor | None]) -> None:
        self.calls.append("program")
        self.block, self.stages = block, block.circuit.stages
        self.coupled = [
            [(part.source, (part.plus - part.minus).numpy()) for part in stage.couplings] for stage in self.stages
        ]
        self.loads = [stage.own.numpy().copy() for stage in self.stages]
        self.later: list[list[tuple[int, Rows]]] = [[] for _ in self.stages]
        for index, stage in enumerate(self.stages):
            for part in stage.couplings:
                if part.source >= 0:
                    self.loads[part.source] += part.reflection * (part.plus + part.minus).sum(0).numpy()
                    scaled = part.reflection / stage.gain * (part.plus - part.minus).numpy()
                    self.later[part.source].append((index, scaled))
        if self.fault is not None:
            self.fault("program", None)

    def settle(self, inputs: Sequence[Tensor], nudge: Sequence[Tensor | None] | None) -> Any:
        self.calls.append("settle" if nudge is None else "nudge")
        found = self._settled(inputs, nudge or [None] * len(self.stages), [None] * len(self.stages))
        return found if self.fault is None else self.fault(self.calls[-1], found)

    def hold(self, inputs: Sequence[Tensor], held: Sequence[Tensor | None]) -> Any:
        self.calls.append("hold")
        return self._settled(inputs, [None] * len(self.stages), held)

    def _settled(
        self, inputs: Sequence[Tensor], nudge: Sequence[Tensor | None], held: Sequence[Tensor | None]
    ) -> list[Tensor]:
        flat = [value.reshape(len(value), -1).numpy() for value in inputs]
        fixed = [None if value is None else value.reshape(len(value), -1).numpy() for value in held]
        states = [
            np.zeros((len(flat[0]), stage.bias.numel())) if value is None else value
            for stage, value in zip(self.stages, fixed, strict=True)
        ]
        for _ in range(2000):
            before = [state.copy() for state in states]
            for index, stage in enumerate(self.stages):
                if fixed[index] is not None:
                    continue
                field = np.tile(stage.bias.numpy(), (len(flat[0]), 1))
                current = nudge[index]
                if current is not None:
                    field = field + current.reshape(len(current), -1).numpy()
                for source, matrix in self.coupled[index]:
                    field = field + (states[source] if source >= 0 else flat[-1 - source]) @ matrix.T
                for later, matrix in self.later[index]:
                    field = field + states[later] @ matrix
                low, high = (np.asarray(bound) for bound in stage.activation.bounds(stage.bias.reshape(stage.shape)))
                shaped = (field / self.loads[index]).reshape(-1, *stage.shape)
                states[index] = np.clip(shaped, low, high).reshape(field.shape)
            if all(np.abs(new - old).max() <= 1e-15 for new, old in zip(states, before, strict=True)):
                break
        shapes = self.block.shapes
        return [torch.tensor(s).reshape(len(s), *shape) for s, shape in zip(states, shapes, strict=True)]


class Boards:
    """A rack with a bench for each block: `program` returns it, so that every block stays programmed."""

    def __init__(self) -> None:
        self.benches: list[Bench] = []

    def program(self, block: FabricBlock, weights: Sequence[Tensor | None]) -> Bench:
        self.benches.append(Bench())
        self.benches[-1].program(block, weights)
        return self.benches[-1]

    def settle(self, inputs: Sequence[Tensor], nudge: Sequence[Tensor | None] | None) -> list[Tensor]:
        raise AssertionError("the rack itself settles nothing")
