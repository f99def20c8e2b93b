"""The terminal: widths, colours, JSON of every command, models in files, completion, `ffebm doctor`."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import ffebm_compiler as ffebm
import ffebm_compiler.cli.doctor as doctor
from ffebm_compiler.cli.completion import models, whole_words
from ffebm_compiler.cli.main import main
from ffebm_compiler.demo.models import DigitsCNN
from ffebm_compiler.reports.checks import Agreement, GradientReport
from ffebm_compiler.reports.text import table_text

CNN = ["ffebm_compiler.demo.models:DigitsCNN", "--input", "2x1x8x8", "--fold-batchnorm"]
MLP = ["ffebm_compiler.demo.models:digits_mlp", "--input", "2x1x8x8"]


def done(*args: str, columns: int = 80) -> str:
    result = CliRunner().invoke(main, list(args), prog_name="ffebm", env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: str) -> str:
    result = CliRunner().invoke(main, list(args), prog_name="ffebm")
    assert result.exit_code == 2, result.output
    return result.stderr


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "  " in line.strip() or "─" in line]


# -- widths ----------------------------------------------------------------------------------


def test_tables_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 1, 8, 8)
    hybrid = ffebm.convert(DigitsCNN().eval(), x, fold_batchnorm=True)
    comparison, costs, what_if = hybrid.compare(x), hybrid.cost_report(), hybrid.plan.what_if()
    agreement = {estimator: Agreement(0.999999, 1e-4) for estimator in ("ep", "implicit", "unrolled")}
    report = GradientReport({name: agreement for name, _ in hybrid.named_parameters()})
    for columns in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        for what in (hybrid.plan, hybrid.summary(), comparison, costs, what_if, report):
            lines = table_lines(str(what).split("constants:")[0])
            assert lines
            assert max(map(len, lines)) <= columns, what


def test_columns_that_do_not_fit_are_below_behind_the_first() -> None:
    columns = ["name", *(f"value {index}" for index in range(12))]
    rows = [["a.b", *(str(1000 * index + 123) for index in range(12))]]
    text = table_text("title", columns, rows, width=40)
    assert all(len(line) <= 40 for line in text.splitlines())
    assert text.count("a.b") > 1
    for cell in rows[0][1:]:
        assert text.split().count(cell) == 1
    assert table_text("", columns, rows, width=400).count("a.b") == 1


def test_long_words_are_broken_and_numbers_never() -> None:
    text = table_text("", ["layers", "count"], [["x" * 100, "123456789"]], width=40)
    assert "123456789" in text
    assert text.count("x") == 100
    assert all(len(line) <= 40 for line in text.splitlines())


def test_paths_are_broken_between_their_parts() -> None:
    paths = "encoder.layer.0.attention.output.dense, encoder.layer.10.intermediate_long.dense"
    text = table_text("", ["block", "layers"], [["block_1", paths]], width=42)
    lines = [line.removeprefix(" block_1").strip() for line in text.splitlines()[2:]]
    assert "".join(lines) == paths.replace(" ", "")
    assert all(line.endswith((".", "_", ",")) for line in lines[:-1])


# -- a real terminal -------------------------------------------------------------------------


def in_a_terminal(*args: str, **variables: str) -> str:
    """The output of the command in a pseudo-terminal of 70 columns."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "70", "TERM": "xterm-256color", **variables}
    for name in {"NO_COLOR", "FORCE_COLOR"} - set(variables):
        environment.pop(name, None)
    command = [sys.executable, "-P", "-m", "ffebm_compiler", *args]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    parts = []
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(leader)
    assert process.wait(120) == 0
    return b"".join(parts).decode()


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
@pytest.mark.slow
def test_colours_are_for_terminals_alone() -> None:
    coloured = in_a_terminal("plan", *CNN)
    assert "\x1b[33mnote" in coloured
    plain = re.sub(r"\x1b\[[01]m", "", in_a_terminal("plan", *CNN, NO_COLOR="1"))
    assert "\x1b" not in plain
    assert "note: 8 batch norms" in plain
    assert max(len(line) for line in plain.splitlines()) <= 70
    assert "\x1b" not in done("plan", *CNN)


