"""Functions that a model keeps as attributes reach the hybrid's own tensors, and the user's model stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_as_source import ONE_LAYER, deviation
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import CaptureError
from ffebm_compiler.passes.private_copy import private_copy


class Tied(nn.Module):
    """A head that closes over the embedding; `make` says as what kind of function."""

    def __init__(self, make: Callable[[Tied], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.inner = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.head = make(self)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.table.weight.t()

    def forward(self, tokens: Tensor) -> Tensor:
        head = self.head
        while isinstance(head, list | dict | tuple):
            head = head["head"] if isinstance(head, dict) else head[0]
        return head(self.inner(self.table(tokens)))


def _chain(model: Tied) -> Callable[[Tensor], Tensor]:
    def inner(x: Tensor) -> Tensor:
        return x @ model.table.weight.t()

    return lambda x: inner(x)


def _of_a_list(model: Tied) -> Callable[[Tensor], Tensor]:
    tables = [model.table]
    return lambda x: x @ tables[0].weight.t()


def _of_itself(model: Tied) -> Callable[..., Tensor]:
    def head(x: Tensor, times: int = 1) -> Tensor:
        return head(x, times - 1) if times else x @ model.table.weight.t()

    return head


KINDS: dict[str, Callable[[Tied], Any]] = {
    "closure over the model": lambda model: lambda x: x @ model.table.weight.t(),
    "closure over a parameter": lambda model: (lambda w: lambda x: F.linear(x, w))(model.table.weight),
    "function of a function": _chain,
    "closure over a list": _of_a_list,
    "a function that calls itself": _of_itself,
    "default argument": lambda model: lambda x, table=model.table: x @ table.weight.t(),
    "keyword-only default": lambda model: lambda x, *, table=model.table: x @ table.weight.t(),
    "partial": lambda model: functools.partial(lambda x, w: x @ w.t(), w=model.table.weight),
    "partial of a closure": lambda model: functools.partial(lambda x, scale: scale * model.logits(x), scale=2.0),
    "bound method": lambda model: model.logits,
    "in containers": lambda model: [{"head": (lambda x: x @ model.table.weight.t(),)}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_hybrid_trains_what_its_functions_reach(kind: str) -> None:
    model, source = Tied(KINDS[kind]), Tied(KINDS[kind])  # not copied: a deep copy has the fault
    tokens = torch.arange(8).reshape(2, 4)
    hybrid = ffebm.convert(model, tokens, hardware=ONE_LAYER)
    for step in range(2):
        for network in (hybrid, source):
            network.zero_grad()
            network(tokens).square().sum().backward()
        assert deviation(hybrid(tokens), source(tokens)) < 1e-6, step
        for name, parameter in source.named_parameters():
            assert deviation(dict(hybrid.named_parameters())[name].grad, parameter.grad) < 1e-5, (step, name)
        for network in (hybrid, source):  # the second step sees the weights that the first one left
            torch.optim.SGD(network.parameters(), lr=0.02).step()
    assert all(parameter.grad is None for parameter in model.parameters())
    untouched = Tied(KINDS[kind])
    assert torch.equal(model(tokens), untouched(tokens))


def test_two_functions_that_share_a_cell_share_its_copy_and_others_are_kept() -> None:
    net = nn.Linear(2, 2)
    apart = nn.Linear(2, 2)
    net.first, net.second = (lambda: net), (lambda: net)
    net.other = lambda: apart
    net.free = torch.relu
    net.plain = plain = lambda: "nothing of the model"
    copied = private_copy(net)
    assert copied.first() is copied.second() is copied
    assert copied.first.__closure__[0] is copied.second.__closure__[0]
    assert copied.other() is not apart
    assert torch.equal(copied.other().weight, apart.weight)
    assert copied.plain is plain
    assert copied.free is torch.relu
    assert net.first() is net


SHARED: list[nn.Module] = []


class Outside(nn.Module):
    """Reaches its own parameter through a global name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ SHARED[0].layer.weight


def test_a_parameter_that_the_code_reaches_by_a_global_name_is_refused() -> None:
    SHARED[:] = [Outside()]
    try:
        with pytest.raises(CaptureError, match=r"reads 'layer\.weight' of the original model.*through self"):
            ffebm.convert(SHARED[0], torch.randn(2, 4))
    finally:
        SHARED.clear()
