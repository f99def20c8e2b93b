"""Deep resistive networks as Scellier (2024) builds them, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from networks import noise, seeded
from torch import Tensor, nn

from ffebm_compiler import init

__all__ = ["Convolutional", "Dense", "Residual", "made", "split"]


def split(h: Tensor, dim: int = -1) -> Tensor:
    """ReLU of the first half, and −ReLU(−h) of the second."""
    above, below = h.chunk(2, dim)
    return torch.cat((F.relu(above), -F.relu(-below)), dim)


class Dense(nn.Module):
    """Linear layers that read ±gain·x."""

    def __init__(self, sizes: tuple[int, ...] = (6, 10, 8, 4), gain: float = 5.0) -> None:
        super().__init__()
        self.gain = gain
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip((2 * sizes[0], *sizes[1:-1]), sizes[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        value = self.gain * torch.cat((x, -x), -1)
        for layer in self.layers[:-1]:
            value = split(layer(value))
        found: Tensor = self.layers[-1](value)
        return found


class Convolutional(nn.Module):
    """Convolutions (a strided one, a grouped one with padding), average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        value = split(self.first(torch.cat((4 * x, -4 * x), 1)), 1)
        value = split(self.pool(self.second(value)), 1)
        found: Tensor = self.head(value.flatten(1))
        return found


class Residual(nn.Module):
    """A wire of conductance 1 beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = split(self.a(torch.cat((3 * x, -3 * x), -1)))
        found: Tensor = self.c(split(self.b(one) + one))
        return found


def made(kind: str) -> tuple[nn.Module, Tensor, dict[str, object]]:
    """(model in float64 with conductances and biases, inputs, options of `convert`)."""
    build, shape = {
        "one hidden": (lambda: Dense((6, 10, 4)), (5, 6)),
        "two hidden": (Dense, (5, 6)),
        "convolutional": (Convolutional, (2, 1, 8, 8)),
        "residual": (Residual, (5, 4)),
    }[kind]
    model = seeded(build).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                init.conductances_(parameter, generator)
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, noise(*shape).double(), {"block_ops": ("add", "reshape", "avg_pool")}
