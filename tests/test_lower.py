"""Lower: with feedback off, the graph of blocks computes what the captured graph computes."""

from __future__ import annotations

import pytest
import torch
from networks import CASES, converted
from running import run
from torch import nn

from ffebm_compiler.passes.lower import lower
from ffebm_compiler.pipeline import annotated_program


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
    state = dict(program.source.named_parameters()) | dict(program.source.named_buffers())
    tensors = [state[name] for name in program.lifted.values()]
    found = lowered.graph_module(*tensors, x)
    found = found[0] if isinstance(found, tuple | list) else found
    torch.testing.assert_close(found, expected)
