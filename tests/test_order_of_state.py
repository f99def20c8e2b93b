"""What reads or writes a norm's running statistics keeps the source's order."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from same_as_source import assert_same
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Net(nn.Module):
    """A layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)


class Deeper(Net):
    """The first call of the norm needs a layer, the second one does not."""

    def forward(self, x: Tensor) -> Tensor:
        deep = self.bn(torch.relu(self.a(x)))
        return deep - self.bn(x)


class Instances(Deeper):
    """The same with an instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.InstanceNorm1d(4, track_running_stats=True)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([x, 2 * x]))


class Counted(Deeper):
    """A cumulative average, by the counter of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.bn.momentum = None


class Functional(Net):
    """The statistics are updated by calls of the function."""

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x).tanh()) - self.norm(x)


class Always(Net):
    """The statistics are updated in both modes."""

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.b(self.norm(self.a(x)).tanh())) + self.bn.running_var.clone()
        return y - self.norm(x) * self.bn.running_mean.clone()


class Branches(Net):
    """The modes call the norm another number of times, and one of them reads its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.a(x).tanh())
        if self.training:
            y = y * self.bn.running_var.clone() - self.bn(self.b(x))
        return self.b(y) + self.bn(y) * self.bn.running_mean.clone()


class Between(Net):
    """The statistics are read between two calls, by a copy, as they are and by a view."""

    def norm(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y * self.bn.running_var.clone() + self.bn.running_mean + self.bn.running_mean.view(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        g = self.norm(x)
        return self.norm(torch.relu(self.a(g))) + g


class Before(Net):
    """The statistics are read before the call, and used after it."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.bn.running_var + 1).sqrt()
        return self.b(self.bn(self.a(x))) * scale + self.bn.running_mean


class Zeroed(Net):
    """A statistic is written before the call in train mode, and read after it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.bn.running_mean.zero_()
        return self.bn(self.a(x)) + self.bn.running_mean


class Reset(Net):
    """The statistics are reset in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        self.bn.reset_running_stats()
        return self.bn(self.a(x))


class Counting(Net):
    """The counter of batches is read between two calls."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(torch.relu(self.a(x))) * self.bn.num_batches_tracked.clone()
        return y + self.bn(x) * self.bn.num_batches_tracked.clone()


class Clamped(Net):
    """A statistic is written after the call in train mode."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.a(x))
        if self.training:
            self.bn.running_var.clamp_(max=0.95)
        return y


class Around(Net):
    """Statistics are written before, between and after two calls."""

    def forward(self, x: Tensor) -> Tensor:
        self.bn.running_var.mul_(0.5)
        y = self.bn(self.a(x))
        self.bn.running_mean.mul_(0.9)
        z = self.bn(y + self.bn.running_var)
        self.bn.running_mean.fill_(0.25)
        return self.b(z) * self.bn.running_mean


class Averaged(Net):
    """A statistic is written by a value of the input, after the call."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.a(x))
        self.bn.running_mean.lerp_(x.mean(0).detach(), 0.5)
        return F.dropout(y, 0.3, self.training) + self.bn(x)


NETS = (
    Deeper,
    Instances,
    Counted,
    Functional,
    Always,
    Branches,
    Between,
    Before,
    Zeroed,
    Reset,
    Counting,
    Clamped,
    Around,
    Averaged,
)


@pytest.mark.parametrize("net", NETS)
def test_statistics_are_read_and_written_in_the_sources_order(net: type[Net]) -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(4, 6) * 2 + 1
    if isinstance(model.bn, nn.BatchNorm1d):
        model.bn.running_mean.uniform_(-1, 1)
        model.bn.running_var.uniform_(0.5, 2)
    if net in (Clamped, Around, Averaged):
        model.requires_grad_(False)  # torch differentiates no norm whose statistics are written afterwards
    assert_same(model, x, calls=2)


def test_a_norm_that_one_mode_alone_calls_and_writes_besides_is_refused() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.a(x).tanh())
            if self.training:
                y = y - self.bn(self.b(x))
                self.bn.running_mean.mul_(0.5)
            return self.b(y)

    message = r"one mode alone calls the norm 'bn' and writes its statistic 'bn\.running_mean' besides"
    with pytest.raises(ffebm.UnsupportedError, match=message):
        ffebm.convert(Both(), torch.randn(4, 6))


@pytest.mark.parametrize("net", [Deeper, Between])
def test_blocks_of_one_and_of_many_layers_keep_the_order(net: type[Net]) -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(4, 6) * 2 + 1
    for layers in (1, 4):
        hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=layers), feedback=1e-7)
        assert_same(copy.deepcopy(model), x, hybrid=hybrid, calls=2)


def test_a_norm_that_is_called_once_leaves_the_graph_as_it_is() -> None:
    plan = ffebm.plan(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(4, 6))
    assert plan.graph.draws == ()
    assert [op.target for op in plan.graph.operations] == ["linear", "batch_norm", "relu", "linear"]


def test_a_folded_norm_that_is_called_twice_stays_folded() -> None:
    class Twice(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.bn(self.a(x))) - torch.relu(self.bn(self.a(y)))

    plan = ffebm.plan(Twice(), (torch.randn(4, 6), torch.randn(4, 6)), fold_batchnorm=True)
    assert not any(op.target == "batch_norm" for op in plan.graph.operations)
    assert plan.graph.draws == ()
