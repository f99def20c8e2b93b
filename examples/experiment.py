"""What the experiments share: runs that go on where they were stopped, training that stops where it fails, tables.

    .venv/bin/python examples/experiment.py [--quick] [--out results/experiment]

trains one small network by backprop and by equilibrium propagation, as an example of an experiment. An experiment is a
list of runs. Each has a key, such as {"feedback": "0.1", "seed": 0}, and becomes rows of two files in the output
folder: `runs.csv` has a line for each finished run, `curves.csv` one for each epoch. A run writes a checkpoint after
each epoch. If the script is stopped and started again, finished runs are not repeated, and the one that was stopped
goes on from its last epoch with the same numbers as without the stop.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from experiment_data import Data, load
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.files.whole_files import write_whole

__all__ = [
    "Diverged",
    "Experiment",
    "Recipe",
    "Row",
    "accuracy",
    "add_options",
    "chosen",
    "feedback_of",
    "told",
    "training",
    "training_and_accuracy",
]

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor], Tensor]


class Diverged(ffebm.FFEBMError):
    """A run whose loss or states are not finite any more."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam with a cosine schedule, an incomplete last batch left out."""

    epochs: int
    rate: float
    batch: int = 32
    loss: Loss = F.cross_entropy
    weight_decay: float = 0.0
    autocast: torch.dtype | None = None
    """The dtype of products; None for that of the weights."""


@dataclass
class Experiment:
    """Runs with their files.

    Attributes:
        folder: where the files are.
        name: of the experiment, for the progress bar.
        settings: what all runs share. Files of other settings are refused, since their numbers cannot be compared.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the folder, and compare the settings with those of its files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / "settings.json", json.dumps(dict(self.settings), indent=1, default=str) + "\n"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ffebm.InputError(
                f"{self.folder} holds runs with other settings ({path}): give another folder with --out, or delete it"
            )
        write_whole(path, text)

    def run(self, keys: Sequence[Row], one: Callable[[Row, Path], Iterator[Row]]) -> None:
        """Do the runs that are not done.

        Args:
            keys: one for each run, with the same names in each.
            one: yields a row for each epoch of a run. It gets the run's key and the file of its checkpoint, which is
                deleted when it ends. A `Diverged` ends the run and is written into its line.
        """
        done = {_text(row, keys[0]) for row in self.rows("runs")} if keys else set()
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(self.name, total=len(keys))
            for key in keys:
                if _text(key, key) not in done:
                    progress.update(bar, description=f"{self.name}: {', '.join(map(str, key.values()))}")
                    self._one(key, one)
                progress.advance(bar)

    def _one(self, key: Row, one: Callable[[Row, Path], Iterator[Row]]) -> None:
        checkpoint = self.folder / f"{hashlib.sha256(repr(_text(key, key)).encode()).hexdigest()[:16]}.pt"
        last: Row = {}
        failed = ""
        try:
            for last in one(key, checkpoint):
                self._append("curves", {**key, **last}, (*key, "epoch"))
        except Diverged as error:
            failed = str(error)
        if not last and not failed:  # it was stopped after its last epoch
            own = [row for row in self.rows("curves") if _text(row, key) == _text(key, key)]
            last = {column: cell for column, cell in own[-1].items() if cell and column not in key} if own else {}
        self._append("runs", {**key, **last, "failed": failed}, tuple(key))
        checkpoint.unlink(missing_ok=True)

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of `runs` or `curves`; none if there are none yet."""
        path = self.folder / f"{name}.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _append(self, name: str, row: Row, key: Sequence[str]) -> None:
        """Write a file again with this row in place of an older one of the same key, whole or not at all."""
        fresh = {column: str(value) for column, value in row.items()}
        same = [fresh[column] for column in key]
        rows = [old for old in self.rows(name) if [old.get(column) for column in key] != same]
        columns = list(dict.fromkeys(column for each in (*rows, fresh) for column in each))
        lines = [columns, *([each.get(column, "") for column in columns] for each in (*rows, fresh))]
        write_whole(self.folder / f"{name}.csv", "".join(",".join(map(_quoted, line)) + "\n" for line in lines))

    def table(self, rows: str | Sequence[str], columns: str, value: str, form: str = ".2f") -> str:
        """Means over the seeds and their range, by one of the keys or several of them, and by another one."""
        runs, names = self.rows("runs"), _names(rows)
        across = list(dict.fromkeys(run[columns] for run in runs))
        lines = [f"{' '.join(names) + chr(92) + columns:24} " + " ".join(f"{name:>24}" for name in across)]
        for down in dict.fromkeys(_text(run, names) for run in runs):
            cells = []
            for name in across:
                found = [run for run in runs if (_text(run, names), run[columns]) == (down, name)]
                values = [float(run[value]) for run in found if run.get(value) not in (None, "", "nan")]
                cell = ""
                if values:
                    cell = f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"
                stopped = sum(bool(run["failed"]) for run in found)
                cells.append(f"{cell}{f' {stopped} stopped' if stopped else ''}")
            lines.append(f"{' '.join(down):24} " + " ".join(f"{cell:>24}" for cell in cells))
        return "\n".join(lines)

    def picture(
        self, panels: str | Sequence[str], lines: str, values: Mapping[str, str], name: str = "curves.svg"
    ) -> Path:
        """Curves by epoch, means over the seeds: a column of panels for each value of `panels`, a row for each value.

        Args:
            panels: a key, or several.
            lines: a key; one line for each of its values.
            values: column of `curves` -> label of its axis.
        """
        import matplotlib as mpl

        mpl.use("svg")
        mpl.rcParams["svg.hashsalt"] = self.name  # the same picture every time
        import matplotlib.pyplot as plt

        curves, names = self.rows("curves"), _names(panels)
        wide = list(dict.fromkeys(_text(row, names) for row in curves))
        size = (4 * max(1, len(wide)), 2.8 * len(values))
        figure, axes = plt.subplots(len(values), max(1, len(wide)), figsize=size, squeeze=False)
        for column, panel in enumerate(wide):
            for row, (value, label) in enumerate(values.items()):
                axis = axes[row][column]
                for line in dict.fromkeys(each[lines] for each in curves):
                    points: dict[int, list[float]] = {}
                    for each in curves:
                        if (_text(each, names), each[lines]) == (panel, line) and each.get(value) not in (None, ""):
                            points.setdefault(int(each["epoch"]), []).append(float(each[value]))
                    if points:
                        axis.plot(list(points), [statistics.mean(found) for found in points.values()], label=line)
                title = ", ".join(map(" ".join, zip(names, panel, strict=True)))
                axis.set(title=title if row == 0 else "", xlabel="epoch", ylabel=label)
                axis.grid(alpha=0.3)
        if curves:
            axes[0][0].legend()
        figure.tight_layout()
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})  # into memory
        plt.close(figure)
        write_whole(self.folder / name, drawn.getvalue())
        return self.folder / name


