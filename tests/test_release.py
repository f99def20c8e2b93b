"""What a release carries beside the code: licences, workflow files, hooks, forms for reports."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    spec = importlib.util.spec_from_file_location("licences", ROOT / "docs" / "licences.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed() -> dict[str, tuple[str, str]]:
    """Name -> licence and who asks for it, as they stand on the page."""
    lines = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {name: (licence, by) for name, licence, by in cells[2:]}


def test_the_page_of_licences_is_that_of_the_installed_packages(licences: ModuleType) -> None:
    page, found = listed(), licences.rows()
    asked = licences.asked()
    # What others pull in differs between systems and versions; what this package asks for does not.
    own = {name: row for name, row in found.items() if name in asked}
    assert {name: page.get(name) for name in own} == own, "run `python docs/licences.py`"
    others = set(page) - set(found) - set(asked)  # those of the extra `wild` are not installed here
    assert not others, "docs/licences.md has packages that nothing asks for"


def test_nothing_that_every_installation_has_is_copyleft_or_unsaid(licences: ModuleType) -> None:
    for name, (licence, by) in listed().items():
        assert "not said" not in licence, name
        if "always" in by:
            assert not re.search(r"GPL|AGPL|SSPL|General Public", licence), f"{name}: {licence}"
    assert licences.licence is not None


def test_licences_of_metadata_in_every_form(licences: ModuleType, tmp_path: Path) -> None:
    from importlib.metadata import Distribution

    def of(*lines: str) -> str:
        folder = tmp_path / f"p{len(list(tmp_path.iterdir()))}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", "Name: p", "Version: 1", *lines, ""]))
        return str(licences.licence(Distribution.at(folder)))

    assert of("License-Expression: MIT", "License: other") == "MIT"
    assert of("Classifier: License :: OSI Approved :: Apache Software License") == "Apache-2.0"
    assert of("Classifier: License :: OSI Approved", "License: BSD 3-Clause License") == "BSD-3-Clause"
    assert of() == "not said in the metadata"


def workflows_linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """What jactionlint says of the workflow files of a folder."""
    command = [Path(sys.executable).parent / "jactionlint"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.skipif(shutil.which("git") is None, reason="jactionlint asks git which files are there")
def test_workflow_files(tmp_path: Path) -> None:
    done = workflows_linted(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(ROOT / ".github", tmp_path / ".github")
    broken = tmp_path / ".github" / "workflows" / "docs.yml"
    broken.write_text(broken.read_text(encoding="utf-8").replace("needs: build", "needs: biuld"), encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    done = workflows_linted(tmp_path)
    assert done.returncode == 1
    assert "biuld" in done.stdout


def jobs(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"])


def test_every_system_and_python_that_is_promised_is_tested() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', pyproject))
    for name, job in (("tests.yml", "matrix"), ("wheels.yml", "install")):
        matrix = jobs(ROOT / ".github" / "workflows" / name)[job]["strategy"]["matrix"]
        assert set(matrix["python"]) == promised
        assert {os.partition("-")[0] for os in matrix["os"]} == {"ubuntu", "macos", "windows"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_of_others_are_pinned_and_jobs_end(path: Path) -> None:
    for name, job in jobs(path).items():
        assert "timeout-minutes" in job, name
        for step in job["steps"]:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", f"a@{'0' * 40}")), step


def test_hooks_run_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^lint: (.+)$", makefile, re.MULTILINE)
    assert found is not None
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"].split()[-1] for repo in config["repos"] for hook in repo["hooks"]]
    assert sorted(entries) == sorted(found[1].split())
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_form_for_defects_asks_for_the_doctor() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*")}
    for name in ("defect", "wish"):
        assert {"name", "description", "body"} <= set(forms[name])
        for field in forms[name]["body"]:
            assert field["type"] in {"textarea", "input", "dropdown", "checkboxes", "markdown"}
            assert field["attributes"]["label"]
    doctor = next(field for field in forms["defect"]["body"] if field.get("id") == "doctor")
    assert "ffebm doctor" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"] is True


def test_security_says_where_to_report() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "Report a vulnerability" in text
    assert "no pickle" in text
