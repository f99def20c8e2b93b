"""`torch.vmap` in a forward becomes operations on whole tensors; flex attention stays what it is, digitally."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import TwoLayers, noise, seeded
from running import targets
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import ffebm_compiler as ffebm
from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.expand_vmap import expand_vmap
from ffebm_compiler.passes.inline_regions import inline_regions
from ffebm_compiler.runtime.feedforward.flex_attention import FlexAttention

ONE = ffebm.Hardware(layers_per_block=1)


def rows(self: nn.Module, x: Tensor) -> Tensor:
    return self.b(torch.vmap(lambda row: torch.tanh(self.a(row)))(x))


def levels(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x).view(-1, 2, 4)
    return self.b(torch.vmap(torch.vmap(lambda r: torch.outer(r, r).sum(0)))(y).flatten(1))


def weights(self: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda w: F.linear(x, w))(torch.stack([self.a.weight, self.b.weight])).sum(0)


def several(self: nn.Module, x: Tensor) -> Tensor:
    low, high = torch.vmap(lambda r: (r.clamp(max=0), r.clamp(min=0) * r.sum()))(self.a(x))
    return self.b(low + high)


@pytest.mark.parametrize("forward", [rows, levels, weights, several], ids=lambda f: f.__name__)
def test_values_and_gradients_are_those_of_the_source(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = seeded(lambda: TwoLayers(forward))
    program = expand_vmap(inline_regions(capture(model, (noise(6, 8),), {})))
    assert not any("vmap" in str(target) or "batch_dim" in str(target) for target in targets(program))
    hybrid = ffebm.convert(model, noise(6, 8), hardware=ONE)
    x = noise(5, 8, seed=1)
    found, expected = hybrid(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    ours = dict(hybrid.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=2e-3, atol=1e-4)
    torch.randn(2)  # no level is left open


def test_vmap_that_torch_cannot_run_on_whole_tensors_is_refused() -> None:
    program = inline_regions(capture(seeded(lambda: TwoLayers(rows)), (noise(6, 8),), {}))
    linear = next(node for node in program.graph.nodes if node.target is torch.ops.aten.tanh.default)
    linear.target = torch.ops.aten.nonzero.default  # its result has another size for each row
    with pytest.raises(UnsupportedError, match=r"uses torch\.vmap \(.*line \d+\) on something that cannot be written"):
        expand_vmap(program)
    torch.randn(2)


def attention(self: nn.Module, x: Tensor) -> Tensor:
    q = self.a(x)[:, None, None].expand(-1, 2, 16, -1)
    return self.b(flex_attention(q, q * 0.5, q)[:, 0, 0])


def score(self: nn.Module, x: Tensor) -> Tensor:
    q = self.a(x)[:, None].repeat(1, 16, 1)[:, None] * torch.arange(16.0)[:, None]
    return self.b(flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + (i - j) * 0.1)[:, 0, 3])


def causal(self: nn.Module, x: Tensor) -> Tensor:
    q = self.a(x)[:, None].repeat(1, 16, 1)[:, None] * torch.arange(16.0)[:, None]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 16, 16, device="cpu")
    return self.b(flex_attention(q, q, q, block_mask=mask)[:, 0, 3])


@pytest.mark.parametrize("forward", [attention, score, causal], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_a_digital_part(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = seeded(lambda: TwoLayers(forward)).requires_grad_(False)
    hybrid = ffebm.convert(model, noise(6, 8), hardware=ONE)
    x = noise(6, 8, seed=1)
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
    assert any(isinstance(module, FlexAttention) for module in hybrid.modules())
    assert hybrid.plan.weights["a.weight"].block
    assert hybrid.plan.weights["b.weight"].block
    assert any("attention multiplies activations" in op.reason for op in hybrid.plan.graph.operations)
