"""Wires and quantisers against CrossSim (Sandia), where it is installed. It is not on PyPI:

pip install git+https://github.com/sandialabs/cross-sim    # 3.2.0 was compared
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from networks import noise

from ffebm_compiler.runtime.devices.converters import quantised
from ffebm_compiler.runtime.devices.wires import exact_weights, fast_weights

arrays = pytest.importorskip(
    "simulator.circuits.array.NonInterleaved_InputSource", reason="needs CrossSim, which is not on PyPI"
)
backend = pytest.importorskip("simulator.backend", reason="needs CrossSim, which is not on PyPI")
adcs = pytest.importorskip("simulator.circuits.adc.quantizer_adc", reason="needs CrossSim, which is not on PyPI")


@pytest.fixture(autouse=True)
def _numpy() -> None:
    """CrossSim computes with numpy."""
    backend.ComputeBackend(use_gpu=False)


@pytest.mark.parametrize("resistance", [1e-5, 1e-4, 1e-3])
def test_wires(resistance: float) -> None:
    """The currents of a tile, for every row driven alone."""
    g = noise(24, 16).double().abs()
    g /= g.max()
    solver = arrays.NoninterleavedInputSourceArray.__new__(arrays.NoninterleavedInputSourceArray)
    vars(solver).update(
        Rp_row_norm=resistance,
        Rp_col_norm=resistance,
        Rp_row_terminal_norm=0.0,
        Rp_col_terminal_norm=0.0,
        Rp_in_mat=None,
        Rp_out_mat=None,
        useMask=False,
        fast_matmul=False,
        Niters_max=10000,
        Verr_th=1e-13,
        hide_convergence_msg=True,
        Verr_matmul_criterion="max_max",
        interleaved=False,
        gamma=0.9,
        nonlinear_IV=False,
    )
    own = exact_weights(g, resistance)
    for row, volts in enumerate(torch.eye(24, dtype=torch.float64)):
        found = torch.as_tensor(solver.iterative_solve(g.T.numpy().copy(), volts.numpy()))
        assert float((found - own[row]).abs().max()) < 1e-9
    assert float((fast_weights(g, resistance) - own).norm() / own.norm()) < 0.02


@pytest.mark.parametrize("bits", [3, 8])
def test_quantisers(bits: int) -> None:
    converter = adcs.QuantizerADC.__new__(adcs.QuantizerADC)
    settings = SimpleNamespace(stochastic_rounding=False)
    vars(converter).update(bits=bits, levels=2**bits, min=0.0, max=1.3, range=1.3, adc_params=settings)
    value = noise(4000).double()
    found = torch.as_tensor(converter.convert(value.numpy().copy()))
    torch.testing.assert_close(quantised(value, bits, (0.0, 1.3)), found, rtol=0, atol=1e-6)
