"""Every state owns a layer: a block of one layer is its layer, whatever follows it."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from partition_cases import total_conversions
from random_networks import RandomNetwork, Several
from test_partition import digital, layer, relu, wiring
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import FFEBMError, PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import OperationGraph
from ffebm_compiler.passes.dialect import WIRING_KINDS
from ffebm_compiler.passes.lower import lower
from ffebm_compiler.passes.partition.decide import partition
from ffebm_compiler.passes.partition.rules import activations_without_a_layer

ONE_LAYER = Hardware(layers_per_block=1)


def deviation(got: Tensor, want: Tensor) -> float:
    return float(((got - want).norm() / want.norm().clamp_min(1e-9)).detach())


def equal_to_source(seeds: range, convolutional: bool = False) -> None:
    """Values and gradients of random networks at one layer a block, against the source's."""
    torch.manual_seed(seeds.start)
    draw = random.Random(seeds.start)
    model = Several(
        [RandomNetwork(seed, operations=draw.randint(2, 12), convolutional=convolutional) for seed in seeds]
    )
    x = torch.randn(4, 8, 4, 4) if convolutional else torch.randn(16, 8)
    kinds = tuple(kind for kind in WIRING_KINDS if draw.random() < 0.7)
    source = copy.deepcopy(model)
    hybrid = ffebm.convert(model, x, hardware=ONE_LAYER, feedback=0.9, block_ops=kinds)
    assert not any(block.module.program.coupled for block in hybrid.blocks)
    ours, theirs = hybrid(x), source(x)
    for seed, got, want in zip(seeds, ours, theirs, strict=True):
        assert deviation(got, want) < 1e-5, seed
    directions = [torch.randn_like(value) for value in theirs]
    torch.autograd.backward(ours, directions)
    torch.autograd.backward(theirs, directions)
    found = dict(hybrid.named_parameters())
    for name, parameter in source.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-6:
            gradient = found[name].grad
            assert gradient is not None, name
            assert deviation(gradient, parameter.grad) < 1e-5, name


@pytest.mark.parametrize("first", [0, 20])
def test_random_networks_of_one_layer_blocks_equal_their_source(first: int) -> None:
    equal_to_source(range(first, first + 20), convolutional=first == 20)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 50))
def test_a_thousand_random_networks_of_one_layer_blocks_equal_their_source(first: int) -> None:
    equal_to_source(range(first, first + 50), convolutional=first % 250 == 0)


@pytest.mark.parametrize("hardware", ["crossbar-256", "ideal"])
def test_on_any_hardware_a_block_of_one_layer_has_no_feedback(hardware: str) -> None:
    torch.manual_seed(0)
    model = Several([RandomNetwork(seed, layers=4, operations=14) for seed in range(12)])
    hybrid = ffebm.convert(model, torch.randn(4, 8), hardware=hardware, block_ops=WIRING_KINDS)
    assert any(block.module.program.coupled for block in hybrid.blocks)
    for block, plan in zip(hybrid.blocks, hybrid.plan.blocks, strict=True):
        assert len(block.module.program.layers) <= len(plan.layers)
        assert len(plan.layers) > 1 or not block.module.program.coupled


