"""`Hardware`: tile counts against brute force, round trips, and one negative test per guard."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffebm_compiler.errors import FFEBMError, HardwareError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.presets import hardware_presets, resolve_hardware

CAPACITIES = (
    "tile_rows",
    "tile_cols",
    "tiles_per_core",
    "cores",
    "cores_per_chip",
    "layers_per_block",
    "neurons_per_block",
)
BITS = ("weight_bits", "adc_bits", "dac_bits")

small = st.integers(1, 12)
capacity = st.none() | st.integers(1, 10**9)
bits = st.none() | st.integers(1, 32)
amount = st.floats(0, 1e300)
own_fields = st.fixed_dictionaries(
    {},
    optional={
        "tile_rows": capacity,
        "tile_cols": capacity,
        "devices_per_weight": st.integers(1, 8),
        "conv_mapping": st.sampled_from(["im2col", "unrolled"]),
        "bias_row": st.booleans(),
        "groups_share_tiles": st.booleans(),
    },
).filter(bool)
hardwares = st.builds(
    Hardware,
    **dict.fromkeys(CAPACITIES, capacity),
    **dict.fromkeys(BITS, bits),
    devices_per_weight=st.integers(1, 8),
    conv_mapping=st.sampled_from(["im2col", "unrolled"]),
    costs=st.none() | st.dictionaries(st.text(max_size=5), amount, max_size=3),
    bias_row=st.booleans(),
    groups_share_tiles=st.booleans(),
    overrides=st.none() | st.dictionaries(st.text(min_size=1, max_size=5), own_fields, max_size=3),
    name=st.text(min_size=1, max_size=8).filter(str.strip),
    source=st.text(max_size=8),
    row_sums=st.sampled_from(["analog", "digital"]),
)


def tiles_by_hand(hardware: Hardware, rows: int, cols: int, groups: int, positions: int, bias: bool) -> int:
    """Lay every device of every group and position on the fabric and count the tiles that hold one."""
    touched = set()
    for copy_ in range(positions if hardware.conv_mapping == "unrolled" else 1):
        for group in range(groups):
            for row in range(rows + bias):
                for column in range(cols * hardware.devices_per_weight):
                    down = 0 if hardware.tile_rows is None else row // hardware.tile_rows
                    across = 0 if hardware.tile_cols is None else column // hardware.tile_cols
                    touched.add((copy_, group, down, across))
    return len(touched)


@given(
    tile_rows=st.none() | small,
    tile_cols=st.none() | small,
    devices=st.integers(1, 4),
    mapping=st.sampled_from(["im2col", "unrolled"]),
    rows=small,
    cols=small,
    groups=st.integers(1, 4),
    positions=st.integers(1, 4),
    bias=st.booleans(),
)
def test_tiles_equal_a_count_by_hand(
    tile_rows: int | None,
    tile_cols: int | None,
    devices: int,
    mapping: Any,
    rows: int,
    cols: int,
    groups: int,
    positions: int,
    bias: bool,
) -> None:
    hardware = Hardware(tile_rows=tile_rows, tile_cols=tile_cols, devices_per_weight=devices, conv_mapping=mapping)
    expected = tiles_by_hand(hardware, rows, cols, groups, positions, bias)
    assert hardware.tiles(rows, cols, groups, positions, bias) == expected


@pytest.mark.parametrize(
    ("layer", "tiles"),
    [
        ({"rows": 256, "cols": 128}, 1),
        ({"rows": 256, "cols": 128, "bias": True}, 2),
        ({"rows": 257, "cols": 129}, 4),
        ({"rows": 9 * 512, "cols": 512}, 18 * 4),  # a 3×3 convolution, 512 → 512 channels
        ({"rows": 9, "cols": 1, "groups": 96, "positions": 100}, 96),  # depthwise 3×3
    ],
)
def test_tiles_of_known_layers(layer: dict[str, Any], tiles: int) -> None:
    assert Hardware().tiles(**layer) == tiles


def test_unrolled_convolution_has_tiles_for_every_position() -> None:
    assert Hardware(conv_mapping="unrolled").tiles(9 * 64, 64, positions=49) == 3 * 49


def test_tiles_of_large_layers_are_exact() -> None:
    """Integer arithmetic: a quotient in floating point is wrong from 2**53 on."""
    rows = 2**60 + 1
    assert Hardware(tile_rows=1, tile_cols=2).tiles(rows, 1) == rows


def test_without_limits_a_group_is_one_tile() -> None:
    ideal = hardware_presets()["ideal"]
    assert ideal.tiles(10**6, 10**6) == 1
    assert ideal.tiles(9, 1, groups=32, positions=100) == 32
    assert replace(ideal, conv_mapping="unrolled").tiles(9, 1, groups=32, positions=100) == 3200


@pytest.mark.parametrize(
    ("rows", "cols", "groups", "bias", "tiles"),
    [(9, 1, 100, False, 4), (9, 1, 100, True, 4), (9, 8, 100, False, 7), (200, 1, 3, False, 3), (300, 1, 3, False, 6)],
)
def test_groups_that_share_tiles_lie_along_the_diagonal(
    rows: int, cols: int, groups: int, bias: bool, tiles: int
) -> None:
    hardware = Hardware(groups_share_tiles=True)  # of 9 rows, 28 fit; with a bias 25; of 16 columns, 16
    assert hardware.tiles(rows, cols, groups, bias=bias) == tiles
    assert replace(hardware, tile_rows=None, tile_cols=None).tiles(rows, cols, groups) == 1


@given(rows=small, cols=small, groups=small, tile_rows=st.none() | small, tile_cols=st.none() | small)
def test_shared_tiles_are_never_more(
    rows: int, cols: int, groups: int, tile_rows: int | None, tile_cols: int | None
) -> None:
    own = Hardware(tile_rows=tile_rows, tile_cols=tile_cols)
    shared = replace(own, groups_share_tiles=True)
    assert shared.tiles(rows, cols, groups) <= own.tiles(rows, cols, groups)
    assert shared.tiles(rows, cols, 1) == own.tiles(rows, cols, 1)


@pytest.mark.parametrize("name", ["rows", "cols", "groups", "positions"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_tiles_refuses_what_is_no_count(name: str, value: Any) -> None:
    layer = {"rows": 4, "cols": 4, "groups": 1, "positions": 1, name: value}
    with pytest.raises(HardwareError, match=f"at least 1 as {name}, got {re.escape(repr(value))}"):
        Hardware().tiles(**layer)


def test_defaults_are_the_published_interface() -> None:
    assert Hardware().to_dict() == {
        "tile_rows": 256,
        "tile_cols": 256,
        "tiles_per_core": 64,
        "cores": None,
        "layers_per_block": 4,
        "neurons_per_block": None,
        "devices_per_weight": 2,
        "conv_mapping": "im2col",
        "weight_bits": None,
        "adc_bits": 8,
        "dac_bits": 8,
        "costs": None,
        "bias_row": False,
        "groups_share_tiles": False,
        "overrides": None,
        "name": "custom",
        "source": "",
        "cores_per_chip": None,
        "row_sums": "analog",
    }


@given(hardwares)
def test_a_dict_from_before_row_sums_is_analog(hardware: Hardware) -> None:
    old = {field: value for field, value in hardware.to_dict().items() if field != "row_sums"}
    assert Hardware.from_dict(old) == replace(hardware, row_sums="analog")


@given(hardwares)
def test_dict_and_json_round_trip(hardware: Hardware) -> None:
    assert Hardware.from_dict(hardware.to_dict()) == hardware
    again = Hardware.from_dict(json.loads(json.dumps(hardware.to_dict(), allow_nan=False)))
    assert again == hardware
    assert hash(again) == hash(hardware)


@given(hardwares)
def test_copies_and_pickles_are_equal(hardware: Hardware) -> None:
    for other in (copy.deepcopy(hardware), pickle.loads(pickle.dumps(hardware)), replace(hardware)):
        assert other == hardware
        assert hash(other) == hash(hardware)
    assert Hardware(**asdict(hardware)) == hardware


def test_fields_cannot_be_assigned() -> None:
    with pytest.raises(FrozenInstanceError):
        Hardware().tile_rows = 3  # type: ignore[misc]


def test_costs_are_a_frozen_copy() -> None:
    costs = {"adc_pj": 1.56}
    hardware = Hardware(costs=costs)
    costs["adc_pj"] = 0.0
    assert hardware.costs == {"adc_pj": 1.56}
    assert repr(hardware.costs) == "{'adc_pj': 1.56}"
    with pytest.raises(TypeError, match="item assignment"):
        hardware.costs["adc_pj"] = 2.0  # type: ignore[index]


def test_costs_take_part_in_equality() -> None:
    assert Hardware(costs={"a": 1.0, "b": 2.0}) == Hardware(costs={"b": 2.0, "a": 1})
    assert Hardware(costs={"a": 1.0}) != Hardware(costs={"a": 2.0})
    assert len({Hardware(costs={"a": 1.0}), Hardware(costs={"a": 2.0}), Hardware()}) == 3


def test_numpy_numbers_become_plain_ones() -> None:
    hardware = Hardware(tile_rows=np.int64(64), costs={"adc_pj": np.float32(0.5)})  # type: ignore[arg-type]
    assert type(hardware.tile_rows) is int
    assert hardware.costs is not None
    assert type(hardware.costs["adc_pj"]) is float
    json.dumps(hardware.to_dict())


@pytest.mark.parametrize("field", CAPACITIES)
@pytest.mark.parametrize("value", [0, -3, 2.0, math.nan, True, "64", [1]])
def test_capacity_must_be_a_count_or_none(field: str, value: Any) -> None:
    message = f"{field} must be a whole number of at least 1, or None for no limit; got {value!r}"
    with pytest.raises(HardwareError, match=re.escape(message)):
        Hardware(**{field: value})


@pytest.mark.parametrize("value", [0, -1, 1.0, False, None])
def test_devices_per_weight_must_be_a_count(value: Any) -> None:
    with pytest.raises(HardwareError, match=r"devices_per_weight must be a whole number of at least 1, such as 2"):
        Hardware(devices_per_weight=value)


@pytest.mark.parametrize("field", BITS)
@pytest.mark.parametrize("value", [0, 33, 8.0, True])
def test_bits_must_be_from_1_to_32_or_none(field: str, value: Any) -> None:
    message = f"{field} must be a whole number from 1 to 32, or None for no quantisation; got {value!r}"
    with pytest.raises(HardwareError, match=re.escape(message)):
        Hardware(**{field: value})


@pytest.mark.parametrize("value", ["winograd", "", None, 1, ["im2col"]])
def test_conv_mapping_must_be_known(value: Any) -> None:
    with pytest.raises(HardwareError, match=r"conv_mapping must be 'im2col' or 'unrolled', got "):
        Hardware(conv_mapping=value)
    with pytest.raises(HardwareError, match=r"row_sums must be 'analog' or 'digital', got "):
        Hardware(row_sums=value)


def test_noise_gives_way_to_devices() -> None:
    """Files of earlier versions have the field, mostly without a value."""
    assert Hardware.from_dict({"noise": None}) == Hardware()
    with pytest.raises(HardwareError, match=r"noise is no field .* any more: .* devices=ffebm.Devices"):
        Hardware.from_dict({"noise": 0.02})


@pytest.mark.parametrize("value", [[("adc", 1.0)], 3, "adc"])
def test_costs_must_be_a_mapping(value: Any) -> None:
    with pytest.raises(HardwareError, match=r"costs must be a mapping of names to numbers or None, got \w+"):
        Hardware(costs=value)


def test_costs_must_have_texts_as_names() -> None:
    with pytest.raises(HardwareError, match="costs must have texts as names, got 3"):
        Hardware(costs={3: 1.0})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [-1.0, math.nan, "1.56", None, True])
def test_costs_must_be_finite_non_negative_numbers(value: Any) -> None:
    with pytest.raises(HardwareError, match=r"costs\['adc'\] must be a finite number of at least 0, got "):
        Hardware(costs={"adc": value})


@pytest.mark.parametrize("value", ["", "  ", None, 3])
def test_name_must_be_a_text(value: Any) -> None:
    with pytest.raises(HardwareError, match="name must be a text that is not empty, got"):
        Hardware(name=value)


def test_source_must_be_a_text() -> None:
    with pytest.raises(HardwareError, match=r"source must be a text .*, got None"):
        Hardware(source=None)  # type: ignore[arg-type]


def test_from_dict_keeps_defaults_of_what_is_left_out() -> None:
    assert Hardware.from_dict({"tile_rows": 64}) == Hardware(tile_rows=64)


def test_from_dict_names_the_closest_field() -> None:
    with pytest.raises(HardwareError, match=r"unknown hardware field 'tile_row': did you mean 'tile_rows'\?"):
        Hardware.from_dict({"tile_row": 64})


def test_from_dict_lists_the_fields_when_none_is_close() -> None:
    with pytest.raises(HardwareError, match="unknown hardware field 3: the fields are tile_rows, tile_cols"):
        Hardware.from_dict({3: 64})  # type: ignore[dict-item]


def test_from_dict_needs_a_mapping() -> None:
    with pytest.raises(HardwareError, match="expected a mapping of hardware fields, got list"):
        Hardware.from_dict([("tile_rows", 64)])  # type: ignore[arg-type]


def test_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "mychip.toml"
    file.write_text('tile_rows = 128\ncores = "none"\nadc_bits = "none"\nsource = "none"\n[costs]\nadc_pj = 0.9\n')
    expected = Hardware(tile_rows=128, adc_bits=None, costs={"adc_pj": 0.9}, name="mychip", source="none")
    assert Hardware.from_file(file) == expected
    assert Hardware.from_file(str(file)) == expected


def test_from_json(tmp_path: Path) -> None:
    file = tmp_path / "chip.json"
    hardware = Hardware(tiles_per_core=None, name="named", costs={"adc_pj": 0.9})
    file.write_text(json.dumps(hardware.to_dict()))
    assert Hardware.from_file(file) == hardware


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "", r"a\.yaml: a hardware file must end in \.toml or \.json"),
        ("a.toml", None, r"a\.toml: cannot be read \(.*No such file"),
        ("a.toml", "tile_rows = \ncores = 1", r"a\.toml: not valid TOML \(.*line 1"),
        ("a.json", '{"tile_rows": }', r"a\.json: not valid JSON \(.*line 1 column"),
        pytest.param("a.json", "[" * 100_000, r"a\.json: not valid JSON", id="too deep"),
        pytest.param("a.json", "1" * 5000, r"a\.json: not valid JSON", id="too many digits"),
        ("a.json", "[1]", r"a\.json: expected an object of hardware fields, got list"),
        ("a.toml", "tile_row = 3", r"a\.toml: unknown hardware field 'tile_row'"),
        ("a.toml", "tile_rows = 0", r"a\.toml: tile_rows must be a whole number of at least 1"),
        ("a.toml", "tile_rows = 64.0", r"a\.toml: tile_rows must be a whole number .* got 64\.0"),
        ("a.toml", 'devices_per_weight = "none"', r"a\.toml: devices_per_weight must be a whole number"),
        ("a.json", '{"cores": "none"}', r"a\.json: cores must be a whole number .* got 'none'"),
        ("a.json", '{"costs": {"adc_pj": NaN}}', r"a\.json: costs\['adc_pj'\] must be a finite number"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(HardwareError, match=message):
        Hardware.from_file(tmp_path / name)


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HardwareError, match=r"a\.json: cannot be read \(.*utf-8"):
        Hardware.from_file(tmp_path / "a.json")


def test_a_layer_has_its_own_fields() -> None:
    hardware = Hardware(overrides={"layer4.*": {"tile_cols": 512}, "*.conv2": {"devices_per_weight": 1}})
    assert hardware.for_layer("layer4.0.conv2") == replace(
        hardware, overrides=None, tile_cols=512, devices_per_weight=1
    )
    assert hardware.for_layer("layer4.0.conv1").devices_per_weight == 2
    assert hardware.for_layer("fc") == Hardware()
    assert Hardware().for_layer("fc") == Hardware()


def test_overrides_are_a_frozen_copy() -> None:
    own = {"tile_cols": np.int64(512)}
    hardware = Hardware(overrides={"fc": own})  # type: ignore[dict-item]
    own["tile_cols"] = np.int64(3)
    assert repr(hardware.overrides) == "{'fc': {'tile_cols': 512}}"
    assert hash(hardware) == hash(Hardware(overrides={"fc": {"tile_cols": 512}})) != hash(Hardware())
    with pytest.raises(TypeError, match="item assignment"):
        hardware.overrides["fc"]["tile_cols"] = 2  # type: ignore[index]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("fc", 1)], "overrides must map patterns of module paths to fields, .* got list"),
        ({3: {"tile_cols": 1}}, "overrides must have patterns of module paths as keys, .* got 3"),
        ({"": {"tile_cols": 1}}, "overrides must have patterns of module paths as keys, .* got ''"),
        ({"fc": 512}, r"overrides\['fc'\] must map fields to values, .* got 512"),
        ({"fc": {}}, r"overrides\['fc'\] must map fields to values, .* got {}"),
        ({"fc": {"tile_col": 5}}, r"overrides\['fc'\] cannot set 'tile_col': did you mean 'tile_cols'\?"),
        (
            {"fc": {"cores": 5}},
            r"overrides\['fc'\] cannot set 'cores': a layer may have tile_rows, tile_cols, .*bias_row",
        ),
        ({"fc": {"tile_cols": 0}}, r"overrides\['fc'\]: tile_cols must be a whole number of at least 1.* got 0"),
        (
            {"fc": {"groups_share_tiles": None}},
            r"overrides\['fc'\]: groups_share_tiles must be True or False; got None",
        ),
        ({"fc": {"bias_row": 1}}, r"overrides\['fc'\]: bias_row must be True or False; got 1"),
    ],
)
def test_malformed_overrides_are_named(overrides: Any, message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        Hardware(overrides=overrides)


def test_overrides_that_disagree_are_refused_where_they_meet() -> None:
    hardware = Hardware(overrides={"layer4.*": {"tile_cols": 512}, "*.conv1": {"tile_cols": 128, "tile_rows": 4}})
    assert hardware.for_layer("layer1.conv1").tile_cols == 128
    message = (
        "the overrides 'layer4.*' and '*.conv1' both match layer 'layer4.conv1' and give tile_cols as 512 and 128: "
        "make one of the patterns narrower"
    )
    with pytest.raises(HardwareError, match=re.escape(message)):
        hardware.for_layer("layer4.conv1")


def test_overrides_that_agree_may_meet() -> None:
    hardware = Hardware(overrides={"a*": {"tile_cols": 8}, "*a": {"tile_cols": 8}})
    assert hardware.for_layer("aa").tile_cols == 8


def test_overrides_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "chip.toml"
    file.write_text('bias_row = true\n[overrides."layer4.*"]\ntile_cols = 512\ntile_rows = "none"\n')
    expected = Hardware(bias_row=True, overrides={"layer4.*": {"tile_cols": 512, "tile_rows": None}}, name="chip")
    assert Hardware.from_file(file) == expected


@pytest.mark.parametrize(
    "text", ["overrides = 3", "[overrides]\nfc = 3", "[overrides.fc]\ntile_cols = 0", '[overrides.fc]\nname = "x"']
)
def test_bad_overrides_of_a_file_name_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "chip.toml"
    file.write_text(text)
    with pytest.raises(HardwareError, match=r"chip\.toml: overrides"):
        Hardware.from_file(file)


def test_presets_have_sources_and_their_own_names() -> None:
    presets = hardware_presets()
    assert list(presets) == [
        *("ideal", "crossbar-64", "crossbar-256", "pcm-64", "pcm-64-one-phase", "neurram", "isaac")
    ]
    for name, preset in presets.items():
        assert preset.name == name
        assert preset.source


def test_default_preset_has_the_default_fields() -> None:
    preset = hardware_presets()["crossbar-256"]
    assert replace(preset, name="custom", source="") == Hardware()


def test_ideal_has_no_limit() -> None:
    ideal = hardware_presets()["ideal"]
    assert all(getattr(ideal, field) is None for field in (*CAPACITIES, *BITS))


def test_changing_the_presets_changes_nothing_for_others() -> None:
    hardware_presets().clear()
    assert hardware_presets()


def test_resolve_takes_names_and_objects() -> None:
    hardware = Hardware(tile_rows=3)
    assert resolve_hardware(hardware) is hardware
    assert resolve_hardware("crossbar-64") == hardware_presets()["crossbar-64"]


def test_resolve_lists_the_presets_for_an_unknown_name() -> None:
    message = r"unknown hardware 'crossbar-65': use one of 'ideal', 'crossbar-64', 'crossbar-256', 'pcm-64'"
    with pytest.raises(HardwareError, match=message):
        resolve_hardware("crossbar-65")


@pytest.mark.parametrize("value", [None, 256, {"tile_rows": 3}])
def test_resolve_refuses_other_types(value: Any) -> None:
    with pytest.raises(HardwareError, match=r"hardware must be one of 'ideal', .*; got (NoneType|int|dict)$"):
        resolve_hardware(value)


def test_hardware_errors_are_package_and_value_errors() -> None:
    assert issubclass(HardwareError, FFEBMError)
    assert issubclass(HardwareError, ValueError)


@pytest.mark.parametrize(("name", "text"), [("a.toml", "tile_rows = 64\n"), ("a.json", '{"tile_rows": 64}')])
def test_files_may_begin_with_the_mark_of_their_encoding(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert Hardware.from_file(tmp_path / name).tile_rows == 64
