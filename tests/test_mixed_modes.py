"""A model whose parts are in different modes: a frozen backbone, Monte Carlo dropout, one layer in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from same_as_source import ONE_LAYER, deviation
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch


class Other(nn.Module):
    """Another function in each mode, without a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + torch.randn_like(x)) if self.training else torch.relu(x)


class Noise(nn.Module):
    """Something in train mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class Squashed(nn.Module):
    """Something in eval mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else 1.5 * torch.tanh(x)


class DropPath(nn.Module):
    """Stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty((len(x), 1)).bernoulli_(0.7) / 0.7 if self.training else x


class Block(nn.Module):
    """A residual block with batch norm, dropout and stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 8)
        self.path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.b(self.drop(F.relu(self.norm(self.a(x))))))


class Functional(nn.Module):
    """The same flag for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.a(x)), 0.3, self.training)
        return x + (h * torch.bernoulli(torch.full((len(h), 1), 0.7)) if self.training else h)


class Net(nn.Module):
    def __init__(self, part: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.backbone = nn.Sequential(part(), part())
        self.head = nn.Sequential(part(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(self.first(x)))


PARTS: dict[str, Callable[[], nn.Module]] = {
    "other": Other,
    "noise": Noise,
    "squashed": Squashed,
    "leaky": nn.RReLU,
    "block": Block,
    "functional": Functional,
    "spectral": lambda: spectral_norm(nn.Linear(8, 8)),
}
FROZEN = ("backbone", "head", "backbone.0", "backbone.1")


@pytest.mark.parametrize("part", PARTS)
def test_a_frozen_part_is_in_eval_mode_alone(part: str) -> None:
    torch.manual_seed(0)
    source, x = Net(PARTS[part]), torch.randn(6, 8)
    hybrid = ffebm.convert(copy.deepcopy(source), x, hardware=ONE_LAYER)
    for path in FROZEN:
        outputs = []
        for network in (hybrid, source):
            network.train()
            network.get_submodule(path).eval()
            network.zero_grad()
            torch.manual_seed(1)
            outputs.append(network(x))
            outputs[-1].square().sum().backward()
        assert deviation(*outputs) < 1e-5, path
        ours, theirs = dict(hybrid.named_parameters()), dict(source.named_parameters())
        for name, parameter in theirs.items():
            assert deviation(ours[name].grad, parameter.grad) < 1e-4, (path, name)
        buffers = dict(hybrid.named_buffers())
        for name, buffer in source.named_buffers():
            assert deviation(buffers[name], buffer) < 1e-5, (path, name)


def test_dropout_alone_in_train_mode() -> None:
    torch.manual_seed(0)
    source, x = Net(Block), torch.randn(6, 8)
    hybrid = ffebm.convert(source, x, hardware=ONE_LAYER)
    outputs = []
    for network in (hybrid, source):
        network.eval()
        for module in network.modules():
            if isinstance(module, nn.Dropout | DropPath):
                module.train()
        torch.manual_seed(1)
        outputs.append(network(x))
    assert deviation(*outputs) < 1e-5


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x + torch.randn_like(x), x.sin()) if self.training else (torch.tanh(x), x.cos())


class Crossed(nn.Module):
    """Each mode reads another of its part's values: they are not one value."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.pair(x)
        return first * torch.rand_like(x) if self.training else torch.sigmoid(second)


def test_modules_that_hand_on_more_than_one_value_must_be_in_one_mode() -> None:
    model, x = Net(Crossed), torch.randn(6, 8)
    hybrid = ffebm.convert(model, x, hardware=ONE_LAYER)
    switches = [module for module in hybrid.lowered.modules() if isinstance(module, ModeSwitch) and module.joined]
    assert switches
    assert not any(switch.checked for switch in switches)
    hybrid.train().get_submodule("backbone.0.pair").eval()
    with pytest.raises(
        ffebm.UnsupportedError, match=r"'backbone\.0' is in train mode and module 'backbone\.0\.pair' is"
    ):
        hybrid(x)


class Drops(nn.Module):
    """Skips its layer at random, by a number of Python's: no graph holds its train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and float(torch.rand(())) < 0.5 else self.layer(x)


def test_what_has_no_train_mode_may_be_frozen_while_the_rest_trains() -> None:
    torch.manual_seed(0)
    source, x = nn.Sequential(Drops(), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)), torch.randn(6, 8)
    hybrid = ffebm.convert(source, x, hardware=ONE_LAYER)
    outputs = []
    for network in (hybrid, source):
        network.train().get_submodule("0").eval()
        torch.manual_seed(1)
        outputs.append(network(x))
    assert deviation(*outputs) < 1e-5
    for modes in (lambda: hybrid.train(), lambda: hybrid.eval().get_submodule("0").train()):
        modes()
        with pytest.raises(
            ffebm.UnsupportedError, match=r"cannot run in train mode.*modules that read their mode \('0'\)"
        ):
            hybrid(x)
