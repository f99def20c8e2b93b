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
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.digital_bits import quantisers
from ffebm_compiler.onnx import ARITHMETIC, load, quantise, run
from ffebm_compiler.onnx.execute import session_of


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


def _float_and_simulation(
    model: nn.Module, x: Tensor, digital: tuple[str, ...]
) -> tuple[ffebm.HybridModel, Tensor, Tensor]:
    hybrid = ffebm.convert(model, x[:2], force_digital=digital).eval()
    with torch.no_grad():
        exact = hybrid(x)
        hybrid.set_devices(ffebm.Devices(digital_bits=8))
        hybrid.calibrate_digital(x.split(16))
        return hybrid, exact, hybrid(x)


class _Convolutions(nn.Module):
    """Digital convolutions with a residual sum and pooling, a block of two layers, a digital classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pool = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)
        self.block = nn.Sequential(nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = self.pool(torch.relu(self.b(x) + x))
        return self.head(self.block(x.flatten(1)))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_onnxruntime_computes_what_the_simulation_computes(tmp_path: Path) -> None:
    """Four values in a chain: at least 95 % of the codes are equal, and the others differ by one."""
    x = networks.noise(64, 1, 8, 8)
    hybrid, exact, simulated = _float_and_simulation(networks.seeded(_Convolutions), x, ("a", "b", "head"))
    source = hybrid.export_onnx(tmp_path / "float", parts="digital")
    report = quantise(source, batches=(each for each in x.split(16)), into=tmp_path / "int8", operations=ARITHMETIC)
    (found,) = run(report.folder, x)
    error = _relative(simulated, exact)
    assert _relative(found, exact) == pytest.approx(error, rel=0.3)
    assert _relative(found, simulated) < 0.5 * error < 0.01
    values = {step["name"]: step for step in json.loads((report.folder / "manifest.json").read_text())["steps"]}
    first = values["digital_1"]
    recorded: list[tuple[Tensor, ...]] = []
    hook = hybrid.energy_blocks["block_1"].register_forward_hook(lambda module, args, out: recorded.append(args))
    with torch.no_grad():
        hybrid(x)
    hook.remove()
    computed = load(report.folder).values(x)[first["outputs"][0]]
    quantiser = quantisers(hybrid)["digital_1"]
    limits = [each for each in quantiser.ranges.values() if each is not None][-1]
    off = (computed - recorded[0][0]).abs() / quantiser.levels(limits)[0]
    assert float(off.max()) < 1.01
    assert float((off < 0.5).float().mean()) > 0.95


def test_a_whole_hybrid_in_int8_keeps_its_energy_blocks(tmp_path: Path) -> None:
    x = networks.noise(48, 1, 8, 8)
    hybrid, exact, simulated = _float_and_simulation(networks.seeded(_Convolutions), x, ("a", "b", "head"))
    file = hybrid.export_onnx(tmp_path / "whole.onnx")
    before = file.read_bytes()
    report = quantise(file, batches=[x[:16], x[16:]], into=tmp_path / "int8.onnx", operations=ARITHMETIC)
    assert file.read_bytes() == before
    plain, int8 = onnx.load(file), onnx.load(report.folder)
    assert [item.SerializeToString() for item in int8.functions] == [
        item.SerializeToString() for item in plain.functions
    ]
    assert {item.key: item.value for item in int8.metadata_props} == {p.key: p.value for p in plain.metadata_props}
    assert any(item.data_type == onnx.TensorProto.INT8 for item in int8.graph.initializer)
    found = torch.from_numpy(session_of(report.folder).run(None, {plain.graph.input[0].name: x.numpy()})[0])
    assert _relative(found, exact) == pytest.approx(_relative(simulated, exact), rel=0.3)
    assert _relative(found, simulated) < 0.01
    assert 0 < report.deviation < 0.02
    assert quantise(file, x[:4], operations=ARITHMETIC).folder == file  # in place
    assert file.read_bytes() != before
    with pytest.raises(ffebm.ExportError, match=r"takes 1 inputs \(.*\), got 2"):
        quantise(file, [x, x], into=tmp_path / "other.onnx")
    with pytest.raises(ffebm.ExportError, match="does not run on the calibration inputs"):
        quantise(file, x[:, 0], into=tmp_path / "other.onnx")
    with pytest.raises(ffebm.ExportError, match="holds no Sin outside of its energy blocks"):
        quantise(file, x, into=tmp_path / "other.onnx", operations=["Sin"])
    assert not (tmp_path / "other.onnx").exists()


def test_calibration_takes_one_batch_or_several(tmp_path: Path) -> None:
    _, x, folder = _exported(tmp_path, "cnn_digital")
    once = quantise(folder, x, into=tmp_path / "once")
    parts = quantise(folder, batches=[x[:5], x[5:]], into=tmp_path / "parts")
    for name in ("once", "parts"):
        (file,) = (tmp_path / name).glob("*.onnx")
        model = onnx.load(file)
        scales = {item.name: item for item in model.graph.initializer if item.name.endswith("_scale")}
        if name == "once":
            wanted = scales
    assert {name: item.SerializeToString() for name, item in scales.items()} == {
        name: item.SerializeToString() for name, item in wanted.items()
    }
    assert parts.deviation >= 0.5 * once.deviation
    with pytest.raises(ffebm.ExportError, match="either as `inputs`, one batch, or as `batches`"):
        quantise(folder, x, batches=[x], into=tmp_path / "both")
    with pytest.raises(ffebm.ExportError, match="either as `inputs`, one batch, or as `batches`"):
        quantise(folder, into=tmp_path / "neither")
    with pytest.raises(ffebm.ExportError, match="batches holds no batch"):
        quantise(folder, batches=iter(()), into=tmp_path / "empty")


def test_devices_that_are_only_digital_are_exported_in_float(tmp_path: Path) -> None:
    """The file holds float32, which onnxruntime's quantiser then turns into int8."""
    x = networks.noise(16, 1, 8, 8)
    hybrid, exact, _ = _float_and_simulation(networks.seeded(_Convolutions), x, ("a", "b", "head"))
    (found,) = run(hybrid.export_onnx(tmp_path / "float", parts="digital"), x)
    assert _relative(found, exact) < 1e-5
    hybrid.set_devices(ffebm.Devices(digital_bits=8, read_noise=0.1))
    with pytest.raises(ffebm.ExportError, match="with read_noise, which an ONNX file does not hold"):
        hybrid.export_onnx(tmp_path / "other", parts="digital")
