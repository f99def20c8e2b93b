"""What README.md prints works as printed, and what it names exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ffebm_compiler.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
RUN_ELSEWHERE = {
    "circuit_in_the_loop.py": "test_circuit_in_the_loop.py",
    "train_distributed.py": "test_distributed.py",
    "which_layers.py": "test_planning_scripts.py",
}
"""Examples that another file of tests runs in the same way, and what they print and write there."""
SHARED = ("command_line.py", "digit_tables.py", "experiment_training.py")
"""What other examples import, and nobody runs."""
EXAMPLES = [path for path in SCRIPTS if path.name not in SHARED]


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "error::UserWarning", *args]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)


def shape(text: str) -> list[list[str]]:
    """The words of a text, with cosines and errors left open."""
    return [re.sub(r"\d\.\de-\d\d|[01]\.\d{6}", "#", line).split() for line in text.strip().splitlines()]


def test_example_runs_as_printed(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 12
    done = python("-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    assert shape(done.stdout) == shape(shown)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SHARED)
def test_shared_files_are_imported_by_examples_and_do_nothing_alone(name: str) -> None:
    assert "__main__" not in (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert any(f"from {name.removesuffix('.py')} import" in path.read_text(encoding="utf-8") for path in EXAMPLES)


@pytest.mark.parametrize(("name", "test"), RUN_ELSEWHERE.items())
def test_examples_are_run_elsewhere(name: str, test: str) -> None:
    assert f"examples/{name}" in (ROOT / "tests" / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_commands_stand_on_top_of_examples(path: Path) -> None:
    launcher = "torchrun --nproc-per-node 2" if path.name == "train_distributed.py" else ".venv/bin/python"
    assert f"{launcher} examples/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.name not in RUN_ELSEWHERE], ids=lambda path: path.name
)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    arguments = ["--quick", "--out", str(tmp_path / "results")] if "[--quick]" in text else []
    if path.name == "draw_demo.py":
        arguments = [str(tmp_path / "pictures")]
    if path.name == "gallery.py":
        if shutil.which("chromedriver") is None:
            pytest.skip("no chromedriver")
        arguments = ["resnet18", "--out", str(tmp_path)]
    done = python(str(path), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_quickstart_is_the_printed_example() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    quickstart = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    for line in filter(None, block.splitlines()):
        assert line in quickstart


def test_links_and_pictures_exist() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    assert "docs/pictures/demo-folded.svg" in targets
    for target in [*targets, *re.findall(r"`(tests/\w+\.py|examples/\w+\.py|benchmarks/\w+\.py)`", README)]:
        assert (ROOT / target).is_file(), target


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    lines = re.findall(r"^ffebm (\w+)(.*)$", README, re.MULTILINE)
    assert len(lines) >= 5
    for command, rest in lines:
        # `--weights` and the model are the reader's own: only the options are checked.
        shown = CliRunner().invoke(main, [command, "--help"], env={"COLUMNS": "200", **os.environ})
        assert shown.exit_code == 0
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown.output, f"ffebm {command} has no {option}"


def test_printed_check_command_passes() -> None:
    (line,) = re.findall(r"^ffebm (check .*)$", README, re.MULTILINE)
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code == 0, result.output


def test_demo_table_has_every_row_of_the_demo() -> None:
    demo = (ROOT / "ffebm_compiler" / "demo" / "main.py").read_text(encoding="utf-8")
    table = README[README.index("demo:begin") : README.index("demo:end")]
    rows = re.findall(r'Row\.(?:least|most)\(\s*f?"([^"]+)"', demo)
    assert len(rows) >= 12
    for row in rows:
        assert re.sub(r"^\{.*?\} ", "", row) in table
