"""Netlists of resistive blocks: every node voltage of ngspice against our states."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import drn_networks
import pytest
import torch
from networks import CASES, MLP, noise, seeded
from torch import Tensor, nn
from typer.testing import CliRunner

import ffebm_compiler as ffebm
from ffebm_compiler import circuit_elements, spice
from ffebm_compiler.cli.main import main
from ffebm_compiler.runtime.activations.base import Lines
from ffebm_compiler.runtime.energies.circuit import Circuit

needs_ngspice = pytest.mark.skipif(shutil.which("ngspice") is None, reason="ngspice is not installed")
ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.3),
    "hardtanh": lambda: nn.Hardtanh(-0.2, 0.3),
    "hardsigmoid": nn.Hardsigmoid,
    "softshrink": lambda: nn.Softshrink(0.1),
}


def made(case: str = "mlp", kind: str = "relu", gamma: float = 0.4) -> tuple[ffebm.HybridModel, Tensor]:
    model, x = CASES[case].make(ACTIVATIONS[kind])
    solver = ffebm.GaussSeidel(rtol=1e-13)
    model, x = model.double(), x.double()
    return ffebm.convert(model, x, energy="resistive", feedback=gamma, solver=solver, **CASES[case].options), x


def simulated(path: Path) -> dict[str, float]:
    done = subprocess.run(["ngspice", "-b", str(path)], capture_output=True, text=True, timeout=60, check=False)
    found = {m[1]: float(m[2]) for m in re.finditer(r"v\((\w+)\) = ([-+\d.e]+)", done.stdout)}
    assert found, done.stdout[-500:] + done.stderr[-500:]
    return found


def unit_of(path: Path) -> float:
    found = re.search(r"a unit of a state is (\S+) V", path.read_text())
    assert found is not None
    return float(found[1])


def nodes_of(hybrid: ffebm.HybridModel, states: tuple[Tensor, ...], unit: float) -> dict[str, float]:
    """The voltages that our states say: V₀ s/A of the nodes, V₀ s of the amplifiers."""
    (block,) = hybrid.blocks
    found = {}
    names = [name.lower().replace(".", "_") for name in block.state_names]
    gains = block.module.setting.amplifiers
    for name, gain, state in zip(names, gains or [1.0] * len(names), states, strict=True):
        for i, value in enumerate(state[0].flatten().tolist()):
            found[f"v_{name}_{i}"] = unit * value / gain
            if gains:
                found[f"s_{name}_{i}"] = unit * value
    return found


def worst(found: dict[str, float], expected: dict[str, float]) -> float:
    """The largest deviation in the range of the voltages of its kind."""
    assert found.keys() == expected.keys()
    kinds = {key[0] for key in expected}
    sizes = {kind: max(abs(v) for key, v in expected.items() if key[0] == kind) for kind in kinds}
    return max(abs(found[key] - value) / sizes[key[0]] for key, value in expected.items())


@needs_ngspice
@pytest.mark.parametrize(
    ("case", "kind", "gamma"),
    [
        ("mlp", "relu", 0.4),
        ("mlp", "leaky", 2.0),
        ("mlp", "relu", 1e-3),
        ("branches", "hardtanh", 0.4),
        ("branches", "softshrink", 0.4),
        ("mlp", "softshrink", 0.05),
        ("projections", "leaky", 0.4),
        ("convolutions", "relu", 0.4),
        ("cnn", "relu", 0.4),
    ],
)
def test_ngspice_finds_our_states(tmp_path: Path, case: str, kind: str, gamma: float) -> None:
    hybrid, x = made(case, kind, gamma)
    if case == "cnn":
        model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, 2, 1), nn.ReLU()))
        x = noise(2, 1, 7, 7).double()
        hybrid = ffebm.convert(model.double(), x, energy="resistive", solver=ffebm.GaussSeidel(rtol=1e-13))
    hybrid(x[:1])
    states, errors = hybrid.blocks[0].states, []
    for emission in (0.1, 0.01, 0.001):
        path = hybrid.export_spice(tmp_path / "block.cir", block="block_1", inputs=x, emission=emission)
        errors.append(worst(simulated(path), nodes_of(hybrid, states, unit_of(path))))
    assert errors[2] <= 1e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.3)  # linear in the emission coefficient
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.1)


@needs_ngspice
@pytest.mark.parametrize("kind", ["one hidden", "two hidden", "convolutional", "residual"])
def test_ngspice_finds_the_states_of_a_deep_resistive_network(tmp_path: Path, kind: str) -> None:
    """Free and nudged: resistors, diodes and sources alone, whose nodes are our states."""
    model, x, options = drn_networks.made(kind)
    hybrid = ffebm.convert(model, x, energy="drn", solver=ffebm.GaussSeidel(rtol=1e-13), **options)
    hybrid(x[:1])
    (block,) = hybrid.blocks
    states = block.states
    delta = float(states[-1].abs().max()) * noise(*states[-1].shape, seed=5).double()
    for nudge in ({}, {block.state_names[-1]: 0.3 * delta}):
        errors = []
        for emission in (0.1, 0.01, 0.001):
            path = hybrid.export_spice(tmp_path / "b.cir", block="block_1", inputs=x, emission=emission, currents=nudge)
            text = path.read_text()
            assert not re.search(r"^[EF]", text, re.MULTILINE)  # no amplifiers
            assert "no amplifiers" in text
            expected = {m[1]: float(m[2]) for m in re.finditer(r"expected v\((\w+)\) = (\S+)", text)}
            if not nudge:
                ours = nodes_of(hybrid, states, unit_of(path))
                assert expected == pytest.approx(ours, rel=1e-8, abs=1e-10)
            errors.append(worst(simulated(path), expected))
        assert errors[2] <= 1e-3
        assert errors[1] == pytest.approx(errors[0] / 10, rel=0.3)  # linear in the emission coefficient
        assert errors[2] == pytest.approx(errors[1] / 10, rel=0.1)


@needs_ngspice
@pytest.mark.parametrize("gamma", [0.05, "symmetric"])
def test_ngspice_finds_the_states_of_an_unamplified_block(tmp_path: Path, gamma: Any) -> None:
    model, x = CASES["branches"].make(nn.ReLU)
    hybrid = ffebm.convert(
        model.double(), x.double(), energy="unamplified", feedback=gamma, **CASES["branches"].options
    )
    hybrid(x[:1].double())
    states = hybrid.blocks[0].states
    path = hybrid.export_spice(tmp_path / "b.cir", block="block_1", inputs=x.double())
    found = simulated(path)
    ours = nodes_of(hybrid, states, unit_of(path))
    assert worst({key: found[key] for key in ours}, ours) <= 1e-3  # beside the outputs of inverting amplifiers


@needs_ngspice
def test_lines_without_a_kink_are_exact(tmp_path: Path) -> None:
    hybrid, x = made(kind="hardsigmoid")  # no unit saturates here, so that no diode conducts
    hybrid(x[:1])
    states = hybrid.blocks[0].states
    path = hybrid.export_spice(tmp_path / "block.cir", block="block_1", inputs=(x,), emission=1.0)
    assert worst(simulated(path), nodes_of(hybrid, states, unit_of(path))) <= 1e-10


@needs_ngspice
def test_nudged_states_of_ngspice_give_the_gradient(tmp_path: Path) -> None:
    """EP from two simulated equilibria: the contrast of bias gradients, against the unrolled gradient."""
    model, x = seeded(lambda: MLP((6, 9, 8, 4))).double(), noise(1, 6).double()
    hybrid = ffebm.convert(model, x, energy="resistive", feedback=0.4, solver=ffebm.GaussSeidel(rtol=1e-13))
    target = noise(1, 4, seed=3).double()
    hybrid.set_gradient("unrolled")
    output = hybrid(x)
    (0.5 * (output - target).square().sum()).backward()
    (block,) = hybrid.blocks
    delta, beta, found = (output - target).detach(), 1e-3, []
    for sign in (1, -1):
        nudge = {block.state_names[-1]: -sign * beta * delta / block.module.scales[-1]}
        path = hybrid.export_spice(tmp_path / "b.cir", block="block_1", inputs=x, emission=1e-4, currents=nudge)
        voltages, unit = simulated(path), unit_of(path)
        expected = {m[1]: float(m[2]) for m in re.finditer(r"expected v\((\w+)\) = (\S+)", path.read_text())}
        assert worst(voltages, expected) <= 1e-4
        names = [name.replace(".", "_") for name in block.state_names]
        sizes = [s.numel() for s in block.states]
        found.append([[voltages[f"s_{n}_{i}"] / unit for i in range(k)] for n, k in zip(names, sizes, strict=True)])
    for index, (plus, minus) in enumerate(zip(*found, strict=True)):
        # ∂E/∂b = −c s, so that the gradient by the bias of a layer is −c (s⁺ − s⁻)/2β.
        contrast = -block.module.scales[index] * (torch.tensor(plus) - torch.tensor(minus)).double() / (2 * beta)
        exact = hybrid.get_parameter(f"layers.{index}.bias").grad
        assert exact is not None
        assert float((contrast - exact).norm() / exact.norm()) <= 2e-2


def test_the_circuit_is_the_block() -> None:
    """Kirchhoff's law on the dense circuit, against the states of the block; without a simulator."""
    for case in ("branches", "projections", "convolutions", "joined", "experts"):
        hybrid, x = made(case, "leaky", 1.5)
        hybrid(x[:1])
        states = hybrid.blocks[0].states
        circuit = spice.circuit_of_block(hybrid, "block_1", (x,))
        assert isinstance(circuit, Circuit)
        for ours, state in zip(states, spice.settled(circuit, {}), strict=True):
            torch.testing.assert_close(state, ours[0].flatten(), rtol=1e-9, atol=1e-10)
        for stage in circuit.stages:
            total = stage.pads + sum(part.plus.sum(1) + part.minus.sum(1) for part in stage.couplings)
            torch.testing.assert_close(total, torch.full_like(total, stage.gain))
            assert all(float(m.min()) >= 0 for part in stage.couplings for m in (part.plus, part.minus))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block": "block_7"}, ffebm.InputError, "there is no block 'block_7'; expected one of 'block_1'"),
        ({"inputs": ()}, ffebm.InputError, "inputs is empty, so that nothing drives the circuit"),
        ({"emission": 0.0}, ffebm.InputError, "emission is 0.0; expected a positive number"),
        ({"volts": float("nan")}, ffebm.InputError, "volts is nan; expected a positive number"),
        ({"siemens": True}, ffebm.InputError, "siemens is True; expected a positive number"),
        (
            {"currents": {"head": torch.zeros(5)}},
            ffebm.InputError,
            "currents names 'head'; expected some of 'layers.0'",
        ),
        ({"currents": {"layers.3": torch.zeros(4)}}, ffebm.InputError, "of 'layers.3': expected 5 finite numbers"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    hybrid, x = made()
    with pytest.raises(error, match=message):
        hybrid.export_spice(tmp_path / "b.cir", **{"block": "block_1", "inputs": x, **options})
    assert not (tmp_path / "b.cir").exists()


def test_what_has_no_netlist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.cir"
    model, x = CASES["mlp"].make(nn.ReLU)
    with pytest.raises(ffebm.UnsupportedError, match=r"block_1: its energy, 'hopfield', .*energy='resistive'"):
        ffebm.convert(model, x).export_spice(path, block="block_1", inputs=x)
    single = ffebm.convert(model, x, energy="resistive", hardware=ffebm.Hardware(layers_per_block=1))
    with pytest.raises(ffebm.InputError, match="block_1 has one layer and no feedback"):
        single.export_spice(path, block="block_1", inputs=x)
    hybrid, x = made()
    with torch.no_grad():
        hybrid.get_parameter("layers.1.weight").mul_(3)
    with (
        pytest.warns(ffebm.FFEBMWarning, match="block_1: its feedback was set for other weights.*recertify"),
        pytest.raises(ffebm.UnsupportedError, match=r"layer 'layers.1' .* and would be negative.*recertify"),
    ):
        hybrid.export_spice(path, block="block_1", inputs=x)
    hybrid.recertify()
    monkeypatch.setattr(circuit_elements, "LARGEST", 100)
    with pytest.raises(ffebm.InputError, match="pairs of resistors; a netlist is written for at most 100"):
        hybrid.export_spice(path, block="block_1", inputs=x)


@needs_ngspice
@pytest.mark.parametrize(("model", "energy"), [("digits_mlp", "resistive"), ("DigitsCircuit", "drn")])
def test_the_command(tmp_path: Path, model: str, energy: str) -> None:
    out = tmp_path / "block.cir"
    args = ["spice", f"ffebm_compiler.demo.models:{model}", "--input", "1x1x8x8", "--energy", energy]
    done = CliRunner().invoke(main, [*args, "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = simulated(out)
    expected = {m[1]: float(m[2]) for m in re.finditer(r"expected v\((\w+)\) = (\S+)", out.read_text())}
    assert worst(found, expected) <= 1e-3
    assert CliRunner().invoke(main, [*args, "--out", str(out)]).exit_code == 2  # it is there already


def test_lines_that_no_elements_make() -> None:
    model, x, options = drn_networks.made("one hidden")
    hybrid = ffebm.convert(model, x, energy="drn", **options)
    (stage, *_) = spice.circuit_of_block(hybrid, "block_1", (x,)).stages
    with pytest.raises(ffebm.UnsupportedError, match=r"of layer 'layers.0' has steeper lines outside than inside"):
        circuit_elements.characteristic(stage, Lines((-1.0, 1.0), (1.0, 0.5, 1.0), -1.0))


class Twice(nn.Module):
    """A layer that runs twice, on tiles of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        for layer in (self.a, self.b, self.c):
            ffebm.init.conductances_(layer.weight, torch.Generator().manual_seed(layer.in_features))

    def forward(self, x: Tensor) -> Tensor:
        value = torch.relu(self.a(torch.cat((x, -x), -1)))
        return self.c(torch.relu(self.b(torch.relu(self.b(value)))))


def test_the_circuit_of_devices_has_what_they_hold() -> None:
    x = noise(3, 4).double()
    solver = ffebm.GaussSeidel(rtol=1e-13)
    devices = ffebm.Devices(programming=0.05)
    hybrid = ffebm.convert(seeded(Twice).double(), x, energy="drn", devices=devices, solver=solver)
    hybrid(x).square().sum().backward()
    torch.optim.SGD(hybrid.parameters(), 0.1).step()
    hybrid(x[:1])
    circuit = spice.circuit_of_block(hybrid, "block_1", (x,))
    for ours, state in zip(hybrid.blocks[0].states, spice.settled(circuit, {}), strict=True):
        torch.testing.assert_close(state, ours[0].flatten(), rtol=1e-8, atol=1e-9)
    first, second = (stage.couplings[0].plus for stage in circuit.stages[1:3])
    assert not torch.allclose(first, second)  # devices of their own
    power = hybrid.power_report(x).blocks[0]
    assert power.inputs + power.biases == pytest.approx(power.total)
