"""The networks of the papers on feedforward-tied energy-based models, as ordinary modules, and their plans.

    .venv/bin/python examples/papers_networks.py

prints the blocks of each at an eighth of its width. `papers_plan` makes of a network the model of its paper: the first
convolution of a block stands alone and runs without feedback, batch norm is digital, its activation is a state driven
by a digital value, and the convolutions after it settle with it. `convert(network, x, plan=papers_plan(network, x))`
builds it; `feedback="symmetric"` is the papers' γ = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm

BLOCK_OPS = ("add", "reshape", "avg_pool", "max_pool")


class Pooled(nn.Module):
    """A 3×3 convolution, or a linear layer of the flattened value, and the 2×2 pooling after it."""

    def __init__(self, layer: nn.Module, pool: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.pool = pool

    def forward(self, s: Tensor) -> Tensor:
        """pool(layer(s))."""
        h = self.layer(s.flatten(1) if isinstance(self.layer, nn.Linear) else s)
        return h if self.pool is None else self.pool(h)


class Block(nn.Module):
    """F(x) = BN(pool(conv(x))) drives s_1 = clamp(a h_1, 0, 1); hidden states are clamp(a h, 0, 1), the last is linear.

    Source: Nest & Ernoult 2024 (arXiv 2409.03306). The scale and shift of the batch norm are frozen at 1 and 0.
    """

    def __init__(self, feedforward: Pooled, inner: Sequence[Pooled], slope: float) -> None:
        super().__init__()
        self.feedforward = feedforward
        self.norm = nn.BatchNorm2d(feedforward.layer.out_channels, affine=False)  # type: ignore[arg-type]
        self.inner = nn.ModuleList(inner)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """The drives, one after the other, without feedback."""
        h = self.norm(self.feedforward(x))
        for layer in self.inner:
            h = layer(torch.clamp(self.slope * h, 0, 1))
        return h


class FeedforwardTied(nn.Module):
    """Blocks one after the other and a linear readout.

    Args:
        channels: of the input and of every layer.
        pooled: whether each layer is followed by a 2×2 pooling.
        sizes: the layers of each block, that of F included.
        side: pixels of the input's side.
        classes: of the readout.
        slope: a, between 0.5 and 1 in the papers.
        dense: features of one more layer of the last block, a linear one; None: there is none.
        pool: the 2×2 pooling. The papers have max pooling, whose winners can switch under the nudge.
    """

    def __init__(
        self,
        channels: Sequence[int],
        pooled: Sequence[bool],
        sizes: Sequence[int],
        side: int = 32,
        classes: int = 10,
        slope: float = 0.5,
        dense: int | None = None,
        pool: type[nn.Module] = nn.AvgPool2d,
    ) -> None:
        super().__init__()
        layers = [
            Pooled(nn.Conv2d(a, b, 3, padding=1), pool(2) if half else None)  # type: ignore[call-arg]
            for (a, b), half in zip(pairwise(channels), pooled, strict=True)
        ]
        features = channels[-1] * (side >> sum(pooled)) ** 2
        if dense is not None:
            layers.append(Pooled(nn.Linear(features, dense), None))
            features = dense
        blocks, rest = [], iter(layers)
        for size in sizes:
            first, *inner = [next(rest) for _ in range(size)]
            blocks.append(Block(first, inner, slope))
        self.blocks = nn.ModuleList(blocks)
        self.readout = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of the classes."""
        for block in self.blocks:
            x = block(x)
        return self.readout(x.flatten(1))


class DCHN(nn.Module):
    """The deep convolutional Hopfield network 3-128-256-512-512-10: one energy block, its first layer included.

    Source: Ernoult et al. 2019 (arXiv 1905.13633) and Laborieux et al. 2021 (arXiv 2006.03824), with the sizes of
    Scellier et al. 2023 (arXiv 2312.15103).
    """

    def __init__(self, width: int = 128, classes: int = 10, slope: float = 0.5, pool: type[nn.Module] = nn.AvgPool2d):
        super().__init__()
        channels = (3, width, 2 * width, 4 * width, 4 * width)
        self.layers = nn.ModuleList(
            [Pooled(nn.Conv2d(a, b, 3, padding=1), pool(2)) for a, b in pairwise(channels)]  # type: ignore[call-arg]
        )
        self.readout = nn.Linear(4 * channels[-1], classes)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """The scores of the classes, for images of 32×32 pixels."""
        for layer in self.layers:
            x = torch.clamp(self.slope * layer(x), 0, 1)
        return self.readout(x.flatten(1))


