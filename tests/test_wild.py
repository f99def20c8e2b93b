"""The sweep of `benchmarks/wild.py` tells right from refused, raw and wrong, and survives what a case does to it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import wild
import wild_compare
import wild_models

FOLDER = Path(__file__).parent.parent / "benchmarks"
Build = Callable[[], wild_models.Case]


class Net(nn.Module):
    """Two layers, batch norm and dropout between them; the last layer starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.dropout(torch.relu(self.norm(self.first(x))), 0.3, self.training))


def case(kind: type[nn.Module] = Net) -> Build:
    return lambda: (kind(), (torch.randn(5, 6),), {})


def hooked(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """The row of `Net` where `change` has been done to its hybrid."""
    convert = wild_compare.ffebm.convert

    def changed(*args: Any, **kwargs: Any) -> nn.Module:
        hybrid = convert(*args, **kwargs)
        change(hybrid)
        return hybrid

    monkeypatch.setattr(wild_compare.ffebm, "convert", changed)
    return wild_compare.compare(case())


def test_a_hybrid_that_is_its_source_is_right() -> None:
    row = wild_compare.compare(case())
    assert (row["verdict"], row["text"]) == ("right", "")
    assert [call["mode"] for call in row["calls"]] == ["eval", "train", "train", "eval"]
    assert all(call["values"] < 1e-5 and call["gradients"] < 1e-4 for call in row["calls"])


def test_values_that_deviate_in_train_mode_only_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(hybrid: nn.Module) -> None:
        hybrid.register_forward_hook(lambda module, _, output: output * 1.001 if module.training else output)

    row = hooked(monkeypatch, change)
    assert row["verdict"] == "wrong"
    assert "call 1 (train): output deviates by 1.0e-03" in row["text"]
    assert "call 0" not in row["text"]
    assert "call 3" not in row["text"]


def test_gradients_that_deviate_are_wrong_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(hybrid: nn.Module) -> None:
        dict(hybrid.named_parameters())["first.weight"].register_hook(lambda grad: grad * 1.01)

    row = hooked(monkeypatch, change)
    assert row["verdict"] == "wrong"
    assert "call 0 (eval): gradient of first.weight deviates by 1.0e-02" in row["text"]
    assert "output" not in row["text"]


def test_another_number_of_draws_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    row = hooked(monkeypatch, lambda hybrid: hybrid.register_forward_hook(lambda *_: torch.rand(1) and None))
    assert row["verdict"] == "wrong"
    assert row["text"].startswith("call 0 (eval): another number of random draws")
    assert "deviates" not in row["text"]


def test_state_that_deviates_after_training_forwards_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(hybrid: nn.Module) -> None:
        counter = dict(hybrid.named_buffers())["norm.num_batches_tracked"]
        hybrid.register_forward_hook(lambda *_: counter.add_(1) and None)

    row = hooked(monkeypatch, change)
    assert (row["verdict"], row["text"]) == ("wrong", "state: norm.num_batches_tracked deviates by inf")


def test_a_users_model_that_conversion_changed_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = wild_compare.ffebm.convert

    def changed(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        hybrid = convert(model, *args, **kwargs)
        with torch.no_grad():
            model.first.weight.mul_(2)
        return hybrid

    monkeypatch.setattr(wild_compare.ffebm, "convert", changed)
    row = wild_compare.compare(case())
    assert row["verdict"] == "wrong"
    assert row["text"].startswith("the user's model afterwards: output deviates")


class Branching(Net):
    """Takes a branch that a value decides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_refusal_is_told_with_its_text() -> None:
    row = wild_compare.compare(case(Branching))
    assert (row["verdict"], row["stage"]) == ("refused", "convert")
    assert row["text"].startswith("CaptureError: ")


def test_any_other_exception_is_raw_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> nn.Module:
        raise KeyError("nowhere")

    monkeypatch.setattr(wild_compare.ffebm, "convert", failing)
    row = wild_compare.compare(case())
    assert (row["verdict"], row["stage"], row["text"]) == ("raw", "convert", "KeyError: 'nowhere'")
    assert "raise KeyError" in row["where"][-1]


class Moody(Net):
    """Another function at each call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Moody.calls += 1
        return super().forward(x) * Moody.calls


class Broken(Net):
    """Does not run."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


def test_a_source_that_fails_or_is_no_function_says_nothing() -> None:
    row = wild_compare.compare(case(Broken))
    assert (row["verdict"], row["text"]) == ("unusable", "RuntimeError: no")
    row = wild_compare.compare(case(Moody))
    assert row["verdict"] == "unusable"
    assert row["text"].startswith("the source differs from itself in eval mode: output deviates")


SCRIPT = """
import os, sys, time
sys.path.insert(0, {folder!r})
import wild, wild_models
cases = {{"t:crash": lambda: os._exit(3), "t:hang": lambda: time.sleep(60), "t:broken": lambda: 1 / 0}}
wild_models.CASES.clear()
wild_models.CASES.update(cases)
wild_models.load = lambda name: None
out = sys.argv[1]
print("FIRST", wild.main(["--workers", {workers!r}, "--limit", "1", "--out", out, "--table", out + ".md"]))
print("SECOND", wild.main(["--out", out]))
print("THIRD", wild.main(["--out", out, "--only", "t:crash", "--again", "raw"]))
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_case_can_neither_crash_nor_hang_the_run_and_a_second_call_goes_on(tmp_path: Path, workers: str) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-P", "-c", SCRIPT.format(folder=str(FOLDER), workers=workers), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert (rows["t:crash"]["verdict"], rows["t:crash"]["text"]) == ("raw", "the process ended with exit status 3")
    assert (rows["t:hang"]["verdict"], rows["t:hang"]["text"]) == ("raw", "no result after 1 s")
    assert rows["t:broken"]["verdict"] == "unusable"
    table = Path(f"{out}.md").read_text(encoding="utf-8")
    assert "| all | 3 | 0 | 0 | 2 | 0 | 1 |" in table
    assert "- t:hang: no result after 1 s" in table
    first, second = done.stdout.split("FIRST 1")
    second, third = second.split("SECOND 1")
    assert [text.count(" s  ") for text in (first, second, third)] == [3, 0, 1]  # cases that ran
    assert "THIRD 1" in third


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        wild.main(["--only", "nothing*"])
    assert "no case matches ['nothing*']; --list prints the names" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["timm:test_resnet", "timm:test_vit", "timm:test_convnext", "transformers:gpt2 cache"],
)
@pytest.mark.filterwarnings("ignore")  # third-party model code
def test_public_models_are_right(name: str) -> None:
    wild_models.load(name)
    row = wild_compare.compare(wild_models.CASES[name])
    assert row["verdict"] == "right", row["text"]
