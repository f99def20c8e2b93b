"""The partition: sound on random graphs, deterministic, and right on graphs that a person can check."""

from __future__ import annotations

from dataclasses import replace

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_cases import chain, faults, random_graph, random_hardware, total_conversions

from ffebm_compiler.errors import PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import ALWAYS_JOIN, Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.decide import partition, quotient_order

KINDS = ("add", "reshape", "concat", "avg_pool")
ALWAYS = frozenset(ALWAYS_JOIN)


def layer(name: str, *inputs: str, values: int = 8, rows: int = 8, cols: int = 8) -> Operation:
    return Operation(name, Role.WEIGHT, name, "linear", inputs, values, kind="linear", rows=rows, cols=cols)


def wiring(name: str, *inputs: str, kind: str = "add", values: int = 8) -> Operation:
    return Operation(name, Role.WIRING, name, kind, inputs, values, kind=kind)


def relu(name: str, source: str, values: int = 8) -> Operation:
    return Operation(name, Role.ACTIVATION, name, "relu", (source,), values, kind="relu")


def digital(name: str, *inputs: str, values: int = 8) -> Operation:
    return Operation(name, Role.DIGITAL, name, "softmax", inputs, values)


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    operations=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.3, 0.45, 0.6]),
    fabric=st.integers(0, 2**32),
    kinds=st.sets(st.sampled_from(KINDS)),
    digital_drive=st.booleans(),
)
def test_partitions_of_random_graphs_are_sound(
    seed: int, operations: int, share: float, fabric: int, kinds: set[str], digital_drive: bool
) -> None:
    graph, hardware = random_graph(seed, operations, share), random_hardware(fabric)
    result = partition(graph, hardware, tuple(kinds), digital_drive=digital_drive)
    assert faults(graph, hardware, result, frozenset(kinds) | ALWAYS, digital_drive) == []
    again = partition(graph, hardware, tuple(kinds), digital_drive=digital_drive)
    assert (again.blocks, again.digital, again.rejected) == (result.blocks, result.digital, result.rejected)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), fabric=st.integers(0, 2**32), cores=st.integers(1, 4))
def test_a_budget_of_cores_holds(seed: int, fabric: int, cores: int) -> None:
    graph = random_graph(seed, 30)
    hardware = replace(random_hardware(fabric), cores=cores)
    result = partition(graph, hardware, KINDS)
    assert faults(graph, hardware, result, frozenset(KINDS) | ALWAYS) == []
    if hardware.tiles_per_core is not None:
        from ffebm_compiler.passes.partition.decide import tiles_of

        used = sum(tiles_of(graph[n], hardware) for b in result.blocks for n in b if graph[n].role is Role.WEIGHT)
        assert used <= cores * hardware.tiles_per_core


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), fabric=st.integers(0, 2**32))
def test_the_reported_order_is_topological(seed: int, fabric: int) -> None:
    graph, hardware = random_graph(seed, 25), random_hardware(fabric)
    result = partition(graph, hardware, KINDS)
    home: dict[str, str | int] = {name: index for index, block in enumerate(result.blocks) for name in block}
    position = {place: index for index, place in enumerate(quotient_order(graph, result.blocks))}
    for op in graph.operations:
        for source in op.inputs:
            if source in graph and home.get(source, source) != home.get(op.name, op.name):
                assert position[home.get(source, source)] < position[home.get(op.name, op.name)]


def test_a_residual_block_is_one_energy_block() -> None:
    graph = OperationGraph(
        {"x": 8},
        (layer("a", "x"), relu("ra", "a"), layer("b", "ra"), wiring("sum", "b", "x"), relu("rs", "sum")),
        ("rs",),
    )
    result = partition(graph, Hardware())
    assert result.blocks == [["a", "ra", "b", "sum", "rs"]]
    assert total_conversions(graph, result.blocks) == 16


def test_layers_that_read_one_value_share_its_converters() -> None:
    """Query, key and value: 8 values in once, not three times."""
    graph = OperationGraph(
        {"x": 8}, (layer("q", "x"), layer("k", "x"), layer("v", "x"), digital("mix", "q", "k", "v")), ("mix",)
    )
    result = partition(graph, Hardware())
    assert result.blocks == [["q", "k", "v"]]
    assert total_conversions(graph, result.blocks) == 8 + 24


