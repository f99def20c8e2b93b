"""What the experiments share: runs that go on where they were stopped, in as many processes as there are; tables.

    .venv/bin/python examples/experiment.py [--quick] [--out results/experiment]

trains one small network by backprop and by equilibrium propagation, as an example of an experiment. An experiment is a
list of runs. Each has a key, such as {"feedback": "0.1", "seed": 0}, and becomes rows of two files in the output
folder: `runs.csv` has a line for each finished run, `curves.csv` one for each epoch. A run writes a checkpoint after
each epoch. If the script is stopped and started again, finished runs are not repeated, and the one that was stopped
goes on from its last epoch with the same numbers as without the stop. If the same command is started several times at
once, the processes share the runs, each on one thread:

    for core in $(seq 16); do .venv/bin/python examples/depth.py & done; wait

`--device cuda` trains on a GPU. How one run is trained is in `experiment_training.py`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from command_line import add_options, chosen, device_of, read_options, told
from experiment_data import load
from experiment_training import Diverged, Recipe, Row, training_and_accuracy
from filelock import FileLock, Timeout  # comes with torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.files.whole_files import write_whole

__all__ = ["Experiment", "once"]


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
        """Do the runs that are not done, and that no other process is doing.

        Args:
            keys: one for each run, with the same names in each. They are columns of the files that are there.
            one: yields a row for each epoch of a run. It gets the run's key and the file of its checkpoint, which is
                deleted when it ends. A `Diverged` ends the run and is written into its line.
        """
        self._check_columns(keys)
        console = Console(stderr=True)
        elsewhere = 0
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(self.name, total=len(keys))
            for key in keys:
                if not self._is_done(key):
                    progress.update(bar, description=f"{self.name}: {', '.join(map(str, key.values()))}")
                    elsewhere += not self._one(key, one)
                progress.advance(bar)
        if elsewhere:
            console.print(f"{self.name}: other processes are at {elsewhere} of the {len(keys)} runs")

    def _check_columns(self, keys: Sequence[Row]) -> None:
        for name in ("runs", "curves"):
            for row in self.rows(name)[:1]:
                missing = [column for key in keys[:1] for column in key if column not in row]
                if missing:
                    raise ffebm.InputError(
                        f"{self.folder / name}.csv has no column {missing[0]!r}, so it is of another version of this "
                        "script: give another folder with --out, or delete it"
                    )

    def _is_done(self, key: Row) -> bool:
        return any(_text(row, key) == _text(key, key) for row in self.rows("runs"))

    def _one(self, key: Row, one: Callable[[Row, Path], Iterator[Row]]) -> bool:
        """Do a run; False if another process is at it. Its lock ends with the process that holds it."""
        checkpoint = self.folder / f"{hashlib.sha256(repr(_text(key, key)).encode()).hexdigest()[:16]}.pt"
        try:
            with FileLock(checkpoint.with_suffix(".lock"), timeout=0):
                if not self._is_done(key):
                    self._locked(key, one, checkpoint)
                checkpoint.with_suffix(".lock").unlink(missing_ok=True)
        except Timeout:
            return False
        return True

    def _locked(self, key: Row, one: Callable[[Row, Path], Iterator[Row]], checkpoint: Path) -> None:
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
        with FileLock(self.folder / ".rows.lock"):
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
        curves, names = self.rows("curves"), _names(panels)
        wide = list(dict.fromkeys(_text(row, names) for row in curves))
        figure, axes = self.panels(len(values), max(1, len(wide)))
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
        return self.drawn(figure, name)

    def panels(self, rows: int, columns: int) -> tuple[Any, Any]:
        """A figure with so many panels, and its axes, for `drawn`."""
        import matplotlib as mpl

        mpl.use("svg")
        mpl.rcParams["svg.hashsalt"] = self.name  # the same picture every time
        import matplotlib.pyplot as plt

        return plt.subplots(rows, columns, figsize=(4 * columns, 2.8 * rows), squeeze=False)

    def drawn(self, figure: Any, name: str = "curves.svg") -> Path:
        """Write a figure into the folder, whole or not at all."""
        import matplotlib.pyplot as plt

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


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """A file that is made once, by the first process that wants it; the others wait."""
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            make(path)
    return path


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/experiment", epochs=5)
    options = read_options(parser, epochs=2, seeds=1)
    torch.set_num_threads(1)
    with told(parser):
        data = load(options.data, options.folder).to(device_of(options))
        experiment = Experiment(options.out, "an example", chosen(options, "data", "folder", "device", "epochs"))

        def one(key: Row, checkpoint: Path) -> Iterator[Row]:
            torch.manual_seed(key["seed"])
            size = data.training[0][0].numel()
            layers = nn.Flatten(), nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, data.classes)
            model: nn.Module = nn.Sequential(*layers).to(data.device)
            if key["gradient"] != "backprop":
                model = ffebm.convert(model, data.scaled(data.training[0][:2]), gradient="ep")
            recipe = Recipe(options.epochs, 2e-3)
            yield from training_and_accuracy(model, data, recipe, key["seed"], checkpoint)

        keys = [{"gradient": g, "seed": seed} for g in ("backprop", "ep") for seed in range(options.seeds)]
        experiment.run(keys, one)
        print(experiment.table("gradient", "failed", "test"))


if __name__ == "__main__":
    main()
