"""Experiment 4: seven learning algorithms on one network, vector fields and backpropagation beside them.

    .venv/bin/python examples/seven_algorithms.py [--quick] [--nudge cost] [--bits 16] [--out results/seven_algorithms]

The comparison of Scellier et al. 2023 (arXiv 2312.15103): contrastive learning (CL), equilibrium propagation (EP) and
coupled learning (CpL), the last two positively perturbed (P), negatively (N) and centered (C), with a squared error.
Images are scaled to 32 × 32 pixels, and the network is their deep convolutional Hopfield network at small width. Other
inputs have one of two hidden layers. It is one energy block. The paper has MNIST, Fashion-MNIST, SVHN, CIFAR-10 and
CIFAR-100: `--data NAME --folder DIR --width 128`.

P, N and C differ by what a finite β does. `--nudge constant` is the project's: the output is pushed by β a δ, with the
error δ at the free state and a = rms(s)/rms(δ) of each sample, so that β is relative. `--nudge cost` is the paper's: it
is pushed by β(s − y) with its own present state s. `--bits 16` computes products in bfloat16 (autocast).

Test accuracy by epoch, and, for one batch after training, the cosine of the worst layer's gradient to implicit
differentiation. Ten minutes on one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from command_line import add_options, chosen, device_of, feedback_of, positive, positive_number, read_options, told
from experiment import Experiment
from experiment_data import Data, load
from experiment_training import Recipe, Row, training_and_accuracy
from papers_networks import BLOCK_OPS, DCHN
from splitting import scaled
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.estimators.base import Estimator

VARIANTS = {"P": "positive", "N": "negative", "C": "centered"}
SEVEN = ("CL", "P-EP", "N-EP", "C-EP", "P-CpL", "N-CpL", "C-CpL")
FIELDS = {"VF, fixed": "fixed", "VF, free": "free", "VF, aligned": "aligned"}
METHODS = ("backprop", *SEVEN, *FIELDS)


def squared(scores: Tensor, labels: Tensor) -> Tensor:
    """½‖scores − one-hot‖², the mean over the batch."""
    return 0.5 * (scores.float() - F.one_hot(labels, scores.shape[-1])).square().sum(-1).mean()


class Dense(nn.Module):
    """Two hidden layers of clamp(h/2, 0, 1) and a linear readout."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inputs, width), nn.Linear(width, width)])
        self.readout = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """The scores of the classes."""
        s = x.flatten(1)
        for layer in self.layers:
            s = torch.clamp(0.5 * layer(s), 0, 1)
        scores: Tensor = self.readout(s)
        return scores


def network(data: Data, method: str, options: argparse.Namespace) -> nn.Module:
    """The network with its algorithm."""
    x = data.scaled(data.training[0][:2])
    source: nn.Module = (
        DCHN(options.width, data.classes) if x.dim() == 4 else Dense(x[0].numel(), 16 * options.width, data.classes)
    ).to(data.device)
    if method == "backprop":
        return source
    plan = ffebm.plan(source, x, digital_drive=True, hardware="ideal", block_ops=BLOCK_OPS)
    settings: dict[str, Any] = {"feedback": feedback_of(options.feedback), "plan": plan}
    if method in FIELDS:
        own = ffebm.FeedbackWeights(update=FIELDS[method], start="random", seed=1)  # type: ignore[arg-type]
        return ffebm.convert(source, x, feedback_weights=own, **settings)
    return ffebm.convert(source, x, gradient=algorithm(method, options), **settings)


def algorithm(method: str, options: argparse.Namespace) -> Estimator:
    """One of the seven."""
    if method == "CL":
        return ffebm.ContrastiveLearning(float(options.batch))
    sign, kind = method.split("-")
    variant: Any = VARIANTS[sign]
    if kind == "CpL":
        return ffebm.CoupledLearning(options.beta, variant)
    if options.nudge == "cost":
        return ffebm.CostNudge(options.beta, variant, scale=float(options.batch))
    return ffebm.EquilibriumPropagation(options.beta, variant)


def cosine(model: nn.Module, data: Data, batch: int) -> float | None:
    """The cosine of the worst layer's gradient to implicit differentiation, at γ held; None for the source."""
    if not isinstance(model, ffebm.HybridModel):
        return None
    x, y = data.scaled(data.test[0][:batch]), data.test[1][:batch]
    own = {name: block.estimator for name, block in model.energy_blocks.items()}
    found: list[dict[str, Tensor]] = []
    model.eval()
    for exact in (False, True):
        if exact:
            model.set_gradient("implicit")
        model.zero_grad()
        squared(model(x), y).backward()  # type: ignore[no-untyped-call]
        named = [(n, p) for n, p in model.named_parameters() if n not in model.feedback_names]
        found.append({n: p.grad.flatten().clone() for n, p in named if p.grad is not None and p.dim() > 1})
    for name, estimator in own.items():
        model.set_gradient(estimator, blocks=[name])
    model.zero_grad()
    return min(float(F.cosine_similarity(a, found[1][name], 0)) for name, a in found[0].items())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/seven_algorithms", epochs=8, seeds=1)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--nudge", choices=("constant", "cost"), default="constant")
    parser.add_argument("--beta", type=positive_number, default=0.5)
    parser.add_argument("--feedback", default="0.5", help="a loop gain, or symmetric")
    parser.add_argument("--bits", type=int, choices=(16, 32), default=32)
    parser.add_argument("--width", type=positive, default=8)
    parser.add_argument("--rate", type=positive_number, default=2e-3)
    parser.add_argument("--batch", type=positive, default=32)
    few = ["backprop", "CL", "C-EP", "VF, free"]
    options = read_options(parser, epochs=1, seeds=1, width=2, method=few)
    torch.set_num_threads(1)
    with told(parser):
        data = load(options.data, options.folder).to(device_of(options))
        data = scaled(data) if data.training[0].dim() == 4 else data
        if options.quick:
            data = data.first(128, 64)
        settings = chosen(options, "data", "folder", "device", "nudge", "beta", "feedback", "bits")
        settings |= chosen(options, "epochs", "width", "rate", "batch", "quick")
        experiment = Experiment(options.out, "algorithms", settings)
        dtype = torch.bfloat16 if options.bits == 16 else None
        recipe = Recipe(options.epochs, options.rate, options.batch, loss=squared, autocast=dtype)

        def one(key: Row, checkpoint: Path) -> Iterator[Row]:
            torch.manual_seed(key["seed"])
            model = network(data, key["method"], options)
            for row in training_and_accuracy(model, data, recipe, key["seed"], checkpoint):
                found = cosine(model, data, options.batch) if row["epoch"] == options.epochs else None
                yield {**row, "cosine": "" if found is None else found}

        keys = [{"data": data.name, "method": m, "seed": seed} for m in options.method for seed in range(options.seeds)]
        experiment.run(keys, one)
        print("test accuracy, %")
        print(experiment.table("method", "data", "test"))
        print("cosine of the worst layer to implicit differentiation")
        print(experiment.table("method", "data", "cosine", ".4f"))
        values = {"test": "test accuracy, %", "loss": "loss", "sweeps": "free sweeps"}
        print(f"curves: {experiment.picture('data', 'method', values)}")


if __name__ == "__main__":
    main()