# -- JSON ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_command_prints_json(tmp_path: Path) -> None:
    plan = json.loads(done("plan", *CNN, "--json", "--what-if"))
    assert plan["what_if"]["now"]["blocks"] == 3
    plan.pop("what_if")
    assert len(ffebm.Plan.from_dict(plan).blocks) == 3
    reasons = json.loads(done("plan", *CNN, "--json", "--explain", "head"))
    assert reasons["head"].startswith("analog")
    found = json.loads(done("convert", *CNN, "--json", "--costs", "--out", str(tmp_path / "saved")))
    assert [block["sweeps"] for block in found["blocks"]] == list(found["deviation"]["sweeps"].values())
    assert found["costs"]["note"].startswith("modelled")
    assert found["saved"] == str(tmp_path / "saved")
    check = json.loads(done("check", *MLP, "--json"))
    assert check["agreements"][check["worst"]["parameter"]]["ep"]["cosine"] == check["worst"]["cosine"]
    out = str(tmp_path / "p.svg")
    assert json.loads(done("draw", *MLP, "--json", "--out", out)) == {"wrote": out}
    out = str(tmp_path / "m.onnx")
    wrote = json.loads(done("export", *MLP, "--json", "--out", out))
    assert wrote["wrote"] == out
    assert max(wrote["deviations"].values()) <= wrote["tolerance"]
    out = str(tmp_path / "b.cir")
    assert json.loads(done("spice", *MLP, "--energy", "resistive", "--json", "--out", out))["block"] == "block_1"


def test_the_demo_prints_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quick(settings: object, console: object, quiet: bool) -> bool:
        (tmp_path / "results.json").write_text('{"rows": []}', encoding="utf-8")
        return False

    monkeypatch.setattr("ffebm_compiler.demo.main.run_demo", quick)
    result = CliRunner().invoke(main, ["demo", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"rows": []}


# -- models in files -------------------------------------------------------------------------


def test_an_exported_program_is_a_model(tmp_path: Path) -> None:
    model, path = DigitsCNN().eval(), tmp_path / "model.pt2"
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            module.running_mean.normal_()  # type: ignore[operator, union-attr]
    x = torch.randn(2, 1, 8, 8)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), path)
    plan = json.loads(done("plan", str(path), "--json", "--fold-batchnorm"))
    expected = ffebm.plan(model, x, fold_batchnorm=True)
    found = ffebm.Plan.from_dict(plan)
    assert [block.layers for block in found.blocks] == [block.layers for block in expected.blocks]
    assert found.conversions == expected.conversions
    hybrid = ffebm.convert(torch.export.load(path).module(), x, fold_batchnorm=True, feedback=1e-6)
    assert torch.allclose(hybrid(x), model(x), atol=1e-4)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    assert "DigitsCNN" not in done("plan", str(path), "--weights", str(tmp_path / "w.safetensors"))


