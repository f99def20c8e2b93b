"""The networks that the tests share: small ones of every kind, with fixed random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm

__all__ = [
    "CASES",
    "DCHN",
    "MLP",
    "Between",
    "Branches",
    "Case",
    "ConvBlock",
    "Convolutions",
    "DigitsCNN",
    "Experts",
    "Joined",
    "Projections",
    "Residual",
    "Skip",
    "Slopes",
    "Tied",
    "TwoBlocks",
    "TwoLayers",
    "converted",
    "dchn",
    "dchn_reference",
    "digits_cnn",
    "mlp",
    "noise",
    "seeded",
    "transformer",
    "warmed",
]

Activation = Callable[[], nn.Module]
M = TypeVar("M", bound=nn.Module)
_REFERENCE = Path(__file__).parent / "data" / "dchn_avgpool.npz"


def seeded(build: Callable[[], M], seed: int = 0) -> M:
    """A module built with the random state of `seed`; the global state stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def warmed(model: M, *inputs: Tensor) -> M:
    """The model in eval mode after one batch in train mode, with statistics as after training."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight.uniform_(0.6, 1.4)
                module.bias.uniform_(-0.2, 0.2)
        model.train()
        model(*inputs)
    return model.eval()


class Between(nn.Module):
    """linear, a function, linear."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


class TwoLayers(nn.Module):
    """Two linears, and a forward from outside."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class TwoBlocks(nn.Module):
    """Two MLPs with a layer norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.c, self.d = nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.norm(self.b(self.a(x).tanh()))).tanh())


