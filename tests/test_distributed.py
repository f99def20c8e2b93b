"""A hybrid under DistributedDataParallel, as examples/train_distributed.py shows it: two real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_processes_train_as_one() -> None:
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "examples/train_distributed.py", "--epochs", "2", "--check"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    difference = re.search(r"gradients: (\S+) from one process's", printed)
    assert difference is not None, printed
    assert float(difference[1]) < 1e-3
    accuracies = [float(found) for found in re.findall(r"test accuracy (\S+) %", printed)]
    assert len(accuracies) == 2
    assert accuracies[-1] > 80
