"""Explain a failed capture: the cause, the module, and the line of the model's own code."""

from __future__ import annotations

import linecache
import traceback
from types import FrameType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ffebm_compiler.errors import CaptureError, InputError
from ffebm_compiler.passes.check_model import has_no_memory
from ffebm_compiler.passes.process import is_users

__all__ = ["NotTraceable", "explained", "rejected", "rejection_of"]


class NotTraceable(Exception):
    """The forward does something that a graph cannot hold. The message says what, and what to do instead."""


def explained(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> CaptureError | InputError:
    """The error to raise: whether the model rejects the inputs or cannot be traced, where, and what to do."""
    where = _where(source, error)
    if isinstance(error, NotTraceable):
        return CaptureError(f"the forward cannot be traced{where}: {error}")
    if "dynamic_shapes" in _first_line(error):
        return InputError(
            f"dynamic_shapes does not fit the inputs ({_first_line(error)}): expected 'batch', None, or what "
            "torch.export takes, the free dimensions of each input, such as {'x': {0: torch.export.Dim('batch')}}"
        )
    rejection = rejection_of(source, args, kwargs)
    if rejection is not None and has_no_memory(source):
        return CaptureError(
            f"the forward cannot be traced{_where(source, rejection)}: {type(rejection).__name__}: {rejection}; the "
            "model is on the meta device, where tensors have shapes and no values: load it, or make the tensor whose "
            "value it reads a constant"
        )
    if rejection is not None:
        return rejected(source, args, kwargs, rejection)
    return CaptureError(f"the forward cannot be traced{where}: {_cause(error)}")


def rejected(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> InputError:
    """The error to raise for inputs with which the model itself fails."""
    leaves = pytree.tree_leaves((args, kwargs))
    shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else repr(leaf)[:40] for leaf in leaves[:8]]
    others = f" and {len(leaves) - 8} more" if len(leaves) > 8 else ""
    return InputError(
        f"the model itself rejects the example inputs {shapes}{others}{_where(source, error)}: "
        f"{type(error).__name__}: {_first_line(error)}; pass inputs for which model(*inputs) runs"
    )


def rejection_of(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """The error that the eager model raises for the inputs, with or without gradients; None if it runs."""
    found: Exception | None = None
    for gradients in (False, True):
        try:
            with torch.set_grad_enabled(gradients):
                source(*args, **kwargs)
        except Exception as error:
            found = found or error
        else:
            return None
    return found


def _cause(error: Exception) -> str:
    """What went wrong, and what would help."""
    text = _first_line(error)
    kinds = {type(cause).__name__ for cause in _with_its_causes(error)}
    if "data-dependent" in str(error) or kinds & {"DataDependentOutputException", "DynamicOutputShapeException"}:
        return (
            "control flow or a Python number here depends on the values of a tensor (data-dependent), which a graph "
            "cannot hold; make the branch depend on shapes or settings, write it with torch.where, or convert the "
            "submodules around it"
        )
    if "_functorch/eager_transforms" in "".join(traceback.format_tb(error.__traceback__)):
        return (
            "a function transform of torch.func (grad, jacrev, ...) here cannot be captured; write its result with "
            "ordinary operations, or convert the submodules around it"
        )
    if ".numpy()" in text or "numpy" in kinds:
        return "the values leave torch here (.numpy()); use torch operations, or convert the submodules around it"
    return (
        f"{type(error).__name__}: {text}; rewrite this line with operations that torch.export takes, or convert the "
        "submodules around it"
    )


def _with_its_causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _where(source: nn.Module, error: BaseException) -> str:
    """Where it failed: the innermost module, the torch function it called, the innermost line of the model's code."""
    names = {id(module): name for name, module in source.named_modules()}
    path, kind, called, place, own = "", "", "", ("", 0), False
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        owner = _module_of_frame(frame)
        if owner is not None and id(owner) in names and not _is_machinery(frame.f_globals):
            path, called = names[id(owner)] or type(source).__name__, ""
            foreign = type(owner).__module__.startswith("torch.")
            kind = f", in {type(owner).__name__}" if foreign else ""
            if not (foreign and own):
                place, own = (file, line), not foreign
        elif own and is_users(frame.f_globals.get("__name__")):
            place, called = (file, line), ""  # a function that the module calls
        elif path and not called and frame.f_globals.get("__name__") == "torch.nn.functional":
            called = f", in F.{frame.f_code.co_name}"
    if not path:
        return ""
    code = linecache.getline(*place).strip()
    return f" in module {path!r} ({place[0]}, line {place[1]}){f' at {code!r}' if code else ''}{kind}{called}"


def _module_of_frame(frame: FrameType) -> nn.Module | None:
    """The module whose method a frame runs; None for a function that was merely given a module."""
    code = frame.f_code
    first = code.co_varnames[0] if code.co_varnames else ""
    owner = frame.f_locals.get(first)
    if not isinstance(owner, nn.Module):
        return None
    methods = (vars(kind).get(code.co_name) for kind in type(owner).__mro__)
    return owner if first == "self" or any(getattr(method, "__code__", None) is code for method in methods) else None


def _is_machinery(names: dict[str, Any]) -> bool:
    """Whether a frame belongs to what calls and traces modules, not to a module."""
    name = str(names.get("__name__", ""))
    machinery = ("torch.export.", "torch._", "torch.fx.", "torch.nn.modules.module", "torch.nn.utils.", "torch.utils.")
    return name.startswith(machinery) or name.startswith("ffebm_compiler.") or name.startswith("contextlib")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
