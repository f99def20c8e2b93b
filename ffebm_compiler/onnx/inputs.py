"""Inputs: the tensors that an export is run on, by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.errors import ExportError

__all__ = ["Inputs", "named_inputs"]

Inputs = Tensor | np.ndarray | Sequence[Any] | Mapping[str, Any]
"""One tensor or array, a sequence in the order of the forward, or a mapping by the names in the manifest."""


def named_inputs(names: Sequence[str], inputs: object, what: str = "the export") -> dict[str, Tensor]:
    """Name -> tensor on the CPU, in the order of the names.

    Args:
        names: of the inputs that the export takes.
        inputs: one tensor or array, a sequence of such or of numbers, or a mapping by names.
        what: how an error names the export.

    Raises:
        ExportError: they are something else, or others than the export takes.
    """
    if isinstance(inputs, Tensor | np.ndarray):
        inputs = [inputs]
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence | Mapping):
        raise ExportError(
            f"inputs is a {type(inputs).__name__}; expected a tensor or an array, a sequence of them in the order "
            f"{', '.join(names)}, or a dictionary by these names"
        )
    if isinstance(inputs, Mapping):
        given = dict(inputs)
    else:
        given = dict(zip(names, inputs, strict=False)) if len(inputs) == len(names) else {}
    if set(given) != set(names):
        found = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else f"{len(inputs)} tensors"
        raise ExportError(
            f"{what} takes {len(names)} inputs ({', '.join(names)}), got {found or 'none'}: pass each of them"
        )
    return {name: _tensor(name, given[name], names) for name in names}


def _tensor(name: str, item: object, names: Sequence[str]) -> Tensor:
    if isinstance(item, Tensor):
        if item.layout is not torch.strided:
            raise ExportError(f"input {name!r} is a sparse tensor, expected a dense one: convert it by to_dense()")
        return item.detach().cpu()
    try:
        return torch.as_tensor(np.asarray(item), device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # of no numbers, or of rows that differ in length
        raise ExportError(
            f"input {name!r} is a {type(item).__name__} that is no tensor of numbers; expected a tensor or an array. "
            f"Tensors inside of containers are given one by one, in the order {', '.join(names)}"
        ) from error
