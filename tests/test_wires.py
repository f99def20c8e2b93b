"""Wires with resistance: the exact solution of a tile against ngspice and nodes, and the fast one against the exact."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import noise
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, EquilibriumPropagation, Hardware
from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.devices.array import Array
from ffebm_compiler.runtime.devices.tiling import Tiling
from ffebm_compiler.runtime.devices.wires import exact_weights, fast_weights


def _conductances(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _nodal(g: Tensor, resistance: float) -> Tensor:
    """M from the matrix of all 2NM node voltages, written down element by element."""
    rows, cols = g.shape
    y = 1 / resistance
    count = rows * cols
    matrix, sources = np.zeros((2 * count, 2 * count)), np.zeros((2 * count, rows))

    def connect(a: int, b: int | None, conductance: float) -> None:
        matrix[a, a] += conductance
        if b is not None:
            matrix[b, b] += conductance
            matrix[a, b] -= conductance
            matrix[b, a] -= conductance

    for i in range(rows):
        for j in range(cols):
            row, col = i * cols + j, count + i * cols + j
            connect(row, col, float(g[i, j]))
            connect(row, row - 1 if j else None, y)
            if not j:
                sources[row, i] = y
            connect(col, col + cols if i < rows - 1 else None, y)
    voltages = np.linalg.solve(matrix, sources)
    return torch.tensor(y * voltages[count + (rows - 1) * cols :].T)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), cols=st.integers(1, 9), resistance=st.sampled_from([1e-5, 1e-3, 0.1, 1.0]))
def test_exact_weights_are_those_of_the_nodal_matrix(rows: int, cols: int, resistance: float) -> None:
    g = _conductances(rows, cols, rows * cols)
    assert torch.allclose(exact_weights(g, resistance), _nodal(g, resistance), rtol=1e-8, atol=1e-10)


@pytest.mark.skipif(shutil.which("ngspice") is None, reason="ngspice is not installed")
def test_exact_weights_are_those_of_ngspice(tmp_path: Path) -> None:
    """A tile of 16×16 devices of up to 25 µS with wires of 40 Ω a cell: sensed currents to 1e-6."""
    g, siemens, ohms = _conductances(16, 16), 25e-6, 40.0
    volts = torch.linspace(-0.2, 0.2, 16, dtype=torch.float64)
    lines = ["tile"]
    for i in range(16):
        lines.append(f"VR{i} r{i}_in 0 {float(volts[i]):.17g}")
        lines.append(f"VC{i} c{i}_out 0 0")
        for j in range(16):
            before = f"r{i}_in" if j == 0 else f"r{i}_{j - 1}"
            below = f"c{j}_out" if i == 15 else f"c{j}_{i + 1}"
            lines.append(f"RW{i}_{j} {before} r{i}_{j} {ohms}")
            lines.append(f"RC{i}_{j} c{j}_{i} {below} {ohms}")
            lines.append(f"RD{i}_{j} r{i}_{j} c{j}_{i} {1 / (float(g[i, j]) * siemens):.17g}")
    printed = "\n".join(f"print i(VC{j})" for j in range(16))
    lines += [".control", "set numdgt=15", "op", printed, ".endc", ".end"]
    path = tmp_path / "tile.cir"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = subprocess.run(
        ["ngspice", "-n", "-b", str(path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    currents = [float(x) for x in re.findall(r"i\(vc\d+\) = (\S+)", found.stdout.lower())]
    expected = volts @ exact_weights(g, ohms * siemens) * siemens
    assert len(currents) == 16, found.stdout + found.stderr
    assert torch.allclose(torch.tensor(currents, dtype=torch.float64), expected, rtol=1e-6, atol=1e-13)
    assert float((expected - volts @ g * siemens).norm() / expected.norm()) > 0.05


@pytest.mark.parametrize(("resistance", "limit"), [(1e-5, 3e-6), (1e-4, 3e-4), (1e-3, 2e-2)])
def test_the_error_of_fast_weights(resistance: float, limit: float) -> None:
    """On a tile of 64×64 with signed weights, relative to the weights, and to what the wires take."""
    weights = noise(64, 32).double()
    weights = weights / weights.abs().max()
    g = torch.stack([weights.clamp_min(0), (-weights).clamp_min(0)], -1).reshape(64, 64)
    exact, fast = exact_weights(g, resistance), fast_weights(g, resistance)
    error = float((fast - exact).norm())
    assert error <= limit * float(exact.norm())
    assert error <= 0.05 * float((exact - g).norm())


@pytest.mark.parametrize("shape", [(1, 12), (12, 1)])
def test_lines_that_do_not_meet_are_nearly_exact(shape: tuple[int, int]) -> None:
    """One row or one column has no other line to couple to but through its own cells."""
    g = _conductances(*shape)
    assert torch.allclose(fast_weights(g, 1e-4), exact_weights(g, 1e-4), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wires", ["fast", "exact"])
def test_wires_are_those_of_each_tile(wires: str) -> None:
    """Columns of a pair are neighbours, and each tile has wires of its own."""
    devices = Devices(wire_resistance=1e-3, wires=wires)  # type: ignore[arg-type]
    weights = noise(1, 10, 7).double()
    held = Array("a", Tiling.of(10, 7, tile_rows=6, tile_cols=8), devices).held(weights, 0.0).forward
    solve = exact_weights if wires == "exact" else fast_weights
    for rows in (slice(0, 6), slice(6, 10)):
        for cols in (slice(0, 4), slice(4, 7)):
            part = weights[0, rows, cols]
            share = part / part.abs().max()
            g = torch.stack([share.clamp_min(0), (-share).clamp_min(0)], -1).reshape(share.shape[0], -1)
            lines = solve(g, 1e-3).reshape(*share.shape, 2)
            expected = part.abs().max() * (lines[..., 0] - lines[..., 1])
            assert torch.allclose(held[0, rows, cols], expected, atol=1e-12)


def test_groups_on_one_tile_share_its_wires() -> None:
    devices = Devices(wire_resistance=1e-2)
    weights = noise(2, 3, 2).double()
    shared = Array("a", Tiling.of(3, 2, 2, tile_rows=64, tile_cols=64, groups_per_tile=2), devices).held(weights, 0.0)
    apart = Array("a", Tiling.of(3, 2, 2, tile_rows=64, tile_cols=64), devices).held(weights, 0.0)
    assert float(shared.forward[1].norm()) < float(apart.forward[1].norm())  # further along the row wires


def test_the_feedback_stays_tied() -> None:
    """A linear network is reciprocal: EP follows the exact gradient of the weights between the terminals."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    x = noise(6, 12).double().requires_grad_()
    hybrid = ffebm.convert(model, x.detach(), hardware=Hardware(), feedback=0.3, devices=Devices(wire_resistance=3e-3))
    assert hybrid.energy_blocks["block_1"].program.symmetric
    found = []
    for gradient in (EquilibriumPropagation(1e-4, variant="centered"), "unrolled"):
        hybrid.set_gradient(gradient)
        hybrid.zero_grad(set_to_none=True)
        hybrid(x).square().sum().backward()
        found.append([p.grad.clone() for p in hybrid.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert float((a * b).sum() / (a.norm() * b.norm())) > 0.99999


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wire_resistance": -1.0}, "wire_resistance is -1.0"),
        ({"wire_resistance": 2.0}, "at most 1, r g_max"),
        ({"wires": "none"}, "wires is 'none'; expected 'fast' or 'exact'"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Devices(**values)  # type: ignore[arg-type]
