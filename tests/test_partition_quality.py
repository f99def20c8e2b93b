"""The partition against the exact optimum on small random graphs, and its growth with the network."""

from __future__ import annotations

import importlib.util
import itertools
import time
from pathlib import Path
from types import ModuleType

import pytest
from partition_cases import chain, faults, random_graph, random_hardware, total_conversions

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import ALWAYS_JOIN, OperationGraph, Role
from ffebm_compiler.passes.partition.decide import partition

KINDS = ("add", "reshape", "concat", "avg_pool")
ALL_KINDS = frozenset((*KINDS, *ALWAYS_JOIN))


def benchmark(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_enumeration(graph: OperationGraph, hardware: Hardware, digital_drive: bool = False) -> tuple[int, int]:
    """(conversions, blocks) of the best partition, by trying every one."""
    eligible = []
    for op in graph.operations:
        joins = op.role is Role.ACTIVATION or (op.role is Role.WIRING and op.kind in ALL_KINDS)
        if op.role is Role.WEIGHT or joins:
            eligible.append(op)
    layers = [op.name for op in eligible if op.role is Role.WEIGHT]
    rejected = set(partition(graph, hardware, KINDS).rejected)
    choices = []
    for op in eligible:
        if op.name in rejected:
            choices.append([-1])
        elif op.role is Role.WEIGHT:
            choices.append(list(range(layers.index(op.name) + 1)))
        else:
            choices.append([-1, *range(len(layers))])
    best = None
    for homes in itertools.product(*choices):
        blocks: dict[int, list[str]] = {}
        for op, home in zip(eligible, homes, strict=True):
            if home >= 0:
                blocks.setdefault(home, []).append(op.name)
        found = list(blocks.values())
        value = (total_conversions(graph, found), len(found))
        if best is not None and value >= best:
            continue
        inside = {name for block in found for name in block}
        result = partition(OperationGraph({}, (), ()), hardware)
        result.blocks = found
        result.digital = [[op.name for op in graph.operations if op.name not in inside]]
        result.rejected = dict.fromkeys(rejected, "")
        # One digital part for all would make cycles of its own: each operation is a part.
        result.digital = [[name] for part in result.digital for name in part]
        if not faults(graph, hardware, result, ALL_KINDS, digital_drive):
            best = value
    assert best is not None
    return best


@pytest.mark.parametrize("digital_drive", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_the_exact_solver_is_exact(seed: int, digital_drive: bool) -> None:
    graph, hardware = random_graph(seed, 6, 0.4 if digital_drive else 0.5), random_hardware(seed)
    best = benchmark("exact_partition").optimum(graph, hardware, KINDS, digital_drive=digital_drive)
    assert best == by_enumeration(graph, hardware, digital_drive)


@pytest.mark.parametrize("digital_drive", [False, True])
def test_conversions_are_optimal_on_nearly_all_small_graphs(digital_drive: bool) -> None:
    exact = benchmark("exact_partition")
    equal = known = 0
    for seed in range(10_000, 10_060):
        graph, hardware = random_graph(seed, 12), random_hardware(seed)
        best = exact.optimum(graph, hardware, KINDS, digital_drive=digital_drive)
        if best is None:
            continue
        known += 1
        found = total_conversions(graph, partition(graph, hardware, KINDS, digital_drive=digital_drive).blocks)
        assert best[0] <= found <= 1.2 * best[0], seed
        equal += found == best[0]
    assert known >= 50
    assert equal >= 0.95 * known


@pytest.mark.slow
@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(),
        Hardware(tiles_per_core=None, layers_per_block=None),
        Hardware(tiles_per_core=2000, layers_per_block=None),
    ],
    ids=["4 layers", "unlimited", "2000 tiles"],
)
@pytest.mark.parametrize("branch_every", [0, 2])
def test_time_grows_with_the_network(hardware: Hardware, branch_every: int) -> None:
    """Ten times the layers in about ten times the time; the limits leave room for a busy machine."""
    graph = chain(10_000, branch_every)
    start = time.perf_counter()
    result = partition(graph, hardware)
    assert time.perf_counter() - start < 15
    assert faults(graph, hardware, result, ALL_KINDS) == []
