"""Rebind: batch norm and dropout follow the flags of the source's modules."""

from __future__ import annotations

import copy

import torch
from networks import digits_cnn, transformer
from running import run, targets
from torch import nn

from ffebm_compiler.ir import verify
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.free_shapes import free_shapes
from ffebm_compiler.passes.functionalize import functionalize
from ffebm_compiler.passes.merge_modes import merge_modes
from ffebm_compiler.passes.rebind import rebind
from ffebm_compiler.runtime.feedforward.blocks import ReboundAttention, ReboundBatchNorm, ReboundDropout

aten = torch.ops.aten


def test_rebind_binds_every_flag_to_the_source() -> None:
    cnn, x = digits_cnn()
    program = rebind(free_shapes(functionalize(capture(cnn, (x,), {}))))
    verify(program)
    assert aten.batch_norm.default not in targets(program)
    bound = [m for m in program.graph_module.modules() if isinstance(m, ReboundBatchNorm)]
    norms = [m for m in program.source.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.owner for m in bound] == norms
    torch.testing.assert_close(run(program, x), cnn(x))
    program.source.train()
    expected = copy.deepcopy(cnn).train()
    torch.testing.assert_close(run(program, x), expected(x))
    for mine, theirs in zip(program.source.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)

    encoder, tokens = transformer(dropout=0.25)
    program = rebind(merge_modes(capture(encoder, (tokens,), {})))
    modules = list(program.graph_module.modules())
    assert [m.rate for m in modules if isinstance(m, ReboundAttention)] == [0.25, 0.25]
    drops = [m for m in modules if isinstance(m, ReboundDropout)]
    assert len(drops) == 6
    assert all(m.rate == 0.25 and not m.active for m in drops)
    program.source.train()
    assert all(m.active for m in drops)
