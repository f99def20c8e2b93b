"""Fold batch norm: exact in eval mode, and reaches every parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import digits_cnn, noise, seeded, warmed
from running import run
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.ir import verify
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.fold_batchnorm import fold_batchnorm
from ffebm_compiler.passes.free_shapes import free_shapes
from ffebm_compiler.passes.functionalize import functionalize
from ffebm_compiler.passes.rebind import rebind

aten = torch.ops.aten


def folding(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh())


FOLDABLE = {
    "conv": (lambda: folding(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)), (5, 2, 6, 6)),
    "conv without bias": (lambda: folding(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)), (5, 2, 6, 6)),
    "grouped conv": (lambda: folding(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (5, 4, 6, 6)),
    "conv with padding by name": (lambda: folding(nn.Conv1d(2, 4, 3, padding="same"), nn.BatchNorm1d(4)), (5, 2, 6)),
    "without affine": (lambda: folding(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False, eps=0.1)), (5, 2, 6, 6)),
    "linear": (lambda: folding(nn.Linear(6, 4), nn.BatchNorm1d(4)), (5, 6)),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_fold_batchnorm_is_exact_in_eval_mode_and_reaches_every_parameter(name: str) -> None:
    build, shape = FOLDABLE[name]
    x = noise(*shape)
    model = warmed(seeded(build), 2 * x + 1)
    program = fold_batchnorm(rebind(free_shapes(functionalize(capture(model, (x,), {})))))
    verify(program)
    assert not any(node.op == "call_module" for node in program.graph.nodes)
    assert any("1 batch norms are folded" in note for note in program.notes)
    found = run(program, x)
    expected = model(x)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad():
        assert (model[0](x).tanh() - expected).norm() > 0.05 * expected.norm()  # the norm does something
    found.square().sum().backward()
    expected.square().sum().backward()
    for key, parameter in model.named_parameters():
        gradient = program.source.get_parameter(key).grad
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-6, key


class Unfoldable(nn.Module):
    """Batch norms that no layer before them can take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read_twice = nn.BatchNorm2d(2), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(2, 4, 1)
        self.linear, self.tokens = nn.Linear(6, 6), nn.BatchNorm1d(4)
        self.last = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        y = self.read_twice(y) + y
        return self.last(self.tokens(self.linear(y.mean(-1))))


def test_fold_batchnorm_notes_what_it_leaves_and_why() -> None:
    x = noise(3, 2, 6, 6)
    model = warmed(seeded(Unfoldable), x)
    program = fold_batchnorm(rebind(capture(model, (x,), {})))
    assert program.notes == [
        "batch norm 'first' stays digital: the operation before it is no convolution or linear",
        "batch norm 'read_twice' stays digital: the layer before it is also read elsewhere",
        "batch norm 'tokens' stays digital: it normalises another dimension than the linear's features",
    ]
    torch.testing.assert_close(run(program, x), model(x))


def test_folded_statistics_are_frozen_in_train_mode_and_load_state_dict_is_seen() -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x, fold_batchnorm=True)
    hybrid.train()
    before = {name: buffer.clone() for name, buffer in hybrid.named_buffers()}
    expected = copy.deepcopy(hybrid).eval()(x)
    torch.testing.assert_close(hybrid(x), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in hybrid.named_buffers())
    assert any("running statistics are frozen" in note for note in hybrid.plan.notes)
