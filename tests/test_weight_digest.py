"""`digests_of`: whether tensors have the values that a digest was made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import noise
from torch import Tensor

from ffebm_compiler.runtime.weight_digest import digests_of, have_digests

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (64, 64), (3, 2, 5), (40, 200)])
def test_copies_fit_and_a_changed_value_does_not(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (noise(*shape) * 9).to(dtype)
    digests = digests_of([tensor])
    assert have_digests([tensor.clone()], digests)
    for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
        other = tensor.clone()
        other.view(-1)[place] = ~other.view(-1)[place] if dtype is torch.bool else other.view(-1)[place] * 3 + 1
        assert not have_digests([other], digests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changed_signs_are_seen(dtype: torch.dtype) -> None:
    tensor = noise(8, 8).to(dtype)
    for rows in range(1, 9):
        other = tensor.clone()
        other[:rows] *= -1
        assert not have_digests([other], digests_of([tensor]))


@pytest.mark.parametrize("order", ["contiguous", "transposed", "shifted", "channels last"])
def test_the_layout_in_memory_is_no_value(order: str) -> None:
    tensor = noise(4, 6, 3, 5)
    stored: Tensor = {
        "contiguous": lambda: tensor,
        "transposed": lambda: tensor.mT.contiguous().mT,
        "shifted": lambda: torch.cat([torch.zeros(1), tensor.flatten()])[1:].view_as(tensor),
        "channels last": lambda: tensor.contiguous(memory_format=torch.channels_last),
    }[order]()
    assert digests_of([stored]) == digests_of([tensor])


@given(st.integers(2, 70), st.integers(2, 70), st.data())
def test_rows_and_columns_that_change_places_are_seen(rows: int, columns: int, data: st.DataObject) -> None:
    tensor = noise(rows, columns)
    dim = data.draw(st.integers(0, 1))
    first, second = data.draw(st.permutations(range((rows, columns)[dim])))[:2]
    order = list(range((rows, columns)[dim]))
    order[first], order[second] = second, first
    assert not have_digests([tensor.index_select(dim, torch.tensor(order))], digests_of([tensor]))


def test_a_wider_dtype_holds_the_same_values_and_a_narrower_one_does_not() -> None:
    tensor = noise(6, 5)
    assert have_digests([tensor.double()], digests_of([tensor]))
    assert not have_digests([tensor.bfloat16()], digests_of([tensor]))


def test_values_that_are_not_here_may_be_any() -> None:
    for tensor in (torch.zeros(0, 3), torch.empty(3, device="meta")):
        assert digests_of([tensor]) == [""]
        assert have_digests([noise(3)], [""])
        assert have_digests([tensor], digests_of([noise(3)]))
    assert not have_digests([noise(3)], [])
    assert not have_digests([noise(3)], ["load:0"])
