"""Plain call: let a forward take and return plain containers while it is traced."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ffebm_compiler.passes.containers import Recipe, plain

__all__ = ["PlainCall", "plain_call"]


@dataclass
class PlainCall:
    """Example inputs in plain form, and the forms that build inputs and outputs from it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Recipe
    outputs: Recipe
    """The form of the outputs of the last call."""


def _with_names(signature: inspect.Signature, kwargs: dict[str, Any]) -> inspect.Signature:
    """The signature with names in place of `**kwargs`, since the exporter frees no size of a value in `**kwargs`."""
    parameters = list(signature.parameters.values())
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return signature
    more = [name for name in kwargs if name not in signature.parameters]
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more]
    return signature.replace(parameters=[*parameters[:-1], *(named or parameters[-1:])])


@contextlib.contextmanager
def plain_call(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[PlainCall]:
    """While the context is open, let `source` take the plain form of its inputs and return plain containers."""
    (plain_args, plain_kwargs), inputs = plain((args, kwargs))
    call = PlainCall(plain_args, plain_kwargs, inputs, Recipe())
    original = source.forward
    own = source.__dict__.get("forward")

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not inputs.trivial:
            args, kwargs = inputs.build((args, kwargs))
        result, call.outputs = plain(original(*args, **kwargs))
        return result

    forward.__signature__ = _with_names(inspect.signature(original), plain_kwargs)  # type: ignore[attr-defined]
    source.__dict__["forward"] = forward
    try:
        yield call
    finally:
        del source.__dict__["forward"]
        if own is not None:
            source.__dict__["forward"] = own
