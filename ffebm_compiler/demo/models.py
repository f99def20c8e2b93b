"""The demo's network and data, which the tests use too: scikit-learn's 8×8 digits, embedded in its package."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ffebm_compiler import init
from ffebm_compiler.errors import UnsupportedError

__all__ = ["Digits", "DigitsCNN", "DigitsCircuit", "digits_mlp", "load_digits"]


class _ResidualBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)); the shortcut is x, or a 1×1 convolution where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsCNN(nn.Module):
    """A residual network with batch norm for 8×8 grey-value digits, (N, 1, 8, 8) -> (N, classes).

    A stem (convolution, batch norm, ReLU), three residual blocks of which the second halves the resolution
    through a projection shortcut, global average pooling and a linear head: nine weight-stationary layers.
    """

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = _ResidualBlock(width, width)
        self.layer2 = _ResidualBlock(width, 2 * width, stride=2)
        self.layer3 = _ResidualBlock(2 * width, 2 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.head(self.pool(x).flatten(1))


def digits_mlp(hidden: int = 64, classes: int = 10) -> nn.Sequential:
    """A multilayer perceptron for the same digits, (N, 1, 8, 8) -> (N, classes): three linear layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


class DigitsCircuit(nn.Module):
    """A deep resistive network for the same digits, (N, 1, 8, 8) -> (N, classes); convert it with `energy="drn"`.

    Its weights are conductances. It reads ±gain·x, and half of its hidden nodes are held at or above 0, the others at
    or below 0 (Scellier 2024, arXiv 2402.11674).
    """

    def __init__(self, hidden: int = 64, classes: int = 10, gain: float = 20.0) -> None:
        super().__init__()
        self.gain = gain
        self.first, self.last = nn.Linear(128, hidden), nn.Linear(hidden, classes)
        for layer in (self.first, self.last):
            init.conductances_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The currents that meet at the nodes. The scores are what they settle to."""
        x = x.flatten(1)
        above, below = self.first(self.gain * torch.cat((x, -x), -1)).chunk(2, -1)
        scores: Tensor = self.last(torch.cat((above.relu(), below.clamp(max=0)), -1))
        return scores


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8), float32, normalised with the training set's statistics, and labels (N,)."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digits() -> Digits:
    """The 1797 handwritten digits that come with scikit-learn (UCI, Alpaydin & Kaynak 1998).

    The split is fixed and stratified: 1347 images to train, 450 to test.

    Raises:
        UnsupportedError: where scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UnsupportedError(
            "the digits come with scikit-learn, which is not installed: pip install 'ffebm-compiler[demo]'"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    x_train, x_test = (
        torch.as_tensor(part, dtype=torch.float32, device="cpu").reshape(-1, 1, 8, 8) for part in parts[:2]
    )
    y_train, y_test = (torch.as_tensor(part, dtype=torch.int64, device="cpu") for part in parts[2:])
    mean, deviation = x_train.mean(), x_train.std()
    return Digits((x_train - mean) / deviation, y_train, (x_test - mean) / deviation, y_test)
