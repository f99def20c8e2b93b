"""The analog fabric that a network is partitioned for: tiles, cores, capacities and converters.

A *tile* is one crossbar of `tile_rows` × `tile_cols` devices. A *core* is `tiles_per_core` tiles that settle
together, with no converter between them. One energy block must fit into one core. `None` as a
capacity means unlimited.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from ffebm_compiler.errors import HardwareError
from ffebm_compiler.files.checked_json import clipped
from ffebm_compiler.hardware.file import read_table
from ffebm_compiler.hardware.layers import Frozen, checked_overrides, fields_for

__all__ = ["ConvMapping", "Hardware", "RowSums"]

ConvMapping = Literal["im2col", "unrolled"]
RowSums = Literal["analog", "digital"]

_CAPACITIES = ("tile_rows", "tile_cols", "tiles_per_core", "cores", "cores_per_chip", "layers_per_block",
               "neurons_per_block")  # fmt: skip
_BITS = ("weight_bits", "adc_bits", "dac_bits")
_OPTIONAL = (*_CAPACITIES, *_BITS, "costs", "overrides")
_MAX_BITS = 32
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Hardware:
    """An analog fabric, checked when it is made.

    The tiles that one layer takes are given by `tiles`; a block fits a core when the tiles of its layers
    sum to at most `tiles_per_core`, and its layers and neurons are at most `layers_per_block` and
    `neurons_per_block`.

    Args:
        tile_rows: input lines of a tile, in devices. None: unlimited.
        tile_cols: output lines of a tile, in devices. None: unlimited.
        tiles_per_core: tiles that can settle together. None: unlimited.
        cores: cores of the whole fabric, a budget for all blocks. None: unlimited.
        layers_per_block: weight-stationary layers in one energy block. None: unlimited.
        neurons_per_block: state values per sample in one energy block. None: unlimited.
        devices_per_weight: adjacent columns that hold one signed weight, 2 for a differential pair.
        conv_mapping: "im2col" uses a convolution's tiles for one output position after the other.
            "unrolled" has separate tiles for every position.
        weight_bits: bits of a programmed weight. None: not quantised.
        adc_bits: bits of an analog-to-digital conversion, at a block's outputs. None: not quantised.
        dac_bits: bits of a digital-to-analog conversion, at a block's inputs. None: not quantised.
        costs: constants that replace the cost model's own, by name. None: none is replaced.
        bias_row: whether the bias of a layer takes one more row of its matrix, driven by a constant input.
            Otherwise it is added digitally, after the converters.
        groups_share_tiles: whether as many groups of a convolution as fit lie along the diagonal of one tile.
            Otherwise each group has tiles of its own.
        overrides: fields that differ for some layers, as a mapping of glob patterns on module paths to fields
            (`{"layer4.*": {"tile_cols": 512}}`). A layer may have its own `tile_rows`, `tile_cols`,
            `devices_per_weight`, `conv_mapping`, `bias_row` and `groups_share_tiles`. `tiles_per_core`
            counts tiles of any size. None: no layer differs.
        name: what reports call this fabric.
        source: where these numbers come from.
        cores_per_chip: cores of one chip; a network that needs more takes several chips. None: all on one chip.
        row_sums: how the results of the tiles are added on which one layer's rows lie. "analog" adds their currents,
            and one converter reads the sum. "digital" converts the partial sum of every tile.

    Raises:
        HardwareError: a field has a wrong type or is out of range.
    """

    tile_rows: int | None = 256
    tile_cols: int | None = 256
    tiles_per_core: int | None = 64
    cores: int | None = None
    layers_per_block: int | None = 4
    neurons_per_block: int | None = None
    devices_per_weight: int = 2
    conv_mapping: ConvMapping = "im2col"
    weight_bits: int | None = None
    adc_bits: int | None = 8
    dac_bits: int | None = 8
    costs: Mapping[str, float] | None = None
    bias_row: bool = False
    groups_share_tiles: bool = False
    overrides: Mapping[str, Mapping[str, Any]] | None = None
    name: str = "custom"
    source: str = ""
    cores_per_chip: int | None = None
    row_sums: RowSums = "analog"

    def __post_init__(self) -> None:
        for field in _CAPACITIES:
            self._set_whole(field, optional=True, remedy="or None for no limit")
        self._set_whole("devices_per_weight", remedy="such as 2 for a differential pair, 1 for a single device")
        for field in _BITS:
            self._set_whole(field, optional=True, most=_MAX_BITS, remedy="or None for no quantisation")
        for field, allowed in (("conv_mapping", ConvMapping), ("row_sums", RowSums)):
            if getattr(self, field) not in get_args(allowed):
                choices = " or ".join(repr(choice) for choice in get_args(allowed))
                raise HardwareError(f"{field} must be {choices}, got {getattr(self, field)!r}")
        if self.costs is not None:
            self._set("costs", _frozen_costs(self.costs))
        for field in ("bias_row", "groups_share_tiles"):
            if not isinstance(getattr(self, field), bool):
                raise HardwareError(f"{field} must be True or False; got {getattr(self, field)!r}")
        if self.overrides is not None:
            self._set(
                "overrides",
                Frozen({p: self._checked_override(p, v) for p, v in checked_overrides(self.overrides).items()}),
            )
        if not isinstance(self.name, str) or not self.name.strip():
            raise HardwareError(f"name must be a text that is not empty, got {self.name!r}: it heads the reports")
        if not isinstance(self.source, str):
            raise HardwareError(f"source must be a text (empty if there is none), got {self.source!r}")

    def tiles(self, rows: int, cols: int, groups: int = 1, positions: int = 1, bias: bool = False) -> int:
        """The tiles that one layer's weights take.

            tiles = groups · ⌈rows / tile_rows⌉ · ⌈cols · devices_per_weight / tile_cols⌉

        times `positions` if `conv_mapping` is "unrolled". A quotient by an unlimited side is 1, so that without
        limits there is one tile per group (and position). With `groups_share_tiles`, one tile holds up to
        n = min(⌊tile_rows / rows⌋, ⌊tile_cols / (cols · devices_per_weight)⌋) groups. If n > 1 there are ⌈groups / n⌉
        tiles.

        Args:
            rows: inputs of one group: in_features, or k_h · k_w · C_in / groups.
            cols: outputs of one group: out_features, or C_out / groups.
            groups: groups of a grouped convolution, 1 otherwise.
            positions: output positions of a convolution, 1 otherwise.
            bias: whether the layer has a bias that takes a row of the crossbar (rows + 1).

        Raises:
            HardwareError: one of the four numbers is not a whole number of at least 1.
        """
        for name, value in (("rows", rows), ("cols", cols), ("groups", groups), ("positions", positions)):
            if not _is_whole(value) or value < 1:
                raise HardwareError(f"tiles needs a whole number of at least 1 as {name}, got {value!r}")
        down, across = self.row_tiles(rows, bias), self.col_tiles(cols)
        copies = positions if self.conv_mapping == "unrolled" else 1
        return -(-groups // self.groups_per_tile(rows, cols, groups, bias)) * down * across * copies

    def row_tiles(self, rows: int, bias: bool = False) -> int:
        """Tiles on which the rows of one matrix lie: the partial sums of each of its outputs."""
        return _ceil_div(rows + int(bias), self.tile_rows)

    def col_tiles(self, cols: int) -> int:
        """Tiles on which the columns of one matrix lie: the partial sums of each value of a backward read."""
        return _ceil_div(cols * self.devices_per_weight, self.tile_cols)

    def groups_per_tile(self, rows: int, cols: int, groups: int = 1, bias: bool = False) -> int:
        """Groups of one layer on one tile (1 without `groups_share_tiles`). The arguments are those of `tiles`."""
        if not self.groups_share_tiles:
            return 1
        down = groups if self.tile_rows is None else self.tile_rows // (rows + int(bias))
        across = groups if self.tile_cols is None else self.tile_cols // (cols * self.devices_per_weight)
        return max(1, min(groups, down, across))

    def for_layer(self, path: str) -> Hardware:
        """The fabric for the layer of a module path, with the `overrides` that match it.

        Raises:
            HardwareError: two patterns match the layer and disagree.
        """
        return replace(self, overrides=None, **fields_for(self.overrides, path)) if self.overrides else self

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `from_dict` makes an equal object of them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["costs"] = None if self.costs is None else dict(self.costs)
        if self.overrides is not None:
            values["overrides"] = {pattern: dict(own) for pattern, own in self.overrides.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Hardware:
        """The fabric with these fields; those left out keep their defaults.

        Raises:
            HardwareError: an unknown key, or a value that its field refuses.
        """
        if not isinstance(values, Mapping):
            raise HardwareError(f"expected a mapping of hardware fields, got {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        values = dict(values)
        if values.pop("noise", None) is not None:  # fabrics were once described with a noise that nothing applied
            raise HardwareError(
                "noise is no field of the hardware any more: errors of programmed weights are those of the devices, "
                "convert(..., devices=ffebm.Devices(programming=...))"
            )
        for key in values:
            if key not in known:
                close = get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
                raise HardwareError(f"unknown hardware field {key!r}: {hint}")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Hardware:
        """The fabric described by a TOML or JSON file with the fields as top-level keys.

        Without a `name` in the file, the fabric has the name of the file. TOML has no null, so write `cores = "none"`
        for an optional field without a value.

        Raises:
            HardwareError: the file cannot be read or parsed, or describes no hardware; names file and key.
        """
        if not isinstance(path, str | os.PathLike):
            raise HardwareError(f"path is a {type(path).__name__}; expected the path of a .toml or .json file")
        path = Path(path)
        values = read_table(path, _OPTIONAL)
        try:
            return cls.from_dict({"name": path.stem, **values})
        except HardwareError as error:
            raise HardwareError(f"{path}: {clipped(str(error))}") from error

    def _checked_override(self, pattern: str, values: Mapping[str, Any]) -> Frozen:
        """The fields of one override, checked like those of a fabric."""
        try:
            checked = Hardware(**values)
        except HardwareError as error:
            raise HardwareError(f"overrides[{pattern!r}]: {error}") from error
        return Frozen({field: getattr(checked, field) for field in values})

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)  # the class is frozen

    def _set_whole(self, field: str, *, remedy: str, optional: bool = False, most: int | None = None) -> None:
        """Check a whole number and store it as a plain int, which JSON and TOML can hold."""
        value = getattr(self, field)
        if value is None and optional:
            return
        if not _is_whole(value) or not 1 <= value <= (most or _LARGEST):
            allowed = "of at least 1" if most is None else f"from 1 to {most}"
            large = _is_whole(value) and value > _LARGEST
            got = f"one of {int(value).bit_length()} bits, more than 63" if large else repr(value)
            raise HardwareError(f"{field} must be a whole number {allowed}, {remedy}; got {got}")
        self._set(field, int(value))


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _ceil_div(value: int, size: int | None) -> int:
    return 1 if size is None else -(-value // size)


def _non_negative(value: object, wanted: str) -> float:
    """The value as a float; `wanted` begins the error message."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise HardwareError(f"{wanted}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # the number is larger than the largest float
        number = math.inf
    if not 0 <= number < math.inf:
        raise HardwareError(f"{wanted}, got {number!r}")
    return number


def _frozen_costs(costs: object) -> Frozen:
    if not isinstance(costs, Mapping):
        raise HardwareError(f"costs must be a mapping of names to numbers or None, got {type(costs).__name__}")
    values = {}
    for key, value in costs.items():
        if not isinstance(key, str):
            raise HardwareError(f"costs must have texts as names, got {key!r}")
        values[key] = _non_negative(value, f"costs[{key!r}] must be a finite number of at least 0")
    return Frozen(values)
