"""Digital parts of few bits: accuracy over bits, agreement with onnxruntime's int8, and training with int8 gradients.

    python benchmarks/quantised.py [bits] [onnx] [training] [--quick]

The network is on scikit-learn's digits (1 400 samples to train, 397 to test): two convolutions with ReLU (digital), one
energy block 512-64-64 with tanh and κ = 0.1, and a classifier (digital). It is trained by equilibrium propagation with
gradient descent (momentum 0.9, batches of 32, cosine schedule). Digital values are calibrated anew after every epoch.
`--quick` takes one seed and few epochs. Everything about bits is simulated, but for what onnxruntime computes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import MarkdownTables, add_out, keep

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, QuantisedBackprop
from ffebm_compiler.onnx import ARITHMETIC, quantise, run

DIGITAL = ("0", "2", "9")
"""The layers that are digital."""


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test samples."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


def network() -> nn.Sequential:
    """Two digital convolutions, an energy block of two layers, a digital classifier."""
    features = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten())
    block = (nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    return nn.Sequential(*features, *block, nn.Linear(64, 10))


PRINTED = MarkdownTables(".1f")
row = PRINTED.row


class Tables:
    """The tables, by name."""

    def __init__(self, epochs: int, seeds: int) -> None:
        self.epochs, self.seeds = epochs, seeds
        self.x, self.y, self.test_x, self.test_y = digits()

    def trained(
        self,
        seed: int,
        *,
        bits: int | None = None,
        backprop: QuantisedBackprop | None = None,
        adam: bool = False,
        rate: float | None = None,
        digital_rate: float = 1.0,
        gradient: str = "ep",
    ) -> ffebm.HybridModel:
        """A network trained from scratch with so many bits in its digital parts.

        Args:
            seed: of initial weights and of the order of samples.
            bits: of digital weights and values; None for float32.
            backprop: how their gradients are quantised.
            adam: Adam in the place of gradient descent.
            rate: learning rate; None for 0.05, and 2e-3 with Adam.
            digital_rate: learning rate of the digital layers, relative to `rate`.
            gradient: estimator of the energy block.
        """
        torch.manual_seed(seed)
        hybrid = ffebm.convert(network(), self.x[:32], force_digital=DIGITAL, gradient=gradient)
        if bits is not None:
            hybrid.set_devices(Devices(digital_bits=bits))
            hybrid.calibrate_digital(self.x.split(256))
            hybrid.set_gradient(gradient, feedforward=backprop or "backprop")
        hybrid.train()
        rate = rate or (2e-3 if adam else 0.05)
        named = dict(hybrid.named_parameters())
        own = [p for name, p in named.items() if name.split(".")[0] in DIGITAL]
        other = [p for name, p in named.items() if name.split(".")[0] not in DIGITAL]
        groups: list[dict[str, Any]] = [{"params": own, "lr": rate * digital_rate}, {"params": other}]
        optimizer: Optimizer = torch.optim.SGD(groups, rate, momentum=0.9)
        if adam:
            optimizer = torch.optim.Adam(groups, rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(self.x)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(hybrid(self.x[rows]), self.y[rows]).backward()
                optimizer.step()
            schedule.step()
            if bits is not None:
                hybrid.calibrate_digital(self.x.split(256))
        return hybrid.eval()

    def accuracy(self, output: Tensor) -> float:
        """Test accuracy in %."""
        return 100 * float((output.argmax(1) == self.test_y).float().mean())

    def score(self, hybrid: ffebm.HybridModel) -> float:
        """Test accuracy of a hybrid in %."""
        with torch.no_grad():
            return self.accuracy(hybrid(self.test_x))

    def mean(self, **settings: Any) -> float:
        """Mean test accuracy over the seeds, trained with these settings."""
        return statistics.mean(self.score(self.trained(seed, **settings)) for seed in range(self.seeds))

    def bits(self) -> None:
        """A network that was trained in float32, moved to digital parts of few bits, and one that was trained there."""
        ideal = [self.trained(seed) for seed in range(self.seeds)]
        row("bits", "moved there", "trained there")
        row("float32", statistics.mean(map(self.score, ideal)), "")
        for bits in (2, 3, 4, 6, 8):
            for hybrid in ideal:
                hybrid.set_devices(Devices(digital_bits=bits))
                hybrid.calibrate_digital(self.x.split(256))
            row(bits, statistics.mean(map(self.score, ideal)), self.mean(bits=bits))

    def onnx(self) -> None:
        """One network: relative deviation at the output, and test accuracy, of the simulation and of onnxruntime."""
        hybrid = self.trained(0)
        batches = self.x.split(256)
        with torch.no_grad():
            exact = hybrid(self.test_x)
            hybrid.set_devices(Devices(digital_bits=8))
            hybrid.calibrate_digital(batches)
            simulated = hybrid(self.test_x)
        with tempfile.TemporaryDirectory() as folder:
            source = hybrid.export_onnx(Path(folder) / "float", parts="digital")
            report = quantise(source, batches=batches, into=Path(folder) / "int8", operations=ARITHMETIC)
            (found,) = run(report.folder, self.test_x)
        row("", "accuracy", "from float32", "from the simulation")
        row("float32", self.accuracy(exact), "", "")
        row("simulation", self.accuracy(simulated), relative(simulated, exact), "")
        row("onnxruntime", self.accuracy(found), relative(found, exact), relative(found, simulated))

    def training(self) -> None:
        """Training with weights, values and gradients of 8 bits in the digital parts. Without QAS: see `scaling`."""
        plain = QuantisedBackprop(scaling=False)
        row("digital parts", "gradient descent", "Adam")
        both = [{"adam": adam} for adam in (False, True)]
        row("float32", *(self.mean(**each) for each in both))
        row("8 bits, gradients float32", *(self.mean(bits=8, **each) for each in both))
        row("8 bits, gradients too, QAS", *(self.mean(bits=8, backprop=QuantisedBackprop(), **each) for each in both))
        row("the same without QAS", *(self.mean(bits=8, backprop=plain, **each) for each in both))
        for factor in (1e4, 1e5, 1e6):
            found = self.mean(bits=8, backprop=plain, digital_rate=factor)
            row(f"without QAS, their rate times {factor:.0e}", found, "")
        row("QAS, implicit gradients", self.mean(bits=8, backprop=QuantisedBackprop(), gradient="implicit"), "")


def relative(found: Tensor, expected: Tensor) -> str:
    """‖found − expected‖/‖expected‖."""
    return f"{float((found - expected).norm() / expected.norm()):.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    names = ("bits", "onnx", "training")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="TABLE", help=f"of {', '.join(names)}; all if left out")
    parser.add_argument("--quick", action="store_true", help="one seed and two epochs")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    add_out(parser)
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(names):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    torch.set_num_threads(1)
    tables = Tables(2 if options.quick else options.epochs, 1 if options.quick else options.seeds)
    for name in options.names or names:
        method = getattr(tables, name)
        print(f"{name}: {method.__doc__}\n")
        PRINTED.begin(name)
        method()
        print()
        keep(PRINTED.tables, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
