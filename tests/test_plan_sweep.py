"""`ffebm plan --sweep`, and sweeps that plan the model anew where its large layers fall apart differently."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import ffebm_compiler as ffebm
from ffebm_compiler.cli.main import main
from ffebm_compiler.cli.plan import sweep_settings
from ffebm_compiler.errors import InputError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.compare import sweep
from ffebm_compiler.passes.partition.decide import partition
from ffebm_compiler.passes.planning import describe
from ffebm_compiler.plan import Plan, PlanOptions

MLP = ["plan", "ffebm_compiler.demo.models:digits_mlp", "--input", "1x1x8x8"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*MLP, *arguments])


def test_a_sweep_is_a_table_with_a_row_for_each_combination() -> None:
    result = run("--sweep", "tile_rows=16,256", "--sweep", "layers_per_block=1,none")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert lines[0][-2:] == ["per", "sample"]
    assert lines[1][:7] == ["tile", "rows", "layers", "per", "block", "blocks", "conversions"]
    assert [line[:2] for line in lines[3:]] == [["16", "1"], ["16", "none"], ["256", "1"], ["256", "none"]]


def test_a_sweep_as_json() -> None:
    rows = json.loads(run("--sweep", "tile_rows=16, 256", "--json").stdout)
    assert [row["settings"] for row in rows] == [{"tile_rows": 16}, {"tile_rows": 256}]
    assert rows[0]["tiles"] > rows[1]["tiles"]
    assert rows[0]["utilisation"] > rows[1]["utilisation"]
    assert set(rows[0]) == {"settings", "blocks", "conversions", "tiles", "cores", "utilisation", "analog_macs"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "tile_rows"], "--sweep 'tile_rows' must name a field of the hardware and values"),
        (["--sweep", "tile_rows="], "--sweep 'tile_rows=' must name a field"),
        (["--sweep", "=3"], "--sweep '=3' must name a field"),
        (["--sweep", "tile_rows=1", "--sweep", "tile_rows=2"], "--sweep gives 'tile_rows' twice"),
        (["--sweep", "tile_row=1"], "unknown hardware field 'tile_row': did you mean 'tile_rows'?"),
        (
            ["--sweep", "tile_rows=many"],
            "tile_rows must be a whole number of at least 1, or None for no limit; got 'many'",
        ),
        (["--sweep", "tile_rows=1", "--explain", "0"], "--sweep prints a table of many plans: leave out --out and"),
        (["--sweep", "tile_rows=1", "--out", "p.json"], "--sweep prints a table of many plans: leave out --out and"),
    ],
)
def test_malformed_sweeps_are_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_values_are_read_as_what_they_are() -> None:
    read = sweep_settings(["a=1,none,True", "b=0.5,im2col"])
    assert read == {"a": [1, None, True], "b": [0.5, "im2col"]}
    with pytest.raises(InputError, match="must name a field"):
        sweep_settings([""])


def test_large_layers_are_split_anew_where_the_model_is_at_hand() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(2, 16)

    def replan(fabric: Hardware) -> ffebm.Plan:
        return ffebm.plan(model, x, hardware=fabric)

    fabric = Hardware(tile_rows=8, tile_cols=8, tiles_per_core=4, devices_per_weight=1)
    points = {"tiles_per_core": [4, 8, 64]}
    expected = [replan(replace(fabric, tiles_per_core=count)) for count in points["tiles_per_core"]]
    for start in (fabric, replace(fabric, tiles_per_core=64)):
        rows = sweep(replan(start), points, replan)
        assert [row.blocks for row in rows] == [len(plan.blocks) for plan in expected]
        assert [row.conversions for row in rows] == [plan.conversions for plan in expected]
        assert [row.analog_macs for row in rows] == [1.0, 1.0, 1.0]
    whole = sweep(replan(replace(fabric, tiles_per_core=64)), points)
    assert whole[0].analog_macs < 1.0


def layer(name: str, source: str, **sizes: Any) -> Operation:
    return Operation(name, Role.WEIGHT, name, "linear", (source,), 8, kind="linear", **sizes)


def test_blocks_that_fit_the_cores_in_one_order_alone_have_a_placement() -> None:
    """Largest first gives 4 3 | 3 2 2 and leaves a 2 out; most valuable first gives 4 2 2 | 3 3 2."""
    sizes, positions = (4, 3, 3, 2, 2, 2), (9, 6, 5, 8, 7, 4)
    hardware = Hardware(tile_rows=8, tile_cols=8, tiles_per_core=8, cores=2, devices_per_weight=1, layers_per_block=1)
    operations = [
        layer(f"l{index}", "x", rows=8, cols=8 * tiles, positions=times)
        for index, (tiles, times) in enumerate(zip(sizes, positions, strict=True))
    ]
    graph = OperationGraph({"x": 8}, tuple(operations), tuple(op.name for op in operations))
    result = partition(graph, hardware)
    plan = Plan.of(describe(graph, hardware, PlanOptions(), result, model="M", modules=[""], parameters=[]))
    plan.validate()
    assert plan.rejected == {}
    assert plan.placement().cores == 2
    (row,) = sweep(plan, {"cores": [2]})
    assert (row.tiles, row.cores, row.analog_macs) == (16, 2, 1.0)


def test_advice_names_what_sharing_tiles_would_bring() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 40, 1), nn.ReLU(), nn.Conv2d(40, 40, 3, groups=40)), torch.randn(1, 4, 5, 5)
    (sentence,) = [
        text for text in ffebm.plan(model, x, hardware=Hardware(tiles_per_core=16)).advice() if "share" in text
    ]
    assert sentence == (
        "1 grouped convolution is split into several blocks because every group has tiles of its own, 40 in all; on a "
        "fabric with groups_share_tiles=True the same parts would take 3, and whole layers would fit a core"
    )
    shared = ffebm.plan(model, x, hardware=Hardware(tiles_per_core=16, groups_share_tiles=True))
    assert (len(shared.blocks), shared.placement().tiles) == (1, 3)
    assert not [text for text in shared.advice() if "share" in text]