class ConvBlock(nn.Module):
    """Two convolutions with batch norm and a shortcut: the identity, or a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, activation: Activation = nn.ReLU) -> None:
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

    def __init__(self, width: int = 4, activation: Activation = nn.ReLU) -> None:
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

    def __init__(self, sizes: tuple[int, ...] = (8, 12, 10, 9, 5), activation: Activation = nn.ReLU) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Residual(nn.Module):
    """A residual addition inside a block: y = c(σ(b(σ(a(x))) + a'(x)))."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 4)
        self.side = nn.Linear(6, 7)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.b(self.activation(self.a(x)))
        return self.c(self.activation(inner + self.side(x)))


class Skip(nn.Module):
    """A skip from one state over another: y = c(σ(b(s) + s)), s = σ(a(x)); then a shift and a scale."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 4)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        s = self.activation(self.a(x))
        return self.c(0.5 * self.activation(self.b(s) + s) - 0.25)


class Gains(nn.Module):
    """Layer scale of a branch, a gain computed from a parameter, one that leaves the block, and one number (ReZero)."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 6)
        self.layer_scale, self.log_gain = (nn.Parameter(0.3 + torch.rand(6)) for _ in range(2))
        self.number = nn.Parameter(torch.tensor(0.7))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        s = self.activation(x + self.layer_scale * self.b(self.activation(self.a(x))))
        t = self.log_gain.exp() * s
        return torch.cat([x + self.number * self.c(t), t], 1)


class Projections(nn.Module):
    """Query, key and value from one input, joined by signed additions and read by one linear."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 5, bias=False), nn.Linear(6, 5), nn.Linear(6, 5)
        self.out = nn.Linear(5, 4)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        act = self.activation
        return self.out(act(self.q(x)) + act(self.k(x)) - act(self.v(x)))


class Branches(nn.Module):
    """Two residual branches from one state: y = e(σ(b(s) + d(σ(c(s))) + s))."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 5), nn.Linear(5, 7)
        self.e = nn.Linear(7, 4)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        s = self.activation(self.a(x))
        return self.e(self.activation(self.b(s) + self.d(self.activation(self.c(s))) + s))


class Joined(nn.Module):
    """Branches of different width joined by concatenation, one of them as it is."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(6, 3), nn.Linear(5 + 3 + 6, 4)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.activation(self.a(x)), self.activation(self.b(x)), x], 1))


class Tied(nn.Module):
    """One weight in two layers of a block, once as it is and once transposed."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        s = self.activation(self.shared(x))
        s = self.activation(self.shared(s))
        s = self.activation(s @ self.shared.weight)
        return self.head(s)


class Convolutions(nn.Module):
    """Strided, dilated, grouped and transposed convolutions, average pooling and a flatten in one block."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False)
        self.c = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(3 * 9, 4)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        s = self.activation(self.a(x))
        s = self.activation(self.b(s))
        s = self.activation(self.c(s))
        return self.head(self.pool(s).flatten(1))


class Slopes(nn.Module):
    """Learned slopes, negative ones too, behind convolutions of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(36, 3)
        self.first, self.second, self.third = nn.PReLU(4), nn.PReLU(), nn.PReLU(3)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([0.3, -0.7, 1.4, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        s = self.second(self.b(self.first(self.a(x))))
        return self.third(self.c(s.flatten(1)))


class Experts(nn.Module):
    """Batched weights in one block: heads by einsum, experts by a batched product, read out by a sum over both."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.heads = nn.Parameter(0.4 * torch.randn(3, 6, 5))
        self.experts = nn.Parameter(0.4 * torch.randn(3, 5, 4))
        self.out = nn.Parameter(0.4 * torch.randn(3, 4, 2, 2))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        s = self.activation(torch.einsum("bd,hde->bhe", x, self.heads))
        s = self.activation(torch.matmul(s[:, :, None], self.experts)[:, :, 0])
        return torch.tensordot(s, self.out, ([1, 2], [0, 1])).flatten(1)


class DCHN(nn.Module):
    """The deep convolutional Hopfield network of the reference file, as an ordinary feedforward module."""

    def __init__(self, widths: tuple[int, ...] = (3, 16, 32, 64, 64), classes: int = 10) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
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


def digits_cnn(activation: Activation = nn.ReLU) -> tuple[DigitsCNN, Tensor]:
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


def mlp(activation: Activation = nn.ReLU) -> tuple[MLP, Tensor]:
    """The plain MLP and a batch of inputs."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    return seeded(lambda: MLP(activation=activation)), x


def noise(*shape: int, seed: int = 5) -> Tensor:
    """A fixed normal tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Driven(nn.Module):
    """An activation behind layer norm drives a block: two layers read it, and a third one reads their sum."""

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.before, self.norm, self.activation = nn.Linear(6, 7), nn.LayerNorm(7), activation()
        self.left, self.right, self.last = nn.Linear(7, 5), nn.Linear(7, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        s = self.activation(self.norm(self.before(x)))
        return self.last(self.activation(self.left(s)) + self.right(s))


@dataclass(frozen=True)
class Case:
    """A network for the gradient tests: how it is made and converted."""

    build: Callable[[Activation], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    """States of its largest block."""

    def make(self, activation: Activation) -> tuple[nn.Module, Tensor]:
        """The model in eval mode and a batch of inputs."""
        x = noise(*self.shape)
        return warmed(seeded(lambda: self.build(activation)), x), x


def _encoder(activation: Activation) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation(), batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


_WIDE = ffebm.Hardware(layers_per_block=8)
CASES = {
    "mlp": Case(lambda activation: MLP(activation=activation), (6, 8), layers=4),
    "cnn": Case(lambda activation: DigitsCNN(3, activation), (4, 1, 8, 8), {"fold_batchnorm": True}, layers=3),
    "transformer": Case(_encoder, (2, 3, 8)),
    "driven": Case(Driven, (5, 6), {"digital_drive": True}, layers=4),
    "residual": Case(Residual, (5, 6), layers=3),
    "skip": Case(Skip, (5, 6), {"block_ops": ("add", "reshape", "scale")}, layers=3),
    "gains": Case(Gains, (5, 6), layers=3),
    "projections": Case(Projections, (5, 6), layers=4),
    "branches": Case(Branches, (5, 6), {"hardware": _WIDE}, layers=4),
    "joined": Case(Joined, (5, 6), {"block_ops": ("add", "reshape", "concat")}, layers=3),
    "tied": Case(Tied, (5, 6), layers=4),
    "experts": Case(Experts, (5, 6), layers=3),
    "convolutions": Case(Convolutions, (3, 2, 6, 6), {"block_ops": ("add", "reshape", "avg_pool")}, layers=4),
}
"""Every kind of block that the gradients are tested on."""


@cache
def converted(name: str, activation: Activation) -> tuple[ffebm.HybridModel, Tensor]:
    """A case converted at the default feedback (do not change it: copy it) and its inputs."""
    case = CASES[name]
    model, x = case.make(activation)
    return ffebm.convert(model, x, **case.options), x
