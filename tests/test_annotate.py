"""Annotate: every node has a role and a reason, every layer its matrix."""

from __future__ import annotations

import torch
from networks import digits_cnn, mlp, noise, seeded, transformer
from torch import nn

from ffebm_compiler.ir import Role, info
from ffebm_compiler.passes.annotate import annotate
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.free_shapes import free_shapes
from ffebm_compiler.passes.functionalize import functionalize
from ffebm_compiler.passes.rebind import rebind

aten = torch.ops.aten


def test_annotate_gives_every_node_a_role_and_a_reason() -> None:
    for model, x in (digits_cnn(), transformer(), mlp()):
        program = rebind(free_shapes(functionalize(capture(model, (x,), {}))))
        graph = annotate(program)
        assert all(info(node).reason for node in program.graph.nodes)
        dynamic = [
            node.name
            for node in program.graph.nodes
            if info(node).role in (Role.WEIGHT, Role.ACTIVATION, Role.WIRING, Role.DIGITAL)
        ]
        assert [operation.name for operation in graph.operations] == dynamic


def test_annotate_measures_the_matrices() -> None:
    x = noise(3, 2, 6, 6)
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False),
            nn.Flatten(),
            nn.Linear(144, 5),
        )
    )
    program = rebind(free_shapes(functionalize(capture(model, (x,), {}))))
    layers = [op for op in annotate(program).operations if op.role is Role.WEIGHT]
    assert [(op.path, op.rows, op.cols, op.groups, op.positions, op.bias) for op in layers] == [
        ("0", 9, 3, 2, 9, True),
        ("2", 6, 16, 1, 9, False),
        ("4", 144, 5, 1, 1, True),
    ]
    # Multiply-accumulates, by counting: every output of a layer is a sum over its receptive field.
    assert [op.macs for op in layers] == [6 * 9 * 9, 9 * 6 * 4 * 4, 144 * 5]
    assert [op.values for op in layers] == [54, 144, 5]
    assert layers[0].shape == (None, 6, 3, 3)
