"""int8 for exported digital parts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import networks
import onnx
import pytest
import torch
from torch import Tensor

import ffebm_compiler as ffebm
from ffebm_compiler.onnx import load, quantise, run


def _exported(folder: Path, name: str) -> tuple[ffebm.HybridModel, Tensor, Path]:
    model, x = networks.digits_cnn() if name.startswith("cnn") else networks.transformer()
    hybrid = ffebm.convert(model, x, force_digital="block*" if name == "cnn_digital" else ())
    return hybrid, networks.noise(16, *x.shape[1:]), hybrid.export_onnx(folder / name, parts="digital")


@pytest.fixture(scope="module", params=["cnn_digital", "transformer"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("int8")
    hybrid, x, source = _exported(folder, request.param)
    return request.param, hybrid, x, source, quantise(source, x, into=folder / "int8")


def test_deviations_are_those_of_the_files(case: Any) -> None:
    _, hybrid, x, source, report = case
    with torch.no_grad():
        expected = hybrid(x)
    (found,) = run(report.folder, x)
    assert float((found - expected).norm() / expected.norm()) == pytest.approx(report.deviation, rel=1e-2)
    assert 1e-5 < report.deviation < 0.03
    assert set(report.parts) == set(hybrid.feedforward_blocks)
    assert torch.equal(run(source, x)[0], load(source).run(x)[0])  # what was quantised is still whole
    manifest = json.loads((report.folder / "manifest.json").read_text())
    assert manifest["int8"] == {"deviation": report.deviation}
    for step in manifest["steps"]:
        if step["kind"] == "energy":
            assert "int8" not in step
            continue
        part = report.parts[step["name"]]
        assert step["int8"] == {"operations": part.operations, "deviation": part.deviation, "reason": part.reason}


def test_parts_hold_what_the_report_says(case: Any) -> None:
    name, _, _, source, report = case
    assert sum(part.operations for part in report.parts.values()) == (5 if name == "cnn_digital" else 4)
    manifest = json.loads((report.folder / "manifest.json").read_text())
    for step in manifest["steps"]:
        if step["kind"] == "energy":
            continue
        part, file = report.parts[step["name"]], report.folder / step["file"]
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(file)
        assert (model.opset_import[0].version, model.ir_version) == (20, 10)
        assert {item.key: item.value for item in model.metadata_props}["ffebm.part"] == step["name"]
        if part.operations:
            assert (part.reason, 0 < part.deviation < 0.05) == ("", True)
            assert any(item.data_type == onnx.TensorProto.INT8 for item in model.graph.initializer)
        else:
            assert part.reason == "left as it is: it holds no Conv, ConvTranspose, Gemm, MatMul"
            assert file.read_bytes() == (source / step["file"]).read_bytes()
    lines = str(report).splitlines()
    assert len(lines) == len(report.parts) + 1
    assert lines[-1] == f"the network: deviation {report.deviation:.1e}"


def test_another_batch_size_runs(case: Any) -> None:
    _, hybrid, x, _, report = case
    with torch.no_grad():
        expected = hybrid(x[:3])
    (found,) = run(report.folder, x[:3])
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_network_with_nothing_to_quantise_is_left_in_place(tmp_path: Path) -> None:
    _, x, folder = _exported(tmp_path, "cnn")
    files = {item.name: item.read_bytes() for item in folder.glob("*.onnx")}
    handlers = list(logging.getLogger().handlers)
    report = quantise(folder, x)
    assert (report.folder, report.deviation) == (folder, 0.0)
    assert all(part.operations == 0 and "left as it is" in part.reason for part in report.parts.values())
    assert {item.name: item.read_bytes() for item in folder.glob("*.onnx")} == files
    assert logging.getLogger().handlers == handlers
    with pytest.raises(ffebm.ExportError, match="is in int8 already: export again and quantise that"):
        quantise(folder, x)


def test_large_parts_and_chosen_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffebm_compiler.onnx.digital._LARGE", 100)
    _, x, folder = _exported(tmp_path, "cnn_digital")
    before = {item.name for item in folder.iterdir()}
    assert any(name.endswith(".data") for name in before)
    report = quantise(folder, x, operations=["Conv", "Add"])
    # Tensors of less than 1 KiB, which they all are in int8, stay in the file.
    assert {item.name for item in folder.iterdir()} == {name for name in before if not name.endswith(".data")}
    (part,) = report.parts.values()
    assert part.operations == 7
    assert 0 < report.deviation < 0.03


def test_bad_calibration_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, x, folder = _exported(tmp_path, "cnn_digital")
    with pytest.raises(ffebm.ExportError, match=r"input 'x' has shape \(16, 8, 8\)"):
        quantise(folder, x[:, 0], into=tmp_path / "int8")
    with pytest.raises(ffebm.FFEBMError, match=r"NaN|not finite"):
        quantise(folder, x * float("nan"), into=tmp_path / "int8")
    monkeypatch.setattr("onnxruntime.quantization.quantize_static", lambda *_, **__: 1 / 0)
    with pytest.raises(ffebm.ExportError, match=r"onnxruntime cannot quantise digital_1 .*leave operations out"):
        quantise(folder, x, into=tmp_path / "int8")
    assert [item.name for item in tmp_path.iterdir()] == ["cnn_digital"]
