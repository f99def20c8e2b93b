"""Weight-stationary by what it is: a product of an activation with a weight is a layer in any spelling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.program.contraction import Contraction, letters_of


class Spelled(nn.Module):
    """A forward over parameters w, v and b."""

    def __init__(self, forward: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(0.4 * torch.randn(shape, generator=generator)))

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


SPELLINGS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], list[tuple[int, ...]]]] = {
    "einsum": (lambda s, x: torch.einsum("bnd,hde->bhne", x, s.w), {"w": (4, 8, 6)}, [(3, 5, 8)]),
    "einsum, weight first": (lambda s, x: torch.einsum("hde,bnd->bhne", s.w, x), {"w": (4, 8, 6)}, [(3, 5, 8)]),
    "einsum, implicit": (lambda s, x: torch.einsum("bi,ij", x, s.w), {"w": (8, 6)}, [(3, 8)]),
    "einsum, ellipsis": (lambda s, x: torch.einsum("...i, oi -> ...o", x, s.w), {"w": (6, 8)}, [(3, 5, 8)]),
    "einsum, ellipsis in both": (
        lambda s, x: torch.einsum("b...i,...ij->b...j", x, s.w), {"w": (5, 8, 6)}, [(3, 5, 8)]),
    "einsum, capital letters": (lambda s, x: torch.einsum("BNd,dE->BNE", x, s.w), {"w": (8, 6)}, [(3, 5, 8)]),
    "einsum, summed": (lambda s, x: torch.einsum("bnd,dek->be", x, s.w), {"w": (8, 6, 2)}, [(3, 5, 8)]),
    "einsum, diagonal": (lambda s, x: torch.einsum("bii,ij->bj", x, s.w), {"w": (5, 6)}, [(3, 5, 5)]),
    "einsum, several weights": (
        lambda s, x: torch.einsum("bi,ir,rj->bj", x, s.w, s.v), {"w": (8, 3), "v": (3, 6)}, [(4, 8)]),
    "einsum, two activations": (
        lambda s, x, y: torch.einsum("bi,ijk,bk->bj", x, s.w, y), {"w": (8, 5, 6)}, [(4, 8), (4, 6)]),
    "bmm": (lambda s, x: torch.bmm(x.transpose(0, 1), s.w).transpose(0, 1), {"w": (4, 8, 6)}, [(3, 4, 8)]),
    "bmm, weight first": (
        lambda s, x: torch.bmm(s.w, x.transpose(0, 1).mT).transpose(0, 2), {"w": (4, 6, 8)}, [(3, 4, 8)]),
    "bmm, copied": (lambda s, x: torch.bmm(x.expand(4, -1, -1), s.w).sum(0), {"w": (4, 8, 6)}, [(3, 8)]),
    "bmm, copied weight": (
        lambda s, x: torch.bmm(x, s.w.expand(x.shape[0], -1, -1)), {"w": (8, 6)}, [(3, 5, 8)]),
    "bmm, learned queries": (
        lambda s, x: torch.bmm(s.w.expand(x.shape[0], -1, -1), x.mT), {"w": (1, 6, 8)}, [(3, 5, 8)]),
    "baddbmm": (
        lambda s, x: torch.baddbmm(s.b, x.transpose(0, 1), s.w, beta=0.5, alpha=2.0).transpose(0, 1),
        {"w": (4, 8, 6), "b": (4, 1, 6)}, [(3, 4, 8)]),
    "addbmm": (
        lambda s, x: torch.addbmm(s.b, x.unflatten(1, (2, 4)).transpose(0, 1), s.w),
        {"w": (2, 4, 6), "b": (1, 6)}, [(3, 8)]),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5, alpha=2.0), {"w": (8, 6), "b": (6,)}, [(3, 8)]),
    "addmm of activations": (lambda s, x: torch.addmm(x[:, :6], x, s.w), {"w": (8, 6)}, [(3, 8)]),
    "addmm, weight first": (lambda s, x: torch.addmm(s.b, s.w, x.T).T, {"w": (6, 8), "b": (6, 1)}, [(3, 8)]),
    "addmv": (lambda s, x: torch.addmv(s.b, s.w, x.mean(0)), {"w": (6, 8), "b": (6,)}, [(3, 8)]),
    "mv": (lambda s, x: torch.mv(x, s.w), {"w": (8,)}, [(3, 8)]),
    "dot": (lambda s, x: torch.dot(x.mean(0), s.w)[None], {"w": (8,)}, [(3, 8)]),
    "inner": (lambda s, x: torch.inner(x, s.w), {"w": (6, 8)}, [(3, 8)]),
    "vecdot": (lambda s, x: torch.linalg.vecdot(x, s.w), {"w": (8,)}, [(3, 8)]),
    "matmul, batched weight": (lambda s, x: x[:, None] @ s.w, {"w": (4, 8, 6)}, [(3, 5, 8)]),
    "matmul, weight first": (lambda s, x: s.w @ x, {"w": (6, 8)}, [(3, 8, 4)]),
    "matmul, transposed twice": (lambda s, x: (s.w @ x.T).T, {"w": (6, 8)}, [(3, 8)]),
    "matmul, vector": (lambda s, x: x @ s.w, {"w": (8,)}, [(3, 5, 8)]),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, ([1, 2], [1, 0])), {"w": (8, 5, 6)}, [(3, 5, 8)]),
    "chain_matmul": (lambda s, x: torch.linalg.multi_dot([x, s.w, s.v]), {"w": (8, 9), "v": (9, 6)}, [(3, 8)]),
    "bilinear": (lambda s, x, y: F.bilinear(x, y, s.w, s.b), {"w": (3, 8, 6), "b": (3,)}, [(4, 8), (4, 6)]),
    "bilinear, learned vector": (
        lambda s, x: F.bilinear(x, s.v.expand(x.shape[0], -1), s.w), {"w": (3, 8, 6), "v": (6,)}, [(4, 8)]),
    "linear, computed": (lambda s, x: F.linear(x, s.w * torch.sigmoid(s.v)), {"w": (6, 8), "v": (6, 1)}, [(3, 8)]),
    "linear, vector": (lambda s, x: F.linear(x, s.w), {"w": (8,)}, [(3, 8)]),
    "linear, bias from the input": (lambda s, x: F.linear(x, s.w, x.mean(0)[:6]), {"w": (6, 8)}, [(3, 8)]),
    "linear, the other way round": (lambda s, x: F.linear(s.w, x).T, {"w": (6, 8)}, [(3, 8)]),
    "conv, computed": (lambda s, x: F.conv2d(x, s.w * s.v), {"w": (6, 2, 3, 3), "v": (6, 1, 1, 1)}, [(3, 2, 5, 5)]),
    "conv, bias from the input": (
        lambda s, x: F.conv1d(x, s.w, x.mean((0, 2))), {"w": (4, 4, 3)}, [(3, 4, 6)]),
    "convolution": (
        lambda s, x: torch.convolution(x, s.w, None, [2], [1], [1], False, [0], 1), {"w": (6, 4, 3)}, [(3, 4, 6)]),
    "convolution, transposed": (
        lambda s, x: torch.convolution(x, s.w, None, [2], [1], [1], True, [1], 1), {"w": (4, 6, 3)}, [(3, 4, 6)]),
}  # fmt: skip


def spelled(spelling: str) -> tuple[nn.Module, list[Tensor]]:
    function, shapes, inputs = SPELLINGS[spelling]
    torch.manual_seed(1)
    return Spelled(function, **shapes), [torch.randn(shape) for shape in inputs]


def close(got: Tensor | None, want: Tensor, limit: float = 1e-5) -> bool:
    return got is not None and bool(((got - want).norm() <= limit * want.norm().clamp_min(1e-6)).detach())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_product_with_a_weight_is_a_layer(spelling: str) -> None:
    model, inputs = spelled(spelling)
    source = copy.deepcopy(model)
    hybrid = ffebm.convert(model, tuple(inputs), hardware=ffebm.Hardware(layers_per_block=1))
    assert "w" in [name for block in hybrid.plan.blocks for name in block.weights]
    leaves = [value.clone().requires_grad_() for value in inputs]
    others = [value.clone().requires_grad_() for value in inputs]
    got, want = hybrid(*leaves), source(*others)
    assert close(got, want)
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    ours = dict(hybrid.named_parameters())
    for name, parameter in source.named_parameters():
        assert parameter.grad is not None
        assert close(ours[name].grad, parameter.grad), name
    for leaf, other in zip(leaves, others, strict=True):
        assert other.grad is not None
        assert close(leaf.grad, other.grad)


@pytest.mark.parametrize(
    ("spelling", "size"),
    [
        ("einsum", (8, 24, 1)),
        ("bmm", (8, 6, 4)),
        ("bmm, copied", (8, 6, 4)),
        ("matmul, batched weight", (8, 24, 1)),
        ("tensordot", (40, 6, 1)),
        ("bilinear", (8, 18, 1)),
        ("matmul, vector", (8, 1, 1)),
        ("einsum, ellipsis in both", (8, 6, 5)),
    ],
)
def test_rows_columns_and_groups_are_those_of_the_product(spelling: str, size: tuple[int, int, int]) -> None:
    model, inputs = spelled(spelling)
    plan = ffebm.plan(model, tuple(inputs))
    (layer,) = [op for op in plan.graph.operations if op.role == "weight"]
    assert (layer.rows, layer.cols, layer.groups) == size
    assert sum(block.tiles for block in plan.blocks) == size[2]


def test_a_product_that_sums_nothing_or_no_weight_is_left_as_it_is() -> None:
    model = Spelled(
        lambda s, x: torch.einsum("bi,bj->bij", x, F.linear(x, s.w)).sum(1)
        + torch.einsum("bi,i->bi", x[:, :6], s.v),
        w=(6, 8), v=(6,),
    )  # fmt: skip
    plan = ffebm.plan(model, torch.randn(3, 8))
    assert [op.kind for op in plan.graph.operations if op.role == "weight"] == ["linear"]
    assert plan.weights["w"].block


def test_a_batch_of_matrices_of_another_dtype_is_digital_with_the_reason() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.out = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            turned = torch.matmul(torch.complex(x, x), torch.complex(self.w, self.w))
            return self.out(turned.real)

    plan = ffebm.plan(Complex(), torch.randn(3, 4))
    assert "its values are complex64 and energy blocks are real" in plan.weights["w"].reason


EQUATIONS = ["bgk,gkm->bgm", "bnd,hde->bhne", "gbk,gmk->bgm", "bxky,ykm->bmxy", "bk,k->b", "abik,kij->jab"]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_the_operator_against_autograd(equation: str) -> None:
    """Tangent, adjoint and weight gradient of the operator in float64."""
    of, sizes = letters_of(equation), dict(zip("abdeghijkmnxy", (2, 3, 4, 5, 2, 3, 4, 2, 3, 4, 2, 3, 2), strict=True))
    generator = torch.Generator().manual_seed(0)

    def drawn(letters: str) -> Tensor:
        return torch.randn([sizes[c] for c in letters], generator=generator, dtype=torch.float64)

    value, weight = drawn(of.value).requires_grad_(), drawn(of.weight).requires_grad_()
    operator = Contraction(equation)
    result = torch.einsum(equation, value, weight)
    cotangent = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(result, (value, weight), cotangent)
    x, w = value.detach(), weight.detach()
    assert torch.equal(operator.tangent([x], [w], [x.shape]), operator.apply([x], [w]))
    torch.testing.assert_close(operator.apply([x], [w]), result.detach())
    torch.testing.assert_close(operator.adjoint(cotangent, [w], [x.shape], [True])[0], wanted[0])
    torch.testing.assert_close(operator.weight_gradients([x], cotangent, [w], [True], True)[0], wanted[1])
    assert operator.weight_gradients([x], cotangent, [w], [False], True) == [None]


@pytest.mark.parametrize(
    ("spelling", "hardware", "parts"),
    [
        ("bmm", {"tile_rows": 8, "tile_cols": 12, "tiles_per_core": 2}, 2),
        ("bmm", {"tile_rows": 8, "tile_cols": 4, "tiles_per_core": 1}, 12),
        ("einsum", {"tile_rows": 4, "tile_cols": 16, "tiles_per_core": 1}, 6),
        ("tensordot", {"tile_rows": 10, "tile_cols": 12, "tiles_per_core": 1}, 4),
    ],
)
def test_a_large_contraction_is_split(spelling: str, hardware: dict[str, Any], parts: int) -> None:
    model, inputs = spelled(spelling)
    fabric = ffebm.Hardware(layers_per_block=1, devices_per_weight=2, **hardware)
    hybrid = ffebm.convert(model, tuple(inputs), hardware=fabric)
    assert len(hybrid.plan.blocks) == parts
    assert close(hybrid(*inputs), model(*inputs))
    direction = torch.randn_like(model(*inputs))
    (hybrid(*inputs) * direction).sum().backward()
    (model(*inputs) * direction).sum().backward()
    assert close(dict(hybrid.named_parameters())["w"].grad, dict(model.named_parameters())["w"].grad)
