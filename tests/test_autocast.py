"""Blocks under autocast: products in bfloat16 as the source's, states and sums in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import relative
from networks import digits_cnn, transformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ffebm_compiler as ffebm
import ffebm_compiler.onnx

PRODUCTS = ("mm", "addmm", "convolution", "convolution_backward", "bmm")


class Products(TorchDispatchMode):
    """Notes the dtype of every product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in PRODUCTS:
            self.dtypes.append((name, next(a.dtype for a in args if isinstance(a, Tensor))))
        return func(*args, **(kwargs or {}))


def gradients(hybrid: nn.Module, x: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    hybrid.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = F.cross_entropy(hybrid(x), torch.arange(len(x)) % 10)
    loss.backward()
    return {name: p.grad.clone() for name, p in hybrid.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("estimator", ["ep", "implicit", "unrolled"])
def test_every_product_is_in_bfloat16(estimator: str, training: bool) -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x, fold_batchnorm=True, gradient=estimator).train(training)
    assert any(block.program.coupled for block in hybrid.energy_blocks.values())
    with hybrid.held_feedback(), Products() as seen:
        rounded = gradients(hybrid, x, torch.bfloat16)
    assert {dtype for _, dtype in seen.dtypes} == {torch.bfloat16}
    with hybrid.held_feedback():
        exact = gradients(hybrid, x, None)
    for name, gradient in rounded.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), exact[name].flatten(), 0) > 0.995, name


def test_single_layer_blocks_are_the_source_under_autocast() -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = model.eval()(x), hybrid(x)
    assert relative(found.float(), expected.float()) < 1e-2
    with torch.no_grad():
        assert relative(hybrid(x), expected.float()) > 1e-4  # so that there is something to see


def test_gains_are_measured_in_full_precision() -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x, fold_batchnorm=True).train()
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(1.3)
    with torch.autocast("cpu", torch.bfloat16):
        hybrid(x)
    for block in hybrid.blocks:
        if block.module.program.coupled:
            assert block.loop_gain == pytest.approx(0.1, rel=0.02)


def test_float16_stays_in_full_precision() -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x, fold_batchnorm=True).eval()
    with torch.autocast("cpu", torch.float16), Products() as seen:
        hybrid(x)
    assert {dtype for _, dtype in seen.dtypes} == {torch.float32}


def test_exports_are_in_full_precision(tmp_path: Path) -> None:
    """Also with layer norm, whose parameters autocast leaves in float32 beside an input in bfloat16."""
    model, x = transformer()
    hybrid = ffebm.convert(model, x).eval()
    with torch.autocast("cpu", torch.bfloat16):
        hybrid.export_onnx(tmp_path / "hybrid.onnx")
        hybrid.export_onnx(tmp_path / "parts", parts="digital")
        deviations = ffebm_compiler.onnx.verify(hybrid, tmp_path / "hybrid.onnx", (x,))
    assert max(deviations.values()) < 1e-5
    with torch.no_grad():
        (found,) = ffebm_compiler.onnx.run(tmp_path / "parts", x)
        assert relative(found, hybrid(x)) < 1e-5


def test_float64_stays_in_float64() -> None:
    """As in the source, whose products in float64 autocast leaves as they are."""
    model, x = digits_cnn()
    model, x = copy.deepcopy(model).double(), x.double()
    hybrid = ffebm.convert(model, x, fold_batchnorm=True)
    with torch.autocast("cpu", torch.bfloat16), Products() as seen:
        F.cross_entropy(hybrid(x), torch.arange(len(x)) % 10).backward()
    assert {dtype for _, dtype in seen.dtypes} == {torch.float64}


@pytest.mark.parametrize("gradient", ["ep", "implicit", "unrolled"])
@pytest.mark.parametrize("late", [None, True])
def test_a_scaled_loss_that_overflows_skips_the_step(gradient: str, late: bool | None) -> None:
    torch.manual_seed(1)
    layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)]
    model, x, y = nn.Sequential(*layers), torch.randn(6, 8), torch.arange(6) % 4
    nn.init.normal_(model[5].weight, std=2.0)
    solver = ffebm.GaussSeidel(late=late)
    hybrid = ffebm.convert(copy.deepcopy(model), x, force_digital="5", gradient=gradient, solver=solver).train()
    skipped = []
    for network in (model, hybrid):
        optimizer, scaler = torch.optim.SGD(network.parameters(), 0.01), torch.amp.GradScaler("cpu")
        scales = []
        for _ in range(8):
            before = [parameter.detach().clone() for parameter in network.parameters()]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(network(x), y, reduction="sum")
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
            scales.append((scaler.get_scale(), same))
        skipped.append(scales)
    for scales in skipped:  # the block's own products are in float32, so that the hybrid skips fewer steps
        count = sum(same for _, same in scales)
        assert 0 < count < len(scales)
        assert scales == [(2.0 ** (15 - min(step, count - 1)), step < count) for step in range(len(scales))]


def test_a_loss_that_nothing_scales_must_be_finite() -> None:
    hybrid = ffebm.convert(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(6, 8)).train()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ffebm.GradientError, match=r"of block_1 holds NaN or infinite values.*GradScaler"),
    ):
        (hybrid(torch.randn(6, 8)) * float("nan")).sum().backward()
