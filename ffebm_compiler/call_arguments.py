"""Turn a call of a hybrid into one with the same positional and keyword arguments as the captured call."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.passes.containers import plain
from ffebm_compiler.passes.keyword_order import gathered_keywords

__all__ = ["as_captured", "check_keys", "check_order"]

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


def check_order(signature: inspect.Signature, captured: dict[str, Any], kwargs: dict[str, Any]) -> None:
    """Check that the keywords that fall into `**kwargs` come in the captured order.

    Raises:
        InputError: they do not, and the forward reads their order.
    """
    known, given = gathered_keywords(signature, captured), gathered_keywords(signature, kwargs)
    common = [name for name in given if name in captured]
    if common != [name for name in known if name in kwargs]:
        raise InputError(
            f"the keyword arguments {_listed(given)} were captured in the order {_listed(known)}, and the forward "
            "computes something else for another order of them: pass them in the captured order, or convert again"
        )


def check_keys(given: Any, captured: Any) -> None:
    """Check that the dictionaries of a call do not differ from the captured ones in the order of their keys alone.

    Raises:
        InputError: one of them does.
    """
    pending = [(plain(given)[0], captured)]
    while pending:
        one, other = pending.pop()
        if isinstance(one, dict) and isinstance(other, dict):
            if list(one) != list(other) and one.keys() == other.keys():
                raise InputError(
                    f"a dictionary among the inputs has the keys {_listed(one)}, and the captured one had them in the "
                    f"order {_listed(other)}, which a forward may read: build it in the captured order, or convert "
                    "again with example inputs in this order"
                )
            pending += [(one[key], other[key]) for key in one if key in other]
        elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
            pending += zip(one, other, strict=False)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names))


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound = signature.bind(*args, **kwargs)
    given = dict(bound.arguments)
    others = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    given.update(given.pop(others, {}) if others is not None else {})
    return given


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
