"""`WeightStamp`: find out whether tensors have changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["WeightStamp"]

_SAMPLED = 64


@dataclass(frozen=True)
class WeightStamp:
    """Identifies the present values of tensors without reading all of them.

    A tensor counts as unchanged if it is the same object, with the same counter of in-place operations
    (`Tensor._version`), the same memory, and the same values at 64 places. The values are compared because writes to
    `.data` raise no counter. They are compared on the CPU only, since reading them on another device would wait for it.
    """

    marks: tuple[tuple[dict[str, Any], int, int, Tensor | None], ...]
    """(attributes, version, address, values) of each tensor.

    The dictionary of a tensor's attributes stands for the object. It is no other one's while it is held here, it keeps
    no memory of weights, and it follows the tensor in `torch.utils.swap_tensors`, which refuses weak references.
    """

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> WeightStamp:
        """The stamp of these tensors now."""
        return cls(tuple((tensor.__dict__, *_mark(tensor)) for tensor in tensors))

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the stamped tensors, unchanged."""
        return self.equals(WeightStamp.of(tensors))

    def equals(self, other: WeightStamp) -> bool:
        """Whether both are stamps of the same tensors with nothing changed between them."""
        if len(other.marks) != len(self.marks):
            return False
        for (mine, *before, values), (theirs, *now, present) in zip(self.marks, other.marks, strict=True):
            if theirs is not mine or before != now:
                return False
            if values is not None and (present is None or not torch.equal(values, present)):
                return False
        return True


def _mark(tensor: Tensor) -> tuple[int, int, Tensor | None]:
    """(version, address, values at some places) of a tensor."""
    version = -1 if tensor.is_inference() else tensor._version
    if type(tensor) not in (Tensor, nn.Parameter):  # a sharded, fake or wrapped tensor may have no memory of its own
        return version, 0, None
    in_memory = tensor.detach()
    if not in_memory.is_contiguous():
        in_memory = in_memory.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if not in_memory.is_cpu or not in_memory.is_contiguous():
        return version, tensor.data_ptr(), None
    return version, tensor.data_ptr(), in_memory.take(_places(in_memory.numel()))


@lru_cache(maxsize=1024)
def _places(size: int) -> Tensor:
    """Where values are compared: one place in each of as many equal parts of the memory, drawn once for each size.

    Places at a constant distance would all be of one column where the distance is a multiple of a row's length.
    """
    if size <= _SAMPLED:
        return torch.arange(size, device="cpu")
    parts = np.arange(_SAMPLED) + np.random.default_rng(size).random(_SAMPLED)
    return torch.from_numpy((parts * size / _SAMPLED).astype(np.int64))
