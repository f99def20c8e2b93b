"""docs/extending.md, followed literally in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
CHANGED = re.compile(r"In `([^`]+)`:|```(diff|python)\n(.*?)```", re.DOTALL)


def apply(text: str, change: str) -> str:
    """A file with one change: lines of its own (led by a space or a minus), and those to add (led by a plus)."""
    lines = change.splitlines()
    before = "".join(line[1:] + "\n" for line in lines if not line.startswith("+"))
    after = "".join(line[1:] + "\n" for line in lines if not line.startswith("-"))
    assert text.count(before) == 1, f"the page shows lines that are {text.count(before)} times in the file:\n{before}"
    return text.replace(before, after)


@pytest.mark.slow
def test_the_page_adds_an_operator(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    package = tmp_path / "ffebm_compiler"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ffebm_compiler", package, ignore=ignored)
    for folder in ("passes", "runtime"):
        shutil.copytree(ROOT / folder, package / folder, ignore=ignored)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=ignored)
    target, script = None, ""
    for place, language, code in CHANGED.findall(PAGE.read_text(encoding="utf-8")):
        if place:
            inside = place if place.startswith(("ffebm_compiler", "tests")) else f"ffebm_compiler/{place}"
            target = tmp_path / inside
        elif language == "diff":
            assert target is not None
            target.write_text(apply(target.read_text(encoding="utf-8"), code), encoding="utf-8")
        else:
            script = code
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("-c", f"import ffebm_compiler\nassert ffebm_compiler.__file__.startswith({str(package)!r})\n{script}")
    chosen = "test_wiring_operators or test_every_operator_has_its_rows"
    run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "tests/test_operators.py",
        "-k",
        chosen,
    )
