"""Circuits in the loop: equilibria that ngspice finds, and the gradient of circuits with silicon diodes."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import drn_networks
import pytest
import torch
from fabrics import Bench
from finite_differences import parameter_gradients, squared_error
from networks import CASES, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import ngspice_runs

needs_ngspice = pytest.mark.skipif(shutil.which("ngspice") is None, reason="ngspice is not installed")
CENTERED = ffebm.EquilibriumPropagation(1e-3, "centered")


def made(case: str = "mlp", **options: Any) -> tuple[ffebm.HybridModel, Tensor]:
    model, x = CASES[case].make(nn.ReLU)
    settings = {"energy": "resistive", "feedback": 0.3, "gradient": CENTERED, **CASES[case].options, **options}
    return ffebm.convert(model.double(), x.double(), **settings), x.double()


@needs_ngspice
@pytest.mark.parametrize("case", ["mlp", "branches", "projections", "convolutions"])
def test_near_ideal_diodes_give_our_states(case: str) -> None:
    hybrid, x = made(case, solver=ffebm.GaussSeidel(rtol=1e-13))
    output, states = hybrid(x).detach(), hybrid.blocks[0].states
    errors = []
    for emission in (0.01, 0.001):
        hybrid.set_solver(ffebm.Measured(ffebm.Ngspice(emission, volts=20.0)))
        measured = hybrid(x).detach()
        pairs = zip((*hybrid.blocks[0].states, measured), (*states, output), strict=True)
        errors.append(max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
    assert errors[1] <= 1e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.3)  # linear in the emission coefficient


@needs_ngspice
@pytest.mark.parametrize(
    ("case", "energy", "volts"),
    [
        ("mlp", "resistive", 10.0),
        ("convolutions", "resistive", 10.0),
        ("one hidden", "drn", 1.0),
        ("two hidden", "drn", 1.0),
        ("residual", "drn", 1.0),
        ("residual", "unamplified", 1.0),
    ],
)
def test_the_gradient_of_a_circuit_with_silicon_diodes(case: str, energy: str, volts: float) -> None:
    """EP against finite differences of the loss of the circuit itself, the gains of its amplifiers held."""
    if energy == "resistive":
        hybrid, x = made(case)
    else:
        model, x, options = drn_networks.made(case)
        hybrid = ffebm.convert(model, x, energy=energy, gradient=CENTERED, **options)
    hybrid.set_solver(ffebm.Measured(ffebm.Ngspice(volts=volts)))
    x = x[:1]
    far = hybrid(x).detach()
    found = parameter_gradients(hybrid, x)
    generator = torch.Generator().manual_seed(0)
    for name, weight in hybrid.named_parameters():
        flat, gradient = weight.data.view(-1), found[name].view(-1)
        sums = weight.data.flatten(1).abs().sum(1) if energy == "resistive" and weight.dim() > 1 else None
        places = torch.randperm(len(flat), generator=generator).tolist()
        if sums is not None:  # a row at the amplifier's gain has a pad of 0, which cannot fall
            width = len(flat) // len(sums)
            places = [place for place in places if sums[place // width] < 0.9 * sums.max()]
        expected, own = [], []
        for place in places[:4]:
            before, losses = float(flat[place]), []
            if weight.dim() > 1 and abs(before) < 1e-4:
                continue  # |w|, the conductance, has a kink at 0
            for sign in (1, -1):
                flat[place] = before + sign * 1e-5
                losses.append(float(squared_error(hybrid(x).detach())))
            flat[place] = before
            expected.append((losses[0] - losses[1]) / 2e-5)
            own.append(float(gradient[place]))
        error = (torch.tensor(own) - torch.tensor(expected)).abs().max() / max(map(abs, expected))
        assert error <= 1e-5, (name, own, expected)
    hybrid.set_solver(None)
    assert float((hybrid(x) - far).detach().norm() / far.norm()) > 0.05  # silicon is far from ideal here


@needs_ngspice
def test_coupled_learning_holds_nodes() -> None:
    hybrid, x = made(gradient=ffebm.CoupledLearning(1e-2, "centered"), solver=ffebm.Measured(Bench()))
    expected = parameter_gradients(hybrid, x)
    hybrid.set_solver(ffebm.Measured(ffebm.Ngspice(1e-4, volts=20.0)))
    for name, gradient in parameter_gradients(hybrid, x).items():
        assert (gradient - expected[name]).norm() <= 5e-3 * expected[name].norm(), name


class Lossy(Executor):
    """Loses every second job, as a scheduler does whose worker was killed."""

    def __init__(self) -> None:
        self.count = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.count += 1
        future: Future[Any] = Future()
        if self.count % 2:
            future.set_exception(ConnectionError("worker died"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def die(*_: Any) -> None:
    os._exit(1)


@pytest.fixture
def pool() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as found:
        yield found


@needs_ngspice
@pytest.mark.slow
def test_an_executor_gives_the_same_states(pool: ProcessPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    hybrid, x = made(solver=ffebm.Measured(ffebm.Ngspice(volts=10.0)))
    x = torch.cat([x, noise(7, 8, seed=3).double()])
    output, expected = hybrid(x).detach(), parameter_gradients(hybrid, x)

    def same(executor: Executor, parts: int) -> None:
        hybrid.set_solver(ffebm.Measured(ffebm.Ngspice(volts=10.0, executor=executor, parts=parts)))
        torch.testing.assert_close(hybrid(x).detach(), output, rtol=0, atol=0)
        for name, gradient in parameter_gradients(hybrid, x).items():
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)

    caplog.set_level(logging.WARNING)
    same(pool, 2)
    same(pool, 40)  # more parts than samples
    assert "worker" not in caplog.text
    same(Lossy(), 3)
    assert "a worker of the executor is lost (ConnectionError: worker died)" in caplog.text
    with pytest.raises(Exception, match="terminated abruptly"):
        pool.submit(die).result()
    same(pool, 2)  # the pool is broken now
    assert "block_1: the executor takes no work (BrokenProcessPool: " in caplog.text


@needs_ngspice
def test_an_error_of_a_worker_is_the_error() -> None:
    hybrid, x = made()
    hybrid.set_solver(ffebm.Measured(ffebm.Ngspice(executor=Lossy(), parts=4, timeout=1e-4)))
    with pytest.raises(ffebm.FabricError, match=r"block_1: ngspice took longer than 0\.0001 s for \d samples"):
        hybrid(x)


def test_without_ngspice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = r"the program 'no-such-ngspice' is not installed: apt-get install ngspice .*Ngspice\(command=...\)"
    with pytest.raises(ffebm.FabricError, match=message):
        ffebm.Ngspice(command="no-such-ngspice")
    job = ngspice_runs.Job("", ("V1",), ("v",), 1.0, "no-such-ngspice", "block_1")
    with pytest.raises(ffebm.FabricError, match=message):
        job(torch.zeros(1, 1).numpy())  # as a worker elsewhere would find


@pytest.mark.parametrize("written", ["", "0 1", "0 nan nan\n0 1 2", "0 one two"])
def test_a_run_without_operating_points(tmp_path: Path, written: str) -> None:
    """A program in the place of ngspice that writes no voltages, too few, or others than numbers."""
    script = tmp_path / "simulator"
    keep = f"open('voltages0', 'w').write({written!r})" if written else ""
    script.write_text(f"#!{sys.executable}\nimport sys\n{keep}\nsys.stderr.write('singular matrix at node v_a')\n")
    script.chmod(0o755)
    model, x = CASES["mlp"].make(nn.ReLU)
    hybrid = ffebm.convert(model, x, energy="resistive")
    hybrid.set_solver(ffebm.Measured(ffebm.Ngspice(command=str(script))))
    with pytest.raises(ffebm.FabricError, match=r"block_1: ngspice found no operating point .*\(singular matrix"):
        hybrid(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emission": 0}, "emission is 0; expected a positive number"),
        ({"saturation": -1e-12}, "saturation is -1e-12; expected a positive number"),
        ({"volts": float("inf")}, "volts is inf; expected a positive number"),
        ({"siemens": True}, "siemens is True; expected a positive number"),
        ({"timeout": "1"}, "timeout is '1'; expected a positive number"),
        ({"parts": 0}, "parts is 0; expected a positive integer, or None"),
        ({"executor": 4}, "executor is a int; expected an executor of concurrent.futures"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ffebm.InputError, match=message):
        ffebm.Ngspice(**options)


@needs_ngspice
def test_what_has_no_circuit() -> None:
    model, x = CASES["mlp"].make(nn.ReLU)
    hybrid = ffebm.convert(model, x, solver=ffebm.Measured(ffebm.Ngspice()))
    with pytest.raises(ffebm.UnsupportedError, match="block_1: its energy, 'hopfield', is not that of a circuit"):
        hybrid(x)
    with pytest.raises(ffebm.FabricError, match="no block was programmed"):
        ffebm.Ngspice().settle([x])
    hybrid, x = made()
    hybrid.set_solver(ffebm.Measured(ffebm.Ngspice()))
    with torch.no_grad():
        hybrid.get_parameter("layers.2.weight").mul_(2)
    with pytest.raises(ffebm.UnsupportedError, match=r"block_1: the amplifier of layer .*recertify"):
        hybrid(x)  # in eval mode the amplifiers stay as they were set


@needs_ngspice
def test_it_is_a_value_that_settles_and_is_pickled() -> None:
    with ProcessPoolExecutor(1) as pool:
        fabric = ffebm.Ngspice(0.5, 1e-14, pool)
        assert repr(fabric) == "Ngspice(emission=0.5, saturation=1e-14)"
        assert pickle.loads(pickle.dumps(fabric)).executor is None
    hybrid, x = made(solver=ffebm.Measured(ffebm.Ngspice()))
    states = [state.clone() for state in hybrid.blocks[0].settle(x).states]
    fabric = hybrid.energy_blocks["block_1"].solver.fabric
    for ours, theirs in zip(fabric.settle([x]), states, strict=True):  # the block that was programmed last
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@needs_ngspice
def test_it_trains_through_the_simulator() -> None:
    """A few steps of a small classifier with silicon diodes: the loss of the circuit falls."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)))
    x = noise(16, 6)
    y = x[:, :3].argmax(1)
    gradient = ffebm.EquilibriumPropagation(0.1, "centered")
    solver = ffebm.Measured(ffebm.Ngspice(volts=20.0))
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=1.0, gradient=gradient, solver=solver)
    optimizer, losses = torch.optim.Adam(hybrid.parameters(), 0.03), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(hybrid(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
