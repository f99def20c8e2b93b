"""`Array`: the devices that hold the weights of one layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.runtime.devices.devices import Devices
from ffebm_compiler.runtime.devices.laws import Drift, FlickerNoise, Relaxation, polynomial
from ffebm_compiler.runtime.devices.tiling import Tiling
from ffebm_compiler.runtime.devices.wires import exact_weights, fast_weights

__all__ = ["Array", "Held"]


@dataclass(frozen=True)
class Held:
    """What an array holds, in the form of its matrices (groups, rows, cols)."""

    forward: Tensor
    """The weights of a forward read."""
    backward: Tensor
    """The weights of a backward read: the same tensor if the same devices are read both ways."""
    variance: Tensor | None
    """Variance of a weight from one read to the next; None without read noise."""


class Array:
    """The devices of one layer: their errors are drawn once, and what they hold follows from weights and age.

    Draws are float32 numbers of a CPU generator, so that a seed gives the same devices anywhere.

    If the weights are `conductances` themselves, which the energy says, they are never negative: w = w_max g, with g
    the mean of a weight's devices, all of which have the same target. A weight below g_min is held at g_min.

    Raises:
        UnsupportedError: a weight with a sign has an odd number of devices above one.
    """

    def __init__(self, name: str, tiling: Tiling, devices: Devices, conductances: bool = False) -> None:
        self.name, self.tiling, self.devices, self.conductive = name, tiling, devices, conductances
        if tiling.devices > 1 and tiling.devices % 2 and not conductances:
            raise UnsupportedError(
                f"{name}: devices_per_weight is {tiling.devices}, and a weight is the difference of two devices, or of "
                "two equal groups of devices: use Hardware(devices_per_weight=1), or an even number"
            )
        self._drawn: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the draws, which the seed gives again."""
        return {**self.__dict__, "_drawn": {}}

    def _draw(self, kind: str, like: Tensor, *leading: int, uniform: bool = False) -> Tensor:
        """Numbers of one kind, one for each device or weight, in the type and place of `like`."""
        found = self._drawn.get(kind)
        if found is None:
            digest = hashlib.sha256(f"{self.devices.seed}/{self.name}/{kind}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            shape = (*leading, *self.tiling.shape)
            found = torch.empty(shape, dtype=torch.float32, device="cpu")
            found = found.uniform_(generator=generator) if uniform else found.normal_(generator=generator)
        if found.device != like.device:
            found = found.to(like.device)
        self._drawn[kind] = found
        return found.to(like.dtype)

    @property
    def _signs(self) -> tuple[float, ...]:
        """dw/dg of each device of a weight, in units of w_max."""
        count, range_ = self.tiling.devices, 1 - self.devices.smallest
        if self.conductive:
            return (1 / count,) * count
        if count == 1:
            return (2 / range_,)
        return (2 / count / range_, -2 / count / range_) * (count // 2)

    def targets(self, matrices: Tensor, largest: Tensor) -> Tensor:
        """The conductances to program, (devices, groups, rows, cols)."""
        scale = self.tiling.spread(largest)
        share = torch.where(scale > 0, matrices / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)
        if self.devices.weight_bits is not None:
            steps = 2 ** (self.devices.weight_bits - 1) - 1
            share = (share * steps).round() / steps
        low = self.devices.smallest
        if self.conductive:
            return share.clamp_min(low).expand(self.tiling.devices, *share.shape)
        if self.tiling.devices == 1:
            return (low + (1 - low) * (share + 1) / 2).unsqueeze(0)
        pair = torch.stack([share.clamp_min(0), (-share).clamp_min(0)])
        return (low + (1 - low) * pair).repeat(self.tiling.devices // 2, 1, 1, 1)

    def conductances(self, targets: Tensor, age: float) -> Tensor:
        """The conductances that the devices have at an age, for these targets."""
        settings, count = self.devices, self.tiling.devices
        g, drift = targets, settings.drift
        relaxing = isinstance(drift, Relaxation)
        if settings.programming != 0 or relaxing:
            sigma = (
                drift.sigma(settings.programming, g, age)
                if isinstance(drift, Relaxation)
                else polynomial(settings.programming, g)
            )
            g = (g + sigma * self._draw("programming", g, count)).clamp_min(0)
        if isinstance(drift, Drift) and age > drift.start:
            factor = drift.factor(g, self._draw("drift", g, count), age)
            fresh, g = g, g * factor
            if drift.compensated:
                g = g * self._compensation(fresh, g)
        if settings.stuck_off or settings.stuck_on:
            chance = self._draw("stuck", g, count, uniform=True)
            g = torch.where(chance < settings.stuck_off, torch.full_like(g, settings.smallest), g)
            g = torch.where(chance > 1 - settings.stuck_on, torch.ones_like(g), g)
        return g

    def _compensation(self, fresh: Tensor, aged: Tensor) -> Tensor:
        """Σ g(t₀)/Σ g(t) of every tile."""
        before, now = (self.tiling.total(g.sum(0)) for g in (fresh, aged))
        return self.tiling.spread(torch.where(now > 0, before / now.clamp_min(torch.finfo(now.dtype).tiny), 1.0))

    def _through_wires(self, conductances: Tensor) -> Tensor:
        """What the wires of every tile leave of the conductances between its terminals.

        The devices of a weight are neighbouring columns. Rows are driven next to the first column, and columns are
        sensed next to the last row.
        """
        solve = exact_weights if self.devices.wires == "exact" else fast_weights
        result = torch.empty_like(conductances)
        first = [0, 0, 0]
        for held in self.tiling.groups:
            first[1] = 0
            for rows in self.tiling.rows:
                first[2] = 0
                for cols in self.tiling.cols:
                    place = tuple(slice(f, f + n) for f, n in zip(first, (held, rows, cols), strict=True))
                    part = conductances[(slice(None), *place)]
                    result[(slice(None), *place)] = self._of_tile(part, solve)
                    first[2] += cols
                first[1] += rows
            first[0] += held
        return result

    def _of_tile(self, part: Tensor, solve: Callable[[Tensor, float], Tensor]) -> Tensor:
        """The effective conductances of one tile, whose groups (devices, groups, rows, cols) are along its diagonal."""
        count, held, rows, cols = part.shape
        lines = part.permute(1, 2, 3, 0).reshape(held, rows, cols * count)
        whole = part.new_full((held * rows, held * cols * count), self.devices.smallest)
        places = [
            (slice(k * rows, (k + 1) * rows), slice(k * cols * count, (k + 1) * cols * count)) for k in range(held)
        ]
        for place, each in zip(places, lines, strict=True):
            whole[place] = each
        found = solve(whole, self.devices.wire_resistance)
        kept = torch.stack([found[place] for place in places])
        return kept.reshape(held, rows, cols, count).permute(3, 0, 1, 2)

    def weights(self, conductances: Tensor, largest: Tensor) -> Tensor:
        """w_max Σ ± g, the weights that these conductances are."""
        signs = self._signs
        if self.tiling.devices == 1 and not self.conductive:
            low = self.devices.smallest
            share = 2 * (conductances[0] - low) / (1 - low) - 1
        else:
            share = torch.stack([sign * g for sign, g in zip(signs, conductances, strict=True)]).sum(0)
        return share * self.tiling.spread(largest)

    def variance(self, conductances: Tensor | None, largest: Tensor, age: float) -> Tensor | None:
        """w_max² Σ (dw/dg)² σ(g, t)²: variance of a weight from read to read. Constant noise needs no conductances."""
        law = self.devices.read_noise
        if law == 0:
            return None
        scale = self.tiling.spread(largest).square()
        if isinstance(law, FlickerNoise):
            assert conductances is not None
            parts = [sign**2 * law.sigma(g, age).square() for sign, g in zip(self._signs, conductances, strict=True)]
            return scale * torch.stack(parts).sum(0)
        return scale * (sum(sign**2 for sign in self._signs) * float(law) ** 2)

    def held(self, matrices: Tensor, age: float) -> Held:
        """What the array holds where it was programmed with these matrices `age` seconds ago."""
        settings = self.devices
        wide = matrices.double() if matrices.dtype == torch.float64 else matrices.float()
        largest = self.tiling.largest(wide)
        aged = isinstance(settings.drift, Relaxation) or (settings.drift is not None and age > settings.drift.start)
        exact = settings.exact and not aged
        g = None
        if not exact or isinstance(settings.read_noise, FlickerNoise):
            g = self.conductances(self.targets(wide, largest), age)
        forward = wide
        if not exact and g is not None:
            forward = self.weights(self._through_wires(g) if settings.wire_resistance else g, largest)
        variance = self.variance(g, largest, age)
        backward = forward
        if settings.mismatch:
            size = settings.mismatch * self.tiling.spread(largest)
            backward = forward + size * self._draw("backward", forward)
            forward = forward + size * self._draw("forward", forward)
        return Held(*(None if part is None else part.to(matrices.dtype) for part in (forward, backward, variance)))  # type: ignore[arg-type]
