"""Run in a process of its own by test_onednn.py: strided 1×1 convolutions of few channels, against float64.

float64 takes no part of oneDNN, so that the references are safe in the same process.
"""

from __future__ import annotations

import copy
import itertools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.program import pointwise
from ffebm_compiler.runtime.program.operators import Convolution

CHANNELS_LAST = torch.channels_last


def laid_out(value: Tensor, last: bool) -> Tensor:
    """Values in strides that are channels-last beyond doubt (`contiguous` leaves a 1×1 kernel as it is)."""
    layout = CHANNELS_LAST if last else torch.contiguous_format
    return torch.empty(value.shape, dtype=value.dtype, memory_format=layout).copy_(value)


def compare(found: Tensor | None, expected: Tensor | None, what: object) -> None:
    assert found is not None, what
    assert expected is not None, what
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < 1e-5, (what, error)


def values_and_gradients(
    operands: list[Tensor], last: bool, transposed: bool, trained: int = 3, **settings: Any
) -> list[Tensor]:
    """The output, and the gradients of the last `trained` of input, weight and bias."""
    leaves = [operand.detach() for operand in operands]
    for leaf in leaves[-trained:]:
        leaf.requires_grad_()
    y = (pointwise.conv_transpose2d if transposed else pointwise.conv2d)(*leaves, **settings)
    error = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves[-trained:], laid_out(error, last))]


def by_autograd() -> int:
    """Every layout of input, weight and error, with and without a transpose."""
    count = 0
    layouts = list(itertools.product((False, True), repeat=3))
    for transposed, channels, stride in itertools.product((False, True), (1, 3, 6, 12), ((2, 2), (1, 2), (3, 1))):
        settings: dict[str, Any] = {"stride": stride}
        if transposed:
            settings["output_padding"] = tuple(step - 1 for step in stride)
        x, w = torch.randn(2, 4 if transposed else channels, 6, 12), torch.randn(4, channels, 1, 1)
        operands = [x, w, torch.randn(channels if transposed else 4)]
        wide = [operand.double() for operand in operands]
        expected = values_and_gradients(wide, False, transposed, **settings)
        source = F.conv_transpose2d if transposed else F.conv2d
        assert torch.equal(expected[0], source(*wide, **settings))
        for first, second, third in layouts:
            given = [laid_out(x, first), laid_out(w, second), operands[2]]
            found = values_and_gradients(given, third, transposed, **settings)
            for value, reference in zip(found, expected, strict=True):
                compare(value, reference, (transposed, channels, stride, first, second, third))
            alone = values_and_gradients(given, third, transposed, trained=1, **settings)  # a frozen kernel
            compare(alone[1], expected[3], (transposed, channels, stride, first, second, third))
            count += 1
    return count


def by_contraction() -> int:
    """The weight gradient of a settled block's convolution, against float64 autograd."""
    count = 0
    for transposed, channels, stride in itertools.product((False, True), (2, 7, 15), ((2, 2), (1, 2))):
        extra = tuple(step - 1 for step in stride) if transposed else (0, 0)
        source = pointwise.conv_transpose2d if transposed else pointwise.conv2d
        arguments = (stride, (0, 0), extra, 1, (1, 1)) if transposed else (stride, (0, 0), (1, 1), 1)
        operator = Convolution(source, arguments, stride, (0, 0), (1, 1), transposed, extra, 1)
        x, w = torch.randn(2, 4 if transposed else channels, 8, 8), torch.randn(4, channels, 1, 1)
        wide = [t.double().requires_grad_() for t in (x, w, torch.randn(channels if transposed else 4))]
        y = (F.conv_transpose2d if transposed else F.conv2d)(
            *wide, stride=stride, **({"output_padding": extra} if transposed else {})
        )
        error = torch.randn_like(y)
        expected = torch.autograd.grad(y, wide[1:], error)
        values = laid_out(x, True), laid_out(error.float(), True)
        for needed in ((True, True), (True, False), (False, True)):
            found = operator.weight_gradients([values[0]], values[1], [w, wide[2].float()], needed, True)
            for wanted, value, reference in zip(needed, found, expected, strict=True):
                if wanted:
                    compare(value, reference, (transposed, channels, stride, needed))
                else:
                    assert value is None
            count += 1
    return count


class Shortcut(nn.Module):
    """A residual block whose shortcut is the case, settled as one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 6, 1, stride=2)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class After(nn.Module):
    """A settled block, then the case: as a block of one layer, transposed, and digital with a computed weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, 3, padding=1)
        self.norm = nn.GroupNorm(1, 5)
        if kind == "transposed":
            self.last: nn.Module = nn.ConvTranspose2d(5, 4, 1, stride=2, output_padding=1)
        elif kind == "computed":
            self.last = nn.Linear(5, 20)
        else:
            self.last = nn.Conv2d(5, 4, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(torch.relu(self.first(x))))
        if self.kind == "computed":
            return F.conv2d(x, self.last(x.mean((0, 2, 3))).view(4, 5, 1, 1), stride=2).flatten(1)
        return self.last(x).flatten(1)


def in_a_hybrid() -> int:
    """Gradients of whole hybrids, against the same hybrid in float64."""
    count = 0
    for kind, estimator in itertools.product(("shortcut", "layer", "transposed", "computed"), ("ep", "implicit")):
        torch.manual_seed(0)
        model = Shortcut() if kind == "shortcut" else After(kind)
        x = torch.randn(4, 3, 8, 8)
        wide = ffebm.convert(copy.deepcopy(model).double(), x.double(), gradient="implicit")
        hybrid = ffebm.convert(model, x, gradient=estimator, solver=ffebm.GaussSeidel(rtol=1e-6))
        assert any(block.loop_gain for block in hybrid.blocks), kind
        wide(x.double()).square().sum().backward()
        for _ in range(3):
            hybrid.zero_grad()
            hybrid(x).square().sum().backward()
        reference = dict(wide.named_parameters())
        for name, parameter in hybrid.named_parameters():
            size = float(reference[name].grad.norm())
            error = float((parameter.grad.double() - reference[name].grad).norm())
            assert error <= 1e-3 * size + 1e-4, (kind, estimator, name, error, size)
        count += 1
    return count


if __name__ == "__main__":
    if sys.argv[1:] == ["the case itself"]:  # an image of one position: nothing is written past anything
        x, w = laid_out(torch.randn(32, 3, 2, 2), True), torch.randn(5, 3, 1, 1, requires_grad=True)
        F.conv2d(x, w, stride=2).sum().backward()
    else:
        sys.stdout.write(f"compared {by_autograd()} {by_contraction()} {in_a_hybrid()}\n")
