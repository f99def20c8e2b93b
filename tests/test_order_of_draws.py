"""Random numbers are drawn in the source's order: one seed gives the source's masks, whatever shares a block."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from partition_cases import random_graph, random_hardware
from same_as_source import assert_same
from test_partition_replay import Random, Step, hardwares, steps
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import OperationGraph, Role
from ffebm_compiler.passes.order_of_draws import in_order_of_draws
from ffebm_compiler.passes.partition.decide import partition
from ffebm_compiler.plan import DigitalPart

KINDS = ("add", "reshape", "concat", "avg_pool")


class Dropping(Random):
    """A random network in which some steps drop values in train mode."""

    def value(self, kind: str, a: Tensor, b: Tensor, detail: int) -> Tensor:
        return F.dropout(a, 0.5, self.training) if kind == "drop" else super().value(kind, a, b, detail)


class Parallel(nn.Module):
    """Two branches that drop in turn: parallel layers could share a block, and digital parts would be one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Shared(nn.Module):
    """A dropped value that two layers read, dropped values that are read in another order, and noise."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.e = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = F.dropout(torch.tanh(self.a(x)), 0.5, self.training)
        second = F.dropout(torch.tanh(self.b(x)), 0.5, self.training)
        late = torch.tanh(self.e(second))
        if self.training:
            late = late + torch.randn_like(late)
        return late * self.c(first) + F.dropout(self.b(first), 0.3, self.training)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), operations=st.integers(2, 40), fabric=st.integers(0, 2**32))
def test_a_partition_leaves_an_order_in_which_the_source_draws(seed: int, operations: int, fabric: int) -> None:
    graph, hardware, draw = random_graph(seed, operations), random_hardware(fabric), random.Random(seed)
    drawing = tuple(
        op.name
        for op in graph.operations
        if (op.role is Role.DIGITAL or op.kind in ("reshape", "copy")) and draw.random() < 0.7
    )
    graph = replace(graph, draws=drawing)
    result = partition(graph, hardware, KINDS)
    order = in_order_of_draws(graph, [*result.blocks, *result.digital])
    assert order.kept
    groups = [*result.blocks, *result.digital]
    place = {op.name: index for index, op in enumerate(graph.operations)}
    ran = [name for index in order.groups for name in sorted(groups[index], key=place.__getitem__)]
    assert sorted(ran) == sorted(place)
    assert [name for name in ran if name in drawing] == list(drawing)
    seen = set(graph.inputs)
    for index in order.groups:
        inside = set(groups[index])
        assert {source for name in inside for source in graph[name].inputs} <= seen | inside
        seen |= inside


dropping = st.lists(st.tuples(st.just("drop"), st.integers(0, 3), st.integers(0, 5), st.just(4)), max_size=5)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(described=steps, drops=dropping, hardware=hardwares, order=st.randoms(use_true_random=False))
def test_one_seed_gives_the_sources_masks_in_random_networks(
    described: list[Step], drops: list[Step], hardware: Hardware, order: random.Random
) -> None:
    mixed = [*described, *drops]
    order.shuffle(mixed)
    torch.manual_seed(len(mixed))
    model, x = Dropping(mixed).double().train(), torch.randn(3, 6, dtype=torch.float64)
    hybrid = ffebm.convert(model, x, hardware=hardware, feedback=1e-6).train()
    assert not any("another order" in note for note in hybrid.plan.notes)
    with torch.no_grad():
        torch.manual_seed(7)
        expected = model(x)
        torch.manual_seed(7)
        torch.testing.assert_close(hybrid(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [Parallel, Shared])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_branches_that_drop_in_turn_draw_as_the_source_does(model: type[nn.Module], layers: int) -> None:
    torch.manual_seed(0)
    net, x = model().double(), torch.randn(3, 8, dtype=torch.float64)
    if layers == 1:
        assert_same(net.float(), x.float(), calls=2)
        return
    hybrid = ffebm.convert(net, x, hardware=Hardware(layers_per_block=layers), feedback=1e-7).train()
    assert any(len(block.layers) > 1 for block in hybrid.plan.blocks)
    assert_same(net, x, calls=2, hybrid=hybrid)


def test_a_transformers_encoder_and_decoder_draw_in_turn() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 1, 1, 16, 0.3, batch_first=True)
    assert_same(model, torch.randn(2, 5, 8), torch.randn(2, 3, 8), calls=2)


def test_a_plan_edited_so_that_no_order_draws_as_the_source_says_so(tmp_path: Path) -> None:
    model, x = Parallel(), torch.randn(3, 8)
    plan = ffebm.plan(model, x, hardware=Hardware(layers_per_block=1))
    first, second, third, fourth = plan.graph.draws
    parts = (DigitalPart("digital_1", (first, third)), DigitalPart("digital_2", (second, fourth, "add")))
    replace(plan, digital_parts=parts).to_json(tmp_path / "plan.json")
    plan = ffebm.Plan.from_json(tmp_path / "plan.json")
    hybrid = ffebm.convert(model, x, plan=plan)
    told = [note for note in hybrid.plan.notes if "another order than in the source" in note]
    assert len(told) == 1
    hybrid.save(tmp_path / "saved")
    assert ffebm.load(tmp_path / "saved", model).plan == hybrid.plan


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (("op9",), "the graph's draws name 'op9', which is no operation of it"),
        (("op1", "op0"), "the graph's draws name 'op1' before 'op0', which comes first in the graph"),
        (("op0", "op0"), "the graph's draws name 'op0' before 'op0', which comes first in the graph"),
    ],
)
def test_draws_that_are_no_order_of_the_graph_are_refused(draws: tuple[str, ...], message: str) -> None:
    graph = random_graph(3, 4)
    with pytest.raises(FFEBMError, match=message):
        OperationGraph(graph.inputs, graph.operations, graph.outputs, draws)
