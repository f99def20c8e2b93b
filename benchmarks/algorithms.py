"""The learning algorithms beside each other: how near each is to the gradient of the loss, and what each learns.

    python benchmarks/algorithms.py [--seeds 3] [--epochs 8] [--out benchmarks/results/algorithms.json]

The network is 64-64-32-10 with tanh, one energy block, on scikit-learn's digits (64 values from -0.3 to 0.7; 1 347
training and 450 test images, one is 0.22 points), in these tables:

    gradients   cosine of every weight to the exact gradient of the loss at γ held, the worst, for one batch of 64 of
                the untrained network in float64, at loop gains of 0.1, 0.5 and 0.9; "through γ" is another gradient
    digital     64-64-32, layer norm, 32-32-10: cosine of all gradients before the norm to the exact ones where the norm
                is perturbed (`ZerothOrder`), over 1 to 1 024 samples
    training    test accuracy by seed (Adam, batches of 64, loop gain 0.5)
    depth       16 layers of width 32 in 8 blocks of two, batch norm before each: test accuracy by loop gain and rate
    cnn         17 layers, 16 convolutions, driven states in 8 blocks (`examples/depth.py` has more of it): the same
    norm        that network at 5e-4: with batch norm, without, and with the last batch of three images kept

One thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from depth import source
from vector_fields import data, network

BATCH = 64
ALGORITHMS: dict[str, Any] = {
    "ep, β = 1e-4": ffebm.EquilibriumPropagation(1e-4),
    "ep, β = 0.3": ffebm.EquilibriumPropagation(0.3),
    "ep centered, β = 0.3": ffebm.EquilibriumPropagation(0.3, "centered"),
    "ep holomorphic, β = 0.3": ffebm.EquilibriumPropagation(0.3, "holomorphic"),
    "implicit": ffebm.Implicit(),
    "recurrent": ffebm.RecurrentBackprop(),
    "truncated, 1 sweep": ffebm.TruncatedBackprop(1),
    "truncated, 3 sweeps": ffebm.TruncatedBackprop(3),
    "coupled": ffebm.CoupledLearning(),
    "coupled centered, β = 0.3": ffebm.CoupledLearning(0.3, "centered"),
    "contrastive": ffebm.ContrastiveLearning(float(BATCH)),
    "implicit, through γ": ffebm.Implicit(through_feedback=True),
}


def gradients(hybrid: ffebm.HybridModel, x: Tensor, y: Tensor, names: Callable[[str], bool]) -> dict[str, Tensor]:
    """The gradients of the mean cross-entropy by some parameters."""
    hybrid.zero_grad()
    F.cross_entropy(hybrid(x), y).backward()
    return {n: p.grad.flatten().clone() for n, p in hybrid.named_parameters() if p.grad is not None and names(n)}


def cosine(found: Tensor, expected: Tensor) -> float:
    """⟨a, b⟩/‖a‖‖b‖."""
    return float(F.cosine_similarity(found, expected, dim=0))


def gradient_table(feedback: float) -> dict[str, float]:
    """The worst cosine of a weight, by algorithm."""
    x, y, _, _ = data()
    x, y = x[:BATCH].double(), y[:BATCH]
    hybrid = ffebm.convert(network(torch.Generator().manual_seed(0)).double(), x, feedback=feedback)
    found = {}
    hybrid.set_gradient("implicit")
    exact = gradients(hybrid, x, y, lambda name: "weight" in name)
    for label, estimator in ALGORITHMS.items():
        hybrid.set_gradient(estimator)
        here = gradients(hybrid, x, y, lambda name: "weight" in name)
        found[label] = min(cosine(here[name], gradient) for name, gradient in exact.items())
    return found


def split() -> nn.Sequential:
    """Two blocks of two layers with a layer norm between them."""
    return nn.Sequential(
        nn.Linear(64, 64),
        nn.Tanh(),
        nn.Linear(64, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def digital_table() -> dict[int, float]:
    """Samples -> cosine of the gradients of the layers before the norm, all as one vector."""
    torch.manual_seed(0)
    x, y, _, _ = data()
    x, y = x[:BATCH].double(), y[:BATCH]
    hybrid = ffebm.convert(split().double(), x, feedback=0.5)

    def flat() -> Tensor:
        return torch.cat(list(gradients(hybrid, x, y, lambda name: name[0] in "02").values()))

    exact, found = flat(), {}
    for samples in (1, 16, 128, 1024):
        hybrid.set_gradient("ep", feedforward=ffebm.ZerothOrder(samples))
        found[samples] = cosine(flat(), exact)
    return found


def deep() -> nn.Sequential:
    """Eight blocks of two layers, batch norm before each, and a head."""
    layers: list[nn.Module] = [nn.Linear(64, 32)]
    for _ in range(8):
        layers += [nn.BatchNorm1d(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)]
    return nn.Sequential(*layers, nn.BatchNorm1d(32), nn.Linear(32, 10))


def deep_cnn(norm: bool = True) -> nn.Sequential:
    """The network of `examples/depth.py` for the flat images of this file; converted with `digital_drive`."""
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *source((1, 8, 8), 10, norm=norm))


def train(model: nn.Module, seed: int, epochs: int, rate: float, drop_last: bool = True) -> float:
    """Test accuracy in %; -1 where a block did not settle."""
    x, y, held_x, held_y = data()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for batch in order[: len(x) // BATCH * BATCH if drop_last else len(x)].split(BATCH):
            optimizer.zero_grad()
            try:
                F.cross_entropy(model(x[batch]), y[batch]).backward()
            except ffebm.ConvergenceError:
                return -1.0
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return 100 * float((model(held_x).argmax(1) == held_y).float().mean())


def runs(
    build: Callable[[int], nn.Module], options: argparse.Namespace, epochs: int, rate: float, drop_last: bool = True
) -> dict[str, Any]:
    """Accuracies by seed, their mean and the seconds of a run."""
    started = time.process_time()
    found = [train(build(seed), seed, epochs, rate, drop_last) for seed in range(options.seeds)]
    seconds = (time.process_time() - started) / options.seeds
    return {"accuracy": found, "mean": statistics.mean(found), "seconds": seconds}


def shown(label: str, row: dict[str, Any]) -> str:
    """A row of accuracies."""
    return f"{label:>36} {'  '.join(f'{a:6.2f}' for a in row['accuracy'])} {row['mean']:8.2f} {row['seconds']:6.1f} s"


def training_table(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies by algorithm."""
    x, _, _, _ = data()

    def start(seed: int) -> nn.Sequential:
        return network(torch.Generator().manual_seed(seed))

    def hybrid(estimator: Any) -> Callable[[int], nn.Module]:
        return lambda seed: ffebm.convert(start(seed), x[:2], feedback=0.5, gradient=estimator)

    def perturbed(samples: int) -> Callable[[int], nn.Module]:
        def build(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            made = ffebm.convert(split(), x[:2], feedback=0.5)
            if samples:
                made.set_gradient("ep", feedforward=ffebm.ZerothOrder(samples, seed=seed))
            return made

        return build

    cases: dict[str, Callable[[int], nn.Module]] = {"backprop of the source": start}
    cases |= {label: hybrid(estimator) for label, estimator in ALGORITHMS.items()}
    cases |= {"with a layer norm": perturbed(0)}
    cases |= {f"with a layer norm, perturbed × {n}": perturbed(n) for n in (1, 16)}
    found = {}
    for label, build in cases.items():
        found[label] = runs(build, options, options.epochs, options.rate)
        print(shown(label, found[label]), flush=True)
    return found


def rate_table(
    options: argparse.Namespace,
    build: Callable[[], nn.Module],
    gains: Sequence[float],
    epochs: int,
    drive: bool = False,
) -> dict[str, Any]:
    """Accuracies of a deep network by loop gain and rate."""
    x, _, _, _ = data()

    def start(seed: int, feedback: float | None) -> nn.Module:
        torch.manual_seed(seed)
        model = build()
        return model if feedback is None else ffebm.convert(model, x[:2], feedback=feedback, digital_drive=drive)

    found = {}
    for rate in (2e-3, 5e-4):
        for feedback in (None, *gains):
            label = f"{'backprop' if feedback is None else f'κ = {feedback}'}, rate {rate:g}"
            found[label] = runs(partial(start, feedback=feedback), options, epochs, rate)
            print(shown(label, found[label]), flush=True)
    return found


def norm_table(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies of the deep convolutional network by loop gain, with batch norm and without."""
    x, _, _, _ = data()
    variants = {"batch norm": (True, True), "no norm": (False, True), "batch norm, last batch kept": (True, False)}
    found = {}
    for name, (norm, drop_last) in variants.items():
        for feedback in (None, 0.1, 0.9):

            def start(seed: int, norm: bool = norm, feedback: float | None = feedback) -> nn.Module:
                torch.manual_seed(seed)
                model = deep_cnn(norm=norm)
                return model if feedback is None else ffebm.convert(model, x[:2], feedback=feedback, digital_drive=norm)

            label = f"{name}, {'backprop' if feedback is None else f'κ = {feedback}'}"
            found[label] = runs(start, options, options.cnn_epochs, 5e-4, drop_last)
            print(shown(label, found[label]), flush=True)
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--depth-epochs", type=int, default=8)
    parser.add_argument("--cnn-epochs", type=int, default=12)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--tables", nargs="+", default=["gradients", "digital", "training", "depth", "cnn", "norm"])
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if "gradients" in options.tables:
        found["gradients"] = {feedback: gradient_table(feedback) for feedback in (0.1, 0.5, 0.9)}
        print("worst cosine to the gradient at γ held      κ = 0.1      0.5      0.9")
        for label in ALGORITHMS:
            print(f"{label:>36} {'  '.join(f'{row[label]:9.6f}' for row in found['gradients'].values())}", flush=True)
    if "digital" in options.tables:
        found["digital"] = digital_table()
        print("cosine where a layer norm is perturbed, by samples")
        print("  ".join(f"{samples}: {value:.3f}" for samples, value in found["digital"].items()), flush=True)
    if "training" in options.tables:
        print("test accuracy %, by seed, mean, CPU seconds of a run")
        found["training"] = training_table(options)
    if "depth" in options.tables:
        print("16 layers in 8 blocks: test accuracy %, by seed, mean, CPU seconds of a run")
        found["depth"] = rate_table(options, deep, (0.1, 0.9), options.depth_epochs)
    if "cnn" in options.tables:
        print("17 layers, convolutional, in 8 blocks: test accuracy %, by seed, mean, CPU seconds of a run")
        found["cnn"] = rate_table(options, deep_cnn, (0.1, 0.5, 0.9), options.cnn_epochs, drive=True)
    if "norm" in options.tables:
        print("the same at 5e-4, with batch norm and without")
        found["norm"] = norm_table(options)
    keep(found, options.out)


if __name__ == "__main__":
    sys.exit(main())
