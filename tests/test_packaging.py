"""The wheel holds every module, also those of passes/ and runtime/, which lie outside of ffebm_compiler/."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TOP_FOLDERS = {
    "ffebm_compiler": "ffebm_compiler",
    "passes": "ffebm_compiler.passes",
    "runtime": "ffebm_compiler.runtime",
}


def packages_on_disk() -> dict[str, str]:
    """Import name -> folder relative to the root, for every folder with an __init__.py."""
    found = {}
    for folder, name in TOP_FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found[".".join((name, *inner))] = init.parent.relative_to(ROOT).as_posix()
    return found


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy of the sources, and the wheel that is built from it.

    A copy, because stale files in the checkout's own build/ would go into them.
    """
    source = tmp_path_factory.mktemp("source")
    modules = [f"{name}.py" for name in PYPROJECT["tool"]["setuptools"]["py-modules"]]
    for name in ("pyproject.toml", "LICENSE", PYPROJECT["project"]["readme"], *modules):
        shutil.copy(ROOT / name, source)
    for folder in TOP_FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.mark.parametrize(
    "command", [("twine", "check", "--strict"), ("check_wheel_contents",)], ids=["twine", "contents"]
)
def test_the_checkers_of_distributions_are_content(distributions: Path, command: tuple[str, ...]) -> None:
    files = sorted(distributions.glob("*.whl" if command[0] == "check_wheel_contents" else "*"))
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command, *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_source_distribution_holds_what_a_build_needs_and_no_tests(distributions: Path) -> None:
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "passes/capture.py", "runtime/block.py"} <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "examples", "docs", "build"))}


def test_every_package_is_listed() -> None:
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == set(packages_on_disk())


def test_every_package_is_found_in_its_folder() -> None:
    mapping = PYPROJECT["tool"]["setuptools"]["package-dir"]
    for name, folder in packages_on_disk().items():
        # setuptools takes the longest listed prefix and appends the rest of the name to its folder.
        prefix = max((p for p in mapping if name == p or name.startswith(p + ".")), key=len)
        rest = name[len(prefix) :].replace(".", "/")
        assert mapping[prefix] + rest == folder


def test_top_level_copies_are_not_importable() -> None:
    code = "import importlib.util as u; print([n for n in ('passes', 'runtime') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_wheel_holds_every_module(wheel: Path) -> None:
    drawing = ROOT / "ffebm_compiler" / "drawing"
    expected = {"ffebm_compiler/py.typed", "ffebm_command.py"}
    expected.update(f"ffebm_compiler/drawing/{file.name}" for file in drawing.glob("*.[cj]s*"))
    for folder, name in TOP_FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            expected.add(name.replace(".", "/") + "/" + file.relative_to(ROOT / folder).as_posix())
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_wheel_names_its_licence_command_and_python(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(info).decode()
        commands = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
        assert info.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "ffebm = ffebm_command:main" in commands


def test_subpackages_import_from_an_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import ffebm_compiler.passes, ffebm_compiler.runtime\n"
        "print(ffebm_compiler.passes.__file__); print(ffebm_compiler.runtime.__file__)"
    )
    # -P: the checkout must not be on the path. That of the wheel comes before the editable install.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for line, part in zip(done.stdout.split(), ("passes", "runtime"), strict=True):
        assert Path(line).parent == tmp_path / "ffebm_compiler" / part


def test_the_command_runs_from_an_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys, runpy; sys.path.insert(0, sys.argv.pop(1))\n"
        "runpy.run_module('ffebm_compiler', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path), "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ffebm-compiler ")