def six_layers(block_size: int = 2, width: int = 128, **settings: Any) -> FeedforwardTied:
    """L = 6 in blocks of 2, 3 or 6 layers: [3-128-256 mm][256-256-512 mm][512-512, 256], for CIFAR-10.

    Source: the splitting experiment of Nest & Ernoult 2024 (arXiv 2409.03306).
    """
    channels = (3, width, 2 * width, 2 * width, 4 * width, 4 * width)
    pooled = (True, True, True, True, False)
    return FeedforwardTied(channels, pooled, [block_size] * (6 // block_size), dense=2 * width, **settings)


def twelve_layers(block_size: int = 2, width: int = 128, **settings: Any) -> FeedforwardTied:
    """L = 12 in blocks of 2, 3 or 4 layers, for CIFAR-10; with 2 a block

    [3-128-128][128-128-128 m-][128-256-256 m-][256-256-256][256-512-512 m-][512-512-512].

    Source: the splitting experiment of Nest & Ernoult 2024 (arXiv 2409.03306).
    """
    w = width
    channels = (3, w, w, w, w, 2 * w, 2 * w, 2 * w, 2 * w, 4 * w, 4 * w, 4 * w, 4 * w)
    pooled = [index in (2, 4, 8) for index in range(12)]
    return FeedforwardTied(channels, pooled, [block_size] * (12 // block_size), **settings)


def fifteen_layers(width: int = 64, classes: int = 1000, **settings: Any) -> FeedforwardTied:
    """L = 15 in 8 blocks, for ImageNet of 32×32 pixels: 64,64 / 128,128 m / ... / 512,512 / 512.

    Source: the scaling experiment of Nest & Ernoult 2024 (arXiv 2409.03306): 46 % top-1.
    """
    w = width
    channels = (3, w, w, *[2 * w] * 4, *[4 * w] * 4, *[8 * w] * 5)
    pooled = [index in (3, 7, 11) for index in range(15)]
    return FeedforwardTied(channels, pooled, [2] * 7 + [1], classes=classes, **settings)


def papers_plan(network: FeedforwardTied | DCHN, x: Tensor, **options: Any) -> ffebm.Plan:
    """The plan with the papers' blocks; `options` are those of `ffebm.plan`, the fabric is without limits by default.

    The convolution of every F, and the readout, get a block of their own: `plan.move(path, "analog")`.
    """
    settings = {"hardware": "ideal", "block_ops": BLOCK_OPS, **options}
    plan = ffebm.plan(network, x, digital_drive=True, **settings)
    if isinstance(network, DCHN):
        return plan
    alone = [f"blocks.{index}.feedforward" for index in range(len(network.blocks))]
    for path in (*alone, "readout"):
        home = next(block for block in plan.blocks if any(layer.startswith(path) for layer in block.layers))
        if len(home.layers) > 1 or home.driven:
            plan = plan.move(path, "analog")
    return plan


def goe_(network: FeedforwardTied, variance: float) -> None:
    """Initialise the convolutions after the first of each block as the papers do; `variance` is V."""
    for block in network.blocks:
        for layer in block.inner:  # type: ignore[union-attr]
            if isinstance(layer.layer, nn.Conv2d):
                ffebm.init.goe_(layer.layer.weight, variance)


def papers_hybrid(
    network: FeedforwardTied | DCHN, x: Tensor, feedback: float | str, rtol: float | None = None
) -> ffebm.HybridModel:
    """The network converted by its `papers_plan`; `rtol` is where every phase stops, also in training."""
    solver = None if rtol is None else ffebm.GaussSeidel(rtol=rtol)
    return ffebm.convert(network, x, plan=papers_plan(network, x), feedback=feedback, solver=solver)


def main() -> None:
    """Print the plans."""
    x = torch.randn(2, 3, 32, 32)
    for network in (
        six_layers(width=16),
        twelve_layers(width=16),
        fifteen_layers(width=8, classes=100),
        DCHN(width=16),
    ):
        print(papers_plan(network, x), "\n")


if __name__ == "__main__":
    main()
