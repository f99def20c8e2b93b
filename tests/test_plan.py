"""Plans: tables, explanations, edits, JSON, and a sentence for everything that can be wrong with one."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_cases import random_graph, random_hardware
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import FFEBMError, InputError, PlanError, UnsupportedError
from ffebm_compiler.ir import Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.compare import sweep
from ffebm_compiler.passes.partition.decide import Partition, partition
from ffebm_compiler.passes.planning import describe
from ffebm_compiler.plan import Plan, PlanOptions

KINDS = ("add", "reshape", "concat", "avg_pool")


class Residual(nn.Module):
    """Two convolutions with a sum around them, pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.pool = nn.MaxPool2d(4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
        self.scale = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.body(x))
        return self.head(self.pool(x))


def residual_plan(**settings: Any) -> Plan:
    torch.manual_seed(0)
    return ffebm.plan(Residual(), torch.randn(2, 1, 8, 8), **settings)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return residual_plan()


@pytest.fixture(scope="module")
def single() -> Plan:
    return residual_plan(hardware=ffebm.Hardware(layers_per_block=2, tiles_per_core=3))


def random_plan(seed: int, fabric: int, size: int = 14) -> Plan:
    graph, hardware = random_graph(seed, size), random_hardware(fabric)
    data = describe(
        graph,
        hardware,
        PlanOptions(block_ops=KINDS),
        partition(graph, hardware, KINDS),
        model="Random",
        modules=["", *(op.path for op in graph.operations)],
        parameters=[weight for op in graph.operations for weight in op.weights],
    )
    return Plan.of(data)


GOLDEN = """\
Residual on crossbar-256 (64 tiles per core): 2 energy blocks, 1 digital part
 block    layers                tiles  DAC  ADC    MACs
────────────────────────────────────────────────────────
 block_1  stem, body.0, body.2      3   64  256  20.7 k
 block_2  head.1, head.3            2   16    3     152
conversions per sample: 339; analog MACs: 100.0 % of 20.9 k
5 tiles on 1 core; 0.3 % of the tiles' devices hold a weight
digital_1: max_pool2d, flatten
note: 1 block settles several convolutions together; with conv_mapping='im2col' one set of tiles serves all \
output positions in turn, while settling needs every position at once: conv_mapping='unrolled' counts the tiles \
for that"""


def squeeze(text: str) -> str:
    """Without the spaces that only align."""
    return "\n".join(re.sub(r"\s+|─+", " ", line).strip() for line in text.splitlines())


def test_the_table(plan: Plan) -> None:
    assert squeeze(str(plan)).startswith(squeeze(GOLDEN).rsplit("\n", 1)[0])


def test_blocks_of_one_split_layer_are_one_row_with_their_sums() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    hardware = ffebm.Hardware(tile_rows=8, tile_cols=8, tiles_per_core=8, layers_per_block=1, cores=100)
    plan = ffebm.plan(model, torch.randn(2, 64), hardware=hardware)
    text = str(plan)
    row = next(line for line in text.splitlines() if "(16 blocks)" in line)
    parts = [block for block in plan.blocks if block.layers == ("0",)]
    assert len(parts) == 16
    first, last = parts[0].name, parts[-1].name
    assert squeeze(row) == f"{first}..{last} (16 blocks) 0 x16 128 1024 64 4096"
    assert "136 tiles on 17 cores of 100; 98.5 % of the tiles' devices hold a weight" in text


def test_a_single_part_and_a_single_block_are_singular() -> None:
    text = str(ffebm.plan(nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), torch.randn(2, 4), hardware="ideal"))
    assert ": 1 energy block, 1 digital part\n" in text
    assert "\n1 tile on 1 core\n" in text


def test_a_fabric_that_the_blocks_do_not_fit_is_said_in_the_table(plan: Plan) -> None:
    small = replace(plan, hardware=replace(plan.hardware, tiles_per_core=3, cores=1))
    assert "no placement: the blocks do not fit the only core of 3 tiles" in str(small)


def test_max_pooling_in_a_block_is_noted() -> None:
    plan = residual_plan(block_ops=("add", "reshape", "max_pool"))
    (note,) = [note for note in plan.notes if "winners" in note]
    assert note.startswith("block_1 holds max pooling: its winners can switch under the nudge")
    assert not any("winners" in note for note in residual_plan().notes)


