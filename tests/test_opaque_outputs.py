"""Outputs in objects that nothing looks into are refused, and those of a `SimpleNamespace` are built again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Net(nn.Module):
    """A value, alone or beside what is made of another one."""

    def __init__(self, make: Callable[[Tensor], Any], alone: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.make, self.alone = nn.Linear(6, 6), nn.Linear(6, 3), make, alone

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.a(x))
        return self.make(h) if self.alone else (self.b(h), {"more": self.make(h)})


def generator(h: Tensor) -> Iterator[Tensor]:
    yield h


class Holder:
    """An object that holds a set."""

    def __init__(self, h: Tensor) -> None:
        self.found = {h}


OPAQUE: dict[str, Callable[[Tensor], Any]] = {
    "set": lambda h: {h},
    "list_iterator": lambda h: iter([h]),
    "generator": generator,
    "function": lambda h: lambda: h,
    "partial": lambda h: functools.partial(torch.add, h),
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", OPAQUE)
def test_a_tensor_in_what_cannot_be_built_again_is_refused(kind: str, alone: bool) -> None:
    message = f"the forward returns a tensor in a {kind}, which a hybrid cannot build again: return it by itself"
    with pytest.raises(ffebm.UnsupportedError, match=message):
        ffebm.convert(Net(OPAQUE[kind], alone), torch.randn(4, 6))


def test_a_set_in_an_object_is_refused() -> None:
    with pytest.raises(ffebm.UnsupportedError, match=r"the forward returns a tensor in a (Holder|set)"):
        ffebm.convert(Net(Holder), torch.randn(4, 6))


@pytest.mark.parametrize("alone", [False, True])
def test_a_namespace_is_built_again(alone: bool) -> None:
    model, x = Net(lambda h: SimpleNamespace(h=h, name="h"), alone), torch.randn(4, 6)
    hybrid = ffebm.convert(model, x)
    with hybrid.feedforward_mode():
        found, wanted = hybrid(x), model(x)
    found, wanted = (found, wanted) if alone else (found[1]["more"], wanted[1]["more"])
    assert type(found) is SimpleNamespace
    assert found.name == "h"
    torch.testing.assert_close(found.h, wanted.h)


def test_a_hybrid_that_takes_a_namespace_is_saved_and_loaded(tmp_path: Path) -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, given: SimpleNamespace) -> Tensor:
            return self.a(given.x)

    model, given = Takes(), SimpleNamespace(x=torch.randn(4, 6))
    hybrid = ffebm.convert(model, (given,))
    hybrid.save(tmp_path / "saved")
    assert torch.equal(ffebm.load(tmp_path / "saved", model)(given), hybrid(given))


def test_functions_and_sets_without_computed_tensors_are_returned() -> None:
    hybrid = ffebm.convert(Net(lambda h: (len, {1, 2}, {"a"})), torch.randn(4, 6))
    assert hybrid(torch.randn(4, 6))[1]["more"] == (len, {1, 2}, {"a"})
