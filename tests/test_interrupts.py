"""Ctrl-C in every command: exit code 130, no traceback, and what was there before is still there."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FFEBM = Path(sys.executable).with_name("ffebm")

MODEL = """
import os
import signal
import torch
from torch import nn

calls = 0

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        global calls
        calls += 1
        if calls == int(os.environ["INTERRUPTED_CALL"]):
            os.kill(os.getpid(), signal.SIGINT)
        return self.second(torch.relu(self.first(x)))

class Slow(Net):
    def __init__(self):
        os.kill(os.getpid(), signal.SIGINT)
        super().__init__()
"""

COMMANDS = {
    "plan": (),
    "convert": ("--out", "saved"),
    "check": (),
    "draw": ("--out", "page.html"),
    "export": ("--out", "hybrid.onnx"),
    "spice": ("--energy", "resistive", "--out", "block.cir"),
}


def interrupted(folder: Path, *args: str, call: int = 1) -> subprocess.CompletedProcess[str]:
    (folder / "slow_models.py").write_text(MODEL, encoding="utf-8")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "INTERRUPTED_CALL": str(call), "COLUMNS": "120"}
    command = [str(FFEBM), *args]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, cwd=folder, env=environment
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_in_one_line(command: str, tmp_path: Path) -> None:
    options = COMMANDS[command]
    out = tmp_path / options[-1] if options else None
    result = interrupted(tmp_path, command, "slow_models:Net", "--input", "3x4", *options)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    assert out is None or not out.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"slow_models.py", "__pycache__"}


def test_an_older_file_stays(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("older", encoding="utf-8")
    result = interrupted(tmp_path, "draw", "slow_models:Net", "--input", "3x4", "--out", "page.html", "--force")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "older"


def test_while_a_model_is_built(tmp_path: Path) -> None:
    result = interrupted(tmp_path, "plan", "slow_models:Slow", "--input", "3x4")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_while_torch_is_imported(tmp_path: Path) -> None:
    """The first seconds of the command, in which nothing of it runs yet."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPROFILEIMPORTTIME": "1"}
    command = [str(FFEBM), "demo", "--out", "demo"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "torch._" not in process.stderr.readline():  # a line a module that was imported
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
