"""Matrix products of float32 on a CPU, by the faster of the two libraries that torch is built with.

`F.linear` multiplies by MKL, which has AVX-512 kernels for processors of its maker alone: on an AMD EPYC of the fifth
generation one thread does 113 GFLOP/s of the 256 that oneDNN does. Torch reaches oneDNN by an operator of its compiler
for CPUs. It has no derivative, so that it serves only where no gradient is recorded: where a block settles, and in the
products of its gradient.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["linear", "slow_mkl"]

_SMALLEST = 1 << 20
"""Number of multiplications from which on the faster product outweighs its longer call (6 µs)."""


def linear(value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b with x of shape (..., in), W (out, in) and b (out,)."""
    if value.numel() * weight.shape[0] < _SMALLEST or not _plain(value, weight) or not slow_mkl():
        return F.linear(value, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(value, weight, bias, "none", [], "")
    return product


def _plain(value: Tensor, weight: Tensor) -> bool:
    """Whether both are plain float32 tensors on the CPU, not sharded ones, and no gradient is recorded."""
    kinds = (Tensor, nn.Parameter)
    return (
        type(value) in kinds
        and type(weight) in kinds
        and value.dtype == weight.dtype == torch.float32
        and value.device.type == weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


@lru_cache
def slow_mkl() -> bool:
    """Whether this processor multiplies by AVX-512, is not of MKL's maker, and torch has both libraries."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and "GenuineIntel" not in _maker()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _maker() -> str:
    """What names the processor's maker; "GenuineIntel", so that nothing is changed, if nothing does."""
    about = Path("/proc/cpuinfo")
    found = platform.processor() if not about.exists() else about.read_text().partition("\n\n")[0]
    return found if "Authentic" in found or "Hygon" in found else "GenuineIntel"
