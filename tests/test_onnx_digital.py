"""The digital parts as ONNX files, the manifest that joins them, and their execution."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.onnx import load, run
from ffebm_compiler.onnx.manifest import seal
from ffebm_compiler.onnx.steps import Steps
from ffebm_compiler.runtime.solvers.relaxation import stopping_rule


class SequenceFirst(nn.Module):
    """An encoder layer whose batch is dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _sequence_first() -> tuple[ffebm.HybridModel, Tensor]:
    x = networks.noise(5, 4, 8)
    model = networks.seeded(SequenceFirst).eval()
    return ffebm.convert(model, x, dynamic_shapes=({1: torch.export.Dim.DYNAMIC},)), x


def _default(make: Callable[[], tuple[nn.Module, Tensor]]) -> tuple[ffebm.HybridModel, Tensor]:
    model, x = make()
    return ffebm.convert(model, x), x


NETWORKS: dict[str, tuple[Callable[[], tuple[ffebm.HybridModel, Tensor]], int]] = {
    "cnn": (lambda: _default(networks.digits_cnn), 0),
    "transformer": (lambda: _default(lambda: networks.transformer(0.1)), 0),
    "sequence_first": (_sequence_first, 1),
    "mlp": (lambda: _default(networks.mlp), 0),
    "slopes": (lambda: _default(lambda: (networks.seeded(networks.Slopes).eval(), networks.noise(3, 2, 5, 5))), 0),
    "experts": (lambda: networks.converted("experts", nn.Tanh), 0),
}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    build, batch_dim = NETWORKS[request.param]
    hybrid, x = build()
    folder = tmp_path_factory.mktemp("onnx") / request.param
    assert hybrid.export_onnx(folder, parts="digital") == folder
    return request.param, hybrid, x, batch_dim, folder


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[ffebm.HybridModel, Tensor, Path]:
    hybrid, x = _default(networks.digits_cnn)
    folder = tmp_path_factory.mktemp("onnx") / "cnn"
    hybrid.export_onnx(folder, parts="digital")
    return hybrid, x, folder


