"""What a circuit dissipates, against ngspice's voltages at every resistor and against what its sources deliver."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import drn_networks
import pytest
import torch
from networks import CASES, noise
from torch import Tensor, nn

import ffebm_compiler as ffebm

needs_ngspice = pytest.mark.skipif(shutil.which("ngspice") is None, reason="ngspice is not installed")
KINDS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.3),
    "hardtanh": lambda: nn.Hardtanh(-0.2, 0.3),
    "softshrink": lambda: nn.Softshrink(0.1),
}


def dissipated(path: Path) -> float:
    """Σ U²/R over the resistors, and U I over the current sources of limiters, with voltages from ngspice."""
    text = path.read_text()
    elements = re.findall(r"^([RI])\d+ (\w+) (\w+) (\S+)$", text, re.MULTILINE)
    nodes = {node for _, a, b, _ in elements for node in (a, b)} - {"0"}
    path.write_text(text.replace("quit\n", "".join(f"print v({node})\n" for node in sorted(nodes)) + "quit\n"))
    done = subprocess.run(["ngspice", "-b", str(path)], capture_output=True, text=True, timeout=60, check=False)
    volts = {m[1]: float(m[2]) for m in re.finditer(r"v\((\w+)\) = ([-+\d.e]+)", done.stdout)} | {"0": 0.0}
    total = 0.0
    for kind, a, b, value in elements:
        if kind == "R":
            total += (volts[a] - volts[b]) ** 2 / float(value)
        elif a.startswith("t_"):
            total += (volts[a] - volts[b]) * float(value)
    return total


@needs_ngspice
@pytest.mark.parametrize(
    ("case", "kind", "energy"),
    [
        ("mlp", "relu", "resistive"),
        ("branches", "leaky", "resistive"),
        ("projections", "hardtanh", "resistive"),
        ("mlp", "softshrink", "resistive"),
        ("branches", "relu", "unamplified"),
    ],
)
def test_ngspice_dissipates_as_much(tmp_path: Path, case: str, kind: str, energy: str) -> None:
    model, x = CASES[case].make(KINDS[kind])
    model, x = model.double(), x[:1].double()
    hybrid = ffebm.convert(model, x, energy=energy, feedback=0.3, **CASES[case].options)
    report = hybrid.power_report(x, volts=3.0, siemens=1e-4)
    path = hybrid.export_spice(tmp_path / "b.cir", block="block_1", inputs=x, volts=3.0, siemens=1e-4)
    (block,) = report.blocks
    assert block.total == report.total == pytest.approx(dissipated(path), rel=5e-3)
    assert block.inputs + block.biases + block.amplifiers == pytest.approx(block.total)
    assert (block.leaks > 0) == (kind in ("leaky", "softshrink"))
    assert (block.pads > 0) == (energy == "resistive")


@needs_ngspice
@pytest.mark.parametrize("kind", ["one hidden", "two hidden", "convolutional", "residual"])
def test_sources_deliver_what_a_deep_resistive_network_dissipates(tmp_path: Path, kind: str) -> None:
    model, x, options = drn_networks.made(kind)
    hybrid = ffebm.convert(model, x, energy="drn", **options)
    powers = [hybrid.power_report(x[i : i + 1]).blocks[0] for i in range(len(x))]
    for power in powers:
        assert power.amplifiers == power.pads == power.leaks == 0
        assert power.inputs + power.biases == pytest.approx(power.total, rel=1e-9)  # Tellegen's theorem
    path = hybrid.export_spice(tmp_path / "b.cir", block="block_1", inputs=x[:1])
    assert powers[0].total == pytest.approx(dissipated(path), rel=5e-3)


def test_the_report() -> None:
    model, x, options = drn_networks.made("two hidden")
    hybrid = ffebm.convert(model, x, energy="drn", **options)
    report = hybrid.power_report((x,))
    assert (report.samples, report.volts, report.siemens) == (len(x), 5.0, 1e-3)
    double = hybrid.power_report(x, volts=10.0, siemens=2e-3)
    assert double.total == pytest.approx(8 * report.total)  # P goes as V₀² g₀
    text = str(report)
    assert "nodes of at most 5 V, weights of at most 0.001 S, ideal diodes, mean of 5 samples" in text
    assert "block_1" in text
    assert json.loads(json.dumps(report.to_dict()))["unit"] == "W"


@pytest.mark.parametrize(
    ("energy", "inputs", "options", "error", "message"),
    [
        ("resistive", None, {"volts": 0}, ffebm.InputError, "volts is 0; expected a positive number"),
        ("resistive", None, {"siemens": float("nan")}, ffebm.InputError, "siemens is nan; expected a positive number"),
        ("resistive", (), {}, ffebm.InputError, "inputs is empty, so that nothing drives the circuits"),
        ("hopfield", None, {}, ffebm.UnsupportedError, "'hopfield', is not that of a circuit"),
    ],
)
def test_bad_input(energy: str, inputs: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, x = CASES["mlp"].make(nn.ReLU)
    with pytest.raises(error, match=message):
        ffebm.convert(model, x, energy=energy).power_report(x if inputs is None else inputs, **options)


def test_no_circuit_settles_in_blocks_of_one_layer() -> None:
    x: Tensor = noise(2, 4)
    with pytest.raises(ffebm.InputError, match="every block has one layer and no feedback"):
        ffebm.convert(nn.Linear(4, 3), x, energy="drn").power_report(x)
    assert torch.equal(x, noise(2, 4))
