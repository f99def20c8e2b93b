"""The networks that the tests share: small ones of every kind, with fixed random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "DCHN",
    "MLP",
    "ConvBlock",
    "DigitsCNN",
    "dchn",
    "dchn_reference",
    "digits_cnn",
    "mlp",
    "seeded",
    "transformer",
    "warmed",
]

M = TypeVar("M", bound=nn.Module)
_REFERENCE = Path(__file__).parent / "data" / "dchn_avgpool.npz"


def seeded(build: Callable[[], M], seed: int = 0) -> M:
    """A module built with the random state of `seed`; the global state stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def warmed(model: M, *inputs: Tensor) -> M:
    """The model in eval mode after one batch in train mode: running statistics and affine parameters as after training."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight.uniform_(0.6, 1.4)
                module.bias.uniform_(-0.2, 0.2)
        model.train()
        model(*inputs)
    return model.eval()


class ConvBlock(nn.Module):
    """Two convolutions with batch norm and a shortcut: the identity, or a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = activation()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + self.shortcut(x))


class DigitsCNN(nn.Module):
    """A residual CNN for 8×8 images: stem, identity block, projection block, pooling, classifier."""

    def __init__(self, width: int = 4, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = activation()
        self.block1 = ConvBlock(width, width, 1, activation)
        self.block2 = ConvBlock(width, 2 * width, 2, activation)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = self.block2(self.block1(x))
        return self.head(self.pool(x).flatten(1))


class MLP(nn.Module):
    """Four linears with an activation between them."""

    def __init__(self, sizes: tuple[int, ...] = (8, 12, 10, 9, 5), activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class DCHN(nn.Module):
    """The deep convolutional Hopfield network of the reference file, as an ordinary feedforward module."""

    def __init__(self, widths: tuple[int, ...] = (3, 16, 32, 64, 64), classes: int = 10) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False))
        self.pool = nn.AvgPool2d(2)
        self.clamp = nn.Hardtanh(0.0, 1.0)
        self.dense = nn.Linear(widths[-1] * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.clamp(self.pool(conv(x)))
        return self.dense(x.flatten(1))


@cache
def dchn_reference() -> dict[str, Tensor]:
    """The arrays of tests/data/dchn_avgpool.npz."""
    with np.load(_REFERENCE) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def dchn() -> DCHN:
    """The reference network with its weights; `dense.weight` (64, 2, 2, 10) is contracted over its first three axes."""
    reference = dchn_reference()
    model = DCHN()
    with torch.no_grad():
        for index, conv in enumerate(model.convs):
            conv.weight.copy_(reference[f"conv{index}.weight"])
            conv.bias.copy_(reference[f"bias{index}"].flatten())
        model.dense.weight.copy_(reference["dense.weight"].flatten(0, 2).t())
        model.dense.bias.copy_(reference["bias4"].flatten())
    return model


def digits_cnn(activation: type[nn.Module] = nn.ReLU) -> tuple[DigitsCNN, Tensor]:
    """The small CNN after one batch in train mode, in eval mode, and a batch of inputs."""
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return warmed(seeded(lambda: DigitsCNN(4, activation)), x), x


def transformer(dropout: float = 0.0, activation: Callable[[Tensor], Tensor] = F.gelu) -> tuple[nn.Module, Tensor]:
    """A two-layer `nn.TransformerEncoder` in eval mode, and a batch of inputs."""
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, activation, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return seeded(build).eval(), x


def mlp(activation: type[nn.Module] = nn.ReLU) -> tuple[MLP, Tensor]:
    """The plain MLP and a batch of inputs."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    return seeded(lambda: MLP(activation=activation)), x
