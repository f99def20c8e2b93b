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
from ffebm_compiler.passes.opaque_outputs import opaque_output

__all__ = ["PlainCall", "plain_call"]


@dataclass
class PlainCall:
    """Example inputs in plain form, and the forms that build inputs and outputs from it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Recipe
    outputs: Recipe
    """The form of the outputs of the last call."""
    opaque: str = ""
    """Where the outputs of the last call hold a tensor that cannot be returned, or an empty text."""
    changed: str = ""
    """The list or dictionary among the inputs that the last call changed, or an empty text."""


def _positional(signature: inspect.Signature, count: int) -> list[str]:
    """A name for each positional argument."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]
    return (names + [f"#{index}" for index in range(count)])[:count] if len(names) < count else names[:count]


def _contents(given: dict[str, Any]) -> list[tuple[str, Any, list[Any]]]:
    """The plain lists and dictionaries among named arguments: where each is, itself, and its items at present."""
    found: list[tuple[str, Any, list[Any]]] = []
    pending = [(f"argument {name!r}", ", at ", value) for name, value in given.items()]
    while pending:
        place, joint, value = pending.pop()
        if type(value) in (list, dict):
            found.append((f"a {type(value).__name__} among its inputs ({place})", value, _items(value)))
        if type(value) in (list, tuple, dict):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(f"{place}{joint}[{key!r}]", "", item) for key, item in items]
    return found


def _items(value: Any) -> list[Any]:
    return [part for item in value.items() for part in item] if isinstance(value, dict) else list(value)


def _are_same(value: Any, items: list[Any]) -> bool:
    now = _items(value)
    return len(now) == len(items) and all(one is other for one, other in zip(now, items, strict=True))


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
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        before = _contents(given)
        result, call.outputs = plain(original(*args, **kwargs))
        call.opaque = opaque_output(call.outputs)
        call.changed = next((place for place, held, items in before if not _are_same(held, items)), "")
        return result

    names = _positional(inspect.signature(original), len(plain_args))
    forward.__signature__ = _with_names(inspect.signature(original), plain_kwargs)  # type: ignore[attr-defined]
    source.__dict__["forward"] = forward
    try:
        yield call
    finally:
        del source.__dict__["forward"]
        if own is not None:
            source.__dict__["forward"] = own
