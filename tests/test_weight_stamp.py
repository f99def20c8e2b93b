"""`WeightStamp`: whether tensors are still what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import noise
from torch import Tensor, nn

from ffebm_compiler.runtime.weight_stamp import WeightStamp


def weights() -> list[Tensor]:
    plain, wide = nn.Parameter(noise(6, 5)), nn.Parameter(noise(8, 3, 3, 3).to(memory_format=torch.channels_last))
    return [plain, wide, noise(), noise(0, 4)]


def test_the_same_tensors_fit() -> None:
    tensors = weights()
    stamp = WeightStamp.of(tensors)
    assert stamp.fits(tensors)
    _ = tensors[0] + 1
    assert stamp.fits(tensors)
    assert not stamp.fits(tensors[:3])
    assert not stamp.fits(tensors[::-1])
    assert not stamp.fits(copy.deepcopy(tensors))  # another object may change on its own


def in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1)


def by_data(tensor: Tensor) -> None:
    tensor.data.add_(1e-3)


def new_data(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def by_optimizer(tensor: Tensor) -> None:
    tensor.grad = torch.ones_like(tensor)
    torch.optim.SGD([tensor], 0.1).step()


@pytest.mark.parametrize("change", [in_place, by_data, new_data, by_optimizer])
@pytest.mark.parametrize("index", [0, 1])
def test_a_change_is_seen(change: Callable[[Tensor], None], index: int) -> None:
    tensors = weights()
    stamp = WeightStamp.of(tensors)
    change(tensors[index])
    assert not stamp.fits(tensors)
    assert WeightStamp.of(tensors).fits(tensors)


@pytest.mark.parametrize("shape", [(64, 64), (128, 64), (64, 10), (1024, 1024), (64, 16, 3, 3)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_write_to_data_of_half_the_rows_or_columns_is_seen(
    shape: tuple[int, ...], memory: torch.memory_format
) -> None:
    tensor = noise(*shape)
    if len(shape) == 4:
        tensor = tensor.to(memory_format=memory)
    for dim, length in enumerate(shape):
        for half in (slice(None, length // 2), slice(length // 2, None)):
            stamp = WeightStamp.of([tensor])
            part = tensor.data.movedim(dim, 0)[half]
            part.mul_(4)
            assert not stamp.fits([tensor])
            part.div_(4)


def test_stamped_tensors_can_be_swapped_and_their_stamps_follow() -> None:
    first, second = nn.Parameter(noise(6, 5)), nn.Parameter(noise(6, 5, seed=1))
    stamp = WeightStamp.of([first])
    torch.utils.swap_tensors(first, second)
    assert not stamp.fits([first])
    assert stamp.fits([second])


def test_a_tensor_that_is_gone_does_not_fit_its_successor() -> None:
    """Its address and its object's place may be taken by the next one."""
    for _ in range(20):
        tensor = noise(4, 4)
        stamp = WeightStamp.of([tensor])
        del tensor
        assert not stamp.fits([noise(4, 4)])


def test_values_that_are_no_numbers_count_as_changed() -> None:
    tensor = torch.full((3,), torch.nan)
    assert not WeightStamp.of([tensor]).fits([tensor])
