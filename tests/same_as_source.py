"""A hybrid with one layer a block is its source: values, gradients, randomness and written state, in both modes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import ffebm_compiler as ffebm

ONE_LAYER = ffebm.Hardware(layers_per_block=1)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖/‖expected‖ in their own dtype; NaN, which is within no bound, where both are 0."""
    return float((found - expected).detach().norm() / expected.detach().norm())


def deviation(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖/‖wanted‖."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def assert_same_step(hybrid: nn.Module, source: nn.Module, x: Tensor) -> None:
    """Compare the values, and the gradients of Σ output², of a hybrid and the module itself."""
    hybrid.zero_grad()
    source.zero_grad()
    found, expected = hybrid(x), source(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = dict(hybrid.named_parameters())
    for name, parameter in source.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad)


def assert_same(
    model: nn.Module,
    *inputs: Any,
    train: bool = True,
    calls: int = 1,
    seed: int = 5,
    limit: float = 1e-5,
    gradient_limit: float = 1e-4,
    hybrid: ffebm.HybridModel | None = None,
    **options: Any,
) -> ffebm.HybridModel:
    """Convert `model` and compare with a copy of it over some calls in one mode, draw for draw."""
    torch.manual_seed(3)
    source = copy.deepcopy(model).train(train)
    if hybrid is None:
        hybrid = ffebm.convert(model, inputs, hardware=ONE_LAYER, **options)
    hybrid.train(train)
    for call in range(calls):
        outputs = []
        for network in (hybrid, source):
            network.zero_grad()
            torch.manual_seed(seed + call)
            output = network(*copy.deepcopy(inputs))
            leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            outputs.append((output, leaves, torch.get_rng_state()))
            torch.manual_seed(0)
            reached = [leaf for leaf in leaves if leaf.requires_grad]
            if reached:
                sum((leaf * torch.randn_like(leaf)).sum() for leaf in reached).backward()
        (got, found, drawn), (want, wanted, expected) = outputs
        assert pytree.tree_structure(got) == pytree.tree_structure(want)
        for have, leaf in zip(found, wanted, strict=True):
            assert deviation(have, leaf) < limit, f"call {call}: output deviates by {deviation(have, leaf):.1e}"
        assert torch.equal(drawn, expected), "the hybrid draws another number of random values"
        ours = dict(hybrid.named_parameters())
        for name, parameter in source.named_parameters():
            want_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            have = ours[name].grad
            got_grad = torch.zeros_like(parameter) if have is None else have
            if want_grad.norm() > 1e-6 or got_grad.norm() > 1e-6:
                error = deviation(got_grad, want_grad)
                assert error < gradient_limit, f"call {call}: gradient of {name} deviates by {error:.1e}"
        state = hybrid.state_dict()
        assert list(state) == list(source.state_dict())
        for name, tensor in source.state_dict().items():
            assert deviation(state[name], tensor) < limit, f"call {call}: {name} deviates"
    return hybrid
