"""Freed memory stays in the process: a step has no page faults once the first ones have run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from torch import nn
import ffebm_compiler as ffebm

torch.set_num_threads(1)
layers = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
x = torch.randn(32, 8, 32, 32)
hybrid = ffebm.convert(nn.Sequential(*layers), x).train()
counts = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    hybrid(x).square().mean().backward()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(counts[3:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the rule is that of glibc's allocator")
def test_a_step_fetches_no_memory_from_the_system() -> None:
    # distributed sets MALLOC_TRIM_THRESHOLD_ in a process that starts its workers. An earlier test may have done so.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", STEPS], capture_output=True, text=True, check=True, timeout=200, env=own
    )
    assert int(done.stdout) < 64  # of the 256 pages of one state
