"""The runtime against Algorithm 2 of Nest & Ernoult (2024, arXiv 2409.03306), written down literally.

Implicit BP-EP chaining: the digital map F^k before block k is folded into its energy,

    Ẽ^k(s, s^{parents}) = E^k(s, θ^k, F^k(s^{parents}, ω^k)) ,

and in reverse topological order the states of Ẽ^k ± βa⟨s, δ^k⟩ are settled with the parents' states clamped. The
gradients of θ^k and ω^k and the error currents of the parents are (∂Ẽ^k(s⁺) − ∂Ẽ^k(s⁻))/2βa, with the division by the a
of every sample before F^k is differentiated. Error currents are handed from block to block; autograd differentiates one
Ẽ^k at a time, with all states constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from by_hand import ByHand, relative
from finite_differences import squared_error
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Layers(nn.Module):
    """Linear layers with tanh between them: one energy block, the last state linear."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears[:-1]:
            x = linear(x).tanh()
        return self.linears[-1](x)

    def by_hand(self, scales: Sequence[float]) -> ByHand:
        last = len(self.linears) - 1
        layers = [
            ({index - 1: [linear.weight]}, linear.bias, torch.tanh if index < last else lambda h: h)
            for index, linear in enumerate(self.linears)
        ]
        return ByHand(layers, scales)


class Chain(nn.Module):
    """Three blocks of three, two and three states, with batch norm before the second and the third, and a tanh."""

    parents = ((), (0,), (1,))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layers(6, 8, 7, 8), Layers(8, 7, 8), Layers(8, 7, 6, 4)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])

    def before(self, index: int, states: Sequence[Tensor], x: Tensor) -> Tensor:
        """F of a block."""
        if index == 0:
            return x
        y = self.norms[index - 1](states[index - 1])
        return y.tanh() if index == 1 else y

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            states.append(block(self.before(index, states, x)))
        return states[-1]


class Graph(Chain):
    """The third block reads both blocks before it: a residual connection over the second, through batch norms."""

    parents = ((), (0,), (0, 1))

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.BatchNorm1d(8)

    def before(self, index: int, states: Sequence[Tensor], x: Tensor) -> Tensor:
        y = super().before(index, states, x)
        return y + self.skip(states[0]).square() if index == 2 else y


@dataclass
class Algorithm2:
    """Algorithm 2 for a network of `Layers` and the maps before them."""

    model: Any
    blocks: Sequence[ByHand]
    before: Callable[[int, Sequence[Tensor], Tensor], Tensor]
    beta: float

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        free: list[list[Tensor]] = []
        for index, block in enumerate(self.blocks):
            with torch.no_grad():
                clamped = self.before(index, [states[-1] for states in free], x)
                free.append(block.settle(clamped))
        output = free[-1][-1].clone().requires_grad_()
        errors: list[Tensor | None] = [None] * len(free)
        (errors[-1],) = torch.autograd.grad(squared_error(output), output)
        parameters = dict(self.model.named_parameters())
        found = {name: torch.zeros_like(p) for name, p in parameters.items()} | {"x": torch.zeros_like(x)}
        for index in reversed(range(len(self.blocks))):
            self._block(index, free, errors, x, parameters, found)
        return found

    def _block(
        self,
        index: int,
        free: Sequence[Sequence[Tensor]],
        errors: list[Tensor | None],
        x: Tensor,
        parameters: dict[str, Tensor],
        found: dict[str, Tensor],
    ) -> None:
        block, delta, last = self.blocks[index], errors[index], len(free[index]) - 1
        assert delta is not None
        a = free[index][-1].norm(dim=1) / delta.norm(dim=1)
        parents = [states[-1].clone().requires_grad_() for states in free]
        given = x.clone().requires_grad_()
        clamped = self.before(index, parents, given)
        with torch.no_grad():
            up, down = (
                block.settle(clamped, nudge={last: sign * self.beta * a[:, None] * delta}, sweeps=2000)
                for sign in (1, -1)
            )
        contrast = ((block.energies(up, clamped) - block.energies(down, clamped)) / (2 * self.beta * a)).sum()
        leaves = [*parameters.values(), *parents, given]
        grads = torch.autograd.grad(contrast, leaves, allow_unused=True)
        for name, gradient in zip(parameters, grads, strict=False):
            if gradient is not None:
                found[name] += gradient
        for parent in self.model.parents[index]:
            current, present = grads[len(parameters) + parent], errors[parent]
            assert current is not None
            errors[parent] = current if present is None else present + current
        if grads[-1] is not None:
            found["x"] += grads[-1]


@pytest.mark.parametrize("kind", [Chain, Graph])
@pytest.mark.parametrize(("kappa", "beta"), [(0.1, 1e-2), (0.6, 1e-2), (0.6, 1.0)])
def test_the_runtime_is_algorithm_2_at_the_same_beta(kind: type[Chain], kappa: float, beta: float) -> None:
    model, x = seeded(kind).double(), noise(9, 6).double()
    hybrid = ffebm.convert(
        model,
        x,
        feedback=kappa,
        gradient=ffebm.EquilibriumPropagation(beta, "centered"),
        solver=ffebm.GaussSeidel(rtol=1e-14),
    ).train()
    assert [len(block.module.program.layers) for block in hybrid.blocks] == [3, 2, 3]
    assert [block.layers[0] for block in hybrid.blocks] == [f"blocks.{k}.linears.0" for k in range(3)]
    given = x.clone().requires_grad_()
    squared_error(hybrid(given)).backward()
    model.train()
    blocks = [part.by_hand(b.module.scales) for part, b in zip(model.blocks, hybrid.blocks, strict=True)]
    expected = Algorithm2(model, blocks, model.before, beta).gradients(x)
    assert given.grad is not None
    found = {name: p.grad for name, p in hybrid.named_parameters()} | {"x": given.grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        value = found[name]
        assert value is not None
        # A bias before batch norm has no gradient but round-off; it is compared with that of its weight.
        size = max(float(gradient.norm()), float(expected[name.replace("bias", "weight")].norm()) * 1e-3)
        assert float((value - gradient).norm()) <= 1e-9 * size, name
    # The nudging strength is seen: in the limit it is another gradient.
    hybrid.set_gradient("implicit")
    hybrid.zero_grad()
    squared_error(hybrid(x)).backward()
    first = hybrid.get_parameter("blocks.0.linears.0.weight").grad
    assert first is not None
    assert 1e-5 * beta**2 < relative(first, expected["blocks.0.linears.0.weight"]) < 0.1
