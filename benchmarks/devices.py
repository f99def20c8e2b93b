"""What devices do to gradients: static errors, mismatch, read noise and converters, on the network of docs/analog.md.

    python benchmarks/devices.py [static] [mismatch] [noise] [nudge] [converters] [wires] [step] [without]

The network is 64-128-96-10 with tanh, one energy block, trained on scikit-learn's digits by backpropagation (float64).
Each figure is the cosine between a gradient by equilibrium propagation and an exact one, for the first, second and
third weight matrix, over 128 samples. All figures are modelled: the devices are `ffebm.Devices`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import timeit
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import MarkdownTables, add_out, keep

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, EquilibriumPropagation
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.devices.wires import exact_weights, fast_weights
from ffebm_compiler.runtime.program.frame import Frame

Gradients = dict[str, Tensor]


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """The network and 128 samples."""
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16.0), torch.tensor(y)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model, x[:128], y[:128]


def gradients(hybrid: ffebm.HybridModel, x: Tensor, y: Tensor, seed: int = 0) -> Gradients:
    """Gradients of the weight matrices."""
    torch.manual_seed(seed)
    hybrid.zero_grad(set_to_none=True)
    F.cross_entropy(hybrid(x), y).backward()
    return {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None and p.dim() > 1}


def exact(hybrid: ffebm.HybridModel, x: Tensor, y: Tensor) -> Gradients:
    """The exact gradient of the devices, read without noise and converters."""
    twin = copy.deepcopy(hybrid)
    for block in twin.energy_blocks.values():
        block.quiet = True
    twin.set_gradient("implicit")
    return gradients(twin, x, y)


def cosines(found: Gradients, expected: Gradients) -> list[float]:
    """One for each weight matrix."""
    return [float((found[n] * e).sum() / (found[n].norm() * e.norm())) for n, e in expected.items()]


PRINTED = MarkdownTables(".4f")
row = PRINTED.row


class Tables:
    """The tables, by name."""

    def __init__(self, kappa: float) -> None:
        self.model, self.x, self.y = trained()
        self.kappa = kappa
        ideal = ffebm.convert(self.model, self.x, feedback=kappa, gradient="implicit")
        self.ideal = gradients(ideal, self.x, self.y)

    def on(self, devices: Devices | None, kappa: float | None = None) -> ffebm.HybridModel:
        """The network on devices."""
        return ffebm.convert(self.model, self.x, feedback=kappa or self.kappa, devices=devices)

    def means(self, hybrid: ffebm.HybridModel, expected: Gradients, seeds: int = 5) -> list[float]:
        """Cosines, mean over draws of the noise."""
        each = [cosines(gradients(hybrid, self.x, self.y, seed), expected) for seed in range(seeds)]
        return [statistics.mean(column) for column in zip(*each, strict=True)]

    def static(self) -> None:
        """Programming errors, the same devices read both ways."""
        row("programming error", "own gradient", "", "", "without devices", "", "")
        for sigma in (0.01, 0.05, 0.1, 0.2):
            hybrid = self.on(Devices(programming=sigma))
            found = gradients(hybrid, self.x, self.y)
            row(sigma, *cosines(found, exact(hybrid, self.x, self.y)), *cosines(found, self.ideal))

    def mismatch(self) -> None:
        """Forward and feedback read through other errors."""
        row("mismatch", "own gradient", "", "")
        for sigma in (0.01, 0.05, 0.1, 0.2):
            each = []
            for seed in range(5):
                hybrid = self.on(Devices(mismatch=sigma, seed=seed))
                each.append(cosines(gradients(hybrid, self.x, self.y), exact(hybrid, self.x, self.y)))
            row(sigma, *(statistics.mean(column) for column in zip(*each, strict=True)))

    def noise(self) -> None:
        """Read noise of the devices, by nudge, reads and loop gain."""
        row("read noise", "loop gain", "beta", "reads", "own gradient", "", "")
        for kappa in (0.1, 0.3, 0.5, 0.9):
            for sigma in (1e-4, 1e-3, 1e-2):
                hybrid = self.on(Devices(read_noise=sigma), kappa)
                expected = exact(hybrid, self.x, self.y)
                for beta, reads in ((0.01, 1), (0.1, 1), (0.5, 1), (1.0, 1), (1.0, 16)):
                    hybrid.set_gradient(EquilibriumPropagation(beta=beta, variant="centered", reads=reads))
                    row(f"{sigma:g}", kappa, beta, reads, *self.means(hybrid, expected))

    def nudge(self) -> None:
        """β over the loop gain: what its curvature leaves of the exact gradient, and what read noise and it leave."""
        row("loop gain", "kappa beta", "without noise", "", "", "1e-3, 16 reads", "", "")
        for kappa in (0.1, 0.3, 0.5, 0.9):
            exactly, hybrid = self.on(None, kappa), self.on(Devices(read_noise=1e-3), kappa)
            expected = exact(exactly, self.x, self.y)
            for product in (0.1, 0.5, 1.0, 2.0, 4.0, 8.0):
                estimator = EquilibriumPropagation(beta=product / kappa, variant="centered", reads=16)
                exactly.set_gradient(estimator)
                hybrid.set_gradient(estimator)
                own = cosines(gradients(exactly, self.x, self.y), expected)
                row(kappa, product, *own, *self.means(hybrid, expected, seeds=2))

    def converters(self) -> None:
        """Bits of the ADCs and DACs at β = 1, by loop gain."""
        row("bits", "loop gain", "own gradient", "", "")
        for kappa in (0.1, 0.3, 0.9):
            for bits in (6, 8, 10, 12, 14):
                hybrid = self.on(Devices(adc_bits=bits, dac_bits=bits), kappa)
                row(bits, kappa, *cosines(gradients(hybrid, self.x, self.y), exact(hybrid, self.x, self.y)))

    def wires(self) -> None:
        """What wires take of a tile's weights, and the error and time of the fast solution."""
        row("tile", "r g_max", "taken by wires", "error of fast", "s exact", "s fast")
        for side in (64, 128, 256):
            weights = torch.randn(side, side // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            weights /= weights.abs().max()
            g = torch.stack([weights.clamp_min(0), (-weights).clamp_min(0)], -1).reshape(side, side)
            for resistance in (1e-6, 1e-5, 1e-4, 1e-3) if side < 256 else (1e-6, 1e-5, 1e-4):
                times = [time.process_time()]
                exact_ = exact_weights(g, resistance)
                times.append(time.process_time())
                fast = fast_weights(g, resistance)
                times.append(time.process_time())
                taken, error = (float(a.norm() / exact_.norm()) for a in (g - exact_, fast - exact_))
                row(
                    side,
                    f"{resistance:g}",
                    f"{taken:.1e}",
                    f"{error:.1e}",
                    *(f"{b - a:.3f}" for a, b in pairwise(times)),
                )

    def step(self) -> None:
        """CPU time of a training step, in steps without devices, turn by turn."""
        kinds = {
            "none": None,
            "programming": Devices(programming=0.05),
            "pcm": ffebm.device_presets()["pcm"],
            "converters": Devices(adc_bits=8, dac_bits=8),
        }
        hybrids = {name: self.on(devices).train() for name, devices in kinds.items()}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for turn in range(60):
            for name, hybrid in hybrids.items():
                with torch.no_grad():
                    next(hybrid.parameters()).mul_(1.0)
                start = time.process_time()
                gradients(hybrid, self.x, self.y)
                if turn >= 10:
                    times[name].append(time.process_time() - start)
        row("devices", "ms", "steps without")
        for name, found in times.items():
            ratio = statistics.median(a / b for a, b in zip(found, times["none"], strict=True))
            row(name, f"{1e3 * statistics.median(found):.1f}", f"{ratio:.2f}")

    def without(self) -> None:
        """What devices take of a training step without them: calls into their code, and the time of checks."""
        hybrid = self.on(None).train()
        times = []
        for _ in range(40):
            start = time.process_time()
            gradients(hybrid, self.x, self.y)
            times.append(time.process_time() - start)
        calls: Counter[Any] = Counter()

        def seen(frame: FrameType, event: str, _: object) -> None:
            if event == "call":
                calls[frame.f_code] += 1

        sys.setprofile(seen)
        try:
            gradients(hybrid, self.x, self.y)
        finally:
            sys.setprofile(None)
        (block,) = hybrid.energy_blocks.values()
        outputs, frame = (self.x,), SimpleNamespace(reads=None)
        checks: dict[Callable[..., Any], Callable[[], object]] = {
            EnergyBlock.analog: lambda: block.analog(None, 1),
            EnergyBlock._leave: lambda: block._leave(outputs),
            EnergyBlock.active_estimator.fget: lambda: block.active_estimator,  # type: ignore[attr-defined]
            Frame._run: lambda: (frame.reads is not None, frame.reads is not None),
            Frame.registers: lambda: frame.reads is not None,
            Frame.pullback: lambda: frame.reads is not None,
        }
        took = 0.0
        for function, check in checks.items():
            count = calls[function.__code__]
            took += count * min(timeit.repeat(check, number=2000, repeat=5)) / 2000
        inside = sum(count for code, count in calls.items() if "/runtime/devices/" in code.co_filename)
        step = statistics.median(times[10:])
        row("calls into runtime/devices", "of all", "checks, us", "a step, ms", "share")
        row(inside, calls.total(), f"{1e6 * took:.1f}", f"{1e3 * step:.1f}", f"{took / step:.2%}")


def main() -> None:
    """Print the tables."""
    kinds = ("static", "mismatch", "noise", "nudge", "converters", "wires", "step", "without")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(kinds)}; all if left out")
    parser.add_argument("--feedback", type=float, default=0.3)
    add_out(parser)
    options = parser.parse_args()
    if unknown := set(options.tables) - set(kinds):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    torch.set_num_threads(1)
    tables = Tables(options.feedback)
    for name in options.tables or kinds:
        PRINTED.begin(name)
        getattr(tables, name)()
        print()
        keep(PRINTED.tables, options.out)


if __name__ == "__main__":
    main()
