"""Matrix products of settling blocks by oneDNN, where MKL is slow."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import converted, noise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ffebm_compiler.runtime.program import matrix_products
from ffebm_compiler.runtime.program.operators import Linear

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneDNN on every processor, and for products of every size."""
    if not ONEDNN:
        pytest.skip("this torch has no product by oneDNN")
    monkeypatch.setattr(matrix_products, "_SMALLEST", 1)
    monkeypatch.setattr(matrix_products, "slow_mkl", lambda: True)


class Products(TorchDispatchMode):
    """Counts the products by oneDNN."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function is torch.ops.mkldnn._linear_pointwise.default
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 1, 3, 5), (0, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_equal_the_plain_ones(shape: tuple[int, ...], transposed: bool) -> None:
    plain = Linear(transposed)
    quick = plain.quick()
    value, weight, bias = noise(*shape), noise(*((5, 4) if transposed else (4, 5)), seed=1), noise(4, seed=2)
    field = noise(*shape[:-1], 4, seed=3)
    with torch.no_grad():
        for one, other in (
            (quick.apply([value], [weight, bias]), plain.apply([value], [weight, bias])),
            (quick.apply([value], [weight, None]), plain.apply([value], [weight, None])),
            (quick.tangent([value], [weight], []), plain.tangent([value], [weight], [])),
            (
                quick.adjoint(field, [weight], [value.shape], [True])[0],
                plain.adjoint(field, [weight], [value.shape], [True])[0],
            ),
            *zip(
                quick.weight_gradients([value], field, [weight, bias], [True, True], True),
                plain.weight_gradients([value], field, [weight, bias], [True, True], True),
                strict=True,
            ),
        ):
            torch.testing.assert_close(one, other)
            assert one is not None
            assert one.shape == other.shape


@pytest.mark.usefixtures("everywhere")
def test_strided_operands_equal_the_plain_products() -> None:
    value, weight = noise(5, 7).t(), noise(4, 10, seed=1)[:, ::2]
    with torch.no_grad(), Products() as products:
        torch.testing.assert_close(matrix_products.linear(value, weight), F.linear(value, weight))
    assert products.count == 1


@pytest.mark.usefixtures("everywhere")
def test_a_product_that_records_a_gradient_is_plain() -> None:
    weight = noise(4, 5).requires_grad_()
    with Products() as products:
        (gradient,) = torch.autograd.grad(matrix_products.linear(noise(3, 5), weight).sum(), weight)
    torch.testing.assert_close(gradient, noise(3, 5).sum(0).expand(4, 5))
    assert products.count == 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_plain(dtype: torch.dtype) -> None:
    with torch.no_grad(), Products() as products:
        found = matrix_products.linear(noise(3, 5).to(dtype), noise(4, 5).to(dtype))
    assert found.dtype == dtype
    assert products.count == 0


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("estimator", ["ep", "implicit", "unrolled"])
@pytest.mark.parametrize("case", ["mlp", "transformer", "projections"])
def test_gradients_equal_those_of_plain_products(case: str, estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid, x = converted(case, nn.GELU)
    hybrid = copy.deepcopy(hybrid).train()
    hybrid.set_gradient(estimator)

    def gradients() -> dict[str, Tensor]:
        hybrid.zero_grad(set_to_none=True)
        hybrid(x).square().mean().backward()
        return {name: p.grad for name, p in hybrid.named_parameters() if p.grad is not None}

    with Products() as products:
        found = gradients()
    assert products.count > 0
    monkeypatch.setattr(matrix_products, "slow_mkl", lambda: False)
    with Products() as products:
        expected = gradients()
    assert products.count == 0
    size = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * size, msg=name)


@pytest.mark.parametrize(
    ("about", "slow"),
    [("vendor_id\t: AuthenticAMD", True), ("vendor_id\t: GenuineIntel", False), ("something else", False)],
)
def test_the_maker_decides(about: str, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_products.Path, "exists", lambda path: False)
    monkeypatch.setattr(matrix_products.platform, "processor", lambda: about)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    matrix_products.slow_mkl.cache_clear()
    try:
        assert matrix_products.slow_mkl() == (slow and ONEDNN)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        matrix_products.slow_mkl.cache_clear()
        assert not matrix_products.slow_mkl()
    finally:
        matrix_products.slow_mkl.cache_clear()
