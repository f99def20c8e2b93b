"""The experiments' scripts at their quickest: stopped and started again, diverging, with bad data; what they add."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import sys
from collections import namedtuple
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_experiment_data import batch, idx, truncate, write_cifar10, write_mnist
from torch import Tensor, nn

import ffebm_compiler as ffebm

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = {
    "loop_gain": ["--feedback", "backprop", "0.5"],
    "splitting": [],
    "depth": ["--tables", "training"],
    "fine_tuning": [],
    "seven_algorithms": [],
}
"""Script -> options beside --quick."""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The scripts run on one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@cache
def script(name: str) -> ModuleType:
    """By its file, since benchmarks have modules of the same names."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    module = script(name)
    given = ["--quick", "--out", str(out), *SCRIPTS.get(name, []), *options]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
    module.main()


def rows(out: Path, name: str) -> list[dict[str, str]]:
    (path,) = [path for path in out.rglob(f"{name}.csv") if path.parent.name != "gradients"]
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(file)]


class Stopped(Exception):
    """Ends a script in the middle of a run."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_stopped_script_goes_on_with_the_same_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script(name)
    run(name, tmp_path / "whole", monkeypatch)
    left = [1 if name in ("fine_tuning", "splitting") else 2]

    def stopping(*given: Any) -> Iterator[Any]:
        for row in whole(*given):
            yield row
            left[0] -= 1
            if not left[0]:
                raise Stopped

    whole = module.training_and_accuracy
    with monkeypatch.context() as patched:
        patched.setattr(module, "training_and_accuracy", stopping)
        with pytest.raises(Stopped):
            run(name, tmp_path / "parts", monkeypatch)
    run(name, tmp_path / "parts", monkeypatch)
    assert rows(tmp_path / "parts", "curves") == rows(tmp_path / "whole", "curves")
    assert rows(tmp_path / "parts", "runs") == rows(tmp_path / "whole", "runs")
    assert not list((tmp_path / "parts").rglob("*.pt"))


@pytest.mark.parametrize("name", ["depth", "fine_tuning", "seven_algorithms"])
def test_a_diverging_run_is_stopped_and_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script(name)
    if name != "fine_tuning":
        recipe = module.Recipe
        monkeypatch.setattr(module, "Recipe", lambda epochs, rate, *rest, **more: recipe(epochs, 1e30, *rest, **more))
    run(name, tmp_path, monkeypatch, *(["--rate", "1e30"] if name == "fine_tuning" else []))
    found = rows(tmp_path, "runs")
    assert found
    assert all(row["failed"].startswith("stopped in epoch 1: ") for row in found)
    assert any("block_" in row["failed"] for row in found)
    assert "1 stopped" in capsys.readouterr().out


QUICK = {
    "experiment": "--epochs 3 --seeds 2",
    "loop_gain": "--epochs 3 --seeds 2 --width 6",
    "splitting": "--epochs 3 --seeds 2 --width 6",
    "depth": "--epochs 3 --seeds 2 --width 6 --blocks 1 --rate 0.5 --feedback 0.2",
    "fine_tuning": "--epochs 3 --seeds 2 --network digit-recognizer --feedback 0.2",
    "seven_algorithms": "--epochs 3 --seeds 2 --width 6 --method N-EP",
    "gradient_analysis": "--width 6 --batch 5",
    "character_transformer": "--steps 7 --every 2 --batch 3 --context 8 --held 500",
    "deep_resistive": "--epochs 3 --seeds 2 --width 6 --depth 3 --data mnist1d",
    "circuit_in_the_loop": "--steps 7 --every 3",
    "which_layers": "--draws 2 --trials 3 --max-drop 0.25",
}
"""Script -> options that `--quick` has values for, each with another one."""


@pytest.mark.parametrize("name", QUICK)
def test_an_option_that_is_given_beside_quick_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And one that is not given has quick's value, not the usual one."""
    module = script(name)
    read, found = module.read_options, {}

    def reading(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
        found["options"], found["quick"] = read(parser, **quick), quick
        raise Stopped

    monkeypatch.setattr(module, "read_options", reading)
    given = QUICK[name].split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", *given])
    with pytest.raises(Stopped):
        module.main()
    values = dict(zip(given[::2], given[1::2], strict=True))
    for option, text in values.items():
        value = getattr(found["options"], option[2:].replace("-", "_"))
        assert str(value[0] if isinstance(value, list) else value) == text
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
    with pytest.raises(Stopped):
        module.main()
    assert {key: getattr(found["options"], key) for key in found["quick"]} == found["quick"]
    assert {f"--{key.replace('_', '-')}" for key in found["quick"]} == set(values)


def cifar10_out_of_range(folder: Path) -> None:
    write_cifar10(folder)
    (folder / "data_batch_1").write_bytes(batch(20, "labels", 11))


def mnist_without_labels(folder: Path) -> None:
    write_mnist(folder, zipped=False)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(0)))


