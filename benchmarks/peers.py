"""What `equilibrium.py` compares with: the public code of equilibrium propagation, its schedule enacted, and torchdeq.

The public code is github.com/rain-neuromorphics/energy-based-learning (Scellier et al. 2023, arXiv 2312.15103), of
which a checkout is imported where one is given.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SWEEPS = (60, 20, 20)
"""Asynchronous sweeps of the free phase and of the two nudged ones, as in the public code's best results."""
BETA = 0.2
MARK = Path("model/hopfield/network.py")
"""A file by which a checkout of the public code is known."""


class DCHN(nn.Module):
    """3-128-256-512-512-10 times `width`: convolutions, 2 x 2 pooling, a clamp to [0, 1], and a linear readout."""

    def __init__(self, width: float, pool: str) -> None:
        super().__init__()
        sizes = [3, *(max(1, round(width * size)) for size in (128, 256, 512, 512))]
        self.pool = F.max_pool2d if pool == "max" else F.avg_pool2d
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(sizes))
        self.head = nn.Linear(4 * sizes[-1], 10)
        with torch.no_grad():  # small enough for symmetric feedback, as trained Hopfield networks are
            for layer in (*self.convs, self.head):
                layer.weight.mul_(0.7)

    def layers(self) -> list[nn.Conv2d]:
        """The convolutions."""
        return [conv for conv in self.convs if isinstance(conv, nn.Conv2d)]

    def forward(self, x: Tensor) -> Tensor:
        """The feedforward network that is converted."""
        for conv in self.convs:
            x = F.hardtanh(self.pool(conv(x), 2), 0, 1)
        return self.head(x.flatten(1))


def plain_step(model: DCHN, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradients of ½‖s − onehot‖² (batch mean), in the parameters' order, by EP as the public code schedules it.

    Centered, nothing cached, classical difference of states; max pooling finds its winners anew for every feedback.
    """
    convs, head = model.layers(), model.head
    target = F.one_hot(labels, 10).to(x)

    def up(states: list[Tensor], index: int) -> Tensor:
        return model.pool(convs[index](states[index - 1] if index else x), 2)

    def down(states: list[Tensor], index: int) -> Tensor:
        if index == len(convs) - 1:
            return (states[-1] @ head.weight).view_as(states[index])
        above = convs[index + 1]
        if model.pool is F.max_pool2d:
            _, winners = F.max_pool2d(above(states[index]), 2, return_indices=True)
            spread = F.max_unpool2d(states[index + 1], winners, [2, 2])
        else:
            spread = F.interpolate(states[index + 1], scale_factor=2, mode="nearest") / 4
        return F.conv_transpose2d(spread, above.weight, padding=1)

    def settle(states: list[Tensor], sweeps: int, nudge: float) -> list[Tensor]:
        states = list(states)
        for _ in range(sweeps):
            for parity in (0, 1):
                for index in range(parity, len(states), 2):
                    if index == len(states) - 1:
                        free = head(states[index - 1].flatten(1))
                        states[index] = free - nudge * (states[index] - target)
                    else:
                        states[index] = (up(states, index) + down(states, index)).clamp(0, 1)
        return states

    with torch.no_grad():
        sides = [x.shape[-1] // 2 ** (index + 1) for index in range(len(convs))]
        zeros = [x.new_zeros(len(x), c.out_channels, n, n) for c, n in zip(convs, sides, strict=True)]
        free = settle([*zeros, x.new_zeros(len(x), 10)], SWEEPS[0], 0.0)
        settled = settle(free, SWEEPS[1], BETA), settle(free, SWEEPS[2], -BETA)
    gradients = []
    for states in settled:
        energy = sum(-(states[i] * up(states, i)).sum() for i in range(len(convs)))
        energy = energy - (states[-1] * head(states[-2].flatten(1))).sum()
        gradients.append(torch.autograd.grad(energy, list(model.parameters())))
    return [(p - m) / (2 * BETA * len(x)) for p, m in zip(*gradients, strict=True)]


def public_step(checkout: Path, model: DCHN, x: Tensor, labels: Tensor) -> Callable[[], list[Tensor]]:
    """The same step by the public code itself, on a network with the same weights."""
    sys.path.insert(0, str(checkout))
    try:
        network, minimizer = (importlib.import_module(f"model.hopfield.{n}") for n in ("network", "minimizer"))
        function, cost = (importlib.import_module(f"model.function.{n}") for n in ("network", "cost"))
        training = importlib.import_module("training.sgd")
    finally:
        sys.path.remove(str(checkout))
    pool = "conv_max_pool" if model.pool is F.max_pool2d else "conv_avg_pool"
    energy = network.ConvHopfieldEnergy32(3, 10, *(conv.out_channels for conv in model.layers()), pool_type=pool)
    layers: list[nn.Conv2d | nn.Linear] = [*model.layers(), model.head]
    weights = [layer.weight.detach() for layer in layers]
    weights[-1] = weights[-1].T.reshape(energy.params()[-1].shape)
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    for parameter, value in zip(energy.params(), [*biases, *weights], strict=True):
        assert parameter.state.shape == value.shape
        parameter.state = value
    energy.set_device(x.device)
    whole = function.Network(energy)
    loss = cost.SquaredError(energy.layers()[-1])
    augmented = training.AugmentedFunction(energy, loss)
    free = minimizer.FixedPointMinimizer(energy, whole.free_layers(), SWEEPS[0])
    nudged = minimizer.FixedPointMinimizer(augmented, whole.free_layers(), SWEEPS[1])
    estimator = training.EquilibriumProp(energy.params(), energy.layers(), augmented, loss, nudged, "centered", BETA)

    def step() -> list[Tensor]:
        whole.set_input(x, reset=True)
        free.compute_equilibrium()
        loss.set_target(labels)
        found = estimator.compute_gradient()
        found[-1] = found[-1].reshape(-1, 10).T
        pairs = zip(found[len(layers) :], found[: len(layers)], strict=True)
        return [gradient for pair in pairs for gradient in pair]

    return step


class Block(nn.Module):
    """relu(x + conv(relu(conv(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """One residual block."""
        return F.relu(x + self.b(F.relu(self.a(x))))


def torchdeq_output(model: Block, x: Tensor, gain: float, rtol: float) -> Tensor:
    """Output of the equilibrium with feedback gain γ, by torchdeq's Anderson solver with implicit gradients.

    Geng & Kolter 2023, arXiv 2310.18605.
    """
    get_deq = importlib.import_module("torchdeq").get_deq

    forward = {"f_solver": "anderson", "f_max_iter": 60, "f_tol": rtol, "f_stop_mode": "rel"}
    backward = {"b_solver": "anderson", "b_max_iter": 60, "b_tol": rtol, "b_stop_mode": "rel"}
    deq = get_deq(**forward, **backward, ift=True)  # without ift it differentiates one step only
    drive = model.a(x)

    def function(state: Tensor) -> Tensor:
        first, second = state.chunk(2, 1)
        feedback = F.conv_transpose2d(second, model.b.weight, padding=1)
        return torch.cat([F.relu(drive + gain * feedback), F.relu(x + model.b(first))], 1)

    start = torch.cat([F.relu(drive), F.relu(x + model.b(F.relu(drive)))], 1).detach()
    return deq(function, start)[0][-1].chunk(2, 1)[1]