def _names(keys: str | Sequence[str]) -> Sequence[str]:
    return [keys] if isinstance(keys, str) else keys


def _text(row: Mapping[str, Any], key: Iterable[str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in key)


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if any(c in cell for c in ',"\n') else cell


def accuracy(model: nn.Module, data: Data, part: tuple[Tensor, Tensor], batch: int = 500) -> float:
    """Percent of a part of the data that the model classifies rightly, in evaluation mode."""
    was = model.training
    model.eval()
    with torch.no_grad():
        found = [
            model(data.scaled(x)).argmax(-1) == y
            for x, y in zip(part[0].split(batch), part[1].split(batch), strict=True)
        ]
    model.train(was)
    return 100 * float(torch.cat(found).double().mean())


def training(model: nn.Module, data: Data, recipe: Recipe, seed: int, checkpoint: Path) -> Iterator[Row]:
    """Train a classifier. Yields the epoch, its mean loss, CPU seconds, and what its blocks did in it.

    Raises:
        InputError: the loss is no scalar.
        Diverged: the loss is not finite, a block does not settle, or its weights are too large; names the block.
    """
    optimizer = torch.optim.Adam(model.parameters(), recipe.rate, weight_decay=recipe.weight_decay)
    x, y = data.training
    count = len(x) // recipe.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.epochs * count))
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, Any] = {"optimizer": optimizer, "schedule": schedule}
    first = _resume(checkpoint, model, kept, generator)
    for epoch in range(first, recipe.epochs + 1):
        model.train()
        losses, sweeps, started = [], [], time.process_time()
        for rows in torch.randperm(len(x), generator=generator)[: count * recipe.batch].split(recipe.batch):
            optimizer.zero_grad()
            losses.append(_step(model, data.scaled(x[rows]), y[rows], recipe, epoch))
            optimizer.step()
            schedule.step()
            sweeps += [one.sweeps for one in _settled(model)]
        row = {"epoch": epoch, "loss": statistics.mean(losses), "seconds": time.process_time() - started}
        if isinstance(model, ffebm.HybridModel):
            gains = [block.loop_gain for block in model.blocks if block.certificate is not None]
            row |= {"sweeps": statistics.mean(sweeps) if sweeps else 0, "loop_gain": max(gains, default=0.0)}
        yield row
        _save(checkpoint, epoch, model, kept, generator)  # now that its row is in the file


