"""The experiments of `examples/`: stopped and started again, failing runs, and what they refuse."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from experiment import Experiment, once  # noqa: E402
from experiment_data import Data, load  # noqa: E402
from experiment_training import (  # noqa: E402
    Diverged,
    Recipe,
    Row,
    accuracy,
    training,
    training_and_accuracy,
)


def source(data: Data, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    width = data.training[0][0].numel()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(width, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
    )


def hybrid(data: Data, seed: int = 0, **settings: Any) -> ffebm.HybridModel:
    return ffebm.convert(source(data, seed), data.training[0][:2], **settings)


def curve(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: cell for name, cell in row.items() if name != "seconds"} for row in rows]


class Stopped(Exception):
    """Ends a script in the middle of a run."""


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_stopped_run_goes_on_with_the_same_numbers(stop_after: int, tmp_path: Path) -> None:
    data = load("digits")
    recipe = Recipe(epochs=4, rate=5e-3)
    keys = [{"seed": seed} for seed in (0, 1)]

    def one(stop: tuple[int, int] | None) -> Any:
        def run(key: Row, checkpoint: Path) -> Iterator[Row]:
            model = hybrid(data, key["seed"], feedback=0.5)
            for row in training(model, data, recipe, key["seed"], checkpoint):
                yield {**row, "test": accuracy(model, data, data.test)}
                if stop == (key["seed"], row["epoch"]):
                    raise Stopped

        return run

    whole = Experiment(tmp_path / "whole", "test")
    whole.run(keys, one(None))
    parts = Experiment(tmp_path / "parts", "test")
    with pytest.raises(Stopped):
        parts.run(keys, one((1, stop_after)))
    Experiment(tmp_path / "parts", "test").run(keys, one(None))
    assert curve(tmp_path / "parts" / "curves.csv") == curve(tmp_path / "whole" / "curves.csv")
    assert curve(tmp_path / "parts" / "runs.csv") == curve(tmp_path / "whole" / "runs.csv")
    assert not list((tmp_path / "parts").glob("*.pt"))
    assert float(curve(tmp_path / "whole" / "runs.csv")[0]["test"]) > 70


def test_a_run_that_is_stopped_after_its_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its epochs are in its checkpoint and in curves.csv, and its line in runs.csv is not yet written."""
    data = load("digits").first(320, 50)

    def one(key: Row, checkpoint: Path) -> Iterator[Row]:
        torch.manual_seed(0)
        yield from training_and_accuracy(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, Recipe(2, 1e-2), 0, checkpoint
        )

    def write(self: Experiment, name: str, row: Row, key: Any) -> None:
        if name == "runs":
            raise Stopped
        append(self, name, row, key)

    append = Experiment._append
    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "_append", write)
        with pytest.raises(Stopped):
            Experiment(tmp_path, "test").run([{"seed": 0}], one)
    assert list(tmp_path.glob("*.pt"))
    Experiment(tmp_path, "test").run([{"seed": 0}], one)
    (found,), curves = curve(tmp_path / "runs.csv"), curve(tmp_path / "curves.csv")
    assert found["epoch"] == "2"
    assert found["test"] == curves[-1]["test"]


def test_weights_that_have_become_too_large_stop_the_run(tmp_path: Path) -> None:
    data = load("digits").first(64, 50)
    model = hybrid(data, feedback=0.5)
    with torch.no_grad():
        model.get_parameter("4.weight").fill_(torch.inf)
    with pytest.raises(Diverged, match=r"stopped in epoch 1: weight 2 of block_1, .*holds NaN or infinite values"):
        list(training(model, data, Recipe(1, 1e-3), 0, tmp_path / "run.pt"))