@pytest.fixture
def folder(cnn: tuple[ffebm.HybridModel, Tensor, Path], tmp_path: Path) -> Path:
    """A copy of the exported CNN that a test may damage."""
    target = tmp_path / "cnn"
    target.mkdir()
    for file in cnn[2].iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def batch_of(x: Tensor, batch_dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[batch_dim] = size
    return networks.noise(*shape, seed=size)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], sealed: bool = True) -> None:
    """Change the manifest; `sealed` also renews its digest, as a careful forger would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if sealed:
        manifest["sha256"] = seal(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("size", [1, 7])
def test_each_part_in_onnxruntime_is_the_torch_part(exported: Any, size: int) -> None:
    _, hybrid, x, batch_dim, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    parts = [step for step in manifest["steps"] if step["kind"] == "feedforward"]
    assert {part["name"] for part in parts} == set(hybrid.feedforward_blocks)
    record: dict[str, tuple[tuple[Any, ...], tuple[Tensor, ...]]] = {}
    hooks = [
        part.register_forward_hook(lambda _, given, results, name=name: record.update({name: (given, results)}))
        for name, part in hybrid.feedforward_blocks.items()
    ]
    with torch.no_grad():
        hybrid(batch_of(x, batch_dim, size))
    for hook in hooks:
        hook.remove()
    steps = {step.name: step for step in Steps.of(hybrid).steps}
    for part in parts:
        given, expected = record[part["name"]]
        feed = {
            operand.value.name: tensor.contiguous().numpy()
            for operand, tensor in zip(steps[part["name"]].operands, given, strict=True)
            if operand.value is not None
        }
        session = onnxruntime.InferenceSession(str(folder / part["file"]))
        found = session.run(part["outputs"], feed)
        for have, want in zip(found, expected, strict=True):
            assert relative(torch.from_numpy(have), want) <= 1e-5


@pytest.mark.parametrize("size", [1, 7])
def test_manifest_runs_as_the_hybrid(exported: Any, size: int) -> None:
    _, hybrid, x, batch_dim, folder = exported
    inputs = batch_of(x, batch_dim, size)
    with torch.no_grad():
        expected = copy.deepcopy(hybrid).eval()(inputs)
    (found,) = run(folder, inputs, threads=1)
    assert relative(found, expected) <= 1e-5


def test_every_file_is_checked_small_and_without_paths(exported: Any) -> None:
    name, _, _, _, folder = exported
    files = sorted(file.name for file in folder.iterdir())
    assert [file for file in files if file.endswith(".data")] == []
    assert (name in ("mlp", "slopes")) == (not any(file.endswith(".onnx") for file in files))
    for file in folder.glob("*.onnx"):
        onnx.checker.check_model(str(file), full_check=True)
        model = onnx.load(file)
        assert (model.opset_import[0].version, model.ir_version) == (20, 10)
        text = file.read_bytes()
        for trace in (b"site-packages", b'File "', b"stack_trace", str(Path(__file__).parent.parent).encode()):
            assert trace not in text


def test_batch_is_named_wherever_it_is(exported: Any) -> None:
    _, _, x, batch_dim, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    (name,) = manifest["inputs"]
    shape = [*x.shape]
    shape[batch_dim] = "batch"
    assert manifest["values"][name] == {"dtype": "float32", "shape": shape}
    for file in folder.glob("*.onnx"):
        for info in onnx.load(file).graph.output:
            assert any("batch" in dim.dim_param for dim in info.type.tensor_type.shape.dim)


def test_manifest_says_what_a_back_end_needs(cnn: tuple[ffebm.HybridModel, Tensor, Path]) -> None:
    hybrid, _, folder = cnn
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["schema"], manifest["opset"]) == ("ffebm-digital", 1, 20)
    assert manifest["hardware"] == hybrid.plan.hardware.to_dict()
    blocks = {step["name"]: step for step in manifest["steps"] if step["kind"] == "energy"}
    assert list(blocks) == [block.name for block in hybrid.blocks]
    tensors = load_file(folder / "weights.safetensors")
    for block in hybrid.blocks:
        entry = blocks[block.name]
        assert entry["layers"] == list(block.layers)
        assert entry["tiles"] == block.plan.tiles
        assert entry["loop_gain"] == block.loop_gain
        assert entry["scales"] == list(block.module.scales)
        for operand, weight in zip(entry["weights"], block.weights, strict=True):
            assert torch.equal(tensors[operand["tensor"]], weight)
    known = set(manifest["inputs"])
    for step in manifest["steps"]:  # the order is one in which everything is there when it is read
        read = step["inputs"] if step["kind"] == "feedforward" else [item["value"] for item in step["inputs"]]
        assert set(read) <= known <= set(manifest["values"])
        known |= set(step["outputs"])


def test_blocks_stop_by_the_runtimes_rule(exported: Any) -> None:
    manifest = json.loads((exported[-1] / "manifest.json").read_text())
    for step in manifest["steps"]:
        if step["kind"] == "energy":
            settling = step["settling"]
            earliest, factor = stopping_rule(settling["rtol"], settling["contraction"], omega=settling["relaxation"])
            assert settling["min_sweeps"] == earliest
            assert settling["largest_change"] == pytest.approx(settling["rtol"] / (factor or 1))


def test_parts_are_named_after_what_they_compute(cnn: tuple[ffebm.HybridModel, Tensor, Path]) -> None:
    assert (cnn[2] / "digital_1_batch_norm_relu.onnx").is_file()
    kinds = {node.op_type for node in onnx.load(cnn[2] / "digital_1_batch_norm_relu.onnx").graph.node}
    assert {"BatchNormalization", "Relu"} <= kinds
    (norm,) = (
        node
        for node in onnx.load(cnn[2] / "digital_1_batch_norm_relu.onnx").graph.node
        if node.op_type == "BatchNormalization"
    )
    assert {item.key: item.value for item in norm.metadata_props} == {"ffebm.module": "bn"}


def test_train_mode_hybrid_exports_in_eval_mode_and_is_left_alone(
    cnn: tuple[ffebm.HybridModel, Tensor, Path], tmp_path: Path
) -> None:
    hybrid = copy.deepcopy(cnn[0])
    hybrid.train()
    before = {key: value.clone() for key, value in hybrid.state_dict().items()}
    with pytest.warns(ffebm.FFEBMWarning, match=r"is in train mode \(batch_norm of \w+.*call hybrid.eval\(\)"):
        hybrid.export_onnx(tmp_path / "out", parts="digital")
    assert all(module.training for module in hybrid.modules() if isinstance(module, nn.BatchNorm2d))
    assert all(torch.equal(value, before[key]) for key, value in hybrid.state_dict().items())
    with torch.no_grad():
        expected = cnn[0](cnn[1])
    assert relative(run(tmp_path / "out", cnn[1])[0], expected) <= 1e-5


def test_trained_weights_are_the_ones_exported(cnn: tuple[ffebm.HybridModel, Tensor, Path], tmp_path: Path) -> None:
    hybrid = copy.deepcopy(cnn[0])
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(1.1)
    hybrid.recertify()
    hybrid.export_onnx(tmp_path / "out", parts="digital")
    with torch.no_grad():
        assert relative(run(tmp_path / "out", cnn[1])[0], hybrid(cnn[1])) <= 1e-5


def test_inputs_by_name_as_arrays_and_in_sequence(cnn: tuple[ffebm.HybridModel, Tensor, Path]) -> None:
    _, x, folder = cnn
    export = load(folder, threads=1)
    (expected,) = export.run(x)
    assert torch.equal(export.run([x])[0], expected)
    assert torch.equal(export.run(x.numpy())[0], expected)
    assert torch.equal(export.run({"x": np.asarray(x)})[0], expected)


def test_an_earlier_export_is_replaced(cnn: tuple[ffebm.HybridModel, Tensor, Path], folder: Path) -> None:
    (folder / "digital_1_batch_norm_relu.onnx").write_bytes(b"")
    cnn[0].export_onnx(folder, parts="digital")
    assert run(folder, cnn[1])
    assert [item.name for item in folder.parent.iterdir()] == ["cnn"]


def test_a_folder_with_other_files_is_refused(cnn: tuple[ffebm.HybridModel, Tensor, Path], folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ffebm.ExportError, match=r"holds files that are not of an earlier export"):
        cnn[0].export_onnx(folder, parts="digital")
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(ffebm.ExportError, match=r"is a file, and parts='digital' writes a folder"):
        cnn[0].export_onnx(folder / "notes.txt", parts="digital")


@pytest.mark.parametrize("parts", [None, "digital"])
def test_an_unwritable_path_is_an_error(
    cnn: tuple[ffebm.HybridModel, Tensor, Path], tmp_path: Path, parts: str | None
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ffebm.ExportError, match=r"cannot be written to .*file.*choose a path"):
        cnn[0].export_onnx(tmp_path / "file" / "out", parts=parts)


def test_a_failed_export_leaves_nothing(
    cnn: tuple[ffebm.HybridModel, Tensor, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ffebm_compiler.onnx.digital.to_bytes", fail)
    with pytest.raises(ffebm.ExportError, match="No space left on device"):
        cnn[0].export_onnx(tmp_path / "out", parts="digital")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(
    cnn: tuple[ffebm.HybridModel, Tensor, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ffebm.ExportError, match=rf"package '{name}'.*pip install 'ffebm-compiler\[onnx\]'"):
        cnn[0].export_onnx(tmp_path / "out", parts="digital")


def test_an_operation_without_onnx_form_is_named(tmp_path: Path) -> None:
    class Special(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.special.i1e(self.first(x)))

    hybrid = ffebm.convert(networks.seeded(Special).eval(), networks.noise(3, 4))
    for parts in ("digital", None):
        with pytest.raises(ffebm.ExportError, match=r"digital_1 \(.*i1e of the model\) cannot be written as ONNX"):
            hybrid.export_onnx(tmp_path / "out", parts=parts)


def test_parts_takes_digital_or_nothing(cnn: tuple[ffebm.HybridModel, Tensor, Path], tmp_path: Path) -> None:
    with pytest.raises(ffebm.FFEBMError, match="parts is 'analog'; expected 'digital'"):
        cnn[0].export_onnx(tmp_path / "out", parts="analog")
    with pytest.raises(ffebm.FFEBMError, match=r"^parts is a Tensor; expected 'digital', or nothing"):
        cnn[0].export_onnx(tmp_path / "out", cnn[1])


def test_a_changed_manifest_is_refused(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["steps"].reverse(), sealed=False)
    with pytest.raises(ffebm.ExportError, match=r"manifest.json was changed after the export"):
        load(folder)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/passwd", "..", "a\\b"])
def test_a_path_outside_of_the_folder_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, lambda manifest: manifest["files"].update({name: "0" * 64}))
    with pytest.raises(ffebm.ExportError, match="which is outside of its folder: refused"):
        load(folder)


def test_a_step_that_names_an_unlisted_file_is_refused(folder: Path) -> None:
    step = "../../outside.onnx"
    rewrite(folder, lambda m: next(s for s in m["steps"] if s["kind"] == "feedforward").update(file=step))
    with pytest.raises(
        ffebm.ExportError, match=r"names the file '../../outside.onnx', which the manifest does not list"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "digital_1_batch_norm_relu.onnx"])
def test_a_changed_missing_or_linked_file_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\0" if content[-1:] != b"\0" else content[:-1] + b"\1")
    with pytest.raises(ffebm.ExportError, match=rf"{name} was changed after the export"):
        load(folder)
    path.unlink()
    with pytest.raises(ffebm.ExportError, match=rf"{name} is missing"):
        load(folder)
    (folder.parent / name).write_bytes(content)
    os.symlink(folder.parent / name, path)
    with pytest.raises(ffebm.ExportError, match=r"is missing \(or is a link\)"):
        load(folder)


def test_a_folder_without_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ffebm.ExportError, match=r"manifest.json cannot be read .*export_onnx\(folder"):
        run(tmp_path, torch.zeros(1))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ffebm.ExportError, match="is not JSON"):
        run(tmp_path, torch.zeros(1))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ffebm.ExportError, match="is no manifest of ffebm-compiler"):
        run(tmp_path, torch.zeros(1))


def test_another_schema_is_refused(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest.update(schema=99))
    with pytest.raises(ffebm.ExportError, match="has schema 99, this version reads 1"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("steps"), "is malformed"),
        (lambda m: m["steps"][0]["program"].pop("layers"), "the program of block_1 in the manifest is malformed"),
        (
            lambda m: m["steps"][0]["program"]["layers"][0]["instructions"][0]["operator"].update(kind="os.system"),
            "unknown operator 'os.system'",
        ),
        (lambda m: m["steps"][0].update(scales=[]), "block_1 has 0 scales"),
    ],
)
def test_a_malformed_manifest_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(ffebm.ExportError, match=message):
        load(folder)


def test_a_value_that_nothing_gives_is_refused(folder: Path) -> None:
    rewrite(folder, lambda m: m["steps"][0]["inputs"][0].update(value="nowhere"))
    with pytest.raises(ffebm.ExportError, match="reads 'nowhere', which no step computes"):
        run(folder, torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 1, 8, 9), r"input 'x' has shape \(2, 1, 8, 9\), expected \(batch, 1, 8, 8\)"),
        (torch.zeros(1, 8, 8), r"input 'x' has shape \(1, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "input 'x' has dtype torch.int64, expected torch.float32"),
        ([], r"takes 1 inputs \(x\), got 0 tensors"),
        ({"y": torch.zeros(2, 1, 8, 8)}, r"takes 1 inputs \(x\), got y"),
        (None, r"inputs is a NoneType; expected a tensor or an array, a sequence of them in the order x, or"),
        ("x", r"inputs is a str; expected a tensor"),
        ([None], r"input 'x' is a NoneType that is no tensor of numbers"),
        ([{"x": torch.zeros(2, 1, 8, 8)}], r"input 'x' is a dict that is no tensor of numbers; .* one by one"),
        ([[[1.0], [1.0, 2.0]]], r"input 'x' is a list that is no tensor of numbers"),
        (torch.zeros(2, 1, 8, 8).to_sparse(), r"input 'x' is a sparse tensor, expected a dense one"),
    ],
)
def test_wrong_inputs_are_refused(cnn: tuple[ffebm.HybridModel, Tensor, Path], inputs: Any, message: str) -> None:
    with pytest.raises(ffebm.ExportError, match=message):
        run(cnn[2], inputs)
