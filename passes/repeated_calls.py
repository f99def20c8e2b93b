"""Repeated calls: test whether a forward is a function of its inputs, its tensors and torch's seed alone.

It is not if the same call gives another output when it is made again. Then the model has state that no parameter or
buffer holds: an object's counter, a global variable, a closure, a plain tensor.

Promise: the hooks that the test sets are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ffebm_compiler.passes.containers import leaves_of

__all__ = ["differ", "differing_module"]

_ROUNDING = 1e-4
"""Allowed ‖a − b‖/‖b‖ between two calls. It covers the order of sums, which some devices change from call to call."""


def differ(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether the outputs of two calls differ by more than rounding."""
    return len(first) != len(second) or not all(map(_same, first, second))


def differing_module(source: nn.Module, call: Callable[[], object]) -> str:
    """Name of the innermost module whose outputs differ for the same inputs in a second `call`; "" if there is none."""
    names = {module: name for name, module in source.named_modules()}
    runs: list[list[tuple[nn.Module, list[Any], list[Any]]]] = []
    for _ in range(2):
        seen: list[tuple[nn.Module, list[Any], list[Any]]] = []
        runs.append(seen)

        def note(module: nn.Module, inputs: Any, output: Any, seen: Any = seen) -> None:
            seen.append((module, _copied(inputs), _copied(output)))

        handle = register_module_forward_hook(note)
        try:
            call()
        finally:
            handle.remove()
    for (module, inputs, outputs), (other, again, results) in zip(*runs, strict=False):
        if module is not other:
            return ""
        if differ(outputs, results) and not differ(inputs, again):
            return names.get(module, "") or type(module).__name__
    return ""


def _copied(value: Any) -> list[Any]:
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves_of(value)]


def _same(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return True
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.is_meta or not first.numel():
        return True
    if not (first.is_floating_point() or first.is_complex()):
        return bool(torch.equal(first, second)) or first.device.type != "cpu"
    wide = torch.complex128 if first.is_complex() else torch.float64
    one, other = first.to(wide), second.to(wide)
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
    return float((one - other).norm()) <= _ROUNDING * float(other.norm())
