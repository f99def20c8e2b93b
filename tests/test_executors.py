"""What workers of a dask cluster simulate and measure, also where one dies (`test_ngspice.py` has process pools)."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from by_name import mean_of_outputs
from networks import CASES, noise
from torch import Tensor, nn

import ffebm_compiler as ffebm

distributed: Any = pytest.importorskip("distributed")
needs_ngspice = pytest.mark.skipif(shutil.which("ngspice") is None, reason="ngspice is not installed")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A dask cluster of two worker processes on this machine; nothing of it is left but an idle thread of dask's."""
    before = set(threading.enumerate())
    local = {"n_workers": 2, "threads_per_worker": 1, "silence_logs": logging.CRITICAL, "dashboard_address": ":0"}
    with distributed.LocalCluster(**local) as cluster, distributed.Client(cluster) as found:
        yield found
    deadline = time.monotonic() + 30  # threads of closed connections take a moment
    while (left := after(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def after(before: set[threading.Thread]) -> list[threading.Thread]:
    """The threads that were started since and still run, but for the idle ones of the pool that all clusters share."""
    now = [thread for thread in threading.enumerate() if thread not in before]
    return [thread for thread in now if not (thread.daemon and thread.name.startswith("Dask-Offload"))]


class Made:
    """A hybrid, a batch, and what one process finds for them."""

    def __init__(self) -> None:
        model, x = CASES["mlp"].make(nn.ReLU)
        gradient = ffebm.EquilibriumPropagation(1e-3, "centered")
        self.x = torch.cat([x, noise(7, *x.shape[1:], seed=3)]).double()
        self.hybrid = ffebm.convert(model.double(), self.x, energy="resistive", feedback=0.3, gradient=gradient)
        self.expected = self.found()

    def found(self, **options: Any) -> list[Tensor]:
        """The output and the gradients of a training step."""
        self.hybrid.set_solver(ffebm.Measured(ffebm.Ngspice(volts=10.0, **options)))
        self.hybrid.zero_grad()
        output = self.hybrid(self.x)
        output.square().mean().backward()
        gradients = [p.grad for p in self.hybrid.parameters()]
        return [output.detach(), *(g for g in gradients if g is not None)]

    def agrees(self, **options: Any) -> None:
        for found, expected in zip(self.found(**options), self.expected, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_ngspice
@pytest.mark.slow
def test_workers_of_dask_find_what_one_process_finds(
    client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = Made()
    caplog.set_level(logging.WARNING, "ffebm_compiler")
    made.agrees(executor=client.get_executor(), parts=4)
    # A simulator that takes its worker with it, once: dask gives the part to another worker.
    marker, script = tmp_path / "killed", tmp_path / "simulator"
    script.write_text(
        f"#!{sys.executable}\nimport os, signal, sys\n"
        f"try:\n    os.close(os.open({str(marker)!r}, os.O_CREAT | os.O_EXCL))\n"
        "except FileExistsError:\n    os.execvp('ngspice', ['ngspice', *sys.argv[1:]])\n"
        "os.kill(os.getppid(), signal.SIGKILL)\n"
    )
    script.chmod(0o755)
    made.agrees(executor=client.get_executor(), parts=2, command=str(script))
    assert marker.exists()
    assert "is lost" not in caplog.text
    client.wait_for_workers(2)
    # An executor whose client is closed takes no work, and all of it is simulated here.
    with distributed.Client(client.cluster) as other:
        executor = other.get_executor()
    made.agrees(executor=executor, parts=2)
    assert "block_1: the executor takes no work (ClosedClientError: " in caplog.text


@pytest.mark.slow
def test_workers_of_dask_measure_what_one_process_measures(client: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    hybrid = ffebm.convert(model, torch.randn(2, 6))
    devices = ffebm.Devices(programming=0.1, read_noise=0.01)
    executor = client.get_executor()

    def measured(**options: Any) -> list[Any]:
        given = {"draws": 2, **options}
        x = torch.zeros(2, 6)
        return [
            ffebm.sensitivity(hybrid, mean_of_outputs, devices, **given),
            ffebm.plan_for_accuracy(model, x, mean_of_outputs, devices=devices, max_drop=0.5, **given),
            ffebm.explore(model, x, mean_of_outputs, devices=[None, devices], feedback=[0.1, 0.3], **given),
        ]

    assert measured(executor=executor) == measured()
