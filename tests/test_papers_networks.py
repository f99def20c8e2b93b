"""The networks of the papers: their blocks, and the six-layer one against an implementation of its equations."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.solvers.base import GaussSeidel

EXAMPLE = Path(__file__).parent.parent / "examples" / "papers_networks.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_papers_networks", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


networks = load()
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def members(plan: ffebm.Plan) -> list[tuple[int, tuple[str, ...]]]:
    """Of every block, how many digital values drive states, and its layers' paths."""
    return [
        (len(b.driven), tuple(layer.removesuffix(".layer").removeprefix("blocks.") for layer in b.layers))
        for b in plan.blocks
    ]


def alternating(blocks: int, inner: int, without: int = 0) -> list[tuple[int, tuple[str, ...]]]:
    """The convolution of F alone, then a driven state and the inner layers; `without` blocks of F alone at the end."""
    found: list[tuple[int, tuple[str, ...]]] = []
    for index in range(blocks):
        found.append((0, (f"{index}.feedforward",)))
        found.append((1, tuple(f"{index}.inner.{layer}" for layer in range(inner))))
    found += [(0, (f"{blocks + index}.feedforward",)) for index in range(without)]
    return [*found, (0, ("readout",))]


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (networks.six_layers(2, width=4), alternating(3, 1)),
        (networks.six_layers(3, width=4), alternating(2, 2)),
        (networks.six_layers(6, width=4), alternating(1, 5)),
        (networks.twelve_layers(2, width=4), alternating(6, 1)),
        (networks.twelve_layers(4, width=4), alternating(3, 3)),
        (networks.fifteen_layers(width=4, classes=10), alternating(7, 1, without=1)),
        (networks.DCHN(width=4), [(0, ("layers.0", "layers.1", "layers.2", "layers.3", "readout"))]),
    ],
    ids=["L=6 by 2", "L=6 by 3", "L=6 in one", "L=12 by 2", "L=12 by 4", "L=15", "DCHN"],
)
def test_the_plan_has_the_blocks_of_the_paper(network: Any, expected: list[tuple[int, tuple[str, ...]]]) -> None:
    plan = networks.papers_plan(network, X)
    assert members(plan) == expected
    for part in plan.digital_parts:
        kinds = {plan.graph[name].target for name in part.operations}
        assert kinds <= {"batch_norm", "flatten"}
    plan.validate()


def test_without_feedback_it_is_the_network_with_max_pooling_as_published() -> None:
    torch.manual_seed(0)
    network = networks.six_layers(2, width=4, pool=torch.nn.MaxPool2d)
    hybrid = ffebm.convert(network, X, plan=networks.papers_plan(network, X), feedback=0.5)
    assert sum(block.module.program.coupled for block in hybrid.blocks) == 3
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(X), network(X), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_example_runs() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("energy block") >= 4


@dataclass
class Reference:
    """One block of two states, E = c_1 [G(s_1) - <s_1, F>] + [s_2^2/2 - <s_2, d_2(s_1)>], G(s) = s^2/2a on [0, 1].

    With d_2(s_1) = pool(W s_1) + b and the scale c_1 = 1/gamma; everything in float64 and in literal states.
    """

    weight: Tensor
    bias: Tensor
    pooled: bool
    slope: float
    gamma: float

    def unpool(self, p: Tensor) -> Tensor:
        return p.repeat_interleave(2, -1).repeat_interleave(2, -2) / 4 if self.pooled else p

    def drive(self, s1: Tensor) -> Tensor:
        """d_2(s_1)."""
        if self.weight.dim() == 2:
            return s1.flatten(1) @ self.weight.t() + self.bias
        h = F.conv2d(s1, self.weight, self.bias, padding=1)
        return F.avg_pool2d(h, 2) if self.pooled else h

    def back(self, s2: Tensor, like: Tensor) -> Tensor:
        """(d d_2/d s_1)^T s_2."""
        if self.weight.dim() == 2:
            return (s2 @ self.weight).reshape(like.shape)
        return F.conv_transpose2d(self.unpool(s2), self.weight, padding=1)

    def settle(self, f: Tensor, nudge: Tensor | float) -> tuple[Tensor, Tensor]:
        """s_1 = clamp(a (F + gamma J^T s_2), 0, 1), s_2 = d_2(s_1) - nudge."""
        s1 = (self.slope * f).clamp(0, 1)
        for _ in range(400):
            s2 = self.drive(s1) - nudge
            new = (self.slope * (f + self.gamma * self.back(s2, s1))).clamp(0, 1)
            moved, s1 = float((new - s1).abs().max()), new
            if moved <= 4e-16:
                break
        assert moved <= 1e-15
        return s1, self.drive(s1) - nudge

    def weight_term(self, s1: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
        """dE/dW and dE/db = -<s_2, d d_2>."""
        if self.weight.dim() == 2:
            return -s2.t() @ s1.flatten(1), -s2.sum(0)
        p = self.unpool(s2)
        return -torch.nn.grad.conv2d_weight(s1, self.weight.shape, p, padding=1), -s2.sum((0, 2, 3))

    def gradients(self, f: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of W, b and F from the loss gradient at s_2: the contrast of two nudged equilibria."""
        beta = 1e-4 / float(delta.abs().max())
        (a1, a2), (b1, b2) = self.settle(f, beta * delta), self.settle(f, -beta * delta)
        (aw, ab), (bw, bb) = self.weight_term(a1, a2), self.weight_term(b1, b2)
        return (aw - bw) / (2 * beta), (ab - bb) / (2 * beta), -(a1 - b1) / (2 * beta * self.gamma)


def feedforward(block: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F = BN(pool(conv x)) with the batch's statistics."""
    h = F.conv2d(x, weight, bias, padding=1)
    h = F.avg_pool2d(h, 2) if block.feedforward.pool is not None else h
    mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), unbiased=False, keepdim=True)
    return (h - mean) / (var + block.norm.eps).sqrt()


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= 1e-10 * float(expected.norm())


