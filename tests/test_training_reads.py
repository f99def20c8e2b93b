"""Flags that the code of another module reads, and operations that train in eval mode alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Net(nn.Module):
    """A layer, a dropout and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d, self.bn = nn.Linear(6, 6), nn.Dropout(0.4), nn.BatchNorm1d(6)


class FlagOfAnother(Net):
    """The rate and the flag of a module that does not run."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), self.d.p, self.d.training)


class Chosen(Net):
    """A module's flag decides what its owner runs."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bn.training:
            return self.bn(self.a(x))
        return self.d(F.batch_norm(self.a(x), self.bn.running_mean, self.bn.running_var))


class DropsInEval(Net):
    """Dropout in eval mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.4, not self.training)


class NormsInEval(Net):
    """Statistics of the batch in eval mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.a(x), self.bn.running_mean, self.bn.running_var, training=not self.training)


class Both(Net):
    """Two flags decide together."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(x), 0.4, self.training and self.d.training)


class Sum(Net):
    """Two flags decide one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (2 if self.d.training else 3) + (1 if self.training else 0)


SAME, MIXED = [(True, True), (False, False)], [(True, False), (False, True)]


def compare(net: type[Net], modes: list[tuple[bool, bool]]) -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(4, 6) * 2 + 1
    hybrid = ffebm.convert(model, x)
    for whole, parts in modes:
        for network in (model, hybrid):
            network.train(whole)
            network.get_submodule("d").train(parts)
            network.get_submodule("bn").train(parts)
        with torch.no_grad(), hybrid.feedforward_mode():
            torch.manual_seed(1)
            expected = model(x)
            torch.manual_seed(1)
            torch.testing.assert_close(hybrid(x), expected)
        torch.testing.assert_close(hybrid.state_dict(), model.state_dict())


@pytest.mark.parametrize("net", [FlagOfAnother, Chosen, DropsInEval, NormsInEval])
def test_operations_follow_the_flag_that_the_code_of_their_module_reads(net: type[Net]) -> None:
    compare(net, [*SAME, *MIXED])


@pytest.mark.parametrize("net", [Both, Sum])
def test_modules_whose_flags_decide_together_must_be_in_one_mode(net: type[Net]) -> None:
    compare(net, SAME)
    for whole in (True, False):
        first = "train" if whole else "eval"
        with pytest.raises(
            ffebm.UnsupportedError,
            match=rf"the model itself is in {first} mode and module 'd' is not, but .* depends on the other: put both",
        ):
            compare(net, [(whole, not whole)])
