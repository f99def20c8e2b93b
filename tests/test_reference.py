"""The public energy-based-learning code's settled network, as an ordinary module converted by one call."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from networks import DCHN, dchn, dchn_reference
from torch import Tensor

import ffebm_compiler as ffebm

NAMES = {
    **{f"convs.{i}.weight": f"grad.conv{i}.weight" for i in range(4)},
    **{f"convs.{i}.bias": f"grad.bias{i}" for i in range(4)},
    "dense.weight": "grad.dense.weight",
    "dense.bias": "grad.bias4",
}


@pytest.fixture(scope="module")
def source() -> DCHN:
    return dchn()


@pytest.fixture(scope="module")
def converted(source: DCHN) -> ffebm.HybridModel:
    return ffebm.convert(
        source,
        dchn_reference()["x"],
        hardware=ffebm.Hardware(layers_per_block=5),
        feedback="symmetric",
        block_ops=("add", "reshape", "avg_pool"),
    )


@pytest.fixture
def hybrid(converted: ffebm.HybridModel) -> ffebm.HybridModel:
    return copy.deepcopy(converted)


def reference_loss(output: Tensor) -> Tensor:
    """Mean over the batch of ½‖s5 − onehot(y)‖²."""
    target = F.one_hot(dchn_reference()["y"], 10).to(output.dtype)
    return 0.5 * (output - target).square().sum(1).mean()


def test_whole_network_is_one_symmetric_block_of_five_states(hybrid: ffebm.HybridModel) -> None:
    (block,) = hybrid.blocks
    assert block.layers == ("convs.0", "convs.1", "convs.2", "convs.3", "dense")
    hybrid(dchn_reference()["x"])
    assert block.module.scales == (1.0,) * 5
    assert [tuple(state.shape) for state in block.states[:4]] == [
        tuple(dchn_reference()[f"state{i}"].shape) for i in range(1, 5)
    ]


def test_states_are_those_of_the_reference(hybrid: ffebm.HybridModel) -> None:
    reference = dchn_reference()
    output = hybrid(reference["x"])
    (block,) = hybrid.blocks
    for index, state in enumerate(block.states, start=1):
        expected = reference[f"state{index}"]
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)
        assert (state - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(output, block.states[4])


def test_feedback_moves_every_state_by_far_more_than_the_tolerance(hybrid: ffebm.HybridModel) -> None:
    reference = dchn_reference()
    with hybrid.feedforward_mode():
        hybrid(reference["x"])
    for index, state in enumerate(hybrid.blocks[0].states, start=1):
        assert (state - reference[f"state{index}"]).abs().max() > 1e-4


def test_loss_is_that_of_the_reference(hybrid: ffebm.HybridModel) -> None:
    loss = reference_loss(hybrid(dchn_reference()["x"])).detach()
    assert float(loss) == pytest.approx(float(dchn_reference()["loss"]), rel=1e-5)


@pytest.mark.parametrize("estimator", ["ep", "implicit", "unrolled"])
def test_gradients_are_those_of_the_reference(hybrid: ffebm.HybridModel, estimator: str) -> None:
    reference = dchn_reference()
    hybrid.set_gradient(estimator)
    x = reference["x"].clone().requires_grad_()
    reference_loss(hybrid(x)).backward()
    found = {name: parameter.grad for name, parameter in hybrid.named_parameters()}
    assert set(found) == set(NAMES)
    found["dense.weight"] = found["dense.weight"].t().reshape(64, 2, 2, 10)
    for name, gradient in [*((NAMES[n], g) for n, g in found.items()), ("grad.x", x.grad)]:
        expected = reference[name].double().flatten()
        cosine = F.cosine_similarity(gradient.double().flatten(), expected, dim=0)
        assert cosine >= 0.9999, f"{estimator}: cosine {float(cosine):.6f} with {name}"
        assert float(gradient.double().norm() / expected.norm()) == pytest.approx(1, abs=1e-2), name
