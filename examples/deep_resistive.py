"""Deep resistive networks from scratch: equilibrium propagation beside unrolled gradients and an ordinary MLP.

    .venv/bin/python examples/deep_resistive.py [--quick] [--out results/deep_resistive]

Networks of one and two hidden layers (Scellier 2024, arXiv 2402.11674) on scikit-learn's digits and on mnist1d, three
seeds: conductances trained by EP (centered, β = 1), the same by unrolled gradients, and by backprop an MLP of the same
layers with ReLU, which reads x where the resistive network reads ±x. All with Adam and a cosine schedule. A run ends
in one line of `runs.csv`, and is not repeated where it has one; `curves.csv` has the test accuracy of each epoch. At
the end there are a table and a picture, `curves.svg`. It needs scikit-learn, mnist1d, matplotlib and rich.

Ten minutes on one thread of a shared machine; `--quick` takes one seed, a small network and two epochs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from command_line import read_options
from experiment import Experiment
from experiment_training import Row
from torch import Tensor, nn

import ffebm_compiler as ffebm

METHODS = ("EP", "unrolled", "MLP, backprop")


class DeepResistive(nn.Module):
    """Conductances between layers; hidden nodes with diodes, half of them one way round and half the other.

    Args:
        sizes: of the inputs x, the hidden layers and the outputs.
        gain: the inputs of the circuit are ±gain·x.
    """

    def __init__(self, sizes: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((2 * sizes[0], *sizes[1:])))
        for layer in self.layers:
            ffebm.init.conductances_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The currents that meet at the nodes; `energy="drn"` lets them settle."""
        s = self.gain * torch.cat((x, -x), -1)
        for layer in self.layers[:-1]:
            above, below = layer(s).chunk(2, -1)
            s = torch.cat((F.relu(above), -F.relu(-below)), -1)
        scores: Tensor = self.layers[-1](s)
        return scores


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Task:
    """Data, and how all networks are trained on them."""

    training: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    gain: float
    epochs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    rate: float = 5e-3


def squared(scores: Tensor, labels: Tensor) -> Tensor:
    """½ ‖scores − one-hot‖², the mean over the batch."""
    return 0.5 * (scores - F.one_hot(labels, scores.shape[-1])).square().sum(-1).mean()


def digits() -> Task:
    """64 pixels from −0.3 to 0.7; 1 347 training and 450 test images."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16 - 0.3, torch.tensor(found.target)
    held = torch.arange(len(x)) % 4 == 0
    return Task((x[~held], y[~held]), (x[held], y[held]), gain=20.0, epochs=20, loss=squared)


def mnist1d() -> Task:
    """40 samples of a signal; 4 000 training and 1 000 test signals."""
    from mnist1d.data import get_dataset_args, make_dataset

    found = make_dataset(get_dataset_args())

    def both(x: str, y: str) -> tuple[Tensor, Tensor]:
        return torch.tensor(found[x], dtype=torch.float32), torch.tensor(found[y])

    return Task(both("x", "y"), both("x_test", "y_test"), gain=100.0, epochs=30, loss=F.cross_entropy)


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "mnist1d": mnist1d}


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Percent."""
    model.eval()
    with torch.no_grad():
        return 100 * float((model(data[0]).argmax(-1) == data[1]).double().mean())


def network(method: str, task: Task, hidden: tuple[int, ...]) -> nn.Module:
    """A model to train, with its gradient."""
    x, y = task.training
    sizes = (x.shape[-1], *hidden, int(y.max()) + 1)
    if method == "MLP, backprop":
        return mlp(sizes)
    gradient = ffebm.EquilibriumPropagation(1.0, "centered") if method == "EP" else ffebm.Unrolled()
    return ffebm.convert(DeepResistive(sizes, task.gain), x[:2], energy="drn", gradient=gradient)


def train(model: nn.Module, task: Task, seed: int, epochs: int, batch: int = 32) -> Iterator[float]:
    """Train, and yield the test accuracy after every epoch."""
    x, y = task.training
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), task.rate)
    count = len(x) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * count)
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(x), generator=generator)[: count * batch].split(batch):
            optimizer.zero_grad()
            task.loss(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()  # sets conductances that it left below 0 to 0
            schedule.step()
        yield accuracy(model, task.test)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--width", type=int, default=100, help="units of each hidden layer")
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 2], help="numbers of hidden layers")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of the data set's own number")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, one hidden layer of 20 units, two epochs, digits"
    )
    parser.add_argument("--out", type=Path, default=Path("results/deep_resistive"))
    options = read_options(parser, seeds=1, width=20, depth=[1], epochs=2, data=["digits"])
    torch.set_num_threads(1)
    keys = [
        {"data": data, "hidden": "-".join([str(options.width)] * depth), "method": method, "seed": seed}
        for data in options.data
        for depth in options.depth
        for method in options.method
        for seed in range(options.seeds)
    ]
    loaded: dict[str, Task] = {}

    def one(key: Row, _: Path) -> Iterator[Row]:
        task = loaded[key["data"]] = loaded.get(key["data"]) or TASKS[key["data"]]()
        epochs = options.epochs or task.epochs
        torch.manual_seed(key["seed"])
        model = network(key["method"], task, tuple(map(int, key["hidden"].split("-"))))
        for epoch, test in enumerate(train(model, task, key["seed"], epochs), 1):
            row: Row = {"epoch": epoch, "test": f"{test:.3f}"}
            if epoch == epochs:
                last = model.blocks[0].module.last if isinstance(model, ffebm.HybridModel) else None
                row |= {"train": f"{accuracy(model, task.training):.3f}", "sweeps": 0 if last is None else last.sweeps}
            yield row

    experiment = Experiment(options.out, "deep resistive networks")
    experiment.run(keys, one)
    experiment.picture(("data", "hidden"), "method", {"test": "test accuracy, %"})
    print(experiment.table(("data", "hidden"), "method", "test"))


if __name__ == "__main__":
    main()