class Positions(nn.Module):
    """Parameters that are added, copied and joined; the layer's alone is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.zeros(5, 4))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.prompt = nn.Parameter(torch.zeros(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x) + self.table
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return torch.cat([self.prompt, x.sum(0)])


def test_parameters_that_are_not_multiplied_say_so() -> None:
    plan = ffebm.plan(Positions(), torch.randn(2, 5, 4))
    assert plan.explain("table") == "digital: it is added, not multiplied: no matrix product"
    assert plan.explain("prompt") == "digital: it is joined to other values, not multiplied: no matrix product"
    assert plan.explain("token") == "digital: it is copied to every sample, not multiplied: no matrix product"


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("stem", "analog, block_1: conv of 9x4, settles with 2 other layers"),
        ("body.1", "analog, block_1: relu has an energy potential"),
        ("body", "analog: 3 operations in block_1"),
        ("head", "analog and digital: 4 operations in digital_1, block_2"),
        ("", "analog and digital: 12 operations in block_1, digital_1, block_2"),
        ("head.3.weight", "analog, block_2: the weight of head.3 in block_2"),
        ("head.3.bias", "analog, block_2: linear of 8x3, settles with 1 other layer"),
        ("scale", "digital: no operation that the output depends on reads it"),
    ],
)
def test_explain(plan: Plan, path: str, sentence: str) -> None:
    assert plan.explain(path) == sentence


def test_explain_says_container_where_it_runs_operations_of_its_own() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    sentence = ffebm.plan(model, torch.randn(2, 5, 8)).explain("layers.0")
    assert sentence.startswith("analog and digital: ")
    assert ";" not in sentence


def test_explain_names_the_closest(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"no module or weight 'haed'; did you mean head"):
        plan.explain("haed")
    with pytest.raises(PlanError, match=r"those of model\.named_modules"):
        plan.explain("zzzzzz")


def test_no_block_of_that_name(plan: Plan) -> None:
    with pytest.raises(PlanError, match="no block 'block_9'; it has block_1, block_2"):
        plan.block("block_9")


def test_the_quotient_has_sizes_on_its_edges(plan: Plan) -> None:
    quotient = plan.to_networkx()
    assert networkx.is_directed_acyclic_graph(quotient)
    assert {(a, b): data["values"] for a, b, data in quotient.edges(data=True)} == {
        ("x", "block_1"): 64,
        ("block_1", "digital_1"): 256,
        ("digital_1", "block_2"): 16,
    }


# -- moving ----------------------------------------------------------------------------------------


def test_move_to_digital_takes_what_follows_along(plan: Plan) -> None:
    moved = plan.move("head.1", "digital")
    assert [block.layers for block in moved.blocks] == [("stem", "body.0", "body.2"), ("head.3",)]
    assert moved.rejected == {"head.1": "moved to the digital side"}
    assert moved.explain("head.1.weight") == "digital: moved to the digital side"
    assert moved.conversions == plan.conversions - 16 + 8
    assert plan.rejected == {}


def test_move_to_analog_and_back(plan: Plan) -> None:
    alone = plan.move("head.3", "analog")
    assert [block.layers for block in alone.blocks][1:] == [("head.1",), ("head.3",)]
    assert alone.block("block_3").layers == ("head.3",)
    back = alone.move("head.3", "block_2")
    assert back.block("block_2").layers == ("head.1", "head.3")
    assert back.conversions == plan.conversions
    revived = plan.move("head.1", "digital").move("head.1", "block_2")
    assert revived.rejected == {}
    assert revived.blocks == plan.blocks


def test_move_takes_all_layers_of_a_module(plan: Plan) -> None:
    moved = plan.move("body", "digital")
    assert set(moved.rejected) == {"body.0", "body.2"}


def test_a_block_is_split_where_its_middle_moves(plan: Plan) -> None:
    moved = plan.move("body.0", "digital")
    assert [block.layers for block in moved.blocks] == [("stem",), ("body.2",), ("head.1", "head.3")]
    alone = plan.move("body.0", "analog")
    assert [block.layers for block in alone.blocks] == [("stem",), ("body.0",), ("body.2",), ("head.1", "head.3")]
    assert len({block.name for block in alone.blocks}) == 4


def test_move_to_where_it_is_changes_nothing(plan: Plan) -> None:
    assert plan.move("stem", "block_1").blocks == plan.blocks
    assert not plan.diff(plan.move("stem", "block_1"))


def test_a_moved_plan_converts(plan: Plan) -> None:
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(2, 1, 8, 8)
    hybrid = ffebm.convert(model, x, plan=plan.move("body.0", "digital"), feedback=0.01)
    assert "body.0" in hybrid.plan.rejected
    assert torch.allclose(hybrid(x), model(x), atol=0.05)


@pytest.mark.parametrize(
    ("path", "where", "message"),
    [
        ("nothing", "digital", r"no weight-stationary layer 'nothing': its layers are 'stem', 'body.0'"),
        ("head.2", "digital", r"no weight-stationary layer 'head.2': did you mean head.3, head.1\?"),
        ("stem", "cloud", r"no place 'cloud' to move 'stem' to; expected 'digital', 'analog', 'block_1', 'block_2'"),
        ("head.1", "block_1", r"'head.1' cannot move to block_1, since a value would leave a block and come back"),
    ],
)
def test_moves_that_are_refused(plan: Plan, path: str, where: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan.move(path, where)


def test_a_move_over_capacity_is_refused() -> None:
    pair = residual_plan(hardware=ffebm.Hardware(layers_per_block=2))
    assert [block.layers for block in pair.blocks] == [("stem",), ("body.0", "body.2"), ("head.1", "head.3")]
    with pytest.raises(
        PlanError, match=r"'stem' does not fit into block_2, which would have 3 layers and holds 2: move"
    ):
        pair.move("stem", "block_2")
    assert pair.move("body.2", "analog").move("stem", "block_2").block("block_2").layers == ("stem", "body.0")


def test_a_move_against_an_option_is_refused() -> None:
    forced = residual_plan(force_digital="head", force_analog="stem")
    with pytest.raises(
        PlanError, match=r"'head.1' cannot move to analog, since force_digital=\('head',\) holds 'head.1'"
    ):
        forced.move("head.1", "analog")
    with pytest.raises(PlanError, match=r"'stem' cannot move to digital, since force_analog=\('stem',\) holds 'stem'"):
        forced.move("stem", "digital")


def test_a_layer_that_fits_no_core_cannot_move() -> None:
    small = residual_plan(hardware=ffebm.Hardware(tile_rows=4, tile_cols=8, tiles_per_core=2))
    with pytest.raises(PlanError, match=r"'body.0' cannot be analog on custom: it needs 9 tiles and a core has 2"):
        small.move("body.0", "analog")


def test_a_layer_that_cannot_be_analog_says_why() -> None:
    refused = Operation("a", Role.DIGITAL, "first", "matmul", ("x",), 4, reason="of its shape", kind="weight")
    graph = OperationGraph({"x": 4}, (refused,), ("a",))
    result = partition(graph, ffebm.Hardware())
    plan = Plan.of(
        describe(graph, ffebm.Hardware(), PlanOptions(), result, model="M", modules=["", "first"], parameters=[])
    )
    assert plan.rejected == {"first": "of its shape"}
    with pytest.raises(PlanError, match="'first' cannot be analog: of its shape"):
        plan.move("first", "analog")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), fabric=st.integers(0, 2**32), data=st.data())
def test_moves_of_random_plans_are_sound_or_refused(seed: int, fabric: int, data: st.DataObject) -> None:
    """`move` validates what it returns; so an unsound result would be a PlanError about the plan itself."""
    before = random_plan(seed, fabric)
    before.validate()
    paths = [op.path for op in before.graph.operations if op.rows]
    if not paths:
        return
    path = data.draw(st.sampled_from(paths))
    where = data.draw(st.sampled_from(["digital", "analog", *(block.name for block in before.blocks)]))
    refusal = ""
    try:
        after = before.move(path, where)
    except PlanError as error:
        refusal = str(error)
    if refusal:
        assert re.match(r"'m\d+' (cannot|does not fit)", refusal), refusal
    else:
        after.validate()
        assert (path in after.rejected) == (where == "digital")


# -- comparing ----------------------------------------------------------------------------------------


def test_diff(plan: Plan) -> None:
    text = str(plan.diff(plan.move("head.1", "digital")))
    assert text == (
        "conversions per sample: 339 -> 331 (-8)\ntiles: 5 -> 4 (-1)\n"
        "head.1: block_2 with head.3 -> digital (moved to the digital side)\n"
        "head.3: block_2 with head.1 -> block_2 alone"
    )
    assert str(plan.diff(plan)) == "the plans are equal"


def test_diff_of_two_models_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"no layer in common \(one is of Residual, the other of Linear"):
        plan.diff(ffebm.plan(nn.Linear(3, 3), torch.randn(2, 3)))


def test_advice_says_what_more_would_bring(single: Plan) -> None:
    advice = single.advice()
    assert any(re.match(r"layers_per_block=3 would remove \d+ of \d+ conversions per sample", s) for s in advice), (
        advice
    )


def test_advice_on_large_layers() -> None:
    small = residual_plan(hardware=ffebm.Hardware(tile_rows=4, tile_cols=8, tiles_per_core=2))
    assert (
        "body.0 alone needs 4.5 cores (9 tiles): 7 more tiles per core would make its 9216 multiply-accumulates per "
        "sample analog"
    ) in small.advice()


def test_sweep(plan: Plan) -> None:
    rows = sweep(plan, {"tile_rows": [16, 256], "layers_per_block": [1, 4]})
    assert [tuple(row.settings.values()) for row in rows] == [(16, 1), (16, 4), (256, 1), (256, 4)]
    assert rows[3].conversions == plan.conversions
    assert rows[2].conversions > rows[3].conversions
    assert rows[0].utilisation > rows[2].utilisation
    with pytest.raises(FFEBMError, match="unknown hardware field 'tile_row'"):
        sweep(plan, {"tile_row": [1]})
    with pytest.raises(FFEBMError, match="needs a list of values for 'tile_rows', got '64'"):
        sweep(plan, {"tile_rows": "64"})


# -- placement ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), fabric=st.integers(0, 2**32))
def test_every_weight_is_on_exactly_one_tile(seed: int, fabric: int) -> None:
    plan = random_plan(seed, fabric)
    placement = plan.placement()
    assert placement.tiles == sum(block.tiles for block in plan.blocks)
    taken = set()
    for layer in placement.layers:
        tiles = list(layer.tiles())
        assert len(tiles) == layer.count
        covered: dict[tuple[int, int], int] = {}
        for tile in tiles:
            assert (tile.core, tile.index) not in taken
            taken.add((tile.core, tile.index))
            assert 0 < tile.utilisation <= 1
            key = (tile.group, tile.position)
            devices = tile.utilisation * layer.tile_devices
            covered[key] = covered.get(key, 0) + round(devices)
        each = plan.hardware.devices_per_weight
        assert set(covered.values()) == {layer.rows * layer.cols * each}
        assert len(covered) == layer.groups * layer.positions
    for core in placement.per_core:
        assert core.tiles <= (plan.hardware.tiles_per_core or core.tiles)
        assert {index for c, index in taken if c == core.core} == set(range(core.tiles))


def test_small_blocks_share_a_core(plan: Plan) -> None:
    placement = plan.placement()
    assert placement.cores == 1
    assert placement.layer("head.1").rows == 16
    with pytest.raises(PlanError, match="layer 'pool' is on no tile"):
        placement.layer("pool")


# -- JSON ---------------------------------------------------------------------------------------------


def test_json_round_trip(plan: Plan, tmp_path: Path) -> None:
    plan.to_json(tmp_path / "plan.json")
    again = Plan.from_json(tmp_path / "plan.json")
    assert again == plan
    assert str(again) == str(plan)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), fabric=st.integers(0, 2**32))
def test_json_round_trip_of_random_plans(seed: int, fabric: int) -> None:
    plan = random_plan(seed, fabric)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_block_may_be_written_as_name_and_operations(plan: Plan) -> None:
    data = plan.to_dict()
    data["blocks"] = [{"name": block["name"], "operations": block["operations"]} for block in data["blocks"]]
    assert Plan.from_dict(data) == plan


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return edit


def _join_blocks(data: dict[str, Any]) -> None:
    """Both blocks in one: the pooling between them is on a cycle."""
    first, second = data["blocks"]
    data["hardware"]["layers_per_block"] = None
    data["blocks"] = [{"name": "block_1", "operations": first["operations"] + second["operations"]}]


def _both_digital(data: dict[str, Any]) -> None:
    _bare(data)
    data["digital_parts"].append({"name": "digital_2", "operations": data["blocks"].pop(1)["operations"]})


def _bare(data: dict[str, Any]) -> None:
    data["blocks"] = [{"name": block["name"], "operations": block["operations"]} for block in data["blocks"]]


def _move_between(kind: str, source: tuple[str, int], target: tuple[str, int]) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        _bare(data)
        origin = data[source[0]][source[1]]["operations"]
        name = next(n for n in origin if n.startswith(kind))
        data[source[0]][source[1]]["operations"] = [n for n in origin if n != name]
        data[target[0]][target[1]]["operations"] = [*data[target[0]][target[1]]["operations"], name]

    return edit


def _drop_operation(data: dict[str, Any]) -> None:
    data["digital_parts"][0]["operations"] = data["digital_parts"][0]["operations"][1:]


def _twice(data: dict[str, Any]) -> None:
    data["digital_parts"][0]["operations"] = [
        *data["digital_parts"][0]["operations"],
        data["blocks"][0]["operations"][0],
    ]


BAD = [
    (_set("schema", value=99), r"not a plan of schema 2 \(found 99\)"),
    (lambda data: data.pop("blocks"), "the plan is malformed .*has no 'blocks'"),
    (_set("blocks", 0, "operations", value=5), "the plan is malformed"),
    (_set("blocks", 0, "surprise", value=5), "the plan is malformed .*surprise"),
    (_set("hardware", "tile_rows", value=-1), "the plan is malformed .*tile_rows"),
    (_set("graph", "operations", 0, "inputs", value=["y"]), "the plan is malformed .*reads 'y'"),
    (_set("graph", "operations", 0, "values", value=7), "the graph was changed"),
    (_set("fingerprint", value="0"), r"the graph was changed, since its fingerprint is '\w+' and the plan has '0'"),
    (_set("blocks", 0, "tiles", value=1), r"block_1 says tiles=1, but its operations make it 3"),
    (_set("blocks", 1, "dac", value=0), r"block_2 says dac=0, but its operations make it 16"),
    (_set("blocks", 0, "operations", 0, value="ghost"), "block_1 holds 'ghost', which is no operation"),
    (_set("digital_parts", 0, "operations", 0, value="ghost"), "digital_1 holds 'ghost', which is no operation"),
    (_set("blocks", 1, "name", value="block_1"), "two places named 'block_1'"),
    (_join_blocks, r"the blocks form a cycle through block_1"),
    (
        _move_between("max_pool", ("digital_parts", 0), ("blocks", 0)),
        r"block_1 holds 'max_pool2d.*' of 'pool', w",
    ),
    (_move_between("flatten", ("digital_parts", 0), ("blocks", 1)), "block_2 holds 'flatten.*', which no layer"),
    (_move_between("linear", ("blocks", 1), ("digital_parts", 0)), "block_2 holds 'tanh', which no layer"),
    (_both_digital, "layer 'head.1' is in no block and rejected gives no reason"),
    (_drop_operation, "operation 'max_pool2d.*' of 'pool' is in no block and no digital part"),
    (_twice, "is in block_1 and in digital_1: keep one"),
    (
        _set("hardware", "layers_per_block", value=1),
        r"block_1 \(stem, body.0, body.2\) has 3 layers and layers_per_block is 1",
    ),
    (_set("hardware", "tiles_per_core", value=2), r"block_1 .* has 3 tiles and tiles_per_core is 2"),
    (_set("hardware", "neurons_per_block", value=9), r"block_1 .* has 768 neurons and neurons_per_block is 9"),
    (_set("options", "force_digital", value=["head"]), r"force_digital=\('head',\) keeps digital"),
    (_set("options", "block_ops", value=[]), r"wiring of kind 'add', which block_ops \(\) does not list"),
    (_set("weights", "stem.weight", "block", value="block_7"), "weight 'stem.weight' is said to be block_7, but its"),
    (_set("weights", "stem.weight", "block", value=None), "'stem.weight' is said to be digital, but .* in block_1"),
]


@pytest.mark.parametrize(("edit", "message"), BAD)
def test_edited_plans_are_refused(plan: Plan, edit: Callable[[dict[str, Any]], None], message: str) -> None:
    data = copy.deepcopy(json.loads(json.dumps(plan.to_dict())))
    edit(data)
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(data)


def test_a_block_of_a_file_may_be_split_and_renamed_by_its_operations(plan: Plan, tmp_path: Path) -> None:
    data = json.loads(json.dumps(plan.to_dict()))
    names = data["blocks"][0]["operations"]
    split = next(index for index, name in enumerate(names) if plan.graph[name].path == "body.0")
    parts = [{"name": "opening", "operations": names[:split]}, {"name": "rest", "operations": names[split:]}]
    data["blocks"][0:1] = parts
    (tmp_path / "plan.json").write_text(json.dumps(data), encoding="utf-8")
    edited = Plan.from_json(tmp_path / "plan.json")
    assert [block.layers for block in edited.blocks] == [("stem",), ("body.0", "body.2"), ("head.1", "head.3")]
    assert {name: place.block for name, place in edited.weights.items()} == {
        "stem.weight": "opening",
        "body.0.weight": "rest",
        "body.2.weight": "rest",
        "head.1.weight": "block_2",
        "head.3.weight": "block_2",
        "scale": None,
    }
    assert edited.notes == plan.notes  # one block settles several convolutions, as before
    assert edited.explain("stem.weight") == "analog, opening: the weight of stem in opening"
    assert Plan.from_dict(edited.to_dict()) == edited


def test_more_negative_edits() -> None:
    digital = residual_plan(force_digital="stem")
    data = json.loads(json.dumps(digital.to_dict()))
    data["options"] |= {"force_digital": [], "force_analog": ["stem"]}
    with pytest.raises(PlanError, match=r"layer 'stem' is digital and force_analog=\('stem',\) asks for it"):
        Plan.from_dict(data)
    soft = json.loads(
        json.dumps(ffebm.plan(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)), torch.randn(2, 3)).to_dict())
    )
    _bare(soft)
    soft["blocks"][0]["operations"] += soft["digital_parts"].pop()["operations"]
    with pytest.raises(PlanError, match="block_1 holds 'softmax' of '1', which must be digital: "):
        Plan.from_dict(soft)
    cores = json.loads(json.dumps(residual_plan(hardware=ffebm.Hardware(tiles_per_core=3)).to_dict()))
    cores["hardware"]["cores"] = 1
    with pytest.raises(PlanError, match=r"need more than the 1 cores of 3 tiles \(5 tiles in all\)"):
        Plan.from_dict(cores)


def test_files_that_are_no_plan(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(PlanError, match=r"cannot be read: No such file"):
        Plan.from_json(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match=r"bad.json is not JSON \(line 1"):
        Plan.from_json(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(PlanError, match=r"not a plan of schema 2 \(found 'list'\)"):
        Plan.from_json(tmp_path / "list.json")
    with pytest.raises(PlanError, match="cannot be written"):
        plan.to_json(tmp_path / "no" / "folder.json")


def test_a_plan_of_another_model_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="made for another model or input shape"):
        ffebm.convert(nn.Linear(3, 3), torch.randn(2, 3), plan=plan)


# -- planning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "error", "message"),
    [
        ({"force_digital": "boddy.*"}, InputError, r"force_digital pattern 'boddy.\*' matches no module .* stem, body"),
        ({"force_analog": ["nope"]}, InputError, "force_analog pattern 'nope' matches no module"),
        ({"force_digital": "body", "force_analog": "body.0"}, InputError, "'body.0' matches both force_digital and"),
        ({"block_ops": ["sum"]}, InputError, "block_ops names 'sum'; expected some of 'add', 'reshape'"),
        ({"on_unsupported": "ignore"}, InputError, "on_unsupported is 'ignore'; expected 'digital' or 'error'"),
        (
            {"hardware": ffebm.Hardware(tile_rows=4, tile_cols=8, tiles_per_core=2), "force_analog": "body.0"},
            UnsupportedError,
            "force_analog asks for 'body.0', but it needs 9 tiles and a core has 2",
        ),
        (
            {"hardware": ffebm.Hardware(tile_rows=4, tile_cols=8, tiles_per_core=2), "on_unsupported": "error"},
            UnsupportedError,
            r"weight-stationary layers cannot be analog \(.*body.0: it needs 9 tiles",
        ),
    ],
)
def test_bad_settings(settings_: dict[str, Any], error: type[FFEBMError], message: str) -> None:
    with pytest.raises(error, match=message):
        residual_plan(**settings_)


def test_a_model_without_layers() -> None:
    with pytest.raises(UnsupportedError, match="ReLU has no weight-stationary layer"):
        ffebm.plan(nn.ReLU(), torch.randn(2, 3))


def test_forced_layers_are_no_reason_for_an_error() -> None:
    plan = residual_plan(force_digital="head", on_unsupported="error")
    assert set(plan.rejected) == {"head.1", "head.3"}


def test_the_same_model_gives_the_same_plan() -> None:
    assert residual_plan() == residual_plan()


def test_an_empty_partition_has_an_empty_plan() -> None:
    graph = random_graph(0, 5, layer_share=0.0)
    result = Partition([], [[op.name] for op in graph.operations])
    plan = Plan.of(describe(graph, ffebm.Hardware(), PlanOptions(), result, model="M", modules=[""], parameters=[]))
    assert plan.conversions == 0
    assert "no energy blocks" in str(plan)
    assert replace(plan, model="N") != plan
