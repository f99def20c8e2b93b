"""`make numbers`: every number has a command that exists, an interrupted run goes on, and the page is the tool's."""

from __future__ import annotations

import ast
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import every_number
from number_commands import COMMANDS, ROOT, Command
from number_page import NOT_MEASURED, page
from number_targets import Number, least, most

NAMES = [pytest.param(name, id=name) for name in COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_a_command_runs_files_that_exist_with_options_that_they_have(name: str) -> None:
    command = COMMANDS[name]
    words = shlex.split(command.line)
    variables = [word.split("=")[0] for word in words if re.match(r"[A-Z_]+=", word)]
    words = words[len(variables) :]
    if words[0] == "ffebm":
        return  # tests/test_cli.py and test_demo.py run it
    if words[:2] == ["pytest", "tests"]:
        return
    assert command.files()
    sources = "\n".join(path.read_text(encoding="utf-8") for path in every_number.closure(command.files()))
    for word in words:
        path, _, test = word.partition("::")
        if path.endswith(".py"):
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert not test or test in functions
        elif word.startswith("--"):
            assert f'"{word}"' in sources, word
    for variable in variables:
        assert f'"{variable}"' in sources


def test_every_command_has_a_number_and_every_number_a_command() -> None:
    assert {number.command for number in every_number.NUMBERS} == set(COMMANDS)
    whats = [number.what for number in every_number.NUMBERS]
    assert len(whats) == len(set(whats))


def test_the_page_is_what_the_tool_writes() -> None:
    found = json.loads((ROOT / "docs" / "numbers.json").read_text(encoding="utf-8"))
    assert set(found["values"]) <= {number.what for number in every_number.NUMBERS}
    text = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert text == page(found, every_number.NUMBERS, COMMANDS), "docs/numbers.md: run benchmarks/every_number.py --page"


SCRIPT = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path)
out = parser.parse_args().out
half = out.with_name("half")
if not half.exists():
    half.touch()
    time.sleep(60)
print("measured")
out.write_text(json.dumps([{"name": "a", "seconds": 3.0}, {"name": "b", "seconds": float(sys.argv[0].endswith("x"))}]))
sys.exit(1)
"""
"""It stops in the middle the first time. Exit status 1 is that of a missed target."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three commands in a folder: one that works, one that fails, one that lacks a program."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("raise ValueError('no such network')\n", encoding="utf-8")
    commands = {
        "works": Command(f"python {script}", 1),
        "fails": Command(f"python {wrong}", 1),
        "lacks": Command(f"python {script}", 1, needs=("no-such-program",)),
    }
    rows = [
        Number("Time", "a step", most(2, ".1f", " s"), "works", lambda found: found[0]["seconds"], "It is slow."),
        Number("Time", "no step", most(2, ".1f", " s"), "works", lambda found: found[1]["seconds"]),
        Number("Time", "a third step", least(2), "works", lambda found: found[2]["seconds"]),
        Number("Other", "fails", most(2), "fails", lambda found: 0.0),
        Number("Other", "lacks", most(2), "lacks", lambda found: 0.0),
    ]
    (tmp_path / "docs").mkdir()
    for name, value in (
        ("COMMANDS", commands),
        ("NUMBERS", rows),
        ("ROOT", tmp_path),
        ("FOLDER", tmp_path / "build"),
        ("PAGE", tmp_path / "docs" / "numbers.md"),
    ):
        monkeypatch.setattr(every_number, name, value)
    return tmp_path


def test_a_run_that_is_stopped_goes_on_and_counts_only_its_own_results(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(subprocess.Popen[bytes]):
        """Control-C while the script runs."""

        def wait(self, timeout: float | None = None) -> int:
            while waits and "script.py" in str(self.args):
                if (run / "build" / "works" / "half").exists():
                    waits.clear()
                    raise KeyboardInterrupt
                time.sleep(0.05)
            return super().wait(timeout)

    waits = [True]
    monkeypatch.setattr(subprocess, "Popen", Stopped)
    assert every_number.main([]) == 130
    assert "goes on from here" in capsys.readouterr().err
    text = (run / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert f"| a step | ≤ 2 s | {NOT_MEASURED} |" in text

    assert every_number.main([]) == 1
    text = (run / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert "| a step | ≤ 2 s | 3.0 s | **missed** |" in text
    assert "| no step | ≤ 2 s | 0.0 s | met |" in text
    assert "not in the results: IndexError" in text
    assert "- a step (3.0 s). It is slow." in text
    assert "exit" not in text
    assert "ValueError: no such network" in text
    assert "needs no-such-program" in text
    assert "5 numbers: 1 met, 1 missed, 3 not measured in this run." in text
    capsys.readouterr()
    assert every_number.main(["--only", "works"]) == 0
    assert "[1/" not in capsys.readouterr().out  # it has a result already

    script = run / "script.py"
    script.write_text(SCRIPT + "\n# other sources\n", encoding="utf-8")
    assert every_number.main(["--page"]) == 0
    assert "| a step | ≤ 2 s | not measured in this run |" in (run / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert every_number.main(["--page", "--keep"]) == 0
    assert "| a step | ≤ 2 s | 3.0 s | **missed** |" in (run / "docs" / "numbers.md").read_text(encoding="utf-8")


def test_bad_input(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        every_number.main(["--only", "no-such-command"])
    assert "no command or subject matches no-such-command" in capsys.readouterr().err


def test_exit_status() -> None:
    assert every_number.crashed(0, "fine") == ""
    assert every_number.crashed(1, "1 of 3 targets missed") == ""
    assert every_number.crashed(1, "Traceback\n  ...\nffebm_compiler.errors.InputError: no data") != ""
    assert every_number.crashed(-signal.SIGKILL, "") == "exit status -9: "
    assert every_number.crashed(2, "usage") == "exit status 2: usage"
