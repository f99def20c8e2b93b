"""A concatenation of max(h, 0) and min(h, 0) of parts of h is one activation, however it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import Between, noise
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.activations.table import Identity, SplitReLU

SPELLINGS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "slices": (5, lambda h: torch.cat((F.relu(h[:, :5]), -F.relu(-h[:, 5:])), -1)),
    "ellipsis": (4, lambda h: torch.cat((h[..., :4].clamp(min=0), h[..., -4:].clamp(max=0)), dim=1)),
    "chunk": (4, lambda h: torch.cat(_halves(*h.chunk(2, 1)), 1)),
    "split": (3, lambda h: torch.cat(_halves(*h.split([3, 5], dim=-1)), -1)),
    "tensor_split": (4, lambda h: torch.hstack(_halves(*torch.tensor_split(h, 2, -1)))),
    "narrow": (4, lambda h: torch.cat((h.narrow(-1, 0, 4).relu(), h.narrow(-1, 4, 4).clamp_max(0)), -1)),
    "sliced afterwards": (4, lambda h: torch.concat((F.relu(h)[:, :4], -F.relu(-h)[:, 4:]), -1)),
    "a product with -1": (4, lambda h: torch.cat((F.relu(h[:, :4]), -1 * F.relu(h[:, 4:] * -1)), -1)),
    "three parts": (5, lambda h: torch.cat((F.relu(h[:, :2]), F.relu(h[:, 2:5]), h[:, 5:].clamp(max=0)), -1)),
    "a slice of a slice": (4, lambda h: torch.cat((h[:, :6][:, :4].relu(), h[:, 2:][:, 2:].clamp(max=0)), -1)),
}


def _halves(above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    return above.clamp(min=0), -F.relu(-below)


def activations_of(function: Callable[[Tensor], Tensor]) -> list[object]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), _Call(function), nn.Linear(8, 3)), noise(5, 6)
    hybrid = ffebm.convert(model, x)
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x), rtol=1e-6, atol=1e-6)
    return [layer.activation for block in hybrid.blocks for layer in block.module.program.layers]


class _Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_split_relu_is_one_activation(spelling: str) -> None:
    above, function = SPELLINGS[spelling]
    assert activations_of(function) == [SplitReLU(above, 8 - above), Identity()]


def test_channels_are_units_of_a_convolution() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), _Call(lambda h: torch.cat((h[:, :2].relu(), h[:, 2:].clamp(max=0)), 1)), nn.Conv2d(6, 2, 3)
    )
    x = noise(2, 1, 7, 7)
    (block,) = ffebm.convert(model, x).blocks
    assert block.module.program.layers[0].activation == SplitReLU(2, 4, -3)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.cat((F.relu(h[:, 4:]), -F.relu(-h[:, :4])), -1),  # exchanged
        lambda h: torch.cat((F.relu(h[:, :4]), h[:, 3:7].clamp(max=0)), -1),  # overlapping
        lambda h: torch.cat((h[:, :4].clamp(max=0), F.relu(h[:, 4:])), -1),  # below first
        lambda h: torch.cat((F.relu(h[:, :4]), F.relu(h[:, 4:])), -1),  # all above
        lambda h: torch.cat((F.relu(h[:, :4]), h[:, 4:].clamp(max=0.5)), -1),
        lambda h: torch.cat((F.relu(h[:, ::2]), h[:, 1::2].clamp(max=0)), -1),
        lambda h: torch.cat((F.relu(h[:, :4]), (2 * h)[:, 4:].clamp(max=0)), -1),
    ],
    ids=["exchanged", "overlapping", "below first", "all above", "another bound", "every other", "scaled"],
)
def test_what_is_no_split_relu_keeps_its_values(function: Callable[[Tensor], Tensor]) -> None:
    assert not any(isinstance(activation, SplitReLU) for activation in activations_of(function))


def test_parts_that_others_read_stay() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Between(lambda h: h)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            above, below = self.a(x).chunk(2, -1)
            above = F.relu(above)
            return self.b(torch.cat((above, below.clamp(max=0)), -1)), above.sum(-1)

    model, x = Reader(), noise(5, 6)
    hybrid = ffebm.convert(model, x)
    with hybrid.feedforward_mode():
        for ours, theirs in zip(hybrid(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs)


# -- the activation itself -----------------------------------------------------------------------

SIGMA = SplitReLU(2, 3, -2)


def test_values_slopes_potentials_and_quotients() -> None:
    h = noise(7, 5, 4).double().requires_grad_()
    expected = torch.cat((F.relu(h[:, :2]), h[:, 2:].clamp(max=0)), 1)
    value = SIGMA.value(h)
    torch.testing.assert_close(value, expected)
    (slope,) = torch.autograd.grad(value.sum(), h, retain_graph=True)
    torch.testing.assert_close(SIGMA.derivative(h.detach()), slope)
    (again,) = torch.autograd.grad(SIGMA.primitive(h).sum(), h)
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(SIGMA.potential(value), 0.5 * value**2)
    assert (SIGMA.potential(-value) == torch.inf).eq(value != 0).all()
    low, high = SIGMA.bounds(h.detach())
    torch.testing.assert_close(h.detach().clamp(low, high), expected.detach())
    h, k = h.detach(), noise(7, 5, 4, seed=1).double()
    for t in (2.0, -2.0, 1e-3, -1e-3):
        torch.testing.assert_close(SIGMA.quotient(h, k, t), (SIGMA.value(h + t * k) - SIGMA.value(h)) / t)
    assert len(SIGMA.unit_lines(torch.Size((1, 5, 4)))) == 20
    assert not SIGMA.holomorphic


@pytest.mark.parametrize("settings", [(-1, 3, -1), (2, -1, -1), (0, 0, -1), (2, 3, 0)])
def test_settings_are_checked(settings: tuple[int, int, int]) -> None:
    with pytest.raises(ffebm.InputError, match=r"SplitReLU\(.*expected counts of units, at least one unit"):
        SplitReLU(*settings)
