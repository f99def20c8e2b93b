"""Experiment 2: one depth, all block sizes. Accuracy is kept, and an epoch gets faster.

    .venv/bin/python examples/splitting.py [--quick] [--layers 6] [--feedback 0.1] [--out results/splitting]

The papers' networks of 6 or 12 layers (Nest & Ernoult 2024, arXiv 2409.03306), cut into blocks of several sizes and
trained by EP, with images scaled to 32 × 32 pixels. Their poster has CIFAR-10 at full width and symmetric feedback:
`--data cifar10 --folder DIR --width 128 --feedback symmetric --device cuda`. The one of 15 layers, for CIFAR-100 and
ImageNet32, comes in blocks of 2: `--layers 15 --data imagenet32 --folder DIR --width 64`. Of several feedbacks, rates
and variances every combination is trained, so that each split can be read at its own. Five minutes on one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from command_line import add_options, chosen, device_of, feedback_of, positive, positive_number, read_options, told
from experiment import Experiment
from experiment_data import Data, load
from experiment_training import Recipe, Row, training_and_accuracy
from papers_networks import FeedforwardTied, fifteen_layers, goe_, papers_hybrid, six_layers, twelve_layers
from torch import Tensor, nn

import ffebm_compiler as ffebm

SIZES = {6: (6, 3, 2), 12: (4, 3, 2), 15: (2,)}
VARIANCES = {6: 8.4e-5 * 128, 12: 5.9e-5 * 128, 15: 4.9e-5 * 64}
"""Layers -> the papers' V of the GOE initialisation, times their width."""
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


def papers_source(layers: int, block: int, width: int, classes: int, slope: float) -> FeedforwardTied:
    """The papers' network of so many layers."""
    if layers == 15:
        return fifteen_layers(width, classes, slope=slope)
    build = six_layers if layers == 6 else twelve_layers
    return build(block, width, classes=classes, slope=slope)


def network(data: Data, key: Row, options: argparse.Namespace) -> nn.Module:
    """The network of a run, with GOE initialisation by the seed."""
    torch.manual_seed(key["seed"])
    source = papers_source(options.layers, key["block"], options.width, data.classes, options.slope)
    goe_(source, key["variance"])
    source = source.to(data.device)
    if key["feedback"] == "backprop":
        return source
    return papers_hybrid(source, data.scaled(data.training[0][:2]), feedback_of(key["feedback"]), options.rtol)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/splitting", epochs=12)
    parser.add_argument("--layers", type=int, choices=tuple(SIZES), default=6)
    parser.add_argument("--block", nargs="+", type=int, help="layers a block; by default all sizes of the depth")
    parser.add_argument("--feedback", nargs="+", default=["0.1"], help="loop gains, symmetric, backprop")
    parser.add_argument("--rate", nargs="+", type=positive_number, default=[2e-3])
    parser.add_argument(
        "--variance",
        nargs="+",
        type=positive_number,
        help="V of the GOE initialisation; by default the papers', scaled by the width",
    )
    parser.add_argument("--slope", type=positive_number, default=0.5, help="a of the states clamp(a h, 0, 1)")
    parser.add_argument(
        "--rtol", type=positive_number, help="relative change at which every phase stops; 1e-6 in the papers"
    )
    parser.add_argument("--width", type=positive, default=16)
    parser.add_argument("--batch", type=positive, default=32)
    options = read_options(parser, epochs=1, seeds=1, width=2)
    torch.set_num_threads(1)
    options.variance = options.variance or [VARIANCES[options.layers] / options.width]
    sizes = options.block or SIZES[options.layers]
    with told(parser):
        if not set(sizes) <= set(SIZES[options.layers]):
            raise ffebm.InputError(
                f"block is {sizes}; expected some of {SIZES[options.layers]} for {options.layers} layers"
            )
        data = scaled(load(options.data, options.folder).to(device_of(options)))
        if options.quick:
            data = data.first(128, 64)
        names = ("data", "folder", "device", "layers", "epochs", "width", "slope", "rtol", "batch", "quick")
        experiment = Experiment(options.out, "splitting", chosen(options, *names))

        def one(key: Row, checkpoint: Path) -> Iterator[Row]:
            recipe = Recipe(options.epochs, key["rate"], options.batch)
            yield from training_and_accuracy(network(data, key, options), data, recipe, key["seed"], checkpoint)

        names = ("feedback", "variance", "rate", "block", "seed")
        every = product(options.feedback, options.variance, options.rate, sizes, range(options.seeds))
        experiment.run([dict(zip(names, values, strict=True)) for values in every], one)
        for column, text in (("test", "test accuracy, %"), ("seconds", "seconds of the last epoch")):
            print(text)
            print(experiment.table(names[:3], "block", column))
        values = {"test": "test accuracy, %", "seconds": "s an epoch", "sweeps": "free sweeps"}
        print(f"curves: {experiment.picture(names[:3], 'block', values)}")


if __name__ == "__main__":
    main()
