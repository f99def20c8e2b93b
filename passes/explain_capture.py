"""Explain a failed capture: what the cause is, in which module and at which line of the model's own code."""

from __future__ import annotations

import traceback
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ffebm_compiler.errors import CaptureError, InputError

__all__ = ["explained"]


def explained(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> CaptureError | InputError:
    """Say whether the model rejects the inputs or only cannot be traced, and where."""
    where = _where(source, error)
    try:
        with torch.no_grad():
            source(*args, **kwargs)
    except Exception as rejection:
        shapes = [
            tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else repr(leaf)
            for leaf in pytree.tree_leaves((args, kwargs))
        ]
        return InputError(
            f"the model itself rejects the example inputs {shapes}{_where(source, rejection)}: "
            f"{type(rejection).__name__}: {_first_line(rejection)}; pass inputs for which model(*inputs) runs"
        )
    return CaptureError(
        f"the forward cannot be traced{where}: {_first_line(error)}; control flow or sizes that depend on data "
        "cannot be compiled: make the branch depend on shapes or settings, or convert the submodules around it"
    )


def _where(source: nn.Module, error: BaseException) -> str:
    """Path of the innermost module, and the innermost line of the model's own code (not of torch)."""
    names = {id(module): name for name, module in source.named_modules()}
    path, place, own = "", "", False
    for frame, line in traceback.walk_tb(error.__traceback__):
        names_of_locals = frame.f_code.co_varnames
        owner = frame.f_locals.get(names_of_locals[0]) if names_of_locals else None
        if isinstance(owner, nn.Module) and id(owner) in names and frame.f_code.co_name != "_call_impl":
            if frame.f_code.co_filename.endswith("torch/nn/modules/module.py"):
                continue
            path = names[id(owner)] or type(source).__name__
            foreign = type(owner).__module__.startswith("torch.")
            if not (foreign and own):
                place, own = f"{frame.f_code.co_filename}, line {line}", not foreign
    return f" in module {path!r} ({place})" if path else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
