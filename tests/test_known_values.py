"""Branches on buffers: decided by what the buffers hold, told, and refused where the forward writes them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import TwoLayers, noise, seeded
from same_as_source import assert_same
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import CaptureError


class Flags(nn.Module):
    """Branches on a flag, on a threshold, and on an element of a table."""

    def __init__(self, ready: bool, limit: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("ready", torch.tensor(ready))
        self.register_buffer("limit", torch.tensor([limit, 2.0]))
        self.register_buffer("steps", torch.tensor([1, 3]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) if self.ready else self.b(x)
        if self.limit[0] > 1 and not (self.steps == 2).any():
            y = y * int(self.steps.max())
        return y + self.limit.mean()


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("limit", [0.5, 1.5])
def test_branches_on_buffers_are_settings(ready: bool, limit: float) -> None:
    model = seeded(lambda: Flags(ready, limit))
    hybrid = ffebm.convert(model, noise(3, 8), hardware=ffebm.Hardware(layers_per_block=1))
    x = noise(5, 8, seed=1)
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
    notes = " ".join(hybrid.plan.notes)
    assert f"branches on buffer 'ready' ({__file__}, line " in notes
    assert f"for its value at conversion, {ready}" in notes
    assert "buffer 'limit'" in notes


def test_sizes_that_are_buffers_are_settings() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("total", torch.tensor(3))

        def forward(self, x: Tensor) -> Tensor:
            wide = F.pad(self.a(x), (self.total, self.total - 2))
            return wide[:, 2:] if wide.shape[1] > 10 else wide

    hybrid = assert_same(seeded(Padded), noise(4, 8))
    assert any("buffer 'total'" in note and "at conversion, 3" in note for note in hybrid.plan.notes)


def test_a_flag_that_the_forward_sets_is_refused() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("ready", torch.tensor(0))
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.ready == 0:
                self.scale.copy_(y.detach().std(0))
                self.ready.fill_(1)
            return y / self.scale

    model = seeded(Lazy)
    with pytest.raises(CaptureError, match=r"branches on buffer 'ready' .* and writes it, so that which branch"):
        ffebm.convert(model, noise(6, 8))
    assert model.ready == 0


def test_a_value_that_depends_on_the_input_is_still_unknown() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("limit", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > self.limit else x

    with pytest.raises(CaptureError, match="depends on the values of a tensor"):
        ffebm.convert(seeded(Mixed), noise(6, 8))


def test_fake_quantised_models_with_their_observers_off() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, default_weight_fake_quant

        fake = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        model = seeded(
            lambda: nn.Sequential(fake(), nn.Linear(8, 8), nn.ReLU(), default_weight_fake_quant(), nn.Linear(8, 3))
        )
        model(noise(16, 8))
        for module in model:
            if isinstance(module, FakeQuantize):
                module.disable_observer()
        hybrid = ffebm.convert(copy.deepcopy(model).eval(), noise(4, 8), hardware=ffebm.Hardware(layers_per_block=1))
        x = noise(4, 8, seed=1)
        found, expected = hybrid(x), model.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert any("'0.fake_quant_enabled'" in note for note in hybrid.plan.notes)


def pyramid(self: nn.Module, x: Tensor) -> Tensor:
    """Levels whose sizes are kept in a tensor, as in deformable attention."""
    sizes = torch.as_tensor([[2, 2], [4, 1]])
    starts = torch.cat([sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]])
    parts = [x[:, int(start) : int(start) + int(h * w)] for (h, w), start in zip(sizes, starts, strict=True)]
    first, second = sizes.unbind(0)
    return self.a(torch.cat(parts, 1)) * (2 if torch.equal(first, second) else 3)


def repeated(self: nn.Module, x: Tensor) -> Tensor:
    """Segments of known lengths."""
    segment = torch.repeat_interleave(torch.arange(3), torch.tensor([1, 5, 2]))
    return self.a(x) * segment + (segment == 1).nonzero()[:, 0].sum() * torch.ones(len(segment))


def padded(self: nn.Module, x: Tensor) -> Tensor:
    """Sizes that are tensors, as in audio codecs."""
    total = torch.tensor(3)
    left = total // 2
    wide = F.pad(self.a(x), (left, total - left), "constant", 1.0)
    return wide.reshape(-1, torch.tensor(11)) if wide.shape[1] <= 11 else x


def filled(self: nn.Module, x: Tensor) -> Tensor:
    """A table that is filled step by step, also through a view."""
    table = torch.zeros(4)
    tail = table[1:]
    table[0] = 5
    tail.fill_(2.0)
    tail[tail > table[0]] = torch.tensor(9.0)
    table += torch.ones(4)
    if tail.sum() != 9 or table[0] != 6:
        return self.b(x)
    return self.a(x) if (table > torch.full((), 2.5)).all() else self.b(x)


def beside(self: nn.Module, x: Tensor) -> Tensor:
    """A table that is unknown once it is written, beside one that is not."""
    table = torch.zeros(4)
    table.copy_(x[0, :4])
    other = torch.zeros(4)
    return self.a(x) if other.sum() == 0 else self.b(x)


@pytest.mark.parametrize("forward", [pyramid, repeated, padded, filled, beside], ids=lambda f: f.__name__)
def test_tensors_of_python_numbers_have_their_values(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    hybrid = assert_same(seeded(lambda: TwoLayers(forward)), noise(3, 8))
    assert not hybrid.plan.notes
    x = noise(5, 8, seed=1)
    torch.testing.assert_close(hybrid.eval()(x), forward(hybrid, x), rtol=1e-5, atol=1e-6)


def assigned(table: Tensor, x: Tensor) -> None:
    table[0] = x.sum()


def through_a_view(table: Tensor, x: Tensor) -> None:
    table[1:].copy_(x[0, :3])


def through_data(table: Tensor, x: Tensor) -> None:
    table.data.add_(x.mean())


def with_out(table: Tensor, x: Tensor) -> None:
    torch.mul(x[0, :4], 2.0, out=table)


def with_uniform(table: Tensor, x: Tensor) -> None:
    table.uniform_(-1.0, 1.0).add_(x[0, :4])


def a_view_before(table: Tensor, x: Tensor) -> None:
    table.view(2, 2)[0].add_(1.0).mul_(x.mean())


def rectified(table: Tensor, x: Tensor) -> None:
    torch.relu_(table.sub_(x[0, :4]))


@pytest.mark.parametrize(
    "write", [assigned, through_a_view, through_data, with_out, rectified], ids=lambda f: f.__name__
)
def test_a_constant_that_was_written_is_unknown(write: Callable[[Tensor, Tensor], None]) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        table = torch.zeros(4)
        write(table, x)
        return self.a(x) if table.sum() > 0 else self.b(x)

    with pytest.raises(CaptureError, match="depends on the values of a tensor"):
        ffebm.convert(seeded(lambda: TwoLayers(forward)), noise(6, 8))


def test_what_is_drawn_from_constants_is_unknown() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        kept = F.dropout(torch.ones(4), 0.5, training=True)
        return self.a(x) if kept.sum() > 4 else self.b(x)

    with pytest.raises(CaptureError, match="depends on the values of a tensor"):
        ffebm.convert(seeded(lambda: TwoLayers(forward)), noise(6, 8))


def test_a_buffer_stays_as_it_was_when_its_value_is_followed() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.register_buffer("limits", torch.tensor([-1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * F.relu(self.limits.clone(), inplace=True).sum()

    model = seeded(Clipped)
    assert_same(model, noise(4, 8))
    assert model.limits.tolist() == [-1.0, 2.0]
