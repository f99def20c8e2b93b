"""A hybrid under DistributedDataParallel, as examples/train_distributed.py shows it: two real processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from running import torchrun

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_two_processes_train_as_one() -> None:
    printed = torchrun(2, "examples/train_distributed.py", "--epochs", "2", "--check", timeout=240, cwd=ROOT)
    difference = re.search(r"gradients: (\S+) from one process's", printed)
    assert difference is not None, printed
    assert float(difference[1]) < 1e-3
    accuracies = [float(found) for found in re.findall(r"test accuracy (\S+) %", printed)]
    assert len(accuracies) == 2
    assert accuracies[-1] > 80


SAME_FEEDBACK = """
import torch, torch.distributed as dist, torch.nn as nn, ffebm_compiler as ffebm
from torch.nn.parallel import DistributedDataParallel

# In a function: where a wrapper lives as long as the interpreter, gloo's threads do, and the process aborts at exit.
def main():
    torch.manual_seed(0)
    convs = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(128, 4))
    hybrid = ffebm.convert(model, torch.randn(2, 1, 4, 4), feedback=0.5)
    wrapped = DistributedDataParallel(hybrid).train()
    optimizer = torch.optim.RMSprop(wrapped.parameters(), 1e-2)
    torch.manual_seed(dist.get_rank())  # each rank has data of its own
    for _ in range(6):
        optimizer.zero_grad()
        wrapped(torch.randn(4, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    found = [None, None]
    dist.all_gather_object(found, [(block.module.scales, block.module.gain.changes) for block in hybrid.blocks])
    assert found[0] == found[1], found
    assert any(changes >= 5 for _, changes in found[0]), found

dist.init_process_group("gloo")
main()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_all_ranks_hold_the_loop_gain_with_one_feedback(tmp_path: Path) -> None:
    script = tmp_path / "same_feedback.py"
    script.write_text(SAME_FEEDBACK)
    torchrun(2, script, timeout=240)
