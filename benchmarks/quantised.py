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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import MarkdownTables, add_out, keep

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from digit_tables import DigitTables, options_of, print_tables

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, QuantisedBackprop
from ffebm_compiler.onnx import ARITHMETIC, quantise, run

DIGITAL = ("0", "2", "9")
"""The layers that are digital."""


def network() -> nn.Sequential:
    """Two digital convolutions, an energy block of two layers, a digital classifier."""
    features = (nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten())
    block = (nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    return nn.Sequential(*features, *block, nn.Linear(64, 10))


PRINTED = MarkdownTables(".1f")
row = PRINTED.row


class Tables(DigitTables):
    """The tables, by name."""

    def __init__(self, epochs: int, seeds: int) -> None:
        super().__init__(epochs, seeds, (1, 8, 8))

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
        rate = rate or (2e-3 if adam else 0.05)
        named = dict(hybrid.named_parameters())
        own = [p for name, p in named.items() if name.split(".")[0] in DIGITAL]
        other = [p for name, p in named.items() if name.split(".")[0] not in DIGITAL]
        groups: list[dict[str, Any]] = [{"params": own, "lr": rate * digital_rate}, {"params": other}]
        optimizer: Optimizer = torch.optim.SGD(groups, rate, momentum=0.9)
        if adam:
            optimizer = torch.optim.Adam(groups, rate)
        calibrate = (lambda: None) if bits is None else partial(hybrid.calibrate_digital, self.x.split(256))
        self.fit(hybrid, optimizer, self.epochs, 32, calibrate)
        return hybrid

    def mean_of(self, **settings: Any) -> float:
        """Mean test accuracy over the seeds, trained with these settings."""
        return self.mean(lambda seed: self.accuracy(self.trained(seed, **settings)))

    def bits(self) -> None:
        """A network that was trained in float32, moved to digital parts of few bits, and one that was trained there."""
        ideal = [self.trained(seed) for seed in range(self.seeds)]
        row("bits", "moved there", "trained there")
        row("float32", statistics.mean(map(self.accuracy, ideal)), "")
        for bits in (2, 3, 4, 6, 8):
            for hybrid in ideal:
                hybrid.set_devices(Devices(digital_bits=bits))
                hybrid.calibrate_digital(self.x.split(256))
            row(bits, statistics.mean(map(self.accuracy, ideal)), self.mean_of(bits=bits))

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
        row("float32", self.right(exact), "", "")
        row("simulation", self.right(simulated), relative(simulated, exact), "")
        row("onnxruntime", self.right(found), relative(found, exact), relative(found, simulated))

    def training(self) -> None:
        """Training with weights, values and gradients of 8 bits in the digital parts. Without QAS: see `scaling`."""
        plain = QuantisedBackprop(scaling=False)
        row("digital parts", "gradient descent", "Adam")
        both = [{"adam": adam} for adam in (False, True)]
        row("float32", *(self.mean_of(**each) for each in both))
        row("8 bits, gradients float32", *(self.mean_of(bits=8, **each) for each in both))
        row(
            "8 bits, gradients too, QAS", *(self.mean_of(bits=8, backprop=QuantisedBackprop(), **each) for each in both)
        )
        row("the same without QAS", *(self.mean_of(bits=8, backprop=plain, **each) for each in both))
        for factor in (1e4, 1e5, 1e6):
            found = self.mean_of(bits=8, backprop=plain, digital_rate=factor)
            row(f"without QAS, their rate times {factor:.0e}", found, "")
        row("QAS, implicit gradients", self.mean_of(bits=8, backprop=QuantisedBackprop(), gradient="implicit"), "")


def relative(found: Tensor, expected: Tensor) -> str:
    """‖found − expected‖/‖expected‖."""
    return f"{float((found - expected).norm() / expected.norm()):.1e}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    names = ("bits", "onnx", "training")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed and two epochs")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=3)
    add_out(parser)
    options = options_of(parser, names, "table", "all", arguments, epochs=2, seeds=1)
    tables = Tables(options.epochs, options.seeds)
    print_tables(tables, options.names or names, PRINTED.begin, lambda: keep(PRINTED.tables, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
