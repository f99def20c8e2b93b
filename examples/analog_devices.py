"""Does equilibrium propagation train on imperfect devices, and where does it stop? Six experiments on digits.

    .venv/bin/python examples/analog_devices.py
    .venv/bin/python examples/analog_devices.py static gain converters nudge drift updates --epochs 20 --seeds 2

The second line takes some 20 minutes. States that are read with noise or through ADCs are nudged as each block chooses,
or with `--beta`. Each experiment prints a table of test accuracies (%, mean over the seeds), as in
docs/analog.md. The network is 64-64-32-10 with tanh, one energy block, on scikit-learn's digits (1 400 samples to
train, 397 to test), with Adam at 3e-3 and a cosine schedule, batches of 64 (updates: gradient descent, batches of 16).
All of it is modelled: the devices are `ffebm.Devices`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

sys.path.append(str(Path(__file__).resolve().parent))
from digit_tables import DigitTables, options_of, print_tables

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, PulsedUpdate, PulseResponse, TikiTaka

Wrap = Callable[[Optimizer], Optimizer]


class Experiments(DigitTables):
    """The experiments, by name."""

    beta: float | None = None
    """Strength of nudges where states are read inexactly; None: each block chooses it."""

    def fresh(self, seed: int, devices: Devices | None, kappa: float) -> ffebm.HybridModel:
        """An untrained network on devices."""
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        hybrid = ffebm.convert(model, self.x[:64], feedback=kappa, devices=devices)
        if self.beta is not None and devices is not None and (devices.noisy or devices.adc_bits is not None):
            hybrid.set_gradient(ffebm.EquilibriumPropagation(beta=self.beta, variant="centered", reads=16))
        return hybrid

    def train(self, hybrid: ffebm.HybridModel, epochs: int, rate: float = 3e-3, wrap: Wrap | None = None) -> None:
        """Train with the gradient that the hybrid has: EP, of the size that its devices need.

        With `wrap`, the optimizer is what it makes of plain gradient descent, and the batches have 16 samples.
        """
        optimizer: Optimizer = torch.optim.Adam(hybrid.parameters(), rate)
        if wrap is not None:
            optimizer = wrap(torch.optim.SGD(hybrid.parameters(), 0.1))
        self.fit(hybrid, optimizer, epochs, 64 if wrap is None else 16)

    def trained(self, seed: int, devices: Devices | None, kappa: float, wrap: Wrap | None = None) -> ffebm.HybridModel:
        """A network that was trained on its devices."""
        hybrid = self.fresh(seed, devices, kappa)
        self.train(hybrid, self.epochs, wrap=wrap)
        return hybrid

    def static(self) -> None:
        """Static errors are absorbed by training on the device, dynamic ones are not. κ = 0.5."""
        ideal = [self.trained(seed, None, 0.5) for seed in range(self.seeds)]
        row("devices", "moved there", "trained there")
        row("none", "", self.mean(lambda seed: self.accuracy(ideal[seed])))
        kinds = {
            "programming error 5 %": Devices(programming=0.05),
            "programming error 10 %": Devices(programming=0.1),
            "programming error 20 %": Devices(programming=0.2),
            "5 % of the devices stuck on": Devices(stuck_on=0.05),
            "20 % stuck off": Devices(stuck_off=0.2),
            "3 bits": Devices(weight_bits=3),
            "mismatch 20 %": Devices(mismatch=0.2),
            "wires, r g_max = 1e-3": Devices(wire_resistance=1e-3),
            "read noise 1e-3": Devices(read_noise=1e-3),
            "read noise 1e-2": Devices(read_noise=1e-2),
            "read noise 5e-2": Devices(read_noise=5e-2),
            "pcm": ffebm.device_presets()["pcm"],
            "reram": ffebm.device_presets()["reram"],
        }

        for name, devices in kinds.items():
            moved = self.mean(lambda seed, d=devices: self.moved(ideal[seed], d))  # type: ignore[misc]
            own = self.mean(lambda seed, d=devices: self.accuracy(self.trained(seed, replace(d, seed=seed), 0.5)))  # type: ignore[misc]
            row(name, moved, own)

    def moved(self, hybrid: ffebm.HybridModel, devices: Devices) -> float:
        """The accuracy of a trained network whose weights are put on devices, mean over three of them."""
        twin = copy.deepcopy(hybrid)
        found = []
        for seed in range(3):
            twin.set_devices(replace(devices, seed=100 + seed))
            found.append(self.accuracy(twin))
        return statistics.mean(found)

    def gain(self) -> None:
        """The feedback gain is the signal-to-noise knob: accuracy over κ and read noise, trained there."""
        kappas = (0.1, 0.3, 0.5, 0.9)
        row("read noise", *(f"κ = {kappa}" for kappa in kappas))
        for noise in (0.0, 1e-3, 1e-2, 3e-2):
            devices = Devices(read_noise=noise) if noise else None
            row(
                f"{noise:g}",
                *(self.mean(lambda s, k=k, d=devices: self.accuracy(self.trained(s, d, k))) for k in kappas),
            )  # type: ignore[misc]

    def converters(self) -> None:
        """Bits of DACs and ADCs: the forward pass of an ideal network, and training through them."""
        kappas = (0.1, 0.5)
        ideal = {kappa: [self.trained(seed, None, kappa) for seed in range(self.seeds)] for kappa in kappas}
        row("bits", *(f"κ = {kappa}, {what}" for kappa in kappas for what in ("moved there", "trained there")))
        for bits in (3, 4, 6, 8, 10):
            devices = Devices(adc_bits=bits, dac_bits=bits)
            cells = []
            for kappa in kappas:
                cells.append(self.mean(lambda s, k=kappa, d=devices: self.moved(ideal[k][s], d)))  # type: ignore[misc]
                cells.append(self.mean(lambda s, k=kappa, d=devices: self.accuracy(self.trained(s, d, k))))  # type: ignore[misc]
            row(bits, *cells)

    def drift(self) -> None:
        """Phase-change devices over time: as they are, compensated, and after an epoch of EP on the aged devices."""
        pcm = replace(ffebm.device_presets()["pcm"], read_noise=0.0)
        kinds = {True: pcm, False: replace(pcm, drift=replace(pcm.drift, compensated=False))}  # type: ignore[type-var]
        hybrids = {
            k: [self.trained(seed, replace(d, seed=seed), 0.5) for seed in range(self.seeds)] for k, d in kinds.items()
        }
        row("age", "as it is", "compensated", "as it is, then one epoch of EP", "compensated, then one epoch of EP")
        for name, seconds in (
            ("new", 0),
            ("1 hour", 3600),
            ("1 day", 86400),
            ("30 days", 30 * 86400),
            ("10 years", 3.15e8),
        ):
            cells = [self.mean(lambda s, k=k, t=seconds: self.aged(hybrids[k][s], t, 0)) for k in (False, True)]  # type: ignore[misc]
            cells += [self.mean(lambda s, k=k, t=seconds: self.aged(hybrids[k][s], t, 1)) for k in (False, True)]  # type: ignore[misc]
            row(name, *cells)

    def nudge(self) -> None:
        """How strongly to nudge where reads are noisy, over the feedback gain: `pcm` from scratch."""
        pcm = ffebm.device_presets()["pcm"]
        kappas = (0.1, 0.3, 0.5)
        row("devices", "β", *(f"κ = {kappa}" for kappa in kappas))
        row("none", "", *(self.mean(lambda s, k=k: self.accuracy(self.trained(s, None, k))) for k in kappas))  # type: ignore[misc]
        silent = replace(pcm, read_noise=0.0)
        for name, devices, beta in (
            ("pcm, no noise", silent, 1.0),
            ("pcm", pcm, 1.0),
            ("pcm", pcm, 10.0),
            ("pcm", pcm, None),
        ):
            cells = [
                self.mean(lambda s, k=k, d=devices, b=beta: self.accuracy(self.nudged(s, d, b, k)))  # type: ignore[misc]
                for k in kappas
            ]
            row(name, "its own" if beta is None else f"{beta:g}", *cells)

    def nudged(self, seed: int, devices: Devices, beta: float | None, kappa: float) -> ffebm.HybridModel:
        """A network that was trained on its devices with nudges of this size."""
        hybrid = self.fresh(seed, replace(devices, seed=seed), kappa)
        hybrid.set_gradient(ffebm.EquilibriumPropagation(beta=beta, variant="centered", reads=16))
        self.train(hybrid, self.epochs)
        return hybrid

    def aged(self, hybrid: ffebm.HybridModel, seconds: float, epochs: int) -> float:
        """Accuracy at an age, after some epochs of training there."""
        twin = copy.deepcopy(hybrid)
        twin.age(seconds)
        if epochs:
            self.train(twin, epochs, rate=1e-3)
        return self.accuracy(twin)

    def updates(self) -> None:
        """Updates by pulses: steps, asymmetry and range against accuracy, plain and by Tiki-Taka, at κ = 0.5."""
        exact = self.mean(lambda seed: self.accuracy(self.trained(seed, None, 0.5, lambda inner: inner)))
        row("pulses", "plain", "Tiki-Taka")
        row("exact steps", exact, "")
        responses = {
            "1000 steps, symmetric": PulseResponse(step=0.002),
            "100 steps, symmetric": PulseResponse(step=0.02),
            "1000 steps, asymmetry 0.3": PulseResponse(step=0.002, asymmetry=0.3),
            "1000 steps, asymmetry 0.6": PulseResponse(step=0.002, asymmetry=0.6),
            "1000 steps, asymmetry 0.6, half the range": PulseResponse(step=0.002, asymmetry=0.6, bound=2.0),
            "reram": ffebm.device_presets()["reram"].update,
        }
        for name, response in responses.items():
            devices = Devices(update=response)
            plain = self.mean(
                lambda s, d=devices: self.accuracy(self.trained(s, None, 0.5, lambda o: PulsedUpdate(o, d)))
            )  # type: ignore[misc]
            tiki = self.mean(
                lambda s, d=devices: self.accuracy(self.trained(s, None, 0.5, lambda o: TikiTaka(o, d, rate=1.0)))
            )  # type: ignore[misc]
            row(name, plain, tiki)


def row(*cells: Any) -> None:
    """A row of a table."""
    print(
        "| " + " | ".join(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    names = ("static", "gain", "converters", "nudge", "drift", "updates")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--beta", type=float, help="strength of nudges where states are read inexactly")
    options = options_of(parser, names, "experiment", "drift", arguments)
    experiments = Experiments(options.epochs, options.seeds)
    experiments.beta = options.beta
    print_tables(experiments, options.names or ["drift"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
