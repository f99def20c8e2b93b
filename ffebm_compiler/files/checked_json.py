"""Read JSON from files and check it against type annotations.

Every file that is read goes through `typed(kind, value)`. It walks an annotation (dataclasses, tuples, mappings,
unions, `Literal`, enumerations) beside the value. Where they differ, its error names the place inside the file, such as
`graph.operations[2].inputs: expected a list, got 5`.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.files.paths import path_of

__all__ = ["AtLeast", "Malformed", "Number", "clipped", "parse_json", "read_json", "short", "typed", "typed_fields"]

_LARGEST = 2**63 - 1
_MOST_BYTES = 1 << 28
_DEEPEST = 200


class Malformed(ValueError):
    """A JSON value is wrong. The message says where inside it, and how."""


@dataclass(frozen=True)
class AtLeast:
    """The smallest number that is allowed, as in `Annotated[int, AtLeast(1)]`. With `above` it is excluded."""

    least: float
    above: bool = False
    most: float = math.inf


class Number(float):
    """In an annotation: any number, also infinity and NaN. `float` means a finite number."""


def read_json(path: str | Path, what: str, error: type[FFEBMError], remedy: str) -> Any:
    """The JSON value in a file.

    Args:
        path: the file.
        what: begins the error message, e.g. "the plan".
        error: class of the errors.
        remedy: ends the error message.

    Raises:
        FFEBMError: of the class `error`; the file cannot be read, is too large, is no UTF-8 or no JSON, or
            gives a name twice.
        InputError: `path` is no path.
    """
    path = path_of(path, f"the file of {what}")
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as cause:
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"{what} {path} cannot be read: {reason}; {remedy}") from cause
    if len(data) > _MOST_BYTES:
        raise error(f"{what} {path} is larger than {_MOST_BYTES >> 20} MiB, which no file of this kind is: {remedy}")
    try:
        return parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 (byte {cause.start}: {cause.reason}): {remedy}") from cause
    except ValueError as cause:
        raise error(f"{path} is not JSON ({cause}): {remedy}") from cause


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        Malformed: the text is no JSON, an object gives a name twice, or the nesting is too deep. Names the line.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise Malformed(f"line {error.lineno} column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise Malformed("it is nested too deeply") from error
    except Malformed:
        raise
    except ValueError as error:  # a number has more digits than Python reads
        raise Malformed(f"a number is too long: {error}") from error
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for item in level if isinstance(item, dict | list) for inner in _items(item)]
        if not level:
            return value
    raise Malformed(f"it is nested more than {_DEEPEST} deep")


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise Malformed(f"an object has {short(next(name for name in names if names.count(name) > 1))} twice")
    return found


def typed(kind: Any, value: Any, place: str = "") -> Any:
    """The value in the form that an annotation says, with tuples for lists and dataclasses for objects.

    A whole number has at most 64 bits and is no boolean. A number is finite. A text has no lone surrogates. An object
    has only fields of its dataclass, and all that have no default.

    Args:
        kind: the annotation.
        value: a JSON value.
        place: where it is inside the file.

    Raises:
        Malformed: the value is something else. Names the place, what was expected and what is there.
    """
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        inner, *limits = get_args(kind)
        return _limited(typed(inner, value, place), limits, place)
    if origin in (Union, types.UnionType):
        return _one_of(get_args(kind), value, place)
    if origin is Literal:
        if isinstance(value, bool) or value not in get_args(kind):
            raise _unexpected(place, " or ".join(map(repr, get_args(kind))), value)
        return value
    if origin is tuple or origin is list or origin is Sequence:
        return _sequence(get_args(kind), value, place)
    if origin is dict or origin is Mapping:
        item = get_args(kind)[1]
        return {key: typed(item, inner, _place_inside(place, key)) for key, inner in _mapping(value, place).items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enumerated(kind, value, place)
    if is_dataclass(kind):
        found = typed_fields(kind, value, place)
        try:
            return kind(**found)  # type: ignore[operator]
        except FFEBMError as error:  # the class checks its own fields
            raise Malformed(f"{place}: {error}" if place else str(error)) from error
    return _scalar(kind, value, place)


def typed_fields(kind: Any, value: Any, place: str = "", required: Sequence[str] | None = None) -> dict[str, Any]:
    """The fields that a JSON object gives for a dataclass, each in the form that its annotation says.

    Args:
        kind: the dataclass.
        value: a JSON value.
        place: where it is inside the file.
        required: the fields that must be there. None requires those without a default.

    Raises:
        Malformed: the value is something else. Names the place, what was expected and what is there.
    """
    given = _mapping(value, place)
    known = {field.name: field for field in fields(kind) if field.init}
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it may have {', '.join(known)}"
            raise Malformed(f"{place or 'the file'} has {short(name)}, which is not known: {hint}")
    if required is None:
        required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    for name in required:
        if name not in given:
            raise Malformed(f"{place or 'it'} has no {name!r}")
    hints = get_type_hints(kind, include_extras=True)
    return {name: typed(hints[name], inner, _place_inside(place, name)) for name, inner in given.items()}


def short(value: object) -> str:
    """A value as a short text, however long it is."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} letters)"


