"""The operating point of a circuit by another program than the block's: dense matrices in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.circuit import Circuit
from ffebm_compiler.runtime.energies.loaded import Loaded
from ffebm_compiler.runtime.energies.passive import grounded

__all__ = ["settled"]

_SWEEPS = 100_000


def settled(circuit: Circuit, currents: Mapping[str, Tensor]) -> list[Tensor]:
    """The states of a circuit by block coordinate descent on its dense matrices, to the last digit of float64."""
    stages = circuit.stages
    states = [torch.zeros_like(stage.bias) for stage in stages]
    below: list[list[tuple[int, Tensor, float]]] = [[] for _ in stages]
    diagonals = [stage.own for stage in stages]
    for index, stage in enumerate(stages):
        for part in stage.couplings:
            if part.source >= 0:
                below[part.source].append((index, (part.plus - part.minus).T, part.reflection / stage.gain))
                diagonals[part.source] = diagonals[part.source] + part.reflection * (part.plus + part.minus).sum(0)
    sigmas = [
        Loaded(stage.activation, grounded(diagonal).reshape(stage.shape))
        for stage, diagonal in zip(stages, diagonals, strict=True)
    ]
    for _ in range(_SWEEPS):
        change = 0.0
        for index, stage in enumerate(stages):
            field = stage.bias + currents.get(stage.name, torch.zeros_like(stage.bias))
            for part in stage.couplings:
                source = states[part.source] if part.source >= 0 else circuit.inputs[-1 - part.source]
                field = field + (part.plus - part.minus) @ source
            for later, transposed, gamma in below[index]:
                field = field + gamma * (transposed @ states[later])
            new = sigmas[index].value(field.reshape(stage.shape)).flatten()
            change = max(change, float((new - states[index]).norm() / new.norm().clamp_min(1e-300)))
            states[index] = new
        if change <= 1e-14:
            break
    return states
