"""Free shapes: what follows from the batch is read from the inputs."""

from __future__ import annotations

import torch
from networks import noise, seeded
from running import run, targets
from torch import Tensor, nn

from ffebm_compiler.ir import verify
from ffebm_compiler.passes.annotate import annotate
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.free_shapes import free_shapes

aten = torch.ops.aten


class Shapes(nn.Module):
    """Reads the batch of intermediate values in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = y.view(y.size(0), -1)
        z = self.b(y)
        z = z.view(z.shape[0], 2, z.shape[1] // 2).transpose(1, 2).reshape(z.shape[0], -1)
        return z.view(-1, 4).view(x.shape[0], 8)


def test_free_shapes_reads_the_batch_from_the_input_only() -> None:
    model = seeded(Shapes)
    program = capture(model, (noise(3, 2, 4, 4),), {})
    before = targets(program)
    assert aten.view.default in before
    program = free_shapes(program)
    verify(program)
    (name,) = program.inputs
    reads = [node for node in program.graph.nodes if node.target is aten.sym_size.int]
    assert all(node.args[0].name == name for node in reads)
    assert aten.view.default not in targets(program)
    graph = annotate(program)
    assert not any(op.reason.startswith("its sizes are computed") for op in graph.operations)
    for batch in (1, 3, 7):
        x = noise(batch, 2, 4, 4, seed=batch)
        torch.testing.assert_close(run(program, x), model(x))