def test_pairwise_sound_merges_do_not_make_a_cycle() -> None:
    """a → p → d and c → q → b: merging {a, b} and {c, d} is acyclic one by one, and a cycle together."""
    graph = OperationGraph(
        {"x": 8, "y": 8},
        (layer("a", "x"), layer("c", "y"), digital("p", "a"), digital("q", "c"), layer("d", "p"), layer("b", "q")),
        ("d", "b"),
    )
    for cap in (1, 2, 4, None):
        hardware = Hardware(layers_per_block=cap)
        assert faults(graph, hardware, partition(graph, hardware), ALWAYS) == []


def test_a_layer_larger_than_a_core_stays_digital_with_the_numbers() -> None:
    graph = OperationGraph({"x": 8}, (layer("a", "x", rows=600, cols=600),), ("a",))
    result = partition(graph, Hardware(tiles_per_core=4))
    assert result.blocks == []
    assert result.rejected == {"a": "it needs 15 tiles and a core has 4"}
    crowded = partition(graph, Hardware(neurons_per_block=5))
    assert crowded.rejected == {"a": "it has 8 neurons and a block holds 5"}


def test_cores_keep_the_most_valuable_blocks() -> None:
    graph = OperationGraph(
        {"x": 8},
        (layer("small", "x"), digital("d", "small"), replace(layer("busy", "d"), positions=100)),
        ("busy",),
    )
    result = partition(graph, Hardware(cores=1, tiles_per_core=1))
    assert result.blocks == [["busy"]]
    assert result.rejected["small"].startswith(
        "the only core is full: its block needs 1 tiles and other blocks do more"
    )


def test_neutral_reshapes_at_the_rim_stay_digital() -> None:
    graph = OperationGraph(
        {"x": 8}, (layer("a", "x"), wiring("flat", "a", kind="reshape"), digital("d", "flat")), ("d",)
    )
    assert partition(graph, Hardware()).blocks == [["a"]]


def test_pooling_joins_where_it_saves_conversions() -> None:
    graph = OperationGraph({"x": 8}, (layer("a", "x"), wiring("pool", "a", kind="avg_pool", values=2)), ("pool",))
    assert partition(graph, Hardware(), ("avg_pool",)).blocks == [["a", "pool"]]
    assert partition(graph, Hardware(), ()).blocks == [["a"]]


def test_no_layer_no_block() -> None:
    graph = OperationGraph({"x": 8}, (relu("r", "x"), digital("d", "r")), ("d",))
    result = partition(graph, Hardware())
    assert (result.blocks, result.digital) == ([], [["r", "d"]])


def test_digital_layers_are_kept_out_with_their_reason() -> None:
    graph = OperationGraph({"x": 8}, (layer("a", "x"), relu("r", "a"), layer("b", "r")), ("b",))
    result = partition(graph, Hardware(), digital={"a": "because"})
    assert result.blocks == [["b"]]
    assert result.rejected == {"a": "because"}


def test_a_cycle_is_refused_by_name() -> None:
    graph = OperationGraph({"x": 8}, (layer("a", "x"), digital("d", "a"), layer("b", "d")), ("b",))
    with pytest.raises(PlanError, match=r"cycle through block 1, .* split the block or move one"):
        quotient_order(graph, [["a", "b"]])


def test_unlimited_capacities_put_a_chain_into_one_block() -> None:
    graph = chain(200)
    result = partition(graph, Hardware(tiles_per_core=None, layers_per_block=None))
    assert len(result.blocks) == 1
    assert total_conversions(graph, result.blocks) == 128


def test_a_chain_fills_its_blocks() -> None:
    assert len(partition(chain(40), Hardware(layers_per_block=4)).blocks) == 10


def test_the_checker_sees_faults() -> None:
    """The independent check is itself checked: a partition with a cycle, an unfed and a crowded block."""
    graph = OperationGraph(
        {"x": 8}, (layer("a", "x"), digital("d", "a"), layer("b", "d"), relu("r", "d"), relu("s", "r")), ("b", "s")
    )
    good = partition(graph, Hardware())
    bad = replace(good, blocks=[["a", "b", "r", "s"]], digital=[["d"]], rejected={})
    found = faults(graph, Hardware(layers_per_block=1), bad, ALWAYS)
    assert "the quotient has a cycle" in found
    assert "r is fed by no layer of its block" in found
    assert "2 layers in a block" in found
    assert networkx.__version__
