"""A refusal names the module, the user's line, the true cause, and what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import TwoLayers, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import CaptureError, FFEBMError, InputError, UnsupportedError


def branch(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    return y if y.sum() > 0 else -y  # MARK


def loop(self: nn.Module, x: Tensor) -> Tensor:
    while x.norm() > 1:  # MARK
        x = x / 2
    return self.a(x)


def number(self: nn.Module, x: Tensor) -> Tensor:
    n = int(x.abs().sum().item())  # MARK
    return self.a(x)[:n]


def numpy_inside(self: nn.Module, x: Tensor) -> Tensor:
    return self.a(torch.from_numpy(np.tanh(x.numpy())))  # MARK


def gradient(self: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    energy = self.a(x).square().sum()
    return self.b(torch.autograd.grad(energy, x, create_graph=True)[0])  # MARK


def backward(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x)
    y.sum().backward(retain_graph=True)  # MARK
    return y


def transform(self: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda v: self.a(v).sum())(x)  # MARK


def moved(self: nn.Module, x: Tensor) -> Tensor:
    return self.a.double()(x.double())  # MARK


def _layers_kept(layers: list[nn.Module], rate: float) -> list[nn.Module]:
    dropped = torch.zeros(len(layers)).uniform_(0.0, 1.0) < rate
    return [layer for layer, drop in zip(layers, dropped, strict=True) if not drop]  # MARK


def dropped(self: nn.Module, x: Tensor) -> Tensor:
    for layer in _layers_kept([self.a, self.b], 0.3):
        x = layer(x)
    return x


def skipped(self: nn.Module, x: Tensor) -> Tensor:
    x = self.a(x)
    return x if torch.rand([]) < 0.5 else self.b(x)  # MARK


def chosen(self: nn.Module, x: Tensor) -> Tensor:
    return [self.a, self.b][int(torch.randint(0, 2, (1,)))](x)  # MARK


def _positive(layer: nn.Module, x: Tensor) -> bool:
    return bool(layer.weight.sum() + x.sum() > 0)  # MARK


def function_of_a_module(self: nn.Module, x: Tensor) -> Tensor:
    return self.a(x) if _positive(self.b, x) else x


def copied_inside(self: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(self.a)(x)  # MARK


_DRAWN = r"random numbers that the forward draws decide here what runs.*multiply .* or set the rate to 0"

CASES = {
    dropped: _DRAWN,
    skipped: _DRAWN,
    chosen: _DRAWN,
    copied_inside: r"rewrite this line",
    function_of_a_module: r"depends on the values of a tensor",
    branch: r"depends on the values of a tensor \(data-dependent\).*torch\.where",
    loop: r"depends on the values of a tensor \(data-dependent\).*make the branch depend on shapes",
    number: r"a Python number here depends on the values of a tensor",
    numpy_inside: r"the values leave torch here \(\.numpy\(\)\); use torch operations",
    gradient: r"a gradient is taken inside the forward \(grad\).*take it outside",
    backward: r"a gradient is taken inside the forward \(backward\).*take it outside",
    transform: r"a gradient is taken inside the forward",
    moved: r"moves 'weight' of a Linear to torch\.float64 .*move the model before it is converted",
}


@pytest.mark.parametrize("forward", CASES, ids=lambda f: f.__name__)
def test_a_refusal_names_module_line_cause_and_remedy(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), TwoLayers(forward)))
    with pytest.raises(CaptureError, match=CASES[forward]) as caught:
        ffebm.convert(model, noise(6, 8))
    code = forward.__code__
    assert f"cannot be traced in module '1' ({code.co_filename}, line " in str(caught.value)
    assert "MARK" in str(caught.value), "another line"


def test_torch_cond_is_named_with_its_line() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: -self.a(x), (x,))

    with pytest.raises(UnsupportedError, match=r"torch's cond \(.*line \d+\), control flow that depends on data"):
        ffebm.convert(seeded(lambda: TwoLayers(forward)), noise(6, 8))


def test_layers_may_be_moved_to_where_they_are() -> None:
    model = seeded(lambda: TwoLayers(lambda self, x: self.b.to(x.dtype)(self.a.to(x.device)(x))))
    x = noise(6, 8)
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1))
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
    assert hybrid.plan.weights["a.weight"].block
    assert all("_apply" not in vars(kind) or kind is nn.Module for kind in (nn.Module, nn.Linear))


def test_a_model_that_holds_a_hybrid_is_refused_by_name() -> None:
    body = ffebm.convert(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), noise(3, 8))
    with pytest.raises(InputError, match=r"module '1' is a hybrid already: put its to_digital\(\)"):
        ffebm.convert(nn.Sequential(nn.Linear(8, 8), body), noise(3, 8))
    with pytest.raises(InputError, match="the model is a hybrid already"):
        ffebm.plan(body, noise(3, 8))
    whole = nn.Sequential(nn.Linear(8, 8), body.to_digital())
    assert len(ffebm.convert(whole, noise(3, 8)).plan.weights) == 2


@pytest.mark.parametrize("inputs", [(torch.zeros(0, 8),), ({"x": torch.zeros(0, 8)},)])
def test_an_empty_batch_is_no_example(inputs: tuple[object, ...]) -> None:
    model = seeded(lambda: TwoLayers(lambda self, x: self.a(x["x"] if isinstance(x, dict) else x)))
    with pytest.raises(FFEBMError, match=r"example inputs are an empty batch \(shape \(0, 8\)\): pass an example with"):
        ffebm.convert(model, inputs)
