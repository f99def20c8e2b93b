"""Autocast regions inside a forward are written as casts; casts are no checks of the dtype at capture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from running import targets
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.explicit_casts import explicit_casts
from ffebm_compiler.passes.inline_regions import inline_regions
from ffebm_compiler.runtime.feedforward.casts import autocast_to, under_autocast

bf16 = torch.bfloat16


class Layers(nn.Module):
    """Layers and a forward from the table below."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.rnn = nn.Linear(8, 16), nn.Linear(16, 4), nn.GRU(8, 16, batch_first=True)
        self.conv, self.norm = nn.Conv1d(1, 2, 3, padding=1), nn.LayerNorm(16)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def region(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=bf16):
        y = F.relu(self.a(x))
    return self.b(y.float())


def nested(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=bf16):
        y = self.norm(self.a(x))
        with torch.autocast("cpu", enabled=False):
            z = self.b(y.float())
            with torch.autocast("cpu", dtype=bf16):
                z = z + self.b(torch.tanh(y))
        return torch.cat([z, self.b(y)]).float()


@torch.autocast("cpu", dtype=bf16)
def whole(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(torch.tanh(self.conv(self.a(x)[:, None]).mean(1)))


def under_no_grad(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=bf16):
        with torch.no_grad():
            gate = torch.sigmoid(self.a(x))
            gate[:, :2] = 1.0
        return (self.b(self.a(x) * gate)).float()


def products(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=bf16):
        q = self.a(x).view(-1, 4, 4)
        y = torch.einsum("bij,bkj->bik", q, q.float()) + q @ q.float() + F.scaled_dot_product_attention(q, q, q.float())
        return self.b(torch.softmax(y, -1).flatten(1)).float()


def recurrent(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=bf16):
        return self.b(self.rnn(x[:, None])[0][:, 0]).float()


FORWARDS = (region, nested, whole, under_no_grad, products, recurrent)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_autocast_regions_compute_what_the_source_computes(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = seeded(lambda: Layers(forward))
    hybrid = ffebm.convert(model, noise(5, 8), hardware=ffebm.Hardware(layers_per_block=1))
    x = noise(5, 8, seed=1)
    found, expected = hybrid(x), model(x)
    assert found.dtype is expected.dtype
    # The same casts in the same places: not even a rounding differs.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in hybrid.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (gradients[name] - parameter.grad).norm() <= 2e-2 * parameter.grad.norm() + 1e-6, name


def test_no_region_and_no_check_of_dtypes_is_left() -> None:
    program = explicit_casts(inline_regions(capture(seeded(lambda: Layers(nested)), (noise(5, 8),), {})))
    found = targets(program)
    assert autocast_to in found
    assert under_autocast not in found
    assert torch.ops.aten._assert_tensor_metadata.default not in found
    assert not any("wrap_with" in str(target) for target in found)


def test_an_operation_that_casts_inside_keeps_its_autocast() -> None:
    program = explicit_casts(inline_regions(capture(seeded(lambda: Layers(products)), (noise(5, 8),), {})))
    assert under_autocast in targets(program)


def test_autocast_around_convert_is_not_captured() -> None:
    model, x = seeded(lambda: Layers(lambda self, x: self.b(torch.tanh(self.a(x))))), noise(5, 8)
    with torch.autocast("cpu", dtype=bf16):
        hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1))
    assert hybrid(x).dtype is torch.float32
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=bf16):
        torch.testing.assert_close(hybrid(x).float(), model(x).float(), rtol=2e-2, atol=2e-2)
