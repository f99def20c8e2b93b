"""The functional form of an in-place operation: `aten.add_.Tensor` -> `aten.add.Tensor`.

The functional overloads of `x.copy_(y)`, `x.fill_(v)` and `x.zero_()` have no derivative, so these
get forms of their own here. An `out=` argument is a write, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from ffebm_compiler.passes.emit import on_fakes
from ffebm_compiler.runtime.feedforward.in_place import copied, filled

__all__ = ["FunctionalForm", "functional_form", "is_random", "moves_no_data", "writes"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FunctionalForm:
    """An operation that computes the value which an in-place operation writes."""

    target: Callable[..., Any]
    out: str | None = None
    """Name of the `out=` argument that is written; None where the first operand is."""
    defaults: tuple[Any, ...] = ()
    """Defaults of the in-place operation for arguments that the functional one demands (`bernoulli_()`)."""

    def operands(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Positional arguments of the functional call."""
        return (*args, *self.defaults[len(args) :])

    def rest(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Positional arguments after the first."""
        return tuple(args[1:])

    def named(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments of the functional call."""
        return {name: value for name, value in kwargs.items() if name != self.out}

    def result(self, node: fx.Node) -> Any:
        """The result of the functional call for the captured values (fake tensors); None if it is unknown."""
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: operand.meta.get("val"))
        mode = next((operand.fake_mode for operand in _leaves(args) if isinstance(operand, FakeTensor)), None)
        if mode is None:
            return None
        try:
            with on_fakes(mode), torch.no_grad():
                return self.target(*args, **kwargs)
        except Exception:  # some sizes are known only at run time
            return None


def _leaves(arguments: Any) -> list[Any]:
    return list(arguments) if isinstance(arguments, list | tuple) else []


def writes(node: fx.Node) -> bool:
    """Whether a node mutates one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether a node overwrites its operand with random numbers. Dropout and RReLU do not: they transform it."""
    if not isinstance(node.target, torch._ops.OpOverload) or _name(node.target) in _RANDOM_TRANSFORMS:
        return False
    return torch.Tag.nondeterministic_seeded in node.target.tags


_RANDOM_TRANSFORMS = ("dropout_", "feature_dropout_", "alpha_dropout_", "feature_alpha_dropout_", "rrelu_")
_CHANGE_SIZES = ("resize_", "resize_as_", "set_", "as_strided_")
_MOVE_NO_DATA = ("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "detach_")


def moves_no_data(node: fx.Node) -> bool:
    """Whether an in-place operation makes its operand another view of the same memory."""
    return isinstance(node.target, torch._ops.OpOverload) and _name(node.target) in _MOVE_NO_DATA


def functional_form(node: fx.Node) -> FunctionalForm | None:
    """The functional form of a node that writes, or None where there is none."""
    overload = node.target
    assert isinstance(overload, torch._ops.OpOverload)
    name = _name(overload)
    if name == "copy_":
        return FunctionalForm(copied)
    if name in ("fill_", "zero_"):
        return FunctionalForm(filled)
    if name in _CHANGE_SIZES:
        return None
    schema = overload._schema
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    if len(written) != 1:
        return None
    out = written[0] if schema.arguments[0].name != written[0] else None
    if out is not None:
        packet = name
    elif name.startswith("__i") and name.endswith("__"):
        packet = "__" + name.removeprefix("__i")
    elif name.endswith("_"):
        packet = name[:-1]
    else:
        return None
    wanted = [(a.name, str(a.type)) for a in schema.arguments if a.name != out]
    for operations in (getattr(aten, packet, None), getattr(aten, f"{packet}_functional", None)):
        for candidate in operations.overloads() if operations is not None else ():
            functional = getattr(operations, candidate)
            has = [(a.name, str(a.type)) for a in functional._schema.arguments]
            if not functional._schema.is_mutable and _matches(wanted, has):
                return FunctionalForm(functional, out, _defaults(schema, functional._schema))
    return None


def _defaults(schema: Any, functional: Any) -> tuple[Any, ...]:
    """The in-place operation's defaults for those arguments that the functional one demands."""
    given = [argument.default_value for argument in schema.arguments if not argument.kwarg_only]
    demanded = [not a.kwarg_only and not a.has_default_value() for a in functional.arguments]
    count = max((index + 1 for index, needed in enumerate(demanded) if needed), default=0)
    return tuple(given[:count])


def _matches(wanted: list[tuple[str, str]], has: list[tuple[str, str]]) -> bool:
    """Whether the arguments are the same. Only operands after the first may differ in name (`bernoulli_.float`)."""
    return len(wanted) == len(has) and all(a[1] == b[1] for a, b in zip(wanted, has, strict=True))


def _name(overload: torch._ops.OpOverload) -> str:
    return str(overload._schema.name.split("::")[1])