def test_a_loss_that_is_not_finite_names_the_block(tmp_path: Path) -> None:
    data = load("digits").first(64, 50)
    model = hybrid(data, feedback=0.5)

    def broken(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels) + torch.nan

    with pytest.raises(Diverged, match=r"stopped in epoch 1: the loss is nan$"):
        list(training(model, data, Recipe(1, 1e-3, loss=broken), 0, tmp_path / "run.pt"))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        linear[1].bias.fill_(torch.nan)
    with pytest.raises(Diverged, match=r"the loss is nan, and 1\.bias is not finite"):
        list(training(linear, data, Recipe(1, 1e-3), 0, tmp_path / "run.pt"))


@pytest.mark.parametrize("kind", ["source", "hybrid"])
def test_a_layer_that_has_died_out_stops_the_run(kind: str, tmp_path: Path) -> None:
    """Its units are silent for every input, so that the layers before it and its own weights get no gradient."""
    data = load("digits").first(64, 50)
    model = hybrid(data, feedback=0.5) if kind == "hybrid" else source(data)
    with torch.no_grad():
        model.get_parameter("4.bias").fill_(-100)
    experiment = Experiment(tmp_path, "test")
    experiment.run([{"seed": 0}], lambda _, path: training_and_accuracy(model, data, Recipe(3, 1e-3), 0, path))
    (found,) = experiment.rows("runs")
    of = " of block_1" if kind == "hybrid" else ""
    assert found["failed"].startswith(f"stopped in epoch 1: the gradient of 1.weight, 4.weight, 6.weight{of} was zero")
    assert found["test"], "what it had reached is kept"


def test_a_layer_that_is_silent_for_some_steps_trains_on(tmp_path: Path) -> None:
    data = load("digits").first(64, 50)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    steps = 0

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return F.cross_entropy(scores, labels) * (steps % 2)

    assert len(list(training(model, data, Recipe(2, 1e-3, loss=loss), 0, tmp_path / "run.pt"))) == 2


@pytest.mark.slow
def test_a_killed_script_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(EXAMPLES / "experiment.py"), "--seeds", "1", "--epochs", "6", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    started = subprocess.Popen([*command, str(tmp_path / "parts")], stdout=subprocess.DEVNULL)
    curves = tmp_path / "parts" / "curves.csv"
    for _ in range(1200):
        if curves.exists() and len(curve(curves)) >= 8:  # in the second run
            break
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL, "it had ended by itself"
    subprocess.run([*command, str(tmp_path / "parts")], check=True, capture_output=True)
    assert curve(curves) == curve(tmp_path / "whole" / "curves.csv")


def test_a_diverging_run_is_stopped_and_named(tmp_path: Path) -> None:
    data = load("digits")

    def one(key: Row, checkpoint: Path) -> Iterator[Row]:
        model = hybrid(data, feedback="symmetric" if key["weights"] == "huge" else 0.1)
        if key["weights"] == "huge":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(40)
        yield from training(model, data, Recipe(epochs=1, rate=1e-3), 0, checkpoint)

    experiment = Experiment(tmp_path, "test")
    experiment.run([{"weights": "huge"}, {"weights": "usual"}], one)
    first, second = experiment.rows("runs")
    assert first["failed"].startswith("stopped in epoch 1: free phase of block_1")
    assert second["failed"] == ""
    assert "1 stopped" in experiment.table("weights", "weights", "loss")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    data = load("digits")
    recipe = Recipe(epochs=1, rate=1e-3, loss=lambda scores, labels: F.cross_entropy(scores, labels) * torch.inf)
    with pytest.raises(Diverged, match="stopped in epoch 1: the loss is inf"):
        list(training(hybrid(data), data, recipe, 0, tmp_path / "run.pt"))


def test_a_loss_must_be_a_scalar(tmp_path: Path) -> None:
    data = load("digits")

    def unreduced(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, reduction="none")

    with pytest.raises(ffebm.InputError, match=r"the loss is no scalar tensor \(got \(32,\)\): reduce it by mean\(\)"):
        list(training(hybrid(data), data, Recipe(1, 1e-3, loss=unreduced), 0, tmp_path / "run.pt"))