class Nested(nn.Module):
    """Takes a dictionary, a tensor without dimensions and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, given: dict[str, torch.Tensor], scale: torch.Tensor, power: float, *, mask: torch.Tensor) -> Any:
        return {"y": self.second(torch.relu(self.first(given["a"] + given["b"]))) * scale * power * mask}


def test_an_exported_program_keeps_the_structure_of_its_inputs(tmp_path: Path) -> None:
    args = ({"a": torch.randn(2, 4), "b": torch.randn(2, 4)}, torch.tensor(2.0), 3.0)
    path = tmp_path / "nested.pt2"
    torch.export.save(torch.export.export(Nested().eval(), args, {"mask": torch.ones(2, 3)}), path)
    assert "1 energy block" in done("convert", str(path))
    assert "worst cosine of ep: 1.000000" in done("check", str(path))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(100)])
def test_broken_programs_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.pt2").write_bytes(content)
    command = [sys.executable, "-P", "-m", "ffebm_compiler", "plan", str(tmp_path / "broken.pt2")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert "cannot be read as an exported program" in result.stderr
    assert result.stderr.count("\n") == 1


def test_other_files_are_refused_with_a_way_forward(tmp_path: Path) -> None:
    (tmp_path / "broken.pt2").write_bytes(b"no archive")
    assert "cannot be read as an exported program" in refused("plan", str(tmp_path / "broken.pt2"))
    assert "there is no file missing.pt2: name one that torch.export.save wrote" in refused("plan", "missing.pt2")
    assert "save it by torch.export.save" in refused("plan", "model.onnx")
    assert "name the model, and give this file by --weights" in refused("plan", "model.safetensors")


# -- completion ------------------------------------------------------------------------------


def test_names_of_models_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert models("mypackage:") == []
    named = models("ti")  # what stands behind a lone library too, where it can be loaded
    assert named
    assert all(name.startswith("timm:") for name in named)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert models("ti") == ["timm:"]
    assert models("timm:res") == []


# Words as bash has them in COMP_WORDS, the words that typer gets, and what stands before the last one.
DIVIDED = {
    "a model": (["ffebm", "plan", "timm", ":", "res"], ["ffebm", "plan", "res"], "timm:"),
    "behind the colon": (["ffebm", "plan", "timm", ":"], ["ffebm", "plan", ""], "timm:"),
    "behind a model": (["ffebm", "plan", "a.b", ":", "c", "--inp"], ["ffebm", "plan", "a.b:c", "--inp"], ""),
    "two colons": (["ffebm", "plan", "m", ":", "f", "--input", "x", "=", "2", ":", "int"], None, "x=2:"),
    "a value": (["ffebm", "plan", "--hardware", "=", "cr"], ["ffebm", "plan", "--hardware", "cr"], ""),
    "behind the sign": (["ffebm", "plan", "--hardware", "="], ["ffebm", "plan", "--hardware", ""], ""),
    "quoted": (["ffebm", "plan", "'timm:res"], ["ffebm", "plan", "'timm:res"], ""),
    "nothing yet": (["ffebm", ""], ["ffebm", ""], ""),
}


@pytest.mark.parametrize("case", DIVIDED)
def test_what_bash_divides_is_joined(case: str) -> None:
    given, joined, before = DIVIDED[case]
    environment = {"_FFEBM_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join([*given, "later"])}
    environment["COMP_CWORD"] = str(len(given) - 1)
    whole_words(environment)
    joined = joined or ["ffebm", "plan", "m:f", "--input", "int"]
    assert environment["COMP_WORDS"].split("\n") == joined
    assert environment["COMP_CWORD"] == str(len(joined) - 1)
    assert environment.get("_FFEBM_BASH_BEFORE", "") == before


def test_other_shells_divide_nothing() -> None:
    environment = {"_FFEBM_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "ffebm plan timm:res"}
    whole_words(environment)
    assert list(environment) == ["_FFEBM_COMPLETE", "_TYPER_COMPLETE_ARGS"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes() -> None:
    script = """
        source <(_FFEBM_COMPLETE=source_bash ffebm)
        offers() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _ffebm_completion ffebm; echo "${COMPREPLY[*]}"; }
        offers ffebm plan transformers : gpt2
        offers ffebm plan mine : model --hardware = cross
    """
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    found = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=240
    )
    assert found.stdout.splitlines() == ["gpt2", "crossbar-256 crossbar-64"]


# -- doctor ----------------------------------------------------------------------------------


def test_doctor_says_what_is_here_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = (("numpy", "plots", "arrays"), ("no_such_package", "onnx", "ffebm export"))
    monkeypatch.setattr(doctor, "_OPTIONAL", packages)
    text = done("doctor", columns=120)
    assert f"torch {torch.__version__}" in " ".join(text.split())
    assert "ffebm export: pip install 'ffebm-compiler[onnx]'" in text
    assert text.splitlines()[-1].startswith("test: passed")
    report = json.loads(done("doctor", "--json"))
    by_name = {each["what"]: each["found"] for each in report["optional packages"]}
    assert by_name["no_such_package"] == "missing"
    assert by_name["numpy"] != "missing"


def test_doctor_names_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_OPTIONAL", (("numpy", "plots", "arrays"),))

    def fails(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("ffebm_compiler.cli.doctor.importlib.import_module", fails)
    (found,) = [each for each in doctor.findings()["optional packages"] if each.what == "numpy"]
    assert found.found == "broken"
    assert "Install a build that fits torch" in found.remark


def test_doctor_fails_where_the_test_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(doctor, "_OPTIONAL", ())
    monkeypatch.setattr("ffebm_compiler.cli.doctor.ffebm.convert", fails)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "test: failed. RuntimeError: no kernel" in result.stdout
