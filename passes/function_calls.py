"""Calls of custom functions, caught on their way: what `custom_functions` records while a model is traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["called_through", "is_traced_through", "takes_no_context"]


@contextmanager
def called_through(
    apply: Callable[..., Any], record: Callable[..., Any], forwards: dict[type, Callable[..., Any]]
) -> Iterator[None]:
    """Let calls of custom functions go through `apply` or `record`; `forwards` gets the forwards that are replaced.

    Models keep `Function.apply` bound (`round_ste = Round.apply`), so that another `Function.apply` is not enough. Up
    to torch 2.14 it calls that of `_SingleLevelFunction`. In torch 2.15 it is compiled and calls the class's `forward`.
    """
    before = vars(torch.autograd.Function)["apply"]
    if isinstance(before, classmethod):
        _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del _SingleLevelFunction.apply  # type: ignore[attr-defined]
        return
    functions: list[Any] = [
        function
        for function in _subclasses(torch.autograd.Function)
        if not is_traced_through(function) and not issubclass(function, CheckpointFunction)
    ]
    own = {function: vars(function).get("forward") for function in functions}
    forwards.update({function: function.forward for function in functions})
    for function in functions:
        function.forward = staticmethod(_through(record, function, forwards[function]))
    torch.autograd.Function.apply = classmethod(_with_defaults(apply, forwards))  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = before  # type: ignore[method-assign]
        for function, forward in own.items():
            if forward is None:
                del function.forward
            else:
                function.forward = forward


def _with_defaults(apply: Callable[..., Any], forwards: dict[type, Callable[..., Any]]) -> Callable[..., Any]:
    """`apply`, with the defaults of a forward that takes no context, as torch fills them in."""

    def called(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls in forwards and takes_no_context(cls):
            bound = inspect.signature(forwards[cls]).bind(*args, **kwargs)
            bound.apply_defaults()
            args, kwargs = bound.args, bound.kwargs
        return apply(cls, *args, **kwargs)

    return called


def _through(record: Callable[..., Any], function: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is recorded where compiled code calls it; without tensors, the function's own."""
    first = 0 if takes_no_context(function) else 1

    def called(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args[first:], kwargs))):
            return forward(*args, **kwargs)
        return record(function, args[first:], kwargs, detached=True)

    return called


def takes_no_context(function: Any) -> bool:
    """Whether the forward of a function has no `ctx`, which `setup_context` gets instead."""
    return function.setup_context is not torch.autograd.Function.setup_context


def _subclasses(of: type) -> set[type]:
    """All classes below one."""
    direct: list[type] = of.__subclasses__()
    return {*direct, *(lower for each in direct for lower in _subclasses(each))}


def is_traced_through(function: type) -> bool:
    """Whether to trace through a function: it is a part of torch's machinery, and no layer of `torch.nn`."""
    if function.__module__ == "torch.nn.modules._functions":
        return function is BackwardHookFunction
    return function.__module__.split(".")[0] == "torch"
