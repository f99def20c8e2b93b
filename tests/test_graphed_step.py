"""What `GraphedStep` refuses. What it does needs a CUDA device: `tests/test_gpu.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import digits_cnn, mlp

import ffebm_compiler as ffebm


def hybrid_of(**settings: Any) -> ffebm.HybridModel:
    model, x = mlp()
    return ffebm.convert(model, x, **settings).train()


def test_it_needs_a_cuda_device() -> None:
    with pytest.raises(ffebm.InputError, match=r"needs a CUDA device, and the hybrid is on cpu: call \.cuda\(\) on it"):
        ffebm.GraphedStep(hybrid_of(), F.cross_entropy)


def test_it_needs_train_mode() -> None:
    with pytest.raises(ffebm.InputError, match=r"the hybrid is in evaluation mode: call train\(\) on it"):
        ffebm.GraphedStep(hybrid_of().eval(), F.cross_entropy)


def test_it_takes_a_hybrid() -> None:
    with pytest.raises(ffebm.InputError, match="takes a hybrid, got a Linear: pass what `convert` returned"):
        ffebm.GraphedStep(torch.nn.Linear(2, 2), F.cross_entropy)


def test_devices_are_refused() -> None:
    with pytest.raises(
        ffebm.UnsupportedError, match=r"what devices hold is computed by the host .*set_devices\(None\)"
    ):
        ffebm.GraphedStep(hybrid_of(devices="pcm"), F.cross_entropy)


def test_perturbed_digital_parts_are_refused() -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x).train()
    hybrid.set_gradient("ep", feedforward=ffebm.ZerothOrder())
    with pytest.raises(ffebm.UnsupportedError, match=r"call hybrid.set_gradient\(.*feedforward='backprop'\)"):
        ffebm.GraphedStep(hybrid, F.cross_entropy)


@pytest.mark.parametrize("slack", [0, 1.0, -0.1, True, "much"])
def test_slack_is_a_share(slack: Any) -> None:
    with pytest.raises(ffebm.InputError, match=r"slack is .*; expected a relative distance between 0 and 1"):
        ffebm.GraphedStep(hybrid_of(), F.cross_entropy, slack=slack)


def test_circuits_that_dropout_masks_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    hybrid = ffebm.convert(model.train(), torch.randn(5, 4), energy="resistive")
    step = object.__new__(ffebm.GraphedStep)  # without a CUDA device, which the constructor asks for first
    step.hybrid = hybrid
    with pytest.raises(
        ffebm.UnsupportedError, match=r"dropout cuts conductances of its circuit.*set the dropout's p to 0"
    ):
        step._check_blocks()
    hybrid.get_submodule("1").p = 0.0
    step._check_blocks()
