"""Operators of block programs in a manifest: a dataclass for each, and the operator that is read back from it.

Only the operators listed here can be read, since a manifest names no Python object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ffebm_compiler.files.checked_json import AtLeast, Malformed, short, typed
from ffebm_compiler.runtime.program import pointwise
from ffebm_compiler.runtime.program.contraction import Contraction
from ffebm_compiler.runtime.program.operators import Convolution, Reshape, Wiring, slice_of

__all__ = [
    "StoredConcat",
    "StoredContraction",
    "StoredConvolution",
    "StoredGain",
    "StoredLinear",
    "StoredPermute",
    "StoredScale",
    "StoredSum",
    "StoredWiring",
    "contraction_from",
    "convolution_from",
    "convolution_to_json",
    "wiring_from",
    "wiring_to_json",
]

WIRING: Mapping[str, Callable[..., Tensor]] = {
    "avg_pool1d": F.avg_pool1d,
    "avg_pool2d": F.avg_pool2d,
    "avg_pool3d": F.avg_pool3d,
    "adaptive_avg_pool1d": F.adaptive_avg_pool1d,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "adaptive_avg_pool3d": F.adaptive_avg_pool3d,
    "mean": torch.mean,
    "select": torch.select,
    "slice": slice_of,
    "narrow": torch.narrow,
    "movedim": torch.movedim,
}
RESHAPES: Mapping[str, Callable[..., Tensor]] = {
    "reshape": torch.reshape,
    "flatten": torch.flatten,
    "unflatten": torch.unflatten,
    "squeeze": torch.squeeze,
    "unsqueeze": torch.unsqueeze,
}


_CONVOLUTIONS: Mapping[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): pointwise.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): pointwise.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
_LARGEST_SETTING = 1 << 16
"""The largest stride, padding or size of a pooled output. A larger one would fill the memory."""
_Small = Annotated[int, AtLeast(0, most=_LARGEST_SETTING)]
_Step = Annotated[int, AtLeast(1, most=_LARGEST_SETTING)]


@dataclass(frozen=True)
class StoredLinear:
    """y = x Wᵀ + b, or x W + b if it is transposed."""

    kind: str
    transposed: bool = False


@dataclass(frozen=True)
class StoredContraction:
    """A product over named dimensions."""

    kind: str
    equation: str


@dataclass(frozen=True)
class StoredSum:
    """Σ f x + constant."""

    kind: str
    factors: tuple[float, ...]
    constant: float


@dataclass(frozen=True)
class StoredScale:
    """y = f x."""

    kind: str
    factor: float


@dataclass(frozen=True)
class StoredGain:
    """y = g ⊙ x."""

    kind: str


@dataclass(frozen=True)
class StoredConcat:
    """Concatenation."""

    kind: str
    dim: Annotated[int, AtLeast(-64, most=64)]


@dataclass(frozen=True)
class StoredPermute:
    """Permutation of dimensions."""

    kind: str
    dims: tuple[Annotated[int, AtLeast(-64, most=64)], ...]


@dataclass(frozen=True)
class StoredWiring:
    """A function of `WIRING` or `RESHAPES` and its arguments."""

    kind: str
    function: str
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class StoredConvolution:
    """A convolution, transposed or not."""

    kind: str
    stride: tuple[_Step, ...]
    padding: tuple[_Small, ...]
    padding_mode: Literal["explicit", "same", "valid"]
    dilation: tuple[_Step, ...]
    transposed: bool
    output_padding: tuple[_Small, ...]
    groups: _Step


def convolution_to_json(operator: Convolution) -> dict[str, Any]:
    """The settings of a convolution."""
    padding = operator.arguments[1]
    return {
        "stride": list(operator.stride),
        "padding": list(operator.padding),
        "padding_mode": padding if isinstance(padding, str) else "explicit",
        "dilation": list(operator.dilation),
        "transposed": operator.transposed,
        "output_padding": list(operator.output_padding),
        "groups": operator.groups,
    }


def wiring_to_json(operator: Wiring) -> dict[str, Any] | None:
    """The function's name and its arguments; None if the function has no name here."""
    table = RESHAPES if isinstance(operator, Reshape) else WIRING
    name = next((key for key, function in table.items() if function is operator.function), None)
    if name is None or not _plain_settings((operator.arguments, operator.keywords)):
        return None
    keywords = {key: _lists(value) for key, value in operator.keywords}
    return {"function": name, "arguments": _lists(operator.arguments), "keywords": keywords}


def _plain_settings(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain_settings(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value


def contraction_from(found: StoredContraction, place: str) -> Contraction:
    """The contraction with this equation."""
    match = re.fullmatch(r"([A-Za-z]+),([A-Za-z]+)->([A-Za-z]+)", found.equation)
    if match is None or any(len(set(part)) != len(part) for part in match.groups()):
        raise Malformed(f"{place}.equation: expected one such as 'bnd,hde->bhne', got {short(found.equation)}")
    if not set(match[3]) <= {*match[1], *match[2]}:
        raise Malformed(f"{place}.equation: the result has an index that neither operand has")
    return Contraction(found.equation)


def wiring_from(found: StoredWiring, place: str) -> Wiring:
    """The wiring operator with this function and these arguments."""
    table, form = (RESHAPES, Reshape) if found.kind == "reshape" else (WIRING, Wiring)
    if found.function not in table:
        raise Malformed(f"{place}.function: expected one of {', '.join(table)}, got {short(found.function)}")
    most = _LARGEST_SETTING if "pool" in found.function else 2**63 - 1
    arguments = _with_tuples(list(found.arguments), f"{place}.arguments", most)
    keywords = tuple(
        (key, _with_tuples(value, f"{place}.keywords.{key}", most)) for key, value in found.keywords.items()
    )
    return form(table[found.function], arguments, keywords)


def convolution_from(found: StoredConvolution, place: str) -> Convolution:
    """The convolution with these settings."""
    sizes = {len(found.stride), len(found.padding), len(found.dilation)}
    function = _CONVOLUTIONS.get((len(found.stride), found.transposed))
    if function is None or len(sizes) != 1:
        raise Malformed(f"{place}: expected stride, padding and dilation of one, two or three numbers each")
    stride, dilation, padding, extra = found.stride, found.dilation, found.padding, found.output_padding
    given = padding if found.padding_mode == "explicit" else found.padding_mode
    arguments = (
        (stride, padding, extra, found.groups, dilation)
        if found.transposed
        else (stride, given, dilation, found.groups)
    )
    return Convolution(function, arguments, stride, padding, dilation, found.transposed, extra, found.groups)


def _with_tuples(value: Any, place: str, most: int) -> Any:
    """Numbers, texts and lists of them, with tuples in place of lists."""
    if isinstance(value, list | tuple):
        if any(isinstance(item, list | tuple) for inner in value if isinstance(inner, list | tuple) for item in inner):
            raise Malformed(f"{place}: lists are nested too deeply")
        return tuple(_with_tuples(item, place, most) for item in value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return typed(str, value, place)
    if isinstance(value, int):
        return typed(Annotated[int, AtLeast(-most, most=most)], value, place)
    return typed(float, value, place)
