"""Equilibria and their gradients written down from the equations, in float64, for dense blocks of any shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from networks import MLP, Branches, Residual
from torch import Tensor, nn

__all__ = ["BY_HAND", "ByHand", "branches", "chain", "relative", "residual"]

Sources = Mapping[int, Sequence[Tensor]]
"""State (−1 is the input) -> its matrices; a wire is a matrix too."""


@dataclass
class ByHand:
    """One block: for each layer its matrices by source, its bias and σ; c_l; the last layer is the output."""

    layers: Sequence[tuple[Sources, Tensor, Callable[[Tensor], Tensor]]]
    scales: Sequence[float]

    def drive(self, index: int, states: Sequence[Tensor], x: Tensor) -> Tensor:
        """d_l."""
        sources, bias, _ = self.layers[index]
        return bias + sum((x if k < 0 else states[k]) @ w.T for k, ws in sources.items() for w in ws)

    def field(self, index: int, states: Sequence[Tensor], x: Tensor, scales: Sequence[Any] | None = None) -> Tensor:
        """h_l = d_l + Σ_m (c_m/c_l) J_mlᵀ s_m."""
        c = self.scales if scales is None else scales
        h = self.drive(index, states, x)
        for later, (sources, _, _) in enumerate(self.layers):
            for w in sources.get(index, ()):
                h = h + (c[later] / c[index]) * (states[later] @ w)
        return h

    def update(self, index: int, states: Sequence[Tensor], x: Tensor, scales: Sequence[Any] | None = None) -> Tensor:
        """σ_l(h_l)."""
        return self.layers[index][2](self.field(index, states, x, scales))

    def settle(
        self,
        x: Tensor,
        nudge: Mapping[int, Tensor] | None = None,
        held: Mapping[int, Tensor] | None = None,
        scales: Sequence[Any] | None = None,
        sweeps: int = 400,
    ) -> list[Tensor]:
        """The states for which ∂E/∂s_l + nudge_l = 0, with some of them held."""
        c = self.scales if scales is None else scales
        states: list[Tensor] = []
        for index, (_, _, sigma) in enumerate(self.layers):
            states.append(sigma(self.drive(index, states, x)))
        for _ in range(sweeps):
            before = list(states)
            for index, (_, _, sigma) in enumerate(self.layers):
                h = self.field(index, states, x, scales)
                if nudge is not None and index in nudge:
                    h = h - nudge[index] / c[index]
                states[index] = sigma(h)
                if held is not None and index in held:
                    states[index] = held[index]
            if max(float((a - b).detach().abs().max()) for a, b in zip(states, before, strict=True)) < 1e-16:
                break
        return states

    def energies(self, states: Sequence[Tensor], x: Tensor) -> Tensor:
        """E of every sample without Σ c_l G_l(s_l), which depends on no weight and no input."""
        terms = [
            c * (s * self.drive(i, states, x)).sum(1) for i, (s, c) in enumerate(zip(states, self.scales, strict=True))
        ]
        return -torch.stack(terms).sum(0)

    def energy(self, states: Sequence[Tensor], x: Tensor) -> Tensor:
        """The same, summed over the samples."""
        return self.energies(states, x).sum()

    def contrast(
        self, first: Sequence[Tensor], second: Sequence[Tensor], divisor: Tensor, x: Tensor, by: Sequence[Tensor]
    ) -> list[Tensor]:
        """[∂E(first) − ∂E(second)] / divisor, the division per sample."""
        up, down = [s.detach() for s in first], [s.detach() for s in second]
        difference = ((self.energies(up, x) - self.energies(down, x)) / divisor).sum()
        return list(torch.autograd.grad(difference, by))


def chain(model: MLP) -> list[tuple[Sources, Tensor, Callable[[Tensor], Tensor]]]:
    """Every linear after the one before; the last is linear."""
    sigmas = [*[model.activation] * (len(model.layers) - 1), nn.Identity()]
    return [({i - 1: [m.weight]}, m.bias, sigma) for i, (m, sigma) in enumerate(zip(model.layers, sigmas, strict=True))]


def residual(model: Residual) -> list[tuple[Sources, Tensor, Callable[[Tensor], Tensor]]]:
    """σ(a), σ(b + side), c."""
    act = model.activation
    return [
        ({-1: [model.a.weight]}, model.a.bias, act),
        ({0: [model.b.weight], -1: [model.side.weight]}, model.b.bias + model.side.bias, act),
        ({1: [model.c.weight]}, model.c.bias, nn.Identity()),
    ]


def branches(model: Branches) -> list[tuple[Sources, Tensor, Callable[[Tensor], Tensor]]]:
    """σ(a), σ(c), σ(b + d + wire), e."""
    act, wire = model.activation, torch.eye(7, dtype=torch.float64)
    return [
        ({-1: [model.a.weight]}, model.a.bias, act),
        ({0: [model.c.weight]}, model.c.bias, act),
        ({0: [model.b.weight, wire], 1: [model.d.weight]}, model.b.bias + model.d.bias, act),
        ({2: [model.e.weight]}, model.e.bias, nn.Identity()),
    ]


BY_HAND: dict[str, Callable[[Any], list[tuple[Sources, Tensor, Callable[[Tensor], Tensor]]]]] = {
    "mlp": chain,
    "residual": residual,
    "branches": branches,
}
"""Case of `networks.py` -> its layers."""


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖/‖expected‖."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))
