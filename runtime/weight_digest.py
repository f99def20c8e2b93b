"""Digests of tensors: whether values that come from elsewhere are those that something was measured for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["digests_of", "have_digests"]

_CLASSES = 1021
"""Places are weighted by their number modulo this prime, so that rows and columns that change places are seen."""
_AT_ONCE = 1024 * _CLASSES
"""How many times 64 bits are looked at together."""


def digests_of(tensors: Sequence[Tensor]) -> list[str]:
    """A text for each tensor that is the same on every device, and another one for other values.

    It is the dtype and Σ_i w_i m(b_i) modulo 2⁶⁴ over all values, with b_i 64 bits of them, m(b) = b ⊕ (b >> 32) and
    odd w_i. It is empty for a tensor without values of its own here, such as a sharded one.
    """
    return [_digest(tensor) for tensor in tensors]


def have_digests(tensors: Sequence[Tensor], digests: Sequence[str]) -> bool:
    """Whether tensors may have the values that the digests are of. Those in another dtype now are cast back."""
    if len(tensors) != len(digests):
        return False
    return all(not text or _fits(tensor, text) for tensor, text in zip(tensors, digests, strict=True))


def _fits(tensor: Tensor, text: str) -> bool:
    if not _is_here(tensor):
        return True
    dtype = getattr(torch, text.split(":")[0], None)
    return isinstance(dtype, torch.dtype) and _digest(tensor.detach().to(dtype)) == text


def _is_here(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" and tensor.numel() > 0


def _digest(tensor: Tensor) -> str:
    if not _is_here(tensor) or tensor.layout is not torch.strided:
        return ""
    with torch.no_grad():
        flat = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
        if flat.is_complex():
            flat = torch.view_as_real(flat).flatten()
        together = 8 // flat.element_size()
        if flat.storage_offset() % together:
            flat = flat.clone()
        whole = flat.numel() // together * together
        rest = torch.zeros(together, dtype=flat.dtype, device=flat.device)
        rest[: flat.numel() - whole] = flat[whole:]
        sums = torch.zeros(_CLASSES, dtype=torch.int64, device=flat.device)
        for bits in (*flat[:whole].view(torch.int64).split(_AT_ONCE), rest.view(torch.int64)):
            mixed = bits ^ (bits >> 32)  # without it an even number of changed signs would cancel
            rows = len(mixed) // _CLASSES
            sums += mixed[: rows * _CLASSES].view(rows, _CLASSES).sum(0)
            sums[: len(mixed) - rows * _CLASSES] += mixed[rows * _CLASSES :]
        weights = torch.arange(1, 2 * len(sums), 2, device=flat.device) * 0x9E3779B97F4A7C1
        total = int((sums * weights).sum()) % 2**64
    return f"{str(tensor.dtype).removeprefix('torch.')}:{total:016x}"
