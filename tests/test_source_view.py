"""A hybrid looks like its source to tools: signature, attributes, names of modules."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import UnsupportedError


class Pixels(nn.Module):
    """A forward with defaults, a property, methods and a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.config = {"classes": 4}
        self.main_input_name = "pixels"

    @property
    def dtype(self) -> torch.dtype:
        return self.a.weight.dtype

    def twice(self, pixels: Tensor) -> Tensor:
        return self(self.a(pixels)) if pixels.dim() == 1 else 2 * self(pixels)

    @staticmethod
    def classes() -> int:
        return 4

    def forward(self, pixels: Tensor, scale: float = 1.0, labels: Tensor | None = None) -> object:
        out = self.b(torch.tanh(self.a(pixels))) * scale
        return out if labels is None else (F.cross_entropy(out, labels), out)


@pytest.fixture
def hybrid() -> ffebm.HybridModel:
    return ffebm.convert(seeded(Pixels), noise(3, 8), feedback=0.9)


def test_forward_has_the_signature_of_the_source_in_copies_too(hybrid: ffebm.HybridModel) -> None:
    stored = io.BytesIO()
    torch.save(hybrid, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    expected = inspect.signature(Pixels().forward)
    x = noise(5, 8)
    for model in (hybrid, copy.deepcopy(hybrid), copy.copy(hybrid), loaded):
        assert inspect.signature(model.forward) == expected
        assert inspect.signature(model) == expected
        assert model.forward.__self__ is model
        torch.testing.assert_close(model(x), hybrid(x))
    changed = copy.deepcopy(hybrid)
    with torch.no_grad():
        changed.get_parameter("b.bias").add_(1.0)
    assert (changed(x) - hybrid(x)).abs().min() > 0.5


def test_attributes_are_the_sources_and_methods_run_the_hybrid(hybrid: ffebm.HybridModel) -> None:
    assert hybrid.config == {"classes": 4}
    assert hybrid.main_input_name == "pixels"
    assert hybrid.classes() == 4
    assert hybrid.dtype is torch.float32
    assert hybrid.double().dtype is torch.float64
    x = noise(3, 8).double()
    torch.testing.assert_close(hybrid.twice(x), 2 * hybrid(x))
    with pytest.raises(AttributeError, match="neither the hybrid nor its source, a Pixels, has an attribute 'device'"):
        hybrid.device  # noqa: B018
    assert not hasattr(hybrid, "__len__")


def test_a_wrapper_may_replace_forward(hybrid: ffebm.HybridModel) -> None:
    x = noise(3, 8)
    expected = hybrid(x)
    original = hybrid.forward
    hybrid.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)
    torch.testing.assert_close(hybrid(x), 2 * expected)
    del hybrid.forward
    torch.testing.assert_close(hybrid(x), expected)


NAMES = (
    "_ffebm", "_ffebm_", "_source", "_plan", "conversion", "project_to", "recertify_every", "class", "None", "a'b",
    'a"b', "a b", "blocks", "plan", "lowered", "self", "input", "x", "getitem", "1x", "[0]", "forward_", "summary",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_modules_may_have_any_name(name: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model._modules[name] = nn.Linear(8, 8)
    model.add_module("out", nn.Linear(8, 3))
    x = noise(2, 8)
    hybrid = ffebm.convert(model, x, feedback=1e-6)
    hybrid.recertify_every, hybrid.project_to = 7, None
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-4, atol=1e-5)
    hybrid(x).sum().backward()
    assert hybrid.get_parameter(f"{name}.weight").grad is not None
    assert hybrid.plan.blocks[0].layers == (name, "out")
    assert name in str(hybrid.plan)
    assert name in hybrid.summary()
    assert len(hybrid.blocks) == 1
    assert list(hybrid.state_dict()) == list(model.state_dict())
    hybrid.save(tmp_path / "saved")
    loaded = ffebm.load(tmp_path / "saved", model)
    torch.testing.assert_close(loaded(x), hybrid(x))
    assert loaded.recertify_every == 7
    torch.testing.assert_close(copy.deepcopy(hybrid)(x), hybrid(x))


@pytest.mark.parametrize("name", ["_ffebm", "class", 'a"b', "a b"])
def test_modules_of_any_name_are_exported_under_it(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential()
    model._modules[name] = nn.Linear(8, 8)
    model.add_module("norm", nn.LayerNorm(8))
    hybrid = ffebm.convert(model, noise(2, 8))
    hybrid.export_onnx(tmp_path / "model.onnx")
    hybrid.export_onnx(tmp_path / "parts", parts="digital")
    stored = onnx.load(tmp_path / "model.onnx")
    assert {f"{name}.weight", f"{name}.bias"} <= {tensor.name for tensor in stored.graph.initializer}


def test_parameters_and_buffers_at_the_root_may_have_the_names_of_attributes() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_parameter("_plan", nn.Parameter(torch.ones(8)))
            self.register_buffer("conversion", torch.full((8,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self._plan + self.conversion

    model, x = seeded(Root), noise(3, 8)
    hybrid = ffebm.convert(model, x)
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
    assert list(hybrid.state_dict()) == list(model.state_dict())
    assert hybrid.plan.blocks


def test_generation_is_refused_with_what_to_do_instead(hybrid: ffebm.HybridModel) -> None:
    hybrid._source.generation_config = object()
    with pytest.raises(UnsupportedError, match=r"a hybrid has no generate\(\).*to_digital\(\)\.generate"):
        hybrid.generate(noise(1, 8))
    assert hybrid.accepts_loss_kwargs is False


class Scaled(nn.Module):
    """Reads attributes that a person may set."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.factor, self.name, self.table = nn.Linear(4, 4), 2.0, "a", torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.factor * self.table

    def set_factor(self, factor: float) -> None:
        self.factor = factor


def test_setting_an_attribute_that_was_captured_is_told() -> None:
    hybrid = ffebm.convert(Scaled(), torch.randn(3, 4))
    hybrid.factor, hybrid.name, hybrid.another = 2.0, "a", 3  # as they were, or none of the source's
    for set_it in (lambda: setattr(hybrid, "factor", 3.0), lambda: hybrid.set_factor(4.0)):
        with pytest.warns(ffebm.FFEBMWarning, match="attribute 'factor' of the source was captured as it was"):
            set_it()
    assert hybrid.factor == 4.0
    assert hybrid.to_digital().factor == 4.0
    with pytest.warns(ffebm.FFEBMWarning, match="attribute 'table'"):
        hybrid.table = torch.zeros(4)


class Renaming(nn.Module):
    """Has state dicts of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        return {f"model.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state: dict[str, torch.Tensor], *args: object, **kwargs: object) -> object:
        return super().load_state_dict({name.removeprefix("model."): v for name, v in state.items()}, *args, **kwargs)


def test_state_dicts_of_the_sources_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, x = Renaming(), torch.randn(3, 4)
    hybrid = ffebm.convert(source, x, feedback=0.3)
    assert list(hybrid.state_dict()) == list(source.state_dict())
    other = Renaming()
    with torch.no_grad():
        other.last.weight.mul_(3)
    hybrid.load_state_dict(other.state_dict())
    assert torch.equal(hybrid.last.weight, other.last.weight)
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.3, rel=1e-3)
    hybrid.set_feedback(0.1)
    state, before = hybrid.state_dict(), hybrid(x)
    hybrid.set_feedback(0.4)
    hybrid.load_state_dict(state)
    assert torch.equal(hybrid(x), before)
    hybrid.save(tmp_path / "hybrid")
    assert torch.equal(ffebm.load(tmp_path / "hybrid", source)(x), before)
