"""docs/hardware-in-the-loop.md, followed literally: a bench in a process of its own, and training through it."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drn_networks import made
from networks import CASES, noise
from torch import nn

import ffebm_compiler as ffebm

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "hardware-in-the-loop.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert list(FILES) == ["bench.py", "fabric.py", "train.py"]
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def start(folder: Path, port: int) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts the bench with the page's command, and waits until it listens."""
    running = []

    def begin() -> subprocess.Popen[bytes]:
        assert "    python bench.py 7001\n" in TEXT
        process = subprocess.Popen([sys.executable, "bench.py", str(port)], cwd=folder, stderr=subprocess.DEVNULL)
        running.append(process)
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return process
            except OSError:
                time.sleep(0.05)
        raise AssertionError("the bench does not listen")

    yield begin
    for process in running:
        process.kill()
        process.wait()


def fabric_of(folder: Path, port: int) -> Any:
    spec = importlib.util.spec_from_file_location("fabric_of_the_page", folder / "fabric.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Bench(port)


def test_a_fabric_has_thirty_lines() -> None:
    assert len([line for line in FILES["fabric.py"].splitlines() if line.strip()]) <= 30
    assert "ffebm" not in FILES["bench.py"] + FILES["fabric.py"]


@pytest.mark.slow
def test_the_page_trains_through_a_bench(folder: Path, port: int, start: Callable[[], Any]) -> None:
    start()
    assert "    python train.py 7001\n" in TEXT
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "train.py", str(port)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = re.fullmatch(r"(\d+\.\d) % of the test digits, measured on the bench\n", done.stdout)
    assert found is not None
    assert float(found[1]) >= 75


def network(case: str) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    if case not in CASES:
        return made(case)
    model, x = CASES[case].make(nn.ReLU)
    return model.double(), x.double(), CASES[case].options


@pytest.mark.parametrize(
    ("case", "energy"),
    [
        ("mlp", "resistive"),
        ("branches", "resistive"),
        ("convolutions", "resistive"),
        ("two hidden", "drn"),
        ("convolutional", "drn"),
        ("residual", "unamplified"),
    ],
)
def test_the_bench_is_the_circuit(case: str, energy: str, folder: Path, port: int, start: Callable[[], Any]) -> None:
    start()
    model, x, options = network(case)
    if energy == "resistive":
        options = {**options, "feedback": 0.3}
    gradient, solver = ffebm.EquilibriumPropagation(0.1), ffebm.GaussSeidel(rtol=1e-13)
    hybrid = ffebm.convert(model, x, energy=energy, gradient=gradient, solver=solver, **options)
    target = noise(*hybrid(x).shape).double()

    def gradients() -> list[torch.Tensor]:
        hybrid.zero_grad()
        (hybrid(x) - target).square().mean().backward()
        return [p.grad.clone() for p in hybrid.parameters() if p.grad is not None]

    expected = gradients()
    fabric = fabric_of(folder, port)
    hybrid.set_solver(ffebm.Measured(fabric))
    found = gradients()
    fabric.answers.close()
    fabric.link.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm()


def test_a_bench_that_is_switched_off_and_on(folder: Path, port: int, start: Callable[[], Any]) -> None:
    model, x = CASES["mlp"].make(nn.ReLU)
    fabric = fabric_of(folder, port)
    hybrid = ffebm.convert(model, x, energy="resistive", solver=ffebm.Measured(fabric))
    with pytest.raises(ffebm.FabricError, match=r"block_1: program of the fabric Bench failed \(ConnectionRefused"):
        hybrid(x)
    process = start()
    output = hybrid(x)
    expected = output.detach().clone()
    process.kill()
    process.wait()
    with pytest.raises(ffebm.FabricError, match=r"block_1: settle of the fabric Bench failed"):
        output.square().sum().backward()
    assert all(p.grad is None for p in hybrid.parameters())
    start()
    torch.testing.assert_close(hybrid(x).detach(), expected, rtol=0, atol=0)
    fabric.answers.close()
    fabric.link.close()
