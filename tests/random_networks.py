"""Random small networks: layers with gates, slices, sums, activations in a row and digital products around them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = tuple[Callable[..., Tensor] | int, tuple[int, ...]]
"""A function, or the number of a layer, and the numbers of the values that it reads."""

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.tanh,
    F.relu,
    F.hardtanh,
    torch.sigmoid,
    F.silu,
    F.gelu,
    F.softplus,
    lambda v: F.leaky_relu(v, 0.2),
    lambda v: v.clamp(-0.5, 0.7),
)


class RandomNetwork(nn.Module):
    """A random DAG of one to `layers` layers; its output is all that no other operation reads, and some that is."""

    def __init__(self, seed: int, layers: int = 2, operations: int = 8, convolutional: bool = False) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.layers = nn.ModuleList()
        self.steps: list[Step] = []
        widths = [8]
        read: set[int] = set()
        for index in range(operations):
            first = len(widths) - 1 if draw.random() < 0.5 else draw.randrange(len(widths))
            layer = not index or (len(self.layers) < layers and draw.random() < 0.25)
            function, operands, width = (
                self._layer(first, widths, convolutional) if layer else _operation(draw, first, widths)
            )
            self.steps.append((function, operands))
            read.update(operands)
            widths.append(width)
        last = [value for value in range(1, len(widths)) if value not in read or draw.random() < 0.1]
        self.results = last

    def _layer(self, source: int, widths: list[int], convolutional: bool) -> tuple[int, tuple[int, ...], int]:
        width = widths[source]
        self.layers.append(nn.Conv2d(width, 8, 3, padding=1) if convolutional else nn.Linear(width, 8))
        return len(self.layers) - 1, (source,), 8

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for function, operands in self.steps:
            run = self.layers[function] if isinstance(function, int) else function
            values.append(run(*(values[operand] for operand in operands)))
        return torch.cat([values[index] for index in self.results], 1)


def _operation(
    draw: random.Random, first: int, widths: list[int]
) -> tuple[Callable[..., Tensor], tuple[int, ...], int]:
    """A function of one or two values, its operands and its width."""
    width = widths[first]
    alike = [index for index, other in enumerate(widths) if other == width]
    other = draw.choice(alike)
    kind = draw.choice(
        ("activate", "activate", "activate", "slice", "slice", "add", "add", "cat", "scale", "fold", "mul")
    )
    if kind == "activate":
        return draw.choice(ACTIVATIONS), (first,), width
    if kind == "slice" and width > 2 and not width % 2:
        half = draw.random() < 0.5
        return (lambda v: v[:, : width // 2] if half else v[:, width // 2 :]), (first,), width // 2
    if kind == "add":
        return (lambda v, w: v + w), (first, other), width
    if kind == "cat" and width < 32:
        return (lambda v, w: torch.cat([v, w], 1)), (first, other), 2 * width
    if kind == "scale":
        return (lambda v: v * 0.5), (first,), width
    if kind == "fold":
        return (lambda v: v.unflatten(1, (2, width // 2)).flatten(1, 2) if not width % 2 else -v), (first,), width
    return (lambda v, w: v * w), (first, other), width


class Several(nn.Module):
    """Networks side by side on one input, so that one conversion tests them all."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [network(x) for network in self.networks]
