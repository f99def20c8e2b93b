"""Tracing: what must hold while `torch.export` runs the forward, so that it sees what the user's code does.

- an operation that runs without gradient is marked: inside autocast regions the exporter forgets `no_grad`.
- `x.data` is `x.detach()`, which the exporter can record.
- autocast regions around the call of `convert` are off: the hybrid runs under whatever its caller has on.
- distributions do not look at the values of their parameters.
- attention and encoders take their ordinary path, not the fused one of eval mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributions import Distribution
from torch.fx import traceback
from torch.overrides import TorchFunctionMode

__all__ = ["WITHOUT_GRADIENT", "tracing"]

WITHOUT_GRADIENT = "ffebm_without_gradient"
"""Key under which an operation that ran without gradient is marked."""

_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class _UsersCalls(TorchFunctionMode):
    """Sees every call of torch that the forward makes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call, marked where no gradient is recorded."""
        if func == _DATA:
            return args[0].detach()
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with traceback.preserve_node_meta(), traceback.annotate({WITHOUT_GRADIENT: True}):
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _unchecked_distributions() -> Iterator[None]:
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """The state of torch in which a forward is traced; what was before is restored."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_unchecked_distributions())
            stack.enter_context(_UsersCalls())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
