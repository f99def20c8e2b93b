"""Anderson acceleration of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.solvers.base import Solver, sweep_layers
from ffebm_compiler.runtime.solvers.fixed_point import FixedPoint
from ffebm_compiler.runtime.widest import widest

__all__ = ["Anderson"]


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration of Gauss–Seidel sweeps (Walker & Ni, 2011).

    Let x_i be the last iterates, g_i the results of a sweep from them, and f_i = g_i − x_i. The next iterate is
    Σ α_i g_i, where α minimises ‖Σ α_i f_i‖ under Σ α_i = 1. If samples are independent, each has its own α. Only the
    layers from which a sweep starts are mixed, since the others follow. It is faster if sweeps contract
    slowly. At small loop gain plain sweeps are cheaper.
    """

    memory: int = 5
    regularisation: float = 1e-10

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if not isinstance(self.memory, int) or self.memory < 2:
            raise InputError(f"memory is {self.memory!r}; expected an integer of at least 2")

    def init(self, problem: FixedPoint) -> object:
        """An empty history."""
        return _History(self.memory, self.regularisation, (problem.samples or 0) * problem.parts)

    def step(
        self, problem: FixedPoint, memory: object, measure: bool = True, per_sample: bool = False
    ) -> Tensor | None:
        """Mix the previous iterates, then do one sweep from there.

        So a relaxation ends with a sweep, and its states fit its pre-activations.
        """
        assert isinstance(memory, _History)
        carried, mixed = problem.carried(), memory.mixed()
        if mixed is not None:
            start = 0
            for index, last in zip(carried, memory.channels_last, strict=True):
                value = problem.values[index]
                assert value is not None
                width = value.numel() // len(mixed)
                problem.store(index, _unflattened(mixed[:, start : start + width], value, last))
                start += width
        before = [problem.values[index] for index in carried]
        change = sweep_layers(problem, problem.order(), measure, per_sample)
        if all(value is not None for value in before):
            memory.add(before, [problem.values[index] for index in carried])
        return change


class _History:
    """The last sweeps of Anderson acceleration: g_i, f_i = g_i − x_i, and the products ⟨f_i, f_j⟩.

    Everything is kept in rows, one for each sample, or one for all of them.
    """

    def __init__(self, size: int, regularisation: float, rows: int) -> None:
        self.size = size
        self.regularisation = regularisation
        self.rows = rows or 1
        self.made: list[Tensor] = []
        self.residuals: list[Tensor] = []
        self.gram: Tensor | None = None
        """⟨f_i, f_j⟩, of shape (rows, count, count)."""
        self.channels_last: list[bool] = []
        """For each layer, whether its entries are kept in channels-last order, as they lie in memory."""

    def _joined(self, values: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(values, self.channels_last, strict=True)
        return torch.cat([_flat(value.detach(), self.rows, last) for value, last in pairs if value is not None], 1)

    def add(self, before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> None:
        """Note a sweep."""
        if not self.made:
            self.channels_last = [value is not None and _channels_last(value) for value in after]
        new = self._joined(after)
        residual = new - self._joined(before)
        if len(self.made) == self.size:
            del self.made[0], self.residuals[0]
            assert self.gram is not None
            self.gram = self.gram[:, 1:, 1:]
        self.made.append(new)
        self.residuals.append(residual)
        row = torch.stack([torch.linalg.vecdot(residual, other).to(widest(residual)) for other in self.residuals], 1)
        count = len(self.residuals)
        grown = row.new_zeros(self.rows, count, count)
        if self.gram is not None:
            grown[:, :-1, :-1] = self.gram
        grown[:, -1, :] = grown[:, :, -1] = row
        self.gram = grown

    def mixed(self) -> Tensor | None:
        """Σ α_i g_i in rows; None before there are two sweeps to mix.

        A row that has settled to the last digit, or is not finite, goes on from its last sweep.
        """
        count = len(self.made)
        if count < 2 or self.gram is None:
            return None
        norms = self.gram.diagonal(dim1=1, dim2=2).sqrt()
        falling = norms[:, -1] < norms[:, -2]  # if mixing made a row worse, a plain sweep follows
        usable = torch.isfinite(self.gram).all(2).all(1) & (norms > 0).all(1) & falling
        # The units are ‖f_i‖, so that the regularisation does not outweigh the last, smallest residuals.
        norms = torch.where(usable[:, None], norms, 1.0)
        identity = torch.eye(count, dtype=self.gram.dtype, device=self.gram.device)
        cosines = self.gram / (norms[:, :, None] * norms[:, None, :]) + self.regularisation * identity
        alpha = torch.linalg.solve(torch.where(usable[:, None, None], cosines, identity), 1 / norms) / norms
        alpha = alpha / alpha.sum(1, keepdim=True)
        last = torch.zeros_like(alpha)
        last[:, -1] = 1
        alpha = torch.where(usable[:, None], alpha, last).to(self.made[0].dtype)
        total = self.made[0] * alpha[:, :1]
        for index, made in enumerate(self.made[1:], start=1):
            total.addcmul_(made, alpha[:, index : index + 1])
        return total


def _flat(value: Tensor, rows: int, last: bool) -> Tensor:
    """The value as (rows, entries), with the channels of images last if `last`."""
    return (value.movedim(1, -1) if last else value).reshape(rows, -1)


def _unflattened(flat: Tensor, value: Tensor, last: bool) -> Tensor:
    """The inverse of `_flat` for a tensor like `value`."""
    if last:
        batch, channels, height, width = value.shape
        return flat.reshape(batch, height, width, channels).movedim(-1, 1)
    return flat.reshape(value.shape)


def _channels_last(value: Tensor) -> bool:
    return value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
