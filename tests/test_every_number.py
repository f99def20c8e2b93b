"""`make numbers`: every number has a command that exists, an interrupted run goes on, and the page is the tool's."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xdist.plugin

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import every_number
from number_children import processes
from number_commands import COMMANDS, ROOT, Command
from number_page import NOT_MEASURED, page
from number_targets import Number, least, most

NAMES = [pytest.param(name, id=name) for name in COMMANDS]


def test_every_value_can_be_written() -> None:
    for number in every_number.NUMBERS:
        assert number.target.text(1.0).startswith("1")


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
    files = every_number.closure(command.files())
    if words[0] == "pytest":
        files.append(Path(str(xdist.plugin.__file__)))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
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
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path)
out = parser.parse_args().out
print("measured")
out.write_text(json.dumps([{"name": "a", "seconds": 3.0}, {"name": "b", "seconds": float(sys.argv[0].endswith("x"))}]))
sys.exit(1)
"""
"""Exit status 1 is that of a missed target."""


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


def test_a_run_counts_only_its_own_results(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert every_number.main([]) == 1
    text = (run / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert "| a step | ≤ 2 s | 3.0 s | **missed** |" in text
    assert "| no step | ≤ 2 s | 0.0 s | met |" in text
    assert "not in the results: IndexError" in text
    assert "- a step (3.0 s). It is slow." in text
    assert "exit" not in text
    assert "ValueError: no such network" in text
    assert "needs no-such-program" in text
    assert "5 numbers: 1 met, 1 missed, 3 not measured." in text
    assert "1 of 3 commands were measured, in one call, from 2" in text
    capsys.readouterr()
    assert every_number.main(["--only", "works"]) == 0
    assert "[1/" not in capsys.readouterr().out  # it has a result already

    script = run / "script.py"
    script.write_text(SCRIPT + "\n# other sources\n", encoding="utf-8")
    assert every_number.main(["--page"]) == 0
    assert f"| a step | ≤ 2 s | {NOT_MEASURED} |" in (run / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert every_number.main(["--page", "--keep"]) == 0
    assert "| a step | ≤ 2 s | 3.0 s | **missed** |" in (run / "docs" / "numbers.md").read_text(encoding="utf-8")


def test_a_run_goes_on_from_the_page_in_another_checkout(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every_number.main([])
    shutil.rmtree(run / "build")
    capsys.readouterr()
    assert every_number.main(["--only", "works"]) == 0
    assert "[1/" not in capsys.readouterr().out
    page_of_now = (run / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert "| a step | ≤ 2 s | 3.0 s | **missed** |" in page_of_now
    assert "1 of 3 commands were measured, in one call, from 2" in page_of_now

    script = run / "script.py"
    script.write_text(SCRIPT + "\n# other sources\n", encoding="utf-8")
    assert every_number.main(["--page", "--keep"]) == 0
    assert "| a step | ≤ 2 s | 3.0 s | **missed** |" in (run / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert every_number.main(["--page"]) == 0
    assert f"| a step | ≤ 2 s | {NOT_MEASURED} |" in (run / "docs" / "numbers.md").read_text(encoding="utf-8")
    assert every_number.main(["--only", "works"]) == 0
    assert "[1/1] works" in capsys.readouterr().out


def test_sources_that_change_while_a_command_runs_give_no_result(run: Path) -> None:
    script = run / "script.py"
    script.write_text(SCRIPT + "pathlib.Path(__file__).write_text('')", encoding="utf-8")
    text = script.read_text(encoding="utf-8").replace("sys.exit(1)", "")
    script.write_text(text, encoding="utf-8")
    assert every_number.main(["--only", "works"]) == 1
    assert "the sources changed while it ran" in (run / "docs" / "numbers.md").read_text(encoding="utf-8")


def test_the_page_names_every_call_commit_and_machine() -> None:
    here = {"processor": "P, 2 cores", "system": "S", "python": "3", "torch": "2"}
    known = {name: Command(f"pytest {name}", 1) for name in ("a", "b", "c")}
    state = {"minutes": 1.5, "load": 0.2, "commit": "111", "date": "D2", "call": "D1", "machine": here}
    found = {"values": {}, "commands": {"a": state, "b": state, "c": {"why": ""}}}
    text = page(found, [], known)
    assert "2 of 3 commands were measured, in one call, from D1 to D2, at commit 111." in text
    assert "On P, 2 cores; S, Python 3, torch 2." in text
    assert "| b | `pytest b` | 1.5 | D2 | 111 | 0.2 |" in text
    other = {**state, "call": "D3", "date": "D4", "commit": "222-dirty", "machine": {**here, "torch": "3"}}
    text = page({**found, "commands": {"a": state, "b": other}}, [], known)
    assert "in 2 calls, from D1 to D4, at commit 111 (1 commands) and 222-dirty (1 commands)." in text
    assert "\nMachine 1 (1 commands): P, 2 cores; S, Python 3, torch 2.\n" in text
    assert "\nMachine 2 (1 commands): P, 2 cores; S, Python 3, torch 3.\n" in text
    assert "| name | command | minutes | finished | commit | machine | load |" in text
    assert "| b | `pytest b` | 1.5 | D4 | 222-dirty | 2 | 0.2 |" in text
    assert "| c | `pytest c` | not measured |  |  |  |  |" in text
    assert "No one commit gave all of these numbers" in text
    assert "`-dirty` marks sources" in text
    assert "No command was measured." in page({"values": {}, "commands": {}}, [], known)


UNITS = (" s", " ms", " min", " GiB")
TIMED = re.compile(r"step.* / |of a step|memory|forward of|ngspice / |torch.export|time of")


def test_commands_that_measure_times_or_fill_two_cores_run_alone() -> None:
    timed = {number.command for number in every_number.NUMBERS if number.target.unit in UNITS}
    timed |= {n.command for n in every_number.NUMBERS if TIMED.search(n.what)}
    wide = {name for name, command in COMMANDS.items() if re.search(r"(-n|--workers|--jobs) [2-9]", command.line)}
    assert len(timed) > 15
    assert len(wide) > 5
    assert {name for name in timed | wide if not COMMANDS[name].alone} == set()


PARTS = """
import argparse, json, os, pathlib, subprocess, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--name")
parser.add_argument("--out", type=pathlib.Path)
options = parser.parse_args()
folder, out, half = options.out.parent, options.out, options.out.with_name("half")
others = [each for each in folder.parent.iterdir() if each != folder]
if options.name.startswith("alone"):
    out.write_text(json.dumps([str(each) for each in others if (each / "here").exists()]))
    sys.exit()
if not half.exists():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    half.with_name("begun").write_text(f"{os.getpid()} {child.pid}")
    half.with_name("begun").rename(half)
    time.sleep(300)
(folder / "here").touch()
other = folder.with_name({"one": "two", "two": "one"}[options.name])
until = time.monotonic() + 120
while not (other / "here").exists() and not (other / "out.json").exists() and time.monotonic() < until:
    time.sleep(0.02)
out.write_text(json.dumps(time.monotonic() < until))
(folder / "here").unlink()
"""
"""`one` and `two` stop in the middle the first time, with a child each in a session of its own; then each waits for the
other. One that is to run alone writes which of them it sees running."""

DRIVER = """
import pathlib, sys
sys.path.insert(0, {benchmarks!r})
import every_number
from number_commands import Command
root = pathlib.Path({root!r})
every_number.COMMANDS = {{
    name: Command(f"python {{root}}/parts.py --name {{name}}", 1, alone=name.startswith("alone"))
    for name in ("alone-1", "one", "alone-2", "two")
}}
every_number.NUMBERS, every_number.ROOT, every_number.FOLDER = [], root, root / "build"
every_number.PAGE = root / "docs" / "numbers.md"
sys.exit(every_number.main(["--jobs", "2"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_commands_at_a_time_end_with_their_run_and_a_second_call_goes_on(tmp_path: Path, how: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "parts.py").write_text(PARTS, encoding="utf-8")
    driver = DRIVER.format(benchmarks=str(ROOT / "benchmarks"), root=str(tmp_path))
    command = [sys.executable, "-P", "-c", driver]
    halves = [tmp_path / "build" / name / "half" for name in ("one", "two")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not all(half.exists() for half in halves) and time.monotonic() < until:
        time.sleep(0.05)
    started = {int(pid) for half in halves for pid in half.read_text(encoding="utf-8").split()}
    assert started <= set(processes())
    first.send_signal(getattr(signal, how))
    _, told = first.communicate(timeout=60)
    while started & set(processes()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not started & set(processes())
    assert not list(tmp_path.glob("build/*/done.json"))
    if how != "SIGKILL":
        assert first.returncode == 130
        assert "goes on from here" in told
        assert "No command was measured." in (tmp_path / "docs" / "numbers.md").read_text(encoding="utf-8")

    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert second.returncode == 0, second.stdout + second.stderr
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("build/*/out.json")}
    assert found == {"one": True, "two": True, "alone-1": [], "alone-2": []}
    known = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("build/*/done.json")}
    assert set(known) == set(found)
    assert len({state["call"] for state in known.values()}) == 1


def test_bad_input(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        every_number.main(["--jobs", "0"])
    assert "--jobs is the number of commands that run at a time: 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        every_number.main(["--only", "no-such-command"])
    assert "no command or subject matches no-such-command" in capsys.readouterr().err


def test_exit_status() -> None:
    assert every_number.crashed(0, "fine") == ""
    assert every_number.crashed(1, "1 of 3 targets missed") == ""
    assert every_number.crashed(1, "Traceback\n  ...\nffebm_compiler.errors.InputError: no data") != ""
    assert every_number.crashed(-signal.SIGKILL, "") == "exit status -9: "
    assert every_number.crashed(2, "usage") == "exit status 2: usage"
