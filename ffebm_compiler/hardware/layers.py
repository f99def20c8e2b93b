"""Fields of a fabric that may differ from layer to layer, and mappings that cannot change.

`Hardware.overrides` maps glob patterns on module paths to the fields that differ for the layers
they match. As in `force_digital`, a pattern matches a layer by its own path or by the path of a module that holds it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ffebm_compiler.errors import HardwareError

__all__ = ["PER_LAYER", "Frozen", "checked_overrides", "fields_for", "matches", "unmatched"]

PER_LAYER = ("tile_rows", "tile_cols", "devices_per_weight", "conv_mapping", "bias_row", "groups_share_tiles")
"""Fields of `Hardware` that may differ for a layer. The others belong to a core or to the whole fabric."""


class Frozen(Mapping[str, Any]):
    """A mapping that cannot change, so that the object which holds it can be hashed, copied and pickled."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a module path or a module that holds it matches one of the glob patterns."""
    parts = path.split(".")
    ancestors = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(fnmatch.fnmatchcase(ancestor, pattern) for pattern in patterns for ancestor in ancestors)


def checked_overrides(overrides: object) -> Frozen:
    """Overrides whose fields are known. `Hardware` checks their values.

    Raises:
        HardwareError: the overrides are malformed; names the pattern and the field.
    """
    example = "such as {'layer4.*': {'tile_cols': 512}}"
    if not isinstance(overrides, Mapping):
        raise HardwareError(
            f"overrides must map patterns of module paths to fields, {example}, or be None; got "
            f"{type(overrides).__name__}"
        )
    found = {}
    for pattern, values in overrides.items():
        if not isinstance(pattern, str) or not pattern:
            raise HardwareError(f"overrides must have patterns of module paths as keys, {example}; got {pattern!r}")
        if not isinstance(values, Mapping) or not values:
            raise HardwareError(f"overrides[{pattern!r}] must map fields to values, {example}; got {values!r}")
        for field in values:
            if field not in PER_LAYER:
                close = get_close_matches(str(field), PER_LAYER, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"a layer may have {', '.join(PER_LAYER)}"
                raise HardwareError(f"overrides[{pattern!r}] cannot set {field!r}: {hint}")
        found[pattern] = Frozen(values)
    return Frozen(found)


def fields_for(overrides: Mapping[str, Mapping[str, Any]], path: str) -> dict[str, Any]:
    """The fields that the overrides give for a layer.

    Raises:
        HardwareError: two patterns match the layer and disagree.
    """
    found: dict[str, tuple[Any, str]] = {}
    for pattern, values in overrides.items():
        if not matches(path, (pattern,)):
            continue
        for field, value in values.items():
            before = found.setdefault(field, (value, pattern))
            if before[0] != value:
                raise HardwareError(
                    f"the overrides {before[1]!r} and {pattern!r} both match layer {path!r} and give {field} as "
                    f"{before[0]!r} and {value!r}: make one of the patterns narrower"
                )
    return {field: value for field, (value, _) in found.items()}


def unmatched(overrides: Mapping[str, Mapping[str, Any]] | None, paths: Sequence[str]) -> list[str]:
    """The patterns that match none of the layers."""
    return [pattern for pattern in overrides or () if not any(matches(path, (pattern,)) for path in paths)]
