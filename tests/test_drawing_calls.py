"""Calls: one node per call of a module, and no picture with a loop."""

from __future__ import annotations

import networkx
import pytest
import torch
from networks import CASES, seeded
from random_networks import RandomNetwork
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.drawing.calls import calls_of
from ffebm_compiler.drawing.record import record_of
from ffebm_compiler.drawing.scene import scene_of
from ffebm_compiler.driven import settles
from ffebm_compiler.plan import Plan


class Shared(nn.Module):
    """torchvision's residual block: one ReLU in two places, and a branch that runs another module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.twice = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.two(self.relu(self.one(x))) + x)
        return self.twice(y) - self.twice(-y)


def groups(plan: Plan) -> networkx.DiGraph:
    """The picture of all blocks and parts, opened: a node per group."""
    record = record_of(plan)
    of = {op: (index, record["ops"][op]["group"]) for index, home in enumerate(record["homes"]) for op in home["ops"]}
    drawn = networkx.DiGraph()
    for op, group in of.items():
        drawn.add_edges_from((of[source], group) for source in record["ops"][op]["in"] if source >= 0)
    drawn.remove_edges_from([(node, node) for node in of.values()])
    return drawn


def test_a_module_called_twice_is_two_nodes() -> None:
    plan = ffebm.plan(seeded(Shared), torch.randn(2, 6))
    calls = [(op.path, op.call) for op in plan.graph.operations if op.path in ("relu", "twice")]
    assert calls == [("relu", 0), ("relu", 1), ("twice", 0), ("twice", 1)]
    assert networkx.is_directed_acyclic_graph(groups(plan))


@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_no_loop_in_pictures_of_random_networks(seed: int) -> None:
    plan = ffebm.plan(RandomNetwork(seed, layers=4, operations=16), torch.randn(2, 8))
    assert networkx.is_directed_acyclic_graph(groups(plan))
    # All operations of this network are the model's own, so that many could be one node; none is lost.
    for home in (*plan.blocks, *plan.digital_parts):
        found = calls_of([plan.graph[name] for name in home.operations])
        assert len(found) == len(home.operations)
        assert sorted(set(found)) == list(range(max(found) + 1))


@pytest.mark.parametrize("name", CASES)
def test_blocks_that_settle_are_those_with_feedback(name: str) -> None:
    case = CASES[name]
    model, x = case.make(nn.Tanh)
    hybrid = ffebm.convert(model, x, **case.options)
    for block in hybrid.plan.blocks:
        assert (
            settles(hybrid.plan.graph, block.operations, block.driven)
            == hybrid.energy_blocks[block.name].program.coupled
        )


@pytest.mark.parametrize("seed", range(1, 60, 8))
def test_blocks_of_random_networks_that_settle_are_those_with_feedback(seed: int) -> None:
    torch.manual_seed(seed)
    options = {"block_ops": ("add", "reshape", "concat", "scale"), "digital_drive": bool(seed % 16 == 1)}
    hybrid = ffebm.convert(RandomNetwork(seed, layers=4, operations=14), torch.randn(2, 8), **options)
    for block in hybrid.plan.blocks:
        assert (
            settles(hybrid.plan.graph, block.operations, block.driven)
            == hybrid.energy_blocks[block.name].program.coupled
        )


class Sizes(nn.Module):
    """A class token: it is repeated for every sample, so that the input is read for its sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.embed = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)


def test_an_edge_is_drawn_where_values_flow_and_not_for_sizes_alone() -> None:
    plan = ffebm.plan(seeded(Sizes), torch.randn(2, 3, 4))
    reads = [op for op in plan.graph.operations if op.sizes]
    assert [(op.target, op.sizes, op.data) for op in reads] == [("expand", ("x",), ())]
    assert [edge.target for edge in scene_of(plan).edges if edge.source == "x"] == ["block_1"]
    record = record_of(plan)
    (drawn,) = [op for op in record["ops"] if op["sizes"]]
    assert (drawn["in"], drawn["sizes"]) == ([], [-1])