FORMS = {
    "two in a row": lambda p: torch.tanh(F.relu(p)),
    "gate by slices": lambda p: torch.tanh(p[:, :4]) * torch.sigmoid(p[:, 4:]),
    "tanh(p) + p": lambda p: torch.tanh(p) + p,
    "activation of a sum of both": lambda p: F.relu(torch.tanh(p) + p),
    "mean and scale": lambda p: torch.cat([p[:, :4], F.softplus(p[:, 4:])], 1),
    "swish of one half": lambda p: F.silu(p[:, :4]) * p[:, 4:],
    "product and its activation out": lambda p: torch.cat([p, F.gelu(p)], 1),
    "three in a row": lambda p: F.silu(torch.tanh(F.leaky_relu(p))),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradient", ["ep", "implicit"])
def test_what_follows_one_layer_is_exact(form: str, gradient: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return FORMS[form](self.a(x))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(64, 8)
    hybrid = ffebm.convert(model, x, hardware=ONE_LAYER, feedback=0.9, gradient=gradient)
    got, want = hybrid(x), model(x)
    assert deviation(got, want) < 1e-6
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    assert deviation(dict(hybrid.named_parameters())["a.weight"].grad, model.a.weight.grad) < 1e-6


def test_an_activation_of_an_activation_is_digital() -> None:
    graph = OperationGraph({"x": 8}, (layer("a", "x"), relu("r", "a"), relu("s", "r"), layer("b", "s")), ("b",))
    result = partition(graph, Hardware())
    assert result.blocks == [["a", "r"], ["b"]]
    assert result.digital == [["s"]]


def test_a_sum_of_states_is_activated_digitally_and_one_with_a_layer_is_a_state() -> None:
    states = (layer("a", "x"), relu("ra", "a"), layer("b", "x"), relu("rb", "b"))
    graph = OperationGraph({"x": 8}, (*states, wiring("sum", "ra", "rb"), relu("r", "sum")), ("r",))
    result = partition(graph, Hardware())
    assert result.digital[-1] == ["r"]
    owned = OperationGraph({"x": 8}, (*states[:2], layer("b", "x"), wiring("sum", "ra", "b"), relu("r", "sum")), ("r",))
    result = partition(owned, Hardware())
    assert total_conversions(owned, result.blocks) == 16
    assert len(result.blocks) == 1


def test_an_activation_goes_where_its_layer_is() -> None:
    """The sum reads a layer of another block: of the block of `b` alone, its activation owns no layer."""
    graph = OperationGraph(
        {"x": 8, "y": 8},
        (layer("a", "x"), layer("b", "y"), relu("rb", "b"), wiring("sum", "a", "rb"), relu("r", "sum")),
        ("r",),
    )
    users = graph.users()
    assert activations_without_a_layer(graph, ["b", "rb", "sum", "r"], users) == ["r"]
    assert activations_without_a_layer(graph, ["a", "b", "rb", "sum", "r"], users) == []
    for block in partition(graph, Hardware(layers_per_block=1)).blocks:
        assert activations_without_a_layer(graph, block, users) == []


def test_a_product_read_twice_is_a_state_and_its_activations_are_digital() -> None:
    graph = OperationGraph({"x": 8}, (layer("a", "x"), relu("r", "a"), digital("d", "a", "r")), ("d",))
    assert partition(graph, Hardware()).blocks == [["a"]]


def two_in_a_row() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Hardtanh()), torch.randn(4, 8)


def test_an_edited_plan_cannot_bring_it_back() -> None:
    model, x = two_in_a_row()
    plan = ffebm.plan(model, x)
    (part,) = [part for part in plan.digital_parts if "hardtanh" in part.operations]
    data = plan.to_dict()
    block = data["blocks"][0]
    data["blocks"] = [{"name": block["name"], "operations": [*block["operations"], *part.operations]}]
    data["digital_parts"] = [entry for entry in data["digital_parts"] if entry["name"] != part.name]
    with pytest.raises(PlanError, match=r"block_1 holds the activation 'hardtanh', which owns no layer of the block"):
        ffebm.Plan.from_dict(data)


def test_a_moved_layer_leaves_no_activation_without_one() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.a(x) + torch.tanh(self.b(x)))

    model, x = Model(), torch.randn(4, 8)
    plan = ffebm.plan(model, x)
    assert len(plan.blocks) == 1
    for where in ("digital", "analog"):
        edited = plan.move("a", where)
        edited.validate()
        hybrid = ffebm.convert(model, x, plan=edited)
        assert deviation(hybrid(x), model(x)) < 1e-6


def test_lowering_refuses_a_state_without_a_layer() -> None:
    from ffebm_compiler.convert import _front
    from ffebm_compiler.passes.planning import describe_block
    from ffebm_compiler.plan import PlanOptions

    model, x = two_in_a_row()
    plan = ffebm.plan(model, x)
    front = _front(model, x, None, PlanOptions(), "batch", plan.hardware)
    names = [op.name for op in front.graph.operations]
    order = {name: index for index, name in enumerate(names)}
    block = describe_block(front.graph, plan.hardware, front.graph.users(), order, "block_1", names)
    import dataclasses

    forged = dataclasses.replace(plan, blocks=(block,), digital_parts=())
    with pytest.raises(FFEBMError, match=r"block_1 would hold the state 'hardtanh' of '2', whose drive holds no layer"):
        lower(front.program, forged)
