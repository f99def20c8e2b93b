"""What a forward writes into the tensors that it was given, and changes of lists and dictionaries among them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)


class Cached(Net):
    """A value is kept in a tensor of a dictionary."""

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        h = torch.relu(self.a(x))
        cache["k"].copy_(h.detach())
        return self.b(h) + cache["k"]


class Shifted(Net):
    """The input itself is written, before and after it is read."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.a(x)
        x += 1
        after = self.b(x)
        x[:, 0] = before[:, 0].detach()
        return torch.tanh(after) + before * x.sum()


class Slots(Net):
    """A row of a cache is written through a view, and the rest stays."""

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        cache[1].lerp_(self.a(x).detach(), 0.5)
        return self.b(x) + cache.sum(0)


class InTraining(Net):
    """Written in train mode alone."""

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.training:
            seen.mul_(0.5).add_(h.detach())
        return self.b(h)


class Counted(Net):
    """An integer input counts calls."""

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return self.a(x) * count


CASES: list[tuple[type[Net], tuple[Any, ...]]] = [
    (Cached, ({"k": torch.zeros(4, 6)},)),
    (Shifted, ()),
    (Slots, (torch.randn(3, 4, 6),)),
    (InTraining, (torch.randn(4, 6),)),
    (Counted, (torch.tensor(3),)),
]


@pytest.mark.parametrize(("net", "others"), CASES)
def test_what_the_forward_writes_into_its_inputs_reaches_the_caller(net: type[Net], others: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    model = net()
    given = (torch.randn(4, 6), *others)
    kept = copy.deepcopy(given)
    hybrid = ffebm.convert(model, given, dynamic_shapes=None)
    for one, other in zip(pytree.tree_leaves(given), pytree.tree_leaves(kept), strict=True):
        assert torch.equal(one, other)
    for training in (True, False):
        ours, theirs = copy.deepcopy(given), copy.deepcopy(given)
        with torch.no_grad(), hybrid.feedforward_mode():
            for _ in range(2):
                found, wanted = hybrid.train(training)(*ours), model.train(training)(*theirs)
                torch.testing.assert_close(found, wanted)
                torch.testing.assert_close(ours, theirs)


class Appended(Net):
    """A list of the caller grows."""

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(self.a(x))
        return cache[-1]


class Stored(Net):
    """A nested dictionary of the caller gets another value."""

    def forward(self, x: Tensor, *, cache: dict[str, Any]) -> Tensor:
        cache["layers"]["h"] = self.a(x)
        return cache["layers"]["h"]


class Popped(Net):
    """A dictionary of the caller loses an entry."""

    def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
        return self.a(x) + cache.pop("h")


class OwnKeywords(Net):
    """Its own dictionary of keywords changes, which no caller sees."""

    def forward(self, **features: Tensor) -> Tensor:
        features["x"] = self.a(features["x"])
        return self.b(features.pop("x"))


@pytest.mark.parametrize(
    ("net", "args", "kwargs", "named"),
    [
        (Appended, (torch.randn(4, 6), [torch.zeros(2)]), {}, "a list among its inputs (argument 'cache')"),
        (
            Stored,
            (torch.randn(4, 6),),
            {"cache": {"layers": {"h": torch.zeros(2)}}},
            "a dict among its inputs (argument 'cache', at ['layers'])",
        ),
        (Popped, (torch.randn(4, 6), {"h": torch.zeros(6)}), {}, "a dict among its inputs (argument 'cache')"),
    ],
)
def test_a_forward_that_changes_a_list_or_a_dictionary_of_the_caller_is_refused(
    net: type[Net], args: tuple[Any, ...], kwargs: dict[str, Any], named: str
) -> None:
    with pytest.raises(ffebm.UnsupportedError) as caught:
        ffebm.convert(net(), args, kwargs)
    assert f"the forward changes {named}, which a hybrid does not" in str(caught.value)


def test_its_own_keywords_may_change() -> None:
    x, model = torch.randn(4, 6), OwnKeywords()
    hybrid = ffebm.convert(model, (), {"x": x})
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x=x), model(x=x))
