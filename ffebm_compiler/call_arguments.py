"""Turn a call of a hybrid into one with the same positional and keyword arguments as the captured call."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ffebm_compiler.errors import InputError

__all__ = ["as_captured"]

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_captured(signature: inspect.Signature, captured: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The same call in the captured form.

    An argument that is not given gets its default. An argument that was not captured may be given, but only with its
    default value.

    Args:
        signature: signature of the source's forward.
        captured: the captured call. Only its form counts, not its values.
        args: the positional arguments of the call.
        kwargs: its keyword arguments.

    Raises:
        InputError: the call gives an argument that was not captured.
    """
    try:
        given = _by_name(signature, args, kwargs)
    except TypeError:  # the caller of this function reports what was expected
        return args, kwargs
    parameters = signature.parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    names = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    captured_args, captured_kwargs = captured
    rest = next((name for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
    positional: list[Any] = []
    for name in names[: len(captured_args)]:
        if name not in given and name not in defaults:
            break
        positional.append(given.pop(name, defaults.get(name)))
    if rest is not None:
        positional.extend(given.pop(rest, ()))
    keywords = {
        name: given.pop(name, defaults.get(name)) for name in captured_kwargs if name in given or name in defaults
    }
    for name, value in given.items():
        default = defaults.get(name)
        if value is default or (not isinstance(value, Tensor) and type(value) is type(default) and value == default):
            continue
        raise InputError(
            f"argument {name!r} is {_described(value)}, but the model was captured without it: convert again, with it "
            "among the example inputs"
        )
    return tuple(positional), keywords


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound = signature.bind(*args, **kwargs)
    given = dict(bound.arguments)
    others = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    given.update(given.pop(others, {}) if others is not None else {})
    return given


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