@pytest.mark.parametrize("feedback", ["symmetric", 0.5])
def test_states_and_gradients_of_six_layers_are_those_of_its_equations(feedback: float | str) -> None:
    """In train mode, from the loss at the readout back through three blocks to the first convolution."""
    torch.manual_seed(1)
    network = networks.six_layers(2, width=4).double()
    with torch.no_grad():
        for block in network.blocks:
            block.inner[0].layer.weight.mul_(0.3)  # symmetric feedback settles
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([1, 7, 3, 0])
    hybrid = ffebm.convert(
        network,
        x,
        plan=networks.papers_plan(network, x),
        feedback=feedback,
        gradient=ffebm.EquilibriumPropagation(beta=1e-5, variant="centered"),
        solver=GaussSeidel(rtol=1e-13),
    ).train()
    F.cross_entropy(hybrid(x), labels).backward()
    found = {name: p.grad for name, p in hybrid.named_parameters()}
    driven = [block for block in hybrid.blocks if block.module.program.coupled]
    assert [len(block.states) for block in driven] == [2, 2, 2]

    value, references, trace = x, [], []
    for block, ours in zip(network.blocks, driven, strict=True):
        layer = block.inner[0]
        gamma = ours.module.scales[1] / ours.module.scales[0]
        reference = Reference(
            layer.layer.weight.detach(), layer.layer.bias.detach(), layer.pool is not None, network_slope(block), gamma
        )
        weight, bias = block.feedforward.layer.weight, block.feedforward.layer.bias
        inner = value.detach().requires_grad_()
        f = feedforward(block, inner, weight, bias)
        states = reference.settle(f.detach(), 0.0)
        for state, expected in zip(ours.states, states, strict=True):
            assert close(state, expected)
        norm = torch.linalg.matrix_norm(jacobian(reference, states[0][:1]), 2)
        loop_gain = gamma * float(norm) ** 2 * reference.slope
        if feedback == "symmetric":
            assert gamma == 1
            assert loop_gain < 1
        else:
            assert loop_gain == pytest.approx(feedback, rel=0.02)
        references.append(reference)
        trace.append((inner, f, weight, bias))
        value = states[1]

    top = value.detach().requires_grad_()
    F.cross_entropy(F.linear(top.flatten(1), network.readout.weight, network.readout.bias), labels).backward()
    delta = top.grad
    assert close(found["readout.weight"], network.readout.weight.grad)
    for index in reversed(range(3)):
        inner, f, weight, bias = trace[index]
        g_weight, g_bias, error = references[index].gradients(f.detach(), delta)
        assert close(found[f"blocks.{index}.inner.0.layer.weight"], g_weight)
        assert close(found[f"blocks.{index}.inner.0.layer.bias"], g_bias)
        g_first, delta = torch.autograd.grad(f, (weight, inner), error)
        assert close(found[f"blocks.{index}.feedforward.layer.weight"], g_first)


def network_slope(block: Any) -> float:
    return float(block.slope)


def jacobian(reference: Reference, s1: Tensor) -> Tensor:
    """d d_2/d s_1 as a matrix, column by column."""
    flat = torch.eye(s1.numel(), dtype=s1.dtype)
    columns = reference.drive(flat.reshape(-1, *s1.shape[1:])) - reference.drive(torch.zeros_like(s1))
    return columns.flatten(1).t()
