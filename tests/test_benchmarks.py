"""The benchmarks of a training step run on the smallest networks, and what they count and enact is right."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.fabric import Hardware

FOLDER = Path(__file__).parent.parent / "benchmarks"
FIGURES = ("ms", "ratio", "gflop", "floor_ms", "times_floor", "peak_gflops")
SMALL = ("--steps", "1", "--batch", "2")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
CNN = (*SMALL, "--width", "4", "--depth", "1", "--side", "8", "--table", "residual CNN")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark in a process of its own, warnings as errors (but the one that pyproject.toml excepts)."""
    excepted = "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"
    command = [sys.executable, "-P", "-W", "error", "-W", excepted, str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def rows(done: subprocess.CompletedProcess[str], path: Path, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """The rows of the only table that a benchmark has printed and written."""
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    conditions = "one thread" if device == "cpu" else f"{torch.cuda.get_device_name()}, TF32 off"
    assert f"GFLOP/s, float32 matrix products, {conditions}" in done.stdout
    (table,) = json.loads(path.read_text(encoding="utf-8"))["tables"]
    found = {row["name"]: row for row in table["rows"]}
    printed = done.stdout.splitlines()
    assert table["title"] in printed
    for name, row in found.items():
        assert any(line.startswith(name) for line in printed)
        assert all(row[key] > 0 for key in FIGURES), row
    return found


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    return module("peers")


def module(name: str) -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("device", DEVICES)
def test_training_step(device: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "step.json"
    done = run("training_step.py", *CNN, "--only", "ep, default", "--no-memory", "--device", device, "--out", str(path))
    found = rows(done, path, device)
    assert list(found) == ["source, backprop", "ep, default"]
    source, ep = found.values()
    assert source["ratio"] == 1
    assert source["free_sweeps"] is None
    assert ep["free_sweeps"] >= 1
    # By hand, two operations per MAC: each layer forward and for the gradients of weights and inputs, but those of x.
    stem, conv, head = (2 * 2 * macs for macs in (3 * 4 * 9 * 64, 4 * 4 * 9 * 64, 4 * 10))
    assert source["gflop"] == pytest.approx((2 * stem + 2 * 3 * conv + 3 * head) / 1e9, rel=1e-12)
    # Sweeps and gradients inside the autograd function are whole convolutions, and more of them than backprop's 6.
    convolutions = (1e9 * ep["gflop"] - 2 * stem - 3 * head) / conv
    assert convolutions == pytest.approx(round(convolutions), abs=1e-6)
    assert convolutions > 6


def test_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "forward.json"
    small = (*CNN[:-1], "residual CNN, evaluation", "--only", "forward, default", "--no-memory", "--out", str(path))
    source, forward = rows(run("training_step.py", *small), path).values()
    stem, conv, head = (2 * 2 * macs for macs in (3 * 4 * 9 * 64, 4 * 4 * 9 * 64, 4 * 10))
    assert source["gflop"] == pytest.approx((stem + 2 * conv + head) / 1e9, rel=1e-12)
    # The feedforward states, and two products a sweep.
    assert forward["gflop"] - source["gflop"] == pytest.approx(2 * forward["free_sweeps"] * conv / 1e9, rel=1e-9)


def test_parts_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    done = run("step_parts.py", *CNN, "--only", "ep, default", "--out", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    (table,) = json.loads(path.read_text(encoding="utf-8"))["tables"]
    source, ep = table["rows"]
    for row in (source, ep):
        assert row["products_ms"] > 0
        assert row["passes_ms"] > 0
        assert row["products_ms"] + row["passes_ms"] + row["rest_ms"] == pytest.approx(row["ms"], rel=1e-12)
    assert ep["operations"] > source["operations"]


def test_operations_are_products_or_passes_and_views_are_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = module("step_parts").parts
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)

    def run() -> None:
        h = torch.relu(F.conv2d(x, weight))  # a product and a pass
        (h.flatten(1) @ h.flatten(1).t()).add_(1.0)  # views, a product and a pass

    products, passes, operations = parts(run)
    assert products > 0
    assert passes > 0
    assert operations == 4


@pytest.mark.skipif(sys.platform != "linux", reason="the resident size is read from /proc")
@pytest.mark.parametrize("device", DEVICES)
def test_memory_of_a_step(device: str, tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    large = ("--batch", "8", "--width", "16", "--side", "16", "--depth", "2", "--device", device)
    done = run("training_step.py", *CNN, *large, "--only", "none of them", "--out", str(path))
    (row,) = rows(done, path, device).values()
    activations = 4 * 8 * 16 * 16 * 16 / 1e6  # one in MB; stem, norm and each block keep several
    assert 4 * activations < row["memory_mb"] < 100 * activations
    assert row["memory_ratio"] == 1


@pytest.mark.parametrize("device", DEVICES)
def test_equilibrium(device: str, tmp_path: Path) -> None:
    path = tmp_path / "equilibrium.json"
    small = (*SMALL, "--width", "0.03", "--no-memory", "--table", "DCHN*avg*", "--only", "plain EP")
    found = rows(run("equilibrium.py", *small, "--device", device, "--out", str(path)), path, device)
    assert list(found) == ["ours", "plain EP"]
    assert found["ours"]["worst_cosine"] > 0.9999
    assert found["plain EP"]["free_sweeps"] == 60
    assert found["plain EP"]["ratio"] == pytest.approx(found["ours"]["ms"] / found["plain EP"]["ms"])


def test_equilibrium_of_a_residual_block(tmp_path: Path) -> None:
    path = tmp_path / "block.json"
    small = (*SMALL, "--channels", "4", "--side", "8", "--no-memory", "--table", "a residual*", "--only", "unrolled")
    found = rows(run("equilibrium.py", *small, "--out", str(path)), path)
    assert list(found) == ["ours", "unrolled"]
    assert all(row["worst_cosine"] > 0.9999 for row in found.values())


@pytest.mark.slow
def test_compile_time(tmp_path: Path) -> None:
    path = tmp_path / "compile.json"
    done = run("compile_time.py", "--layers", "6", "--steps", "1", "--out", str(path))
    assert done.returncode == 0, done.stderr
    ((row,),) = (table["rows"] for table in json.loads(path.read_text(encoding="utf-8"))["tables"])
    assert row["name"] == "6 layers"
    assert row["name"] in done.stdout
    assert row["convert_s"] > row["export_s"] > 0
    assert row["plan_s"] > 0


def test_loop_gain(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gain.json"
    small = ("--batch", "2", "--width", "4", "--depth", "1", "--side", "8", "--steps", "2", "--widths", "64")
    done = run("loop_gain.py", *small, "--out", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [row["network"] for row in found["cost"]] == ["residual CNN", "transformer MLP stack", "transformer"]
    assert all(row["ratio"] > 0 for row in found["cost"])
    assert all(1 <= row["true_over_told"] < 1.05 < row["power_iteration"] for row in found["growth"])


@pytest.mark.skipif(shutil.which("ngspice") is None, reason="ngspice is not installed")
def test_netlists() -> None:
    done = run("netlists.py", "--emissions", "0.01", "--samples", "1")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9
    assert all(float(line.split()[-1]) < 1e-2 for line in done.stdout.splitlines()[1:])


@pytest.mark.skipif(shutil.which("ngspice") is None, reason="ngspice is not installed")
def test_settling_against_ngspice() -> None:
    done = run("netlists.py", "--settle", "--longest", "0")
    assert done.returncode == 0, done.stderr
    _, strict, amplified = done.stdout.splitlines()
    for line, name in ((strict, "drn 32-24-10"), (amplified, "32-24-10")):
        assert line.strip().startswith(name)
        assert float(line.split()[-1]) < 0.1  # what the diodes' voltage makes


def test_resistive(tmp_path: Path) -> None:
    path = tmp_path / "resistive.json"
    small = (
        "--seeds",
        "1",
        "--epochs",
        "4",
        "--gammas",
        "0.001",
        "--scratch",
        "0.001",
        "--widths",
        "8",
        "--turns",
        "1",
        "--tune",
        "1",
        "--longer",
        "1",
    )
    done = run("resistive.py", *small, "--out", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    (source, converted), (backprop, scratch) = found["trained"], found["scratch"]
    assert abs(converted["accuracy"][0] - source["accuracy"][0]) < 2
    assert abs(converted["tuned"][0] - source["accuracy"][0]) < 3
    assert abs(converted["longer"][0] - source["accuracy"][0]) < 3
    assert abs(scratch["accuracy"][0] - backprop["accuracy"][0]) < 3
    assert 0 < converted["loop_gain"] < 1
    assert found["step"][0]["resistive"] > 0


@pytest.mark.slow
def test_from_scratch(tmp_path: Path) -> None:
    """EP with the loop gain held at 0.9 learns as backprop does; one seed and three epochs of the benchmark."""
    path = tmp_path / "scratch.json"
    picture = ("--picture", str(tmp_path / "scratch.svg"))
    done = run(
        "from_scratch.py",
        "--seeds",
        "1",
        "--epochs",
        "3",
        "--feedback",
        "backprop",
        "0.9",
        "--out",
        str(path),
        *picture,
    )
    assert done.returncode == 0, done.stderr
    backprop, held = json.loads(path.read_text(encoding="utf-8"))
    assert backprop["accuracy"] > 95
    assert held["accuracy"] > backprop["accuracy"] - 2
    assert not held["failed"]
    assert held["largest_loop_gain"] == pytest.approx(0.9, rel=0.05)
    assert "loop gain held at 0.9" in (tmp_path / "scratch.svg").read_text(encoding="utf-8")


@pytest.mark.slow
def test_digital_drive(tmp_path: Path) -> None:
    """With states driven by batch norm's results EP learns as backprop of the same module does."""
    path = tmp_path / "drive.json"
    done = run("digital_drive.py", "--seeds", "1", "--epochs", "3", "--feedback", "backprop", "0.5", "--out", str(path))
    assert done.returncode == 0, done.stderr
    backprop, held = json.loads(path.read_text(encoding="utf-8"))
    assert backprop["accuracy"] > 95
    assert held["accuracy"] > backprop["accuracy"] - 2
    assert held["largest_loop_gain"] == pytest.approx(0.5, rel=0.05)


@pytest.mark.slow
def test_algorithms(tmp_path: Path) -> None:
    path = tmp_path / "algorithms.json"
    done = run("algorithms.py", "--tables", "gradients", "--out", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))["gradients"]
    for row in found.values():
        assert row["ep, β = 1e-4"] > 0.9999999
        assert row["recurrent"] > 0.9999999
        assert 0.9 < row["truncated, 1 sweep"] < row["truncated, 3 sweeps"] < 1
        assert 0.9 < row["contrastive"] < 1


@pytest.mark.slow
def test_vector_fields(tmp_path: Path) -> None:
    """The angles at every asymmetry, and two kinds of training."""
    path = tmp_path / "fields.json"
    done = run("vector_fields.py", "--seeds", "1", "--modes", "tied", "homeostasis", "--out", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert max(row["implicit"] for row in found["angles"]) <= 1e-9
    first = {row["asymmetry"]: row["cosines"]["0.weight"] for row in found["angles"] if row["feedback"] == 0.5}
    assert first[0.0] == pytest.approx(1, abs=1e-6)
    assert 1 > first[0.1] > first[0.3] > first[1.0] > abs(first["unrelated"])
    tied, homeostasis = found["training"]
    assert tied["accuracy"] > 94
    assert homeostasis["accuracy"] > 92


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("training_step.py", "--steps", "0"), "--steps 0: expected at least 1"),
        (("step_parts.py", "--device", "cuda"), "--device cuda: only a CPU's steps are taken apart"),
        (
            ("equilibrium.py", "--public-code", "nowhere"),
            "--public-code nowhere: there is no model/hopfield/network.py",
        ),
        pytest.param(
            ("equilibrium.py", "--device", "cuda"),
            "--device cuda: torch",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_refusals_are_one_line(arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def macs_of_a_sweep(widths: list[int], pool: str) -> tuple[int, int]:
    """MACs per sample of the drives, and of a sweep of the plain schedule: drives, feedback, winners found anew."""
    sides = (32, 16, 8, 4)
    convs = [9 * i * o * side**2 for i, o, side in zip(widths[:-1], widths[1:], sides, strict=True)]
    head = 4 * widths[-1] * 10
    again = sum(convs[1:])
    return sum(convs) + head, sum(convs) + head + again + head + (again if pool == "max" else 0)


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_plain_schedule_has_the_recorded_arithmetic(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    if pool == "max":  # counted in the public code at full width
        assert macs_of_a_sweep([3, 128, 256, 512, 512], pool)[1] == pytest.approx(0.570e9, rel=2e-3)
    monkeypatch.setattr(peers, "SWEEPS", (3, 2, 1))
    model = peers.DCHN(1 / 16, pool)
    x, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    drives, sweep = macs_of_a_sweep([3, *(conv.out_channels for conv in model.convs)], pool)
    # At the end the drives at two states, forward and for the gradients of the weights.
    counted = module("measuring").flops(lambda: peers.plain_step(model, x, labels))
    assert counted == 2 * len(x) * (6 * sweep + 2 * 2 * drives)


def test_plain_schedule_has_the_exact_gradient_where_nothing_is_lost(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SWEEPS", (200, 100, 100))
    monkeypatch.setattr(peers, "BETA", 1e-5)
    torch.manual_seed(0)
    model: nn.Module = peers.DCHN(0.03, "avg").double()
    x, labels = torch.rand(3, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (3,))
    hybrid = ffebm.convert(
        copy.deepcopy(model),
        x,
        hardware=Hardware(tile_rows=None, tile_cols=None, tiles_per_core=None, layers_per_block=5),
        feedback="symmetric",
        gradient="unrolled",
        block_ops=("add", "reshape", "avg_pool"),
    )
    (0.5 * (hybrid(x) - F.one_hot(labels, 10)).square().sum(1).mean()).backward()
    for plain, parameter in zip(peers.plain_step(model, x, labels), hybrid.parameters(), strict=True):
        assert parameter.grad is not None
        assert float((plain - parameter.grad).norm() / parameter.grad.norm()) < 1e-3