def test_other_settings_need_another_folder(tmp_path: Path) -> None:
    Experiment(tmp_path, "test", {"width": 8})
    Experiment(tmp_path, "test", {"width": 8})
    with pytest.raises(ffebm.InputError, match=r"holds runs with other settings .*: give another folder with --out"):
        Experiment(tmp_path, "test", {"width": 16})


@pytest.mark.parametrize("name", ["runs", "curves"])
def test_files_of_another_version_need_another_folder(name: str, tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, "test")
    (tmp_path / f"{name}.csv").write_text("method,seed,epoch\nep,0,1\n", encoding="utf-8")
    with pytest.raises(ffebm.InputError, match=rf"{name}.csv has no column 'rate', so it is of another version"):
        experiment.run([{"method": "ep", "rate": 1e-3, "seed": 0}], lambda *_: iter([{"epoch": 1}]))


def test_a_script_tells_its_users_errors_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(EXAMPLES / "loop_gain.py"), "--data", "mnist1d", "--quick", "--out"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == ("loop_gain.py: mnist1d has inputs of shape (1, 40); expected square images, side 4n\n")


def test_a_table_of_means_and_ranges(tmp_path: Path) -> None:
    experiment = Experiment(tmp_path, "test")
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 5.0}

    def one(key: Row, _: Path) -> Iterator[Row]:
        yield {"epoch": 1, "test": values[key["method"], key["seed"]]}

    experiment.run([{"data": "x", "method": m, "seed": s} for m, s in values], one)
    assert "2.00 (1.00 to 3.00)" in experiment.table("method", "data", "test")
    assert len(experiment.rows("curves")) == 3


def test_processes_share_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second experiment of the same folder, while the first one is in its first run, does the second run."""
    keys = [{"seed": 0}, {"seed": 1}]
    done: list[tuple[str, int]] = []

    def one(name: str) -> Any:
        def run(key: Row, _: Path) -> Iterator[Row]:
            done.append((name, key["seed"]))
            if name == "first":
                Experiment(tmp_path, "test").run(keys, one("second"))
            yield {"epoch": 1, "test": key["seed"]}

        return run

    Experiment(tmp_path, "test").run(keys, one("first"))
    assert done == [("first", 0), ("second", 1)]
    assert sorted(row["seed"] for row in curve(tmp_path / "runs.csv")) == ["0", "1"]
    assert capsys.readouterr().err == "test: other processes are at 1 of the 2 runs\n"
    assert [path.name for path in tmp_path.glob("*.lock")] in ([], [".rows.lock"])


@pytest.mark.slow
def test_scripts_at_once_give_what_one_gives(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(EXAMPLES / "experiment.py"), "--seeds", "2", "--epochs", "3", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    several = [subprocess.Popen([*command, str(tmp_path / "parts")], stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait() for process in several] == [0, 0, 0]
    for name in ("runs.csv", "curves.csv"):
        found, expected = (sorted(map(str, curve(tmp_path / part / name))) for part in ("parts", "whole"))
        assert found == expected


def test_a_file_that_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("weights", encoding="utf-8")

    assert [once(tmp_path / "source.bin", make).read_text(encoding="utf-8") for _ in range(2)] == ["weights"] * 2
    assert made == [tmp_path / "source.bin"]


def test_a_device_that_is_not_here(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(EXAMPLES / "experiment.py"), "--quick", "--device", "gpu", "--out"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("experiment.py: device is 'gpu', which cannot be used (")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu(tmp_path: Path) -> None:
    """The same samples in the same order give about the same losses as on a CPU."""
    losses = []
    for device in ("cpu", "cuda"):
        data = load("digits").first(320, 50).to(torch.device(device))
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
        )
        network = ffebm.convert(model.to(device), data.training[0][:2], feedback=0.5)
        found = list(training_and_accuracy(network, data, Recipe(3, 5e-3), 0, tmp_path / f"{device}.pt"))
        losses.append([row["loss"] for row in found])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