def clipped(text: str) -> str:
    """A sentence, cut if names from a file have made it very long."""
    return text if len(text) <= 1000 else f"{text[:700]} ... ({len(text) - 900} letters) ... {text[-200:]}"


def _place_inside(place: str, name: str) -> str:
    shown = name if name.isidentifier() and name.isascii() and len(name) <= 60 else f"[{short(name)}]"
    return shown if not place else f"{place}.{shown}" if shown == name else f"{place}{shown}"


def _unexpected(place: str, expected: str, value: object) -> Malformed:
    return Malformed(f"{place or 'it'}: expected {expected}, got {short(value)}")


def _mapping(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _unexpected(place, "an object", value)
    for key in value:
        _scalar(str, key, f"a name in {place or 'the file'}")
    return value


def _sequence(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _unexpected(place, "a list", value)
    if kinds[-1] is Ellipsis or len(kinds) == 1:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _unexpected(place, f"a list of {len(kinds)}", value)
    return tuple(typed(kind, item, f"{place}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _one_of(kinds: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        return typed(others[0], value, place)
    problems = []
    for kind in others:
        try:
            return typed(kind, value, place)
        except Malformed as error:
            problems.append(str(error))
    raise Malformed("; or ".join(problems))


def _enumerated(kind: type[Enum], value: Any, place: str) -> Enum:
    for member in kind:
        if isinstance(value, str) and member.value == value:
            return member
    raise _unexpected(place, " or ".join(repr(member.value) for member in kind), value)


def _limited(value: Any, limits: Sequence[Any], place: str) -> Any:
    for limit in limits:
        if not limit.least <= value <= limit.most or (limit.above and value == limit.least):
            end = f" and at most {limit.most:g}" if limit.most < math.inf else ""
            raise _unexpected(
                place, f"a number {'above' if limit.above else 'of at least'} {limit.least:g}{end}", value
            )
    return value


def _scalar(kind: Any, value: Any, place: str) -> Any:
    if kind is str:
        if not isinstance(value, str):
            raise _unexpected(place, "a text", value)
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _unexpected(place, "a text without lone surrogates (halves of characters)", value)
    elif kind is bool:
        if not isinstance(value, bool):
            raise _unexpected(place, "true or false", value)
    elif kind is int:
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
            raise _unexpected(place, "a whole number of at most 64 bits", value)
    elif kind in (float, Number):
        if isinstance(value, bool) or not isinstance(value, int | float) or not _fits(value, kind):
            raise _unexpected(place, "a finite number" if kind is float else "a number", value)
        return float(value)
    elif kind is type(None):
        if value is not None:
            raise _unexpected(place, "null", value)
    else:
        raise TypeError(f"{place}: no JSON value is a {kind!r}")
    return value


def _fits(value: float, kind: Any) -> bool:
    try:
        return math.isfinite(float(value)) or kind is Number
    except OverflowError:  # the number is larger than the largest float
        return False
