"""Code that does something else where it is compiled: where that cannot be traced, what it does when it is called."""

from __future__ import annotations

import pytest
import torch
from networks import noise, seeded
from same_as_source import assert_same
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.passes.hidden_compiler import hidden_compiler


class Masked(nn.Module):
    """Makes its mask where nothing compiles it, and reads it always."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.branches = branches

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones_like(x) / 2
        if torch.compiler.is_exporting():
            mask = None
        h = torch.tanh(self.a(x)) * mask[:, :]
        return self.b(h) if not self.branches or bool(h.sum() > 0) else h


@pytest.mark.parametrize("train", [False, True])
def test_what_the_source_does_when_it_is_called(train: bool) -> None:
    assert_same(seeded(lambda: Masked(False)), noise(4, 6), train=train)


def test_the_cause_is_that_of_the_source() -> None:
    with pytest.raises(ffebm.CaptureError, match=r"if not self\.branches or bool.*depends on the values of a tensor"):
        ffebm.convert(seeded(lambda: Masked(True)), noise(4, 6))


def test_torchs_functions_are_as_before() -> None:
    before = torch.compiler.is_compiling, torch.compiler.is_exporting
    with pytest.raises(ZeroDivisionError), hidden_compiler() as asked:
        divmod(1, int(torch.compiler.is_exporting()))
    assert asked == {__name__}
    assert (torch.compiler.is_compiling, torch.compiler.is_exporting) == before
