"""Explicit padding: `padding="same"` with even kernels becomes zeros and a plain convolution."""

from __future__ import annotations

import pytest
import torch
from networks import noise, seeded
from running import run, targets
from torch import nn

from ffebm_compiler.ir import verify
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.explicit_padding import explicit_padding

aten = torch.ops.aten
CONVOLUTIONS = {
    "even kernel": (nn.Conv1d, (2, 3, 9), {"kernel_size": 4}),
    "even in one dimension": (nn.Conv2d, (2, 3, 7, 8), {"kernel_size": (3, 2), "bias": False}),
    "odd span of a dilated kernel": (nn.Conv2d, (2, 3, 8, 7), {"kernel_size": (2, 4), "dilation": (1, 3)}),
    "three dimensions and groups": (nn.Conv3d, (2, 4, 5, 6, 5), {"kernel_size": (2, 3, 2), "groups": 2}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_asymmetric_padding_is_written_out(name: str) -> None:
    kind, shape, settings = CONVOLUTIONS[name]
    model = seeded(lambda: kind(shape[1], 4, padding="same", **settings))
    program = explicit_padding(capture(model, (noise(*shape),), {}))
    verify(program, explicit_padding.promises)
    assert aten.constant_pad_nd.default in targets(program)
    for batch in (1, 3):
        x = noise(batch, *shape[1:], seed=batch)
        torch.testing.assert_close(run(program, x), model(x))


@pytest.mark.parametrize("settings", [{"padding": "same"}, {"padding": "valid"}, {"padding": 1}])
def test_symmetric_padding_stays_as_it_is(settings: dict[str, str | int]) -> None:
    model, x = seeded(lambda: nn.Conv2d(3, 4, 3, **settings)), noise(2, 3, 6, 6)
    program = capture(model, (x,), {})
    before = targets(program)
    assert targets(explicit_padding(program)) == before