BAD_DATA = {
    "missing": ("mnist", lambda folder: None, "has no file train-images-idx3-ubyte"),
    "truncated": ("cifar10", truncate("data_batch_3", write_cifar10), "data_batch_3 is no complete batch of images"),
    "labels": ("cifar10", cifar10_out_of_range, "cifar10 has training labels from 0 to 10; expected labels of 10"),
    "no labels": ("mnist", mnist_without_labels, "mnist has 12 training inputs and 0 labels"),
}


@pytest.mark.parametrize("name", [*(name for name in SCRIPTS if name != "fine_tuning"), "gradient_analysis"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_told_in_one_line(
    name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, spoil, message = BAD_DATA[case]
    spoil(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run(name, tmp_path / "out", monkeypatch, "--data", data, "--folder", str(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}.py: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_to_fine_tune_on_is_told_in_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, spoil, message = BAD_DATA[case]
    spoil(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run("fine_tuning", tmp_path / "out", monkeypatch, "--data", data, "--folder", str(tmp_path))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [*SCRIPTS, "gradient_analysis", "experiment"])
def test_the_same_data_of_another_folder_need_another_folder_of_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    monkeypatch.setattr(script(name).Experiment, "run", stop)
    for option in ("--folder", *["--pictures"] * (name == "fine_tuning")):
        with pytest.raises(Stopped):
            run(name, tmp_path / option, monkeypatch, option, "first")
        with pytest.raises(SystemExit, match="2"):
            run(name, tmp_path / option, monkeypatch, option, "second")
        assert "holds runs with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["depth", "fine_tuning"])
def test_data_that_are_no_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(name, tmp_path, monkeypatch, "--data", "mnist1d")
    assert "mnist1d has inputs of shape (1, 40); expected" in capsys.readouterr().err


def test_a_loss_that_is_no_scalar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("seven_algorithms")
    monkeypatch.setattr(module, "squared", lambda scores, labels: F.cross_entropy(scores, labels, reduction="none"))
    with pytest.raises(SystemExit, match="2"):
        run("seven_algorithms", tmp_path, monkeypatch)
    assert "the loss is no scalar tensor (got (32,))" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "0"], "argument --epochs: expected a whole number of at least 1, not '0'"),
        (["--rate", "-1"], "argument --rate: expected a number above 0, not '-1'"),
        (["--batch", "5000"], "digits has 256 training inputs, fewer than a batch of 5000"),
    ],
)
def test_numbers_out_of_range(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("depth", tmp_path, monkeypatch, *given)
    assert message in capsys.readouterr().err


def test_sizes_of_blocks_that_do_not_divide_the_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("splitting", tmp_path, monkeypatch, "--block", "6", "4")
    assert "block is [6, 4]; expected some of (6, 3, 2) for 6 layers" in capsys.readouterr().err


@pytest.mark.parametrize(("layers", "variance"), [(12, 5.9e-5 * 64), (15, 4.9e-5 * 32)])
def test_deeper_networks_of_the_papers(
    layers: int, variance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("splitting", tmp_path, monkeypatch, "--layers", str(layers), "--block", "2")
    (found,) = rows(tmp_path, "runs")
    assert found["failed"] == ""
    assert float(found["variance"]) == pytest.approx(variance)
    assert 0 < float(found["loop_gain"]) < 0.11


def test_a_feedback_that_is_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("seven_algorithms", tmp_path, monkeypatch, "--feedback", "tied")
    assert "feedback is 'tied'; expected a loop gain such as 0.1, or symmetric" in capsys.readouterr().err


def test_the_gradients_of_a_deep_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At γ held EP is the exact gradient; the part through γ is another; a small loop gain is near backprop."""
    module = script("depth")
    data = script("experiment_data").load("digits")
    key = {"activation": "tanh", "blocks": 2, "gradient": "held", "seed": 0}
    near, far = (module.cosines(data, {**key, "feedback": feedback}, 4, 32) for feedback in ("0.01", "0.5"))
    assert float(far["to implicit"]) > 0.9999
    assert float(far["to the one through γ"]) < 0.9999
    assert float(near["to backprop"]) > 0.999
    assert float(far["to backprop"]) < float(near["to backprop"])
    assert sum(name.endswith("weight to implicit") for name in far) == 5
    through = module.cosines(data, {**key, "feedback": "0.5", "gradient": "through"}, 4, 32)
    assert float(through["to the one through γ"]) > 0.9999


def test_step_by_step_ep_is_backprop_through_the_last_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every layer, after so many nudged sweeps; both curves are in the picture."""
    run("gradient_analysis", tmp_path, monkeypatch)
    assert (tmp_path / "curves.svg").read_text(encoding="utf-8").count("backprop through the last T sweeps") == 1
    found = {(row["method"], row["at"]): row for row in rows(tmp_path, "runs")}
    parts = [name for name in found["implicit", "0.0"] if name.endswith("weight, part")]
    assert len(parts) == 7
    for part in parts:
        assert float(found["implicit", "0.0"][part]) == pytest.approx(1, abs=1e-3)
        for count in ("1", "2"):
            row = found["EP, T nudged sweeps", count]
            assert float(row[part]) == pytest.approx(float(row[f"{part} by BPTT"]), abs=1e-4)
    missing = [part for part in parts if float(found["EP, T nudged sweeps", "1"][part]) < 0.99]
    assert missing, "one sweep has not the whole gradient"


# -- characters ------------------------------------------------------------------------------------


def run_transformer(out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    command = ["character_transformer.py", "--quick", "--method", "ep, κ 0.5", "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", command)
    script("character_transformer").main()


def test_a_stopped_transformer_goes_on_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("character_transformer")
    run_transformer(tmp_path / "whole", monkeypatch)
    whole = module.train

    def stopping(*given: Any) -> Iterator[Any]:
        steps = whole(*given)
        yield next(steps)
        assert next(steps)["epoch"] == 6, "the checkpoint of step 3 is written"
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(module, "train", stopping)
        with pytest.raises(Stopped):
            run_transformer(tmp_path / "parts", monkeypatch)
    assert list((tmp_path / "parts").glob("*.pt"))
    run_transformer(tmp_path / "parts", monkeypatch)
    assert rows(tmp_path / "parts", "curves") == rows(tmp_path / "whole", "curves")
    assert rows(tmp_path / "parts", "runs") == rows(tmp_path / "whole", "runs")


def test_a_transformer_that_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_transformer(tmp_path, monkeypatch, "--rate", "1e30")
    (found,) = rows(tmp_path, "runs")
    assert found["failed"].startswith("stopped in step 2: ")


def test_a_text_shorter_than_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("a short text, " * 80, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["x", "--context", "200", "--text", str(tmp_path / "short.txt")])
    with pytest.raises(SystemExit, match="2"):
        script("character_transformer").main()
    assert "the text has 1008 characters to train on and 112 held out" in capsys.readouterr().err


# -- pictures to fine-tune on ----------------------------------------------------------------------


def write_pictures(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for index in range(count):
        Image.fromarray(generator.integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")


class Tiny(nn.Module):
    """Has what is read of EfficientNet-Lite0, and is sure of its answers."""

    def __init__(self) -> None:
        super().__init__()
        self._global_params = namedtuple("Params", "drop_connect_rate")(0.2)
        self._dropout = nn.Dropout(0.2)
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=4), nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(4, 1000)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.relu(self.first(x))).mean((2, 3))
        scores: Tensor = self.last(100 * self._dropout(h))
        return scores


def test_a_network_learns_the_source_from_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("fine_tuning")
    write_pictures(tmp_path, 6)

    def tiny() -> nn.Module:
        torch.manual_seed(0)
        return Tiny().eval()

    monkeypatch.setattr(module, "efficientnet_lite0", tiny)
    options = ["--network", "efficientnet-lite0", "--feedback", "backprop", "0.9", "--pictures", str(tmp_path)]
    size = ["--side", "32", "--views", "24", "--held", "16", "--epochs", "2", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["fine_tuning.py", *options, *size, "--out", str(tmp_path / "out")])
    module.main()
    first, second = rows(tmp_path / "out", "runs")
    for seed, found in enumerate((first, second)):
        assert found["feedback"] == "0.9", "the source has nothing to learn from itself"
        assert int(found["seed"]) == seed
        assert float(found["source"]) == 100
        assert float(found["away"]) > 0
    assert first["loss"] != second["loss"], "each seed has its own views to train on"
    assert first["away"] == second["away"], "and all have the same ones held out"
    assert [row["epoch"] for row in rows(tmp_path / "out", "curves")] == ["0", "1", "2"] * 2


def test_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    module = script("fine_tuning")
    write_pictures(tmp_path, 2)
    with pytest.raises(ffebm.InputError, match=r"has 2 pictures \(.png, .jpg\); expected at least 3"):
        module.pictures(tmp_path)
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    with pytest.raises(ffebm.InputError, match=r"2\.png is no complete picture"):
        module.pictures(tmp_path)
