"""Lower: with feedback off, the graph of blocks computes what the captured graph computes."""

from __future__ import annotations

import pytest
import torch
from networks import CASES, converted
from running import run
from torch import nn

from ffebm_compiler.passes.lower import lower
from ffebm_compiler.pipeline import annotated_program
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.feedforward.blocks import FeedforwardBlock
from ffebm_compiler.runtime.feedforward.fetch import Fetch


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
