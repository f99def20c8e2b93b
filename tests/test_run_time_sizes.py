"""Sizes that only data decide, and complex numbers: digital, with the source's values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm

ONE = ffebm.Hardware(layers_per_block=1)


class Layers(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(5, 8, dtype=torch.complex64) * 0.3)
        self.register_buffer("table", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def masked(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(torch.tanh(self.a(x)[x.sum(1) > 0]))


def experts(self: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, layer in enumerate((self.a, self.b)):
        rows = ((x[:, 0] > 0).long() == number).nonzero()[:, 0]
        out[rows] += torch.tanh(layer(x[rows]))
    return self.b(out)


def repeated(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(torch.relu(self.a(x)).repeat_interleave((x[:, 0] > 0).long() + 1, 0))


def counted(self: nn.Module, x: Tensor) -> Tensor:
    n = (x[:, 0] > 0).sum().item()
    torch._check(n <= x.shape[0])
    return self.b(torch.relu(self.a(x).narrow(0, 0, n)))


def unique(self: nn.Module, x: Tensor) -> Tensor:
    values, places = torch.unique((x[:, 0] > 0).float(), return_inverse=True)
    return self.a(x) * values[places][:, None]


def rotary(self: nn.Module, x: Tensor) -> Tensor:
    turned = torch.view_as_complex(self.a(x).view(-1, 4, 2)) * self.table
    return self.b(torch.view_as_real(turned).flatten(1))


def fourier(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.weight[:, 0], n=8))


def complex_layer(self: nn.Module, x: Tensor) -> Tensor:
    z = torch.complex(x[:, :5], x[:, 3:]) @ self.weight
    return self.b(z.abs() + z.real)


def complex_in_place(self: nn.Module, x: Tensor) -> Tensor:
    z = torch.zeros(x.shape[0], 8, dtype=torch.complex64)
    z[:, :5] = torch.fft.rfft(self.a(x))
    torch.view_as_real(z)[..., 1] *= 2.0
    return self.b(z.abs())


FORWARDS = (
    masked, experts, repeated, counted, unique, rotary, fourier, complex_layer, complex_in_place,
)  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_values_and_gradients_are_those_of_the_source(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = seeded(lambda: Layers(forward))
    hybrid = ffebm.convert(model, noise(6, 8), hardware=ONE)
    for seed in (1, 2):
        x = noise(6, 8, seed=seed)
        found, expected = hybrid(x), model(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        direction = noise(*expected.shape, seed=3)
        for network, output in ((hybrid, found), (model, expected)):
            network.zero_grad()
            (output * direction).sum().backward()
        ours = {name: parameter.grad for name, parameter in hybrid.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("forward", "name", "reason"),
    [(masked, "b.weight", "known at run time only"), (complex_layer, "weight", "complex")],
)
def test_the_reason_is_told(forward: Callable[[nn.Module, Tensor], Tensor], name: str, reason: str) -> None:
    plan = ffebm.plan(seeded(lambda: Layers(forward)), noise(6, 8), hardware=ONE)
    assert plan.weights[name].block is None
    assert reason in plan.weights[name].reason


def test_complex_weights_are_kept_by_save_and_load(tmp_path: object) -> None:
    model = seeded(lambda: Layers(fourier))
    hybrid = ffebm.convert(model, noise(6, 8), hardware=ONE)
    hybrid.save(f"{tmp_path}/saved")
    again = ffebm.load(f"{tmp_path}/saved", seeded(lambda: Layers(fourier)))
    torch.testing.assert_close(again(noise(6, 8)), hybrid(noise(6, 8)))