def training_and_accuracy(
    model: nn.Module, data: Data, recipe: Recipe, seed: int, checkpoint: Path, batch: int = 500
) -> Iterator[Row]:
    """`training`, with the test accuracy after each epoch, in batches of `batch`."""
    for row in training(model, data, recipe, seed, checkpoint):
        yield {**row, "test": accuracy(model, data, data.test, batch)}


def _step(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, epoch: int) -> float:
    products = torch.autocast("cpu", recipe.autocast, enabled=recipe.autocast is not None)
    with _named_divergence(model, epoch), products:
        scores = model(x)
    loss = recipe.loss(scores, y)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ffebm.InputError(f"the loss is no scalar tensor (got {shape}): reduce it by mean() or sum()")
    found = float(loss.detach())
    if not math.isfinite(found):
        raise Diverged(f"stopped in epoch {epoch}: the loss is {found}")
    with _named_divergence(model, epoch):
        loss.backward()  # type: ignore[no-untyped-call]
    return found


@contextmanager
def _named_divergence(model: nn.Module, epoch: int) -> Iterator[None]:
    """Make `Diverged` of a block that does not settle, and of one that refuses weights that have become too large."""
    try:
        yield
    except ffebm.FFEBMError as error:
        size = sum(float(p.detach().square().sum()) for p in model.parameters())
        if not isinstance(error, ffebm.ConvergenceError) and math.isfinite(size):
            raise
        raise Diverged(f"stopped in epoch {epoch}: {str(error).split(';')[0]}") from error


def _settled(model: nn.Module) -> list[Any]:
    blocks = model.energy_blocks.values() if isinstance(model, ffebm.HybridModel) else ()
    return [block.last for block in blocks if block.program.coupled and block.last is not None]


def _save(path: Path, epoch: int, model: nn.Module, kept: Mapping[str, Any], generator: torch.Generator) -> None:
    state = {name: one.state_dict() for name, one in kept.items()}
    part = path.with_suffix(".part")
    torch.save(
        {
            **state,
            "epoch": epoch,
            "model": model.state_dict(),
            "order": generator.get_state(),
            "draws": torch.get_rng_state(),
        },
        part,
    )
    part.replace(path)


def _resume(path: Path, model: nn.Module, kept: Mapping[str, Any], generator: torch.Generator) -> int:
    """The epoch to go on with."""
    if not path.exists():
        return 1
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for name, one in kept.items():
        one.load_state_dict(state[name])
    generator.set_state(state["order"])
    torch.set_rng_state(state["draws"])
    return int(state["epoch"]) + 1


def add_options(parser: argparse.ArgumentParser, out: str, epochs: int, seeds: int = 3) -> None:
    """Options that the experiments share."""
    parser.add_argument("--data", default="digits", help="name of a data set of experiment_data.py")
    parser.add_argument("--folder", type=Path, help="folder with the files of the data set")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, a small network")
    parser.add_argument("--out", type=Path, default=Path(out))


def chosen(options: argparse.Namespace, *names: str) -> Row:
    """Some of the options, as an experiment's settings."""
    return {name: getattr(options, name) for name in names}


def feedback_of(text: str) -> float | str:
    """`convert`'s feedback from a word of the command line: a loop gain, or symmetric.

    Raises:
        InputError: it is neither.
    """
    if text == "symmetric":
        return text
    try:
        return float(text)
    except ValueError:
        raise ffebm.InputError(f"feedback is {text!r}; expected a loop gain such as 0.1, or symmetric") from None


@contextmanager
def told(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Tell errors of the user in one line, with exit status 2."""
    try:
        yield
    except ffebm.FFEBMError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/experiment", epochs=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.epochs, options.seeds = 2, 1
    with told(parser):
        data = load(options.data, options.folder)
        experiment = Experiment(options.out, "an example", {"data": data.name, "epochs": options.epochs})

        def one(key: Row, checkpoint: Path) -> Iterator[Row]:
            torch.manual_seed(key["seed"])
            size = data.training[0][0].numel()
            layers = nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, data.classes)
            model: nn.Module = nn.Sequential(*layers)
            if key["gradient"] != "backprop":
                model = ffebm.convert(model, data.scaled(data.training[0][:2]), gradient="ep")
            recipe = Recipe(options.epochs, 2e-3)
            yield from training_and_accuracy(model, data, recipe, key["seed"], checkpoint)

        keys = [{"gradient": g, "seed": seed} for g in ("backprop", "ep") for seed in range(options.seeds)]
        experiment.run(keys, one)
        print(experiment.table("gradient", "failed", "test"))


if __name__ == "__main__":
    main()
