"""Dead code: what nothing reads changes nothing, and effects stay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Branching(nn.Module):
    """Two layers, and beside them a branch that is thrown away."""

    def __init__(self, branch: Callable[[Branching, Tensor], object] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.branch = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 16), branch
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        if self.branch is not None:
            self.branch(self, hidden)
        return self.b(hidden)


BRANCHES: dict[str, Callable[[Branching, Tensor], object]] = {
    "a layer and an activation": lambda s, h: torch.tanh(s.c(h)),
    "a layer": lambda s, h: s.c(h),
    "digital operations": lambda s, h: torch.softmax(torch.sin(s.c(h)), -1).sum(),
    "an output of several": lambda s, h: s.c(h).chunk(2, -1)[0] * h.topk(2)[0][:, :1],
    "a write to a result": lambda s, h: torch.relu_(s.c(h)),
    "a write to a slice": lambda s, h: s.c(h)[:, :2].mul_(2.0),
    "the layers of the network": lambda s, h: s.b(torch.tanh(s.c(h))),
    "batch norm in eval mode": lambda s, h: torch.tanh(s.norm(s.c(h))),
    "dropout": lambda s, h: torch.tanh(s.c(s.drop(h))),
    "random numbers": lambda s, h: torch.tanh(s.c(h + torch.rand_like(h))),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_dead_branch_changes_nothing(branch: str) -> None:
    x = torch.randn(4, 8)
    with_it, without = (ffebm.convert(Branching(b), x, feedback=0.5) for b in (BRANCHES[branch], None))
    assert torch.equal(with_it(x), without(x))
    assert [block.layers for block in with_it.plan.blocks] == [block.layers for block in without.plan.blocks]
    assert with_it.plan.weights["c.weight"].block is None
    assert "c" not in [path for block in with_it.plan.blocks for path in block.layers]


def test_statistics_of_a_dead_batch_norm_are_kept() -> None:
    model, x = Branching(BRANCHES["batch norm in eval mode"]), torch.randn(32, 8)
    source = copy.deepcopy(model).train()
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1)).train()
    assert hybrid.plan.rejected["c"].startswith("the output does not depend on it, only what the forward writes")
    source(x)
    hybrid(x)
    assert torch.allclose(dict(hybrid.named_buffers())["norm.running_mean"], source.norm.running_mean, atol=1e-6)
    assert int(dict(hybrid.named_buffers())["norm.num_batches_tracked"]) == 1


def test_random_numbers_after_a_dead_draw_are_the_sources() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            self.drop(torch.tanh(self.a(x)))
            return self.a(F.dropout(x, 0.5, self.training) + torch.rand_like(x))

    model, x = Noisy(), torch.randn(4, 8)
    source = copy.deepcopy(model).train()
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1)).train()
    torch.manual_seed(7)
    got = hybrid(x)
    torch.manual_seed(7)
    assert torch.allclose(got, source(x), atol=1e-6)


def test_a_model_of_dead_layers_is_refused() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            return x.sin()

    with pytest.raises(ffebm.UnsupportedError, match="has no weight-stationary layer"):
        ffebm.convert(Dead(), torch.randn(2, 8))
