"""After `.double()`, `.to(bfloat16)` and `.half()` a hybrid computes what its source computes in that dtype."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import UnsupportedError

ONE = ffebm.Hardware(layers_per_block=1)


class Layers(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.table = torch.linspace(0.0, 300.0, 8) ** 1.5  # no buffer: it stays float32 in the source
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def norm(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    z = y.float()
    z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)
    return self.b(z.to(y.dtype))


def positions(self: nn.Module, x: Tensor) -> Tensor:
    steps = torch.arange(x.shape[1], dtype=torch.float32)[None]
    return self.b(self.a(x) + torch.sin(steps * self.table).to(x.dtype))


def softmax(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(torch.softmax(self.a(x), -1, dtype=torch.float32).type_as(x) + torch.zeros_like(x))


def region(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.relu(self.a(x))
    return self.b(y.to(x.dtype))


def in_place(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x) * 1.0
    y[:, :2] = torch.tanh(y[:, :2].float()).to(y.dtype)
    return self.b(y)


FORWARDS = (norm, positions, softmax, region, in_place)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_casts_are_those_of_the_source_in_every_dtype(
    forward: Callable[[nn.Module, Tensor], Tensor], dtype: torch.dtype
) -> None:
    model = seeded(lambda: Layers(forward))
    hybrid = ffebm.convert(model, noise(4, 8), hardware=ONE)
    x = noise(5, 8, seed=1)
    before = hybrid(x)
    cast = copy.deepcopy(hybrid).to(dtype)
    source = copy.deepcopy(model).to(dtype)
    if dtype is torch.float64:
        source.table = source.table.double()  # constants become wider with the hybrid, never narrower
    expected = source(x.to(dtype))
    found = cast(x.to(dtype))
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hybrid(x), before, rtol=0, atol=0)
    torch.testing.assert_close(cast.float()(x), before, rtol=2e-2, atol=2e-2)


def noisy(self: nn.Module, h: Tensor) -> Tensor:
    return h + torch.rand(h.shape, dtype=h.dtype)


def dropped(self: nn.Module, h: Tensor) -> Tensor:
    """Stochastic depth as torchvision writes it: a factor of the shape alone."""
    return h * torch.empty(h.shape[0], 1, dtype=h.dtype).bernoulli_(0.5)


def widened(self: nn.Module, h: Tensor) -> Tensor:
    return (3 * h.float()).to(h.dtype)


def of_weights(self: nn.Module, h: Tensor) -> Tensor:
    return h @ (2 * self.a.weight.float()).to(h.dtype)


def in_autocast(self: nn.Module, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.a(h).to(h.dtype)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", [noisy, dropped, widened, of_weights, in_autocast], ids=lambda f: f.__name__)
def test_casts_of_what_one_mode_alone_computes(
    part: Callable[[nn.Module, Tensor], Tensor], dtype: torch.dtype, mode: str
) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(part(self, h) if self.training == (mode == "train") else h))

    check(seeded(lambda: Layers(forward)), dtype)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_hybrid_from_a_file_follows_its_dtype(mode: str) -> None:
    check(seeded(lambda: Widened(mode)), torch.float64, filed=True)


def check(model: nn.Module, dtype: torch.dtype, filed: bool = False) -> None:
    hybrid = ffebm.convert(model, noise(4, 8), hardware=ONE)
    if filed:
        hybrid = _filed(hybrid)
    hybrid.to(dtype)
    model.to(dtype)
    x = noise(5, 8, seed=1).to(dtype)
    for train in (True, False):
        found, wanted = (_drawn(network.train(train), x) for network in (hybrid, model))
        assert found.dtype is wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=2e-2 if dtype is torch.bfloat16 else 1e-9, atol=1e-6)


class Widened(Layers):
    """A class, for pickle."""

    def __init__(self, mode: str) -> None:
        super().__init__(widened)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(widened(self, h) if self.training == (self.mode == "train") else h))


def _filed(hybrid: ffebm.HybridModel) -> ffebm.HybridModel:
    file = io.BytesIO()
    torch.save(hybrid, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _drawn(network: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return network(x).detach()


def test_new_tensors_are_made_where_the_hybrid_is() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.a(x) + torch.arange(8, device=x.device)
        return self.b(torch.tanh(h + torch.rand(h.shape, device=x.device) if self.training else h))

    hybrid = ffebm.convert(seeded(lambda: Layers(forward)), noise(4, 8), force_digital="*").to("meta")
    for train in (True, False):
        assert hybrid.train(train)(noise(5, 8).to("meta")).device.type == "meta"


@pytest.mark.parametrize("forward", [norm, region], ids=lambda f: f.__name__)
def test_gradients_of_models_that_cast_are_checked(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    hybrid = ffebm.convert(seeded(lambda: Layers(forward)), noise(4, 8), hardware=ONE)
    report = ffebm.check_gradients(hybrid, noise(5, 8), lambda output: output.square().mean())
    assert report.worst("ep")[1].cosine > 0.9999


def test_a_hybrid_saved_in_another_dtype_casts_as_it_did(tmp_path: Path) -> None:
    model = seeded(lambda: Layers(norm))
    hybrid = ffebm.convert(model, noise(4, 8), hardware=ONE).double()
    hybrid.save(tmp_path / "saved")
    x = noise(5, 8).double()
    torch.testing.assert_close(ffebm.load(tmp_path / "saved", model)(x), hybrid(x), rtol=0, atol=0)


def test_a_layer_in_parts_casts_as_its_source() -> None:
    source, x = seeded(lambda: Layers(norm)), noise(3, 8)
    hybrid = ffebm.convert(source, x, hardware=ffebm.Hardware(8, 8, tiles_per_core=1, layers_per_block=1)).double()
    assert sum("split into" in note for note in hybrid.plan.notes) == 1
    source.double()
    torch.testing.assert_close(hybrid(x.double()), source(x.double()))


def test_a_dtype_in_which_the_model_does_something_else_is_refused() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.a(x).float()
        if x.dtype is torch.float16:
            y = y.clamp(-100, 100)
        return self.b(y.to(x.dtype))

    hybrid = ffebm.convert(seeded(lambda: Layers(forward)), noise(4, 8), hardware=ONE)
    hybrid.to(torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"in torch\.float16 the model runs other operations than in torch\.bfl"):
        hybrid.half()


def test_an_exported_source_can_only_become_wider() -> None:
    model, x = seeded(lambda: Layers(norm)), noise(4, 8)
    exported = torch.export.export(model, (x,), strict=False)
    hybrid = ffebm.convert(exported, x, hardware=ONE)
    torch.testing.assert_close(hybrid.double()(x.double()).float(), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match=r"exported in torch\.float64 and names dtypes"):
        hybrid.half()
