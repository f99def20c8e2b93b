"""Diagnosis: how each energy block settles on given inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.reports.text import table_text
from ffebm_compiler.runtime.phases.free_phase import FreePhase
from ffebm_compiler.runtime.program.frame import Frame

if TYPE_CHECKING:
    from ffebm_compiler.bound_block import BoundBlock
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["BlockDiagnosis", "Diagnosis", "diagnose"]


@dataclass(frozen=True)
class BlockDiagnosis:
    """The free phase of one block, sweep by sweep."""

    layers: tuple[str, ...]
    radius: float
    """Spectral radius ρ(A) of the certificate; 0 for a block without feedback."""
    predicted: int | None
    """Sweeps that the certificate predicts; None if it certifies nothing."""
    sweeps: int
    """Sweeps that the last forward took."""
    residuals: tuple[float, ...]
    """Largest relative change of a layer, per sweep."""
    energies: tuple[float, ...]
    """E summed over the batch in float64: at the feedforward values, then after each sweep. Empty if there is none."""
    monotone: bool
    """Whether all activations are monotone. The equilibrium is then a minimum, else a stationary point."""
    symmetric: bool = True
    """Whether the feedback is tied. If it has weights of its own, the block is a vector field without energy."""
    states: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """Up to 48 values, evenly spaced, of each state of the first sample: feedforward, then after each sweep."""

    @property
    def rate(self) -> float:
        """Measured contraction per sweep: the geometric mean of the ratios of successive residuals."""
        kept = [r for r in self.residuals if r > 1e-12]
        return (kept[-1] / kept[0]) ** (1 / (len(kept) - 1)) if len(kept) > 1 else 0.0


@dataclass(frozen=True)
class Diagnosis:
    """Each block's relaxation on given inputs."""

    blocks: Mapping[str, BlockDiagnosis]

    def __getitem__(self, name: str) -> BlockDiagnosis:
        """The diagnosis of one block."""
        return self.blocks[name]

    def __str__(self) -> str:
        """A table."""
        rows = [
            (
                name,
                ", ".join(block.layers),
                f"{block.radius:.3g}",
                "unknown" if block.predicted is None else str(block.predicted),
                str(block.sweeps),
                f"{block.rate:.2g}",
                f"{block.residuals[-1]:.1e}" if block.residuals else "",
                f"{block.energies[-1] - block.energies[0]:.3g}"
                if block.energies
                else ""
                if block.symmetric
                else "no energy",
            )
            for name, block in self.blocks.items()
        ]
        columns = ("block", "layers", "rho", "predicted", "sweeps", "rate", "residual", "energy change")
        return table_text("relaxation of the energy blocks", columns, rows)


def diagnose(hybrid: HybridCore, args: tuple[Any, ...], kwargs: Mapping[str, Any], sweeps: int) -> Diagnosis:
    """Run the hybrid in eval mode, then run and record each block's free phase again for a number of sweeps.

    With devices it is that of the weights that they hold, read without noise.

    Raises:
        InputError: `sweeps` is no whole number of at least 1.
    """
    count = plain(sweeps)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"sweeps is {sweeps!r}; expected the number of sweeps to record, at least 1")
    with hybrid._evaluating():
        with hybrid.recording() as record:
            hybrid(*args, **kwargs)
        blocks = {block.name: _diagnose(block, record[block.name][0], count) for block in hybrid.blocks}
    return Diagnosis(blocks)


def _diagnose(block: BoundBlock, operands: tuple[Any, ...], sweeps: int) -> BlockDiagnosis:
    module = block.module
    program, certificate = module.program, block.certificate
    count = program.inputs
    residuals: list[float] = []
    energies: list[float] = []
    states: list[tuple[tuple[float, ...], ...]] = []
    if program.coupled:
        frame = Frame(program, operands[:count], module.held(operands[count:]))
        phase = FreePhase(frame, module.setting)
        energies += _energy(frame, phase)
        states = [_kept(phase)]
        for _ in range(sweeps):
            before = [value.clone() for value in phase.values if value is not None]
            for index in phase.order():
                phase.store(index, phase.update(index))
            after = [value for value in phase.values if value is not None]
            changes = [
                float((new - old).norm() / new.norm().clamp_min(torch.finfo(new.dtype).tiny))
                for old, new in zip(before, after, strict=True)
            ]
            residuals.append(max(changes))
            energies += _energy(frame, phase)
            states.append(_kept(phase))
    dtype = next((w.dtype for w in operands[count:] if w is not None), torch.float32)
    return BlockDiagnosis(
        layers=block.layers,
        radius=certificate.radius if certificate is not None else 0.0,
        predicted=certificate.sweeps(module.free_rtol(dtype)) if certificate is not None else 0,
        sweeps=module.last.sweeps if module.last is not None else 0,
        residuals=tuple(residuals),
        energies=tuple(energies),
        monotone=program.monotone,
        symmetric=program.symmetric,
        states=tuple(states),
    )


_KEPT = 48
"""Values of a state that are kept, of the first sample."""


def _kept(phase: FreePhase) -> tuple[tuple[float, ...], ...]:
    rows = []
    for value in phase.values:
        if value is not None:
            flat = value[:1].flatten()
            step = max(1, -(-flat.numel() // _KEPT))
            rows.append(tuple(flat[::step].tolist()))
    return tuple(rows)


def _energy(frame: Frame, phase: FreePhase) -> list[float]:
    """E in float64, where there is one. A float32 sum over a batch has fewer digits than the last sweeps change."""
    if not frame.program.symmetric:
        return []
    exact = Frame(
        frame.program,
        [_exact(value) for value in frame.inputs],
        [None if weight is None else _exact(weight) for weight in frame.weights],
        frame.drawn,
        frozen=True,
    )
    states = [_exact(value) for value in phase.values if value is not None]
    preactivations = [_exact(value) for value in phase.preactivations if value is not None]
    return [float(phase.setting.energy.value(exact, phase.setting, states, preactivations))]


def _exact(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
