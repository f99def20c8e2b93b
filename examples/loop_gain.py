"""Experiment 1: hold the loop gain, and EP trains from scratch like backprop; symmetric feedback collapses.

    .venv/bin/python examples/loop_gain.py [--quick] [--data mnist --folder DIR] [--out results/loop_gain]

The papers' architecture at small width (Nest & Ernoult 2024, arXiv 2409.03306), from scratch: two blocks of two
convolutions, each block begins with a state that batch norm drives, GOE initialisation, Adam with a cosine schedule. By
backprop, by EP with the loop gain held at 0.1, 0.5 and 0.9, and by EP with symmetric feedback (γ = 1, the
literature's). Test accuracy, true loop gain and sweeps by epoch; three seeds. 10 minutes on one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from command_line import add_options, chosen, device_of, feedback_of, positive, positive_number, read_options, told
from experiment import Experiment
from experiment_data import Data, load
from experiment_training import Recipe, Row, training_and_accuracy
from papers_networks import FeedforwardTied, goe_, papers_hybrid
from torch import nn

import ffebm_compiler as ffebm

FEEDBACK = ("backprop", "0.1", "0.5", "0.9", "symmetric")


def network(data: Data, width: int, feedback: str, variance: float | None) -> nn.Module:
    """The network with its gradient. Without a variance its initialisation is torch's.

    Raises:
        InputError: the data are no square images whose side two poolings can halve.
    """
    x = data.training[0]
    if x.dim() != 4 or x.shape[-1] != x.shape[-2] or x.shape[-1] % 4:
        raise ffebm.InputError(f"{data.name} has inputs of shape {tuple(x.shape[1:])}; expected square images, side 4n")
    channels = (x.shape[1], width, width, 2 * width, 2 * width)
    side, pooled = x.shape[-1], (False, True, False, True)
    source = FeedforwardTied(channels, pooled, [2, 2], side=side, classes=data.classes)
    if variance:
        goe_(source, variance)
    source = source.to(data.device)
    return source if feedback == "backprop" else papers_hybrid(source, data.scaled(x[:2]), feedback_of(feedback))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/loop_gain", epochs=5)
    parser.add_argument("--feedback", nargs="+", choices=FEEDBACK, default=list(FEEDBACK))
    parser.add_argument("--width", type=positive, default=32)
    parser.add_argument("--rate", type=positive_number, default=2e-3)
    parser.add_argument("--initialisation", choices=("goe", "torch"), default="goe")
    parser.add_argument(
        "--variance", type=positive_number, help="V of the GOE initialisation; 8.4e-5 at the papers' width of 128"
    )
    options = read_options(parser, epochs=2, seeds=1, width=4)
    torch.set_num_threads(1)
    if options.initialisation == "goe":
        options.variance = options.variance or 8.4e-5 * 128 / options.width
    with told(parser):
        data = load(options.data, options.folder).to(device_of(options))
        settings = chosen(options, "data", "folder", "device", "epochs", "width", "rate", "initialisation", "variance")
        experiment = Experiment(options.out, "loop gain", settings)

        def one(key: Row, checkpoint: Path) -> Iterator[Row]:
            torch.manual_seed(key["seed"])
            model = network(data, options.width, key["feedback"], options.variance)
            yield from training_and_accuracy(model, data, Recipe(options.epochs, options.rate), key["seed"], checkpoint)

        keys = [{"feedback": given, "seed": seed} for given in options.feedback for seed in range(options.seeds)]
        experiment.run([{"data": data.name, **key} for key in keys], one)
        print(experiment.table("feedback", "data", "test"))
        values = {"test": "test accuracy, %", "loop_gain": "largest loop gain", "sweeps": "free sweeps"}
        print(f"curves: {experiment.picture('data', 'feedback', values)}")


if __name__ == "__main__":
    main()
