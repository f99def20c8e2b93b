"""The faulty weight-gradient kernel of oneDNN is never reached; see runtime/program/pointwise.py.

Everything runs in processes of their own: the fault kills or hangs, and the instruction set is chosen at import.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent / "narrow_pointwise.py"
CASE = re.compile(
    r"jit_(?:bf16_)?1x1:[^,]*,backward_weights,src:\w+::blocked:acdb.*,mb\d+_ic(\d+)oc\d+_.*kh1sh(\d+).*kw1sw(\d+)"
)

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="the fault is in oneDNN's kernels for x86",
)


def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A child without AVX-512, and the calls of the faulty kernel that oneDNN reports."""
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=env,
    )
    found = [
        line
        for line in done.stdout.splitlines()
        if (case := CASE.search(line)) and int(case[1]) < 16 and (int(case[2]) > 1 or int(case[3]) > 1)
    ]
    return done, found


def test_the_report_of_onednn_shows_the_case() -> None:
    done, found = run("the case itself")
    assert done.returncode == 0, done.stderr[-2000:]
    assert found, done.stdout[-2000:]


@pytest.mark.slow
def test_narrow_strided_pointwise_convolutions_without_avx512() -> None:
    done, found = run()
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    assert not found, found[0]
    assert "compared 192 36 8" in done.stdout
