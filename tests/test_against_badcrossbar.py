"""Wires with resistance against badcrossbar's nodal analysis (Joksas & Mehonic 2020), where it is installed:

pip install --no-deps badcrossbar pathvalidate    # 1.1.0 was compared; the rest that it asks for is for its drawings
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import noise

from ffebm_compiler.runtime.devices.wires import exact_weights, fast_weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("badcrossbar") is None, reason="needs badcrossbar, which builds a drawing library"
)

_SOLVE = """
import json, sys
import numpy
import badcrossbar
found = []
for ohms, segment, volts in json.load(sys.stdin):
    solution = badcrossbar.compute(
        numpy.array(volts), numpy.array(ohms), segment, node_voltages=False, all_currents=False
    )
    found.append(solution.currents.output.tolist())
print(json.dumps(found), file=sys.stderr)
"""


def solved(cases: list[tuple[list[list[float]], float, list[list[float]]]]) -> list[torch.Tensor]:
    """Sensed currents of each case, [sets of voltages, columns]. A process of its own: badcrossbar logs to stdout.

    A case has the resistances of the devices, that of a segment, and voltages [rows, sets].
    """
    command = [sys.executable, "-P", "-W", "ignore", "-c", _SOLVE]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [torch.tensor(each, dtype=torch.float64) for each in json.loads(done.stderr.strip().splitlines()[-1])]


@settings(max_examples=3, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=4, max_size=4),
    exponents=st.lists(st.floats(-5, -1), min_size=4, max_size=4),
)
def test_the_currents_of_a_tile(sizes: list[tuple[int, int]], exponents: list[float]) -> None:
    """Every row driven alone, and all at once with both signs."""
    cases, own = [], []
    for (rows, cols), exponent in zip(sizes, exponents, strict=True):
        g = 0.01 + 0.99 * noise(rows, cols).double().abs().clamp_max(1)
        volts = torch.cat([torch.eye(rows, dtype=torch.float64), torch.linspace(-1, 1, rows).double()[:, None]], 1)
        cases.append(((1 / g).tolist(), 10**exponent, volts.tolist()))
        own.append(volts.T @ exact_weights(g, 10**exponent))
    for found, expected in zip(solved(cases), own, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_what_wires_take_from_a_large_tile() -> None:
    """128×128 devices of up to 25 µS, 1 Ω a segment: fast weights miss at most a tenth of what the wires take."""
    g = 0.01 + 0.99 * noise(128, 128).double().abs().clamp_max(1)
    volts = torch.linspace(-0.2, 0.2, 128, dtype=torch.float64)
    (found,) = solved([((1 / (25e-6 * g)).tolist(), 1.0, volts[:, None].tolist())])
    currents = found[0] / 25e-6
    torch.testing.assert_close(volts @ exact_weights(g, 25e-6), currents, rtol=1e-6, atol=1e-9)
    taken = float((volts @ g - currents).norm())
    assert taken > 0.01 * float(currents.norm())
    assert float((volts @ fast_weights(g, 25e-6) - currents).norm()) < 0.1 * taken
