"""Lower: with feedback off, the graph of blocks computes what the captured graph computes."""

from __future__ import annotations

import pytest
import torch
from networks import CASES, converted
from running import run
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.passes.lower import lower
from ffebm_compiler.pipeline import annotated_program
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.feedforward.blocks import FeedforwardBlock
from ffebm_compiler.runtime.feedforward.fetch import Fetch


@pytest.mark.parametrize("case", CASES)
def test_lowering_leaves_the_captured_graph_as_it_is(case: str) -> None:
    hybrid, x = converted(case, nn.GELU)
    model, _ = CASES[case].make(nn.GELU)
    program, _ = annotated_program(model, (x,), {}, hybrid.plan.options, "batch", hybrid.plan.hardware)
    before = str(program.graph)
    lower(program, hybrid.plan)
    assert str(program.graph) == before


class Projections(nn.Module):
    """Products with weights of (in, out): `x @ W`, and with a bias as transformers' GPT-2 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 8) / 3)
        self.second = nn.Parameter(torch.randn(8, 5) / 3)
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, torch.tanh(x @ self.first), self.second).tanh()


def test_products_with_transposed_weights_are_blocks_and_have_exact_gradients() -> None:
    torch.manual_seed(0)
    model, x = Projections().double(), torch.randn(3, 6, dtype=torch.float64)
    hybrid = ffebm.convert(model, x, feedback=0.3, gradient="implicit", solver=ffebm.GaussSeidel(rtol=1e-13))
    (block,) = hybrid.blocks
    assert len(block.module.program.layers) == 2
    hybrid(x).square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in hybrid.named_parameters()}
    hybrid.zero_grad()
    hybrid.set_gradient("unrolled")
    hybrid(x).square().sum().backward()
    for name, parameter in hybrid.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-9)
        assert parameter.grad.abs().max() > 0


class Present:
    """The tensors of a module, by name."""

    def __init__(self, source: nn.Module) -> None:
        self.state = dict(source.named_parameters()) | dict(source.named_buffers())

    def _tensor(self, name: str) -> torch.Tensor:
        return self.state[name]


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_fetched_just_before_the_block_that_reads_them(case: str) -> None:
    hybrid, x = converted(case, nn.GELU)
    run = hybrid.lowered
    kinds = [type(run.get_submodule(node.target)) if node.op == "call_module" else None for node in run.graph.nodes]
    nodes = list(run.graph.nodes)
    assert Fetch in kinds
    for place, node in enumerate(nodes):
        if kinds[place] is Fetch:
            (user,) = node.users
            while user.op == "call_function":  # a weight transposed or folded
                user = next(iter(user.users))
            between = kinds[place + 1 : nodes.index(user)]
            assert not {EnergyBlock, FeedforwardBlock} & set(between), f"{node} is read long before {user}"
    seen: list[str] = []
    fetch = type(hybrid)._tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(hybrid), "_tensor", lambda self, name: seen.append(name) or fetch(self, name))
        with hybrid.in_mode(False), hybrid.feedforward_mode():
            hybrid(x)
    assert set(seen) >= {name for name, _ in hybrid.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("case", CASES)
def test_the_graph_of_blocks_computes_the_captured_graph(case: str) -> None:
    hybrid, x = converted(case, nn.GELU)
    model, _ = CASES[case].make(nn.GELU)
    plan = hybrid.plan
    program, _ = annotated_program(model, (x,), {}, plan.options, "batch", plan.hardware)
    expected = run(program, x)
    lowered = lower(program, plan)
    assert [block.name for block in plan.blocks] == sorted(lowered.energy, key=lambda name: int(name.split("_")[1]))
    assert sorted(lowered.feedforward) == sorted(part.name for part in plan.digital_parts)
    for block in lowered.energy.values():
        block.enabled = False
    for module in lowered.graph_module.modules():
        if isinstance(module, Fetch):
            module.follow(Present(program.source))
    found = lowered.graph_module(x)
    found = found[0] if isinstance(found, tuple | list) else found
    torch.testing.assert_close(found, expected)
