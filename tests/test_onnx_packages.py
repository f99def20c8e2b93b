"""Versions: of the packages that the ONNX export needs, and of what it writes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import networks
import onnx
import onnxruntime
import pytest
import torch

import ffebm_compiler as ffebm
from ffebm_compiler.onnx import load
from ffebm_compiler.onnx.packages import IR_VERSION, OLDEST, OPSET, _numbers, package

ROOT = Path(__file__).parent.parent


def test_the_extra_and_the_documentation_name_the_oldest_versions() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["onnx"]
    assert extra == [f"{name}>={version}" for name, version in OLDEST.items()]
    text = " ".join((ROOT / "docs" / "onnx.md").read_text(encoding="utf-8").split())
    assert all(f"{name} {version}" in text for name, version in OLDEST.items())
    assert f"opset {OPSET}, ONNX file format {IR_VERSION}" in text


@pytest.mark.parametrize("name", OLDEST)
def test_an_older_package_is_refused_with_a_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert package(name).__name__ == name
    monkeypatch.setattr(package(name), "__version__", "0.4.9")
    message = rf"{name} 0.4.9 is installed, the ONNX export needs {re.escape(OLDEST[name])} or newer: pip install --upg"
    with pytest.raises(ffebm.ExportError, match=message):
        package(name)


def test_export_and_execution_ask_for_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = networks.digits_cnn()
    hybrid = ffebm.convert(model, x)
    folder = hybrid.export_onnx(tmp_path / "out", parts="digital")
    monkeypatch.setattr(onnxruntime, "__version__", "1.21.1")
    with pytest.raises(ffebm.ExportError, match=r"onnxruntime 1.21.1 is installed.*needs 1.22 or newer"):
        load(folder)
    monkeypatch.setattr(onnx, "__version__", "1.18.0")
    for parts in (None, "digital"):
        with pytest.raises(ffebm.ExportError, match=r"onnx 1.18.0 is installed.*needs 1.19 or newer"):
            hybrid.export_onnx(tmp_path / "other", parts=parts)


def test_versions_are_compared_by_their_numbers() -> None:
    assert _numbers("1.9.1") < _numbers("1.19") <= _numbers("1.19.0rc1") < _numbers("1.22")


def test_every_operator_is_of_the_opset_that_is_stated(tmp_path: Path) -> None:
    """Also inside of functions and loops: each operator exists in that opset, and no other domain is asked for."""
    model, x = networks.digits_cnn(torch.nn.GELU)
    hybrid = ffebm.convert(model, x, fold_batchnorm=True)
    proto = onnx.load(hybrid.export_onnx(tmp_path / "hybrid.onnx"))
    assert {item.domain: item.version for item in proto.opset_import} == {"": OPSET, "ffebm.energy": 1}
    assert proto.ir_version == IR_VERSION
    known = {function.name for function in proto.functions}
    pending = [proto.graph.node, *(function.node for function in proto.functions)]
    for function in proto.functions:
        assert {item.domain: item.version for item in function.opset_import} == {"": OPSET}
    count = 0
    while pending:
        for node in pending.pop():
            count += 1
            if node.domain:
                assert node.op_type in known
            else:
                onnx.defs.get_schema(node.op_type, OPSET)
            pending += [item.g.node for item in node.attribute if item.HasField("g")]
    assert count > 100
