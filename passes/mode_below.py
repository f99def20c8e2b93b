"""Mode below: put a mode below those that are on torch's stack of function modes.

A call of torch goes from the top of the stack to its bottom. So a mode below sees what those above have made of it.

Promise: however the context ends, the stack is as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

__all__ = ["mode_below"]


@contextmanager
def mode_below(mode: TorchFunctionMode) -> Iterator[None]:
    """Put a mode at the bottom of the stack while the context is open. It stays where it is if it is on it."""
    before = _get_current_function_mode_stack()
    if mode not in before:
        _replace([mode, *before])
    try:
        yield
    finally:
        _replace(before)


def _replace(stack: list[TorchFunctionMode]) -> None:
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in stack:
        _push_mode(mode)
