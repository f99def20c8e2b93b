"""Experiment 2: one depth, all block sizes. Accuracy is kept, and an epoch gets faster.

    .venv/bin/python examples/splitting.py [--quick] [--layers 6] [--feedback 0.1] [--out results/splitting]

The papers' networks of 6 or 12 layers (Nest & Ernoult 2024, arXiv 2409.03306), cut into blocks of several sizes and
trained by EP, with images scaled to 32 × 32 pixels. Their poster has CIFAR-10 at full width: `--data cifar10 --folder
DIR --width 128`. Half an hour on one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from experiment import Experiment, Recipe, Row, add_options, chosen, feedback_of, told, training_and_accuracy
from experiment_data import Data, load
from papers_networks import goe_, papers_hybrid, six_layers, twelve_layers
from torch import Tensor, nn

import ffebm_compiler as ffebm

SIZES = {6: (6, 3, 2), 12: (4, 3, 2)}
SIDE = 32


def scaled(data: Data) -> Data:
    """The data with images of 32 × 32 pixels and three channels.

    Raises:
        InputError: the data are no images.
    """
    if data.training[0].dim() != 4:
        raise ffebm.InputError(f"{data.name} has inputs of shape {tuple(data.training[0].shape[1:])}; expected images")

    def part(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(data.scaled(x), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return x.expand(-1, 3, -1, -1).contiguous() if x.shape[1] == 1 else x, y

    return replace(data, training=part(*data.training), test=part(*data.test))


def network(data: Data, layers: int, size: int, width: int, feedback: str, variance: float) -> nn.Module:
    """The network in blocks of `size` layers, with GOE initialisation."""
    build = {6: six_layers, 12: twelve_layers}[layers]
    source = build(size, width, classes=data.classes)
    goe_(source, variance)
    if feedback == "backprop":
        return source
    return papers_hybrid(source, data.scaled(data.training[0][:2]), feedback_of(feedback))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/splitting", epochs=6)
    parser.add_argument("--layers", type=int, choices=tuple(SIZES), default=6)
    parser.add_argument("--feedback", default="0.1", help="a loop gain, symmetric or backprop")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument(
        "--variance", type=float, help="V of the GOE initialisation; 8.4e-5 at the papers' width of 128"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.epochs, options.seeds, options.width = 1, 1, 2
    options.variance = options.variance or 8.4e-5 * 128 / options.width
    with told(parser):
        data = scaled(load(options.data, options.folder))
        if options.quick:
            data = data.first(128, 64)
        names = ("data", "layers", "feedback", "epochs", "width", "rate", "variance", "quick")
        experiment = Experiment(options.out, "splitting", chosen(options, *names))

        def one(key: Row, checkpoint: Path) -> Iterator[Row]:
            torch.manual_seed(key["seed"])
            model = network(data, options.layers, key["block"], options.width, options.feedback, options.variance)
            yield from training_and_accuracy(model, data, Recipe(options.epochs, options.rate), key["seed"], checkpoint)

        sizes = SIZES[options.layers]
        keys = [{"data": data.name, "block": size, "seed": seed} for size in sizes for seed in range(options.seeds)]
        experiment.run(keys, one)
        print("test accuracy, %")
        print(experiment.table("block", "data", "test"))
        print("CPU seconds of the last epoch")
        print(experiment.table("block", "data", "seconds"))
        values = {"test": "test accuracy, %", "seconds": "CPU s an epoch", "sweeps": "free sweeps"}
        print(f"curves: {experiment.picture('data', 'block', values)}")


if __name__ == "__main__":
    main()
