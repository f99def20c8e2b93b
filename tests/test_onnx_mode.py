"""The warning of an export in eval mode of a hybrid in train mode."""

from __future__ import annotations

from pathlib import Path

import networks
import pytest
import torch
from test_merge_modes import FORMS, Net
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.onnx import run as onnx_run
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


class More(nn.Module):
    """Train mode has more: values that later code reads, and outputs."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.form = form

    def forward(self, x: torch.Tensor) -> object:
        h = torch.softmax(self.a(x), -1)
        if self.training:
            more = torch.softmax(2 * h, -1)
        y = torch.softmax(self.b(h), -1)
        if self.form == "value" and self.training:
            y = y + more
        y = self.c(y)
        if self.form == "tuple" and self.training:
            return y, torch.softmax(self.b(h.flip(0)), -1)
        if self.form == "dictionary":
            return {"y": y, "more": [more, y.mean()]} if self.training else {"y": y}
        return y


@pytest.mark.parametrize("form", ["value", "tuple", "dictionary"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.filterwarnings("ignore:the hybrid is in train mode")
def test_what_train_mode_alone_computes_is_left_out(form: str, train: bool, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = More(form), torch.randn(5, 4)
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1)).train(train)
    hybrid.export_onnx(tmp_path / "whole.onnx")
    hybrid.export_onnx(tmp_path / "parts", parts="digital")
    wanted = model.eval()(x)
    wanted = (wanted["y"] if isinstance(wanted, dict) else wanted).detach()
    (whole,) = ort.InferenceSession(tmp_path / "whole.onnx").run(None, {"x": x.numpy()})
    (parts,) = onnx_run(tmp_path / "parts", [x])
    torch.testing.assert_close(torch.as_tensor(whole), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts, wanted, rtol=1e-4, atol=1e-6)


class Counts(nn.Module):
    """Counts its calls."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.layer, self.always = nn.Linear(4, 4), always
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or self.always:
            self.calls += 1
        return self.layer(x) / (1 + self.calls)


@pytest.mark.parametrize("parts", [None, "digital"])
def test_state_that_a_forward_writes_in_eval_mode_is_named(parts: str | None, tmp_path: Path) -> None:
    hybrid = ffebm.convert(Counts(always=True).eval(), torch.randn(5, 4))
    with pytest.warns(ffebm.FFEBMWarning, match="forward writes 'calls' at every call, which the export does not"):
        hybrid.export_onnx(tmp_path / ("parts" if parts else "whole.onnx"), parts=parts)
    ffebm.convert(Counts(always=False).eval(), torch.randn(5, 4)).export_onnx(tmp_path / "other.onnx")


def test_inputs_that_the_forward_writes_are_named_and_stay_as_they_are(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            before = self.a(x)
            x += 1
            return before * x

    x = torch.randn(4, 6)
    hybrid = ffebm.convert(Shifted(), x).eval()
    with pytest.warns(ffebm.FFEBMWarning, match=r"forward writes into its inputs \('x'\), which the export does not"):
        hybrid.export_onnx(tmp_path / "parts", parts="digital")
    (found,) = onnx_run(tmp_path / "parts", [x])
    torch.testing.assert_close(torch.as_tensor(found), hybrid(x.clone()), rtol=1e-4, atol=1e-4)
