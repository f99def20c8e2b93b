"""Checks that only raise are passed, and told; what else the data decides is refused."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from data_checking import BRANCHES, CHECKS, guarded
from networks import noise, seeded
from same_as_source import assert_same
from torch import Tensor, nn

import ffebm_compiler as ffebm

Forward = Callable[[nn.Module, Tensor], Tensor]


class Inner(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize("forward", CHECKS, ids=lambda f: f.__name__)
def test_a_check_that_only_raises_is_passed_and_told(forward: Forward) -> None:
    model = seeded(lambda: Inner(forward))
    hybrid = assert_same(model, noise(4, 6))
    assert len(hybrid.plan.notes) == CHECKS[forward]
    file = forward.__code__.co_filename
    assert all(f"raises an error for some values of its data ({file}, line " in note for note in hybrid.plan.notes)
    x = noise(7, 6, seed=1)
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)


def test_values_are_taken_for_finite_and_told() -> None:
    model = seeded(lambda: Inner(guarded))
    hybrid = assert_same(model, noise(4, 6))
    place = rf"branches on whether values are finite \({re.escape(guarded.__code__.co_filename)}, line \d+\)"
    assert [bool(re.search(place, note)) for note in hybrid.plan.notes] == [True, True]


@pytest.mark.parametrize("forward", BRANCHES, ids=lambda f: f.__name__)
def test_what_decides_something_else_is_refused(forward: Forward) -> None:
    with pytest.raises(ffebm.CaptureError, match="depends on the values of a tensor"):
        ffebm.convert(seeded(lambda: Inner(forward)), noise(4, 6))
