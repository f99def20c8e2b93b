"""What experiments on scikit-learn's digits share: the samples, training, scores, and a command line of tables.

`examples/analog_devices.py` and `benchmarks/quantised.py` print tables of test accuracies with it. Run those.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from command_line import read_options
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["DigitTables", "options_of", "print_tables"]


def _digits() -> tuple[Tensor, Tensor]:
    """All samples, (n, 64), in a fixed random order, and their labels."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x / 16.0, dtype=torch.float32)[order], torch.tensor(y)[order]


class DigitTables:
    """Tables of test accuracies, each a method. 1 400 samples are to train with, 397 to test.

    Args:
        epochs: of training.
        seeds: number of networks whose mean a figure is.
        shape: of a sample.
    """

    def __init__(self, epochs: int, seeds: int, shape: tuple[int, ...] = (64,)) -> None:
        self.epochs, self.seeds = epochs, seeds
        x, y = _digits()
        x = x.reshape(-1, *shape)
        self.x, self.y, self.test_x, self.test_y = x[:1400], y[:1400], x[1400:], y[1400:]

    def fit(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        epochs: int,
        batch: int,
        after_epoch: Callable[[], object] = lambda: None,
    ) -> None:
        """Train with a cosine schedule, and leave the model in eval mode."""
        model.train()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for rows in torch.randperm(len(self.x)).split(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(self.x[rows]), self.y[rows]).backward()
                optimizer.step()
            schedule.step()
            after_epoch()
        model.eval()

    def right(self, output: Tensor) -> float:
        """Share of the test samples that this output has right, in %."""
        return 100 * float((output.argmax(1) == self.test_y).float().mean())

    def accuracy(self, model: nn.Module) -> float:
        """Test accuracy in %."""
        with torch.no_grad():
            return self.right(model.eval()(self.test_x))

    def mean(self, measure: Callable[[int], float]) -> float:
        """Mean over the seeds."""
        return statistics.mean(measure(seed) for seed in range(self.seeds))


def options_of(
    parser: argparse.ArgumentParser,
    names: Sequence[str],
    kind: str,
    missing: str,
    arguments: Sequence[str] | None,
    **quick: Any,
) -> argparse.Namespace:
    """The options, with the `names` of the tables to print. `kind` is what one is called, `missing` what none means.

    `quick` holds what `--quick` sets where it is not given. A name that is not there ends the program with status 2.
    """
    parser.add_argument("names", nargs="*", metavar=kind.upper(), help=f"of {', '.join(names)}; {missing} if left out")
    options = read_options(parser, arguments, **quick)
    if unknown := set(options.names) - set(names):
        parser.error(f"no {kind} {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


def print_tables(
    tables: Any,
    names: Sequence[str],
    begin: Callable[[str], object] = lambda name: None,
    end: Callable[[], object] = lambda: None,
) -> None:
    """Print the tables of these names, each below what it shows, on one thread. `begin` and `end` are called around."""
    torch.set_num_threads(1)
    for name in names:
        method = getattr(tables, name)
        print(f"{name}: {method.__doc__}\n")
        begin(name)
        method()
        print()
        end()
