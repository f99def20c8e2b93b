"""The warning of an export in eval mode of a hybrid in train mode."""

from __future__ import annotations

from pathlib import Path

import networks
import pytest
import torch
from test_merge_modes import FORMS, Net
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.onnx.mode import warn_of_train_mode


def test_dropout_and_attention_in_train_mode_are_named() -> None:
    model, x = networks.transformer(0.1)
    hybrid = ffebm.convert(model, x).train()
    with pytest.warns(
        ffebm.FFEBMWarning, match=r"in train mode \(.*(dropout|attention) of .* more\), the export is in"
    ):
        warn_of_train_mode(hybrid)


def test_one_module_in_train_mode_is_enough() -> None:
    model, x = networks.digits_cnn()
    hybrid = ffebm.convert(model, x).eval()
    hybrid.get_submodule("bn").train()
    with pytest.warns(ffebm.FFEBMWarning, match=r"\(batch_norm of bn\), the export is in eval mode"):
        warn_of_train_mode(hybrid)


def test_there_is_no_warning_where_both_modes_are_the_same(tmp_path: Path) -> None:
    """Warnings are errors in the tests."""
    for model, x in (networks.mlp(), networks.transformer(0.0)):
        warn_of_train_mode(ffebm.convert(model, x).train())
        warn_of_train_mode(ffebm.convert(model, x).eval())
    tracking = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Conv2d(2, 2, 3))
    warn_of_train_mode(ffebm.convert(tracking.train(), networks.noise(3, 1, 8, 8)))
    hybrid = ffebm.convert(*networks.mlp()).train()
    hybrid.export_onnx(tmp_path / "hybrid.onnx")


@pytest.mark.parametrize("form", ["auxiliary", "counted afterwards", "moving mean", "straight through"])
def test_a_model_with_two_modes_is_exported_in_eval_mode(form: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, inputs = Net(FORMS[form]), torch.randn(5, 8)
    hybrid = ffebm.convert(model, inputs).train()
    state = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}
    with pytest.warns(ffebm.FFEBMWarning, match="mode_switch of the model"):
        hybrid.export_onnx(tmp_path / "hybrid.onnx")
    for name, tensor in hybrid.state_dict().items():
        assert torch.equal(tensor, state[name])
    session = onnxruntime.InferenceSession(tmp_path / "hybrid.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    wanted = hybrid.eval()(inputs).detach()
    assert (torch.from_numpy(found) - wanted).norm() / wanted.norm() < 1e-5
