"""The names that Netron shows: paths of modules, not counters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import seeded
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.demo.models import DigitsCNN
from ffebm_compiler.onnx.functions import inner_paths

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def nodes_of(nodes: object) -> list[onnx.NodeProto]:
    found = []
    for node in nodes:  # type: ignore[attr-defined]
        found.append(node)
        for attribute in node.attribute:
            found += nodes_of(attribute.g.node)
    return found


@pytest.mark.parametrize("fold", [False, True])
def test_nodes_are_named_by_their_modules(tmp_path: Path, fold: bool) -> None:
    model = DigitsCNN().eval()
    hybrid = ffebm.convert(model, torch.randn(2, 1, 8, 8), fold_batchnorm=fold)
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    written = onnx.load(tmp_path / "hybrid.onnx")
    names = [node.name for node in nodes_of(written.graph.node)]
    assert "" not in names
    assert len(set(names)) == len(names)
    for block in hybrid.plan.blocks:
        assert f"{block.name}/{'+'.join(block.layers)}" in names
    if not fold:
        assert "layer1.bn1/BatchNormalization" in names
    for function in written.functions:
        inside = [node.name for node in nodes_of(function.node)]
        assert "" not in inside
        assert len(set(inside)) == len(inside)
    if fold:
        (first,) = [function for function in written.functions if function.name.startswith("EnergyBlock_stem_0_")]
        named = {node.name.split("/")[0] for node in nodes_of(first.node) if node.op_type in ("Conv", "Relu")}
        assert named == {"stem.0", "layer1.conv1", "layer1.conv2", "layer2.conv1"}


def test_blocks_of_equal_layers_have_one_function(tmp_path: Path) -> None:
    def made() -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    # No weight of these has a largest singular vector of nearly equal entries, which would take another relaxation.
    model = seeded(lambda: nn.Sequential(*(made() for _ in range(3))), 1).eval()
    hybrid = ffebm.convert(model, torch.randn(2, 8))
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    written = onnx.load(tmp_path / "hybrid.onnx")
    assert len(hybrid.plan.blocks) == 3
    assert [function.name.rsplit("_", 1)[0] for function in written.functions] == ["EnergyBlock_1_3"]


def test_inner_paths() -> None:
    assert inner_paths(["layers.0.up", "layers.0.down"]) == ["up", "down"]
    assert inner_paths(["a.b", "a"]) == ["a.b", "a"]
    assert inner_paths(["head"]) == ["head"]
    assert inner_paths(["a.b.c"]) == ["c"]
