"""Converters between arrays: partial sums converted tile by tile, by hand and against the plan's count."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, EquilibriumPropagation, Hardware
from ffebm_compiler.passes.partition.partial_sums import partial_sums
from ffebm_compiler.runtime.devices.converters import Converters

TILES = Hardware(tile_rows=4, tile_cols=16, row_sums="digital")
EIGHT = Devices(adc_bits=8, dac_bits=7)


def data(*shape: int, seed: int = 0) -> Tensor:
    return noise(*shape, seed=seed).double()


def network() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 5))).double()


def level(value: Tensor, bits: int, limits: tuple[float, float]) -> Tensor:
    """The nearest level of a converter, by counting levels."""
    low, high = limits
    count = 2**bits - 1 if low >= 0 else 2 ** (bits - 1) - 1
    step = max(high, -low) / count
    levels = step * torch.arange(0 if low >= 0 else -count, count + 1, dtype=value.dtype)
    return levels[(value.unsqueeze(-1) - levels).abs().argmin(-1)]


class Chain:
    """The two layers of `network` on tiles of 4 rows, with the ranges that are stored: sums and phases by hand."""

    def __init__(self, hybrid: ffebm.HybridModel) -> None:
        (block,) = hybrid.blocks
        self.ranges = block.module.arrays.converters.ranges
        self.names = [op for op in hybrid.plan.block(block.name).operations if hybrid.plan.graph[op].rows]
        self.w1, self.b1, self.w2, self.b2 = (w.detach().requires_grad_() for w in block.weights)
        self.c1, self.c2 = block.module.scales
        self.sweeps = block.module.last.sweeps

    def adc(self, value: Tensor, name: str) -> Tensor:
        return level(value.detach(), 8, self.ranges[name])

    def dac(self, value: Tensor, name: str) -> Tensor:
        return level(value.detach(), 7, self.ranges[name])

    def summed(self, x: Tensor, weight: Tensor, name: str, phase: str) -> Tensor:
        """The digital sum of the tiles' results. All columns are on one tile of columns."""
        parts = [
            self.adc(x[:, 4 * tile : 4 * tile + 4] @ weight[:, 4 * tile : 4 * tile + 4].T, f"{phase} {tile} {name}")
            for tile in range(-(-x.shape[1] // 4))
        ]
        return torch.stack(parts).sum(0)

    def settle(self, x: Tensor, phase: str, sweeps: int, start: Any = None, force: Tensor | float = 0.0) -> Any:
        """(s_1, s_2) after so many sweeps, forward in a free phase and backward in a nudged one."""
        first, second = self.names
        ranges = dict(self.ranges)
        for name in (first, second):
            for tile in range(3):
                key = f"{phase} adc of {name}, tile 0 {tile} 0"
                if key in ranges:
                    self.ranges[f"{phase} {tile} {name}"] = ranges[key]
        registers = sorted(int(key.rsplit(" ", 1)[1]) for key in ranges if key.startswith(f"{phase} dac of "))
        dacs = [f"{phase} dac of {register}" for register in registers]
        drive = self.summed(x, self.w1, first, phase) + self.b1.detach()

        def output(s1: Tensor) -> Tensor:
            return self.summed(self.dac(s1, dacs[0]), self.w2, second, phase) + self.b2.detach() + force

        def hidden(s2: Tensor) -> Tensor:
            back = self.adc(self.dac(s2, dacs[1]) @ self.w2, f"{phase} adc of {second}, back")
            return torch.tanh(drive + self.c2 / self.c1 * back).detach()

        s1, s2 = (torch.tanh(drive), None) if start is None else start
        s2 = output(s1) if s2 is None else s2
        for _ in range(sweeps):
            if phase == "free":
                s1 = hidden(s2)
                s2 = output(s1)
            else:
                s2 = output(s1)
                s1 = hidden(s2)
        return s1, s2

    def energy(self, x: Tensor, s1: Tensor, s2: Tensor) -> Tensor:
        """What of the energy depends on weights, for each sample."""
        first = (s1 * (x @ self.w1.T + self.b1)).sum(1)
        return -self.c1 * first - self.c2 * (s2 * (s1 @ self.w2.T + self.b2)).sum(1)


def test_a_block_by_hand_values_and_gradients() -> None:
    """Free and nudged phases sweep by sweep, and the contrast of the energy by autograd."""
    x, target = data(3, 10), data(3, 5, seed=1)
    hybrid = ffebm.convert(network(), x, feedback=0.3, hardware=TILES, devices=EIGHT)
    hybrid.set_gradient(EquilibriumPropagation(beta=0.5, variant="centered", reads=1))
    hybrid.calibrate_converters(x)
    hybrid.train()
    output = hybrid(x)
    (output - target).square().sum().backward()
    found = {name: p.grad for name, p in hybrid.named_parameters()}
    reference = Chain(hybrid)
    entered = reference.dac(x, "dac 0")
    free = reference.settle(entered, "free", reference.sweeps)
    for state, expected in zip(hybrid.blocks[0].states, free, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(output, hybrid.blocks[0].states[1])  # digital already: no ADC
    error = 2 * (output - target).detach()
    amplitude = free[1].square().mean(1).sqrt() / error.square().mean(1).sqrt()
    energies = []
    for beta in (0.5, -0.5):
        force = -beta / reference.c2 * amplitude[:, None] * error
        states = reference.settle(entered, "nudged", reference.sweeps, free, force)
        energies.append(reference.energy(entered, *states))
    ((energies[0] - energies[1]) / (2 * 0.5 * amplitude)).sum().backward()
    for name, weight in zip(("0.weight", "0.bias", "2.weight", "2.bias"), ("w1", "b1", "w2", "b2"), strict=True):
        torch.testing.assert_close(found[name], getattr(reference, weight).grad, rtol=1e-8, atol=1e-10)


class Straight(torch.autograd.Function):
    """A converter by hand: derivative 1 inside of its range, 0 outside."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, bits: int, limits: tuple[float, float]) -> Tensor:
        ctx.save_for_backward((value >= limits[0]) & (value <= limits[1]))
        return level(value.clamp(*limits), bits, limits)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent * ctx.saved_tensors[0], None, None


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(10, 6), (3, 10)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 4)),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 2, 2, stride=2), (2, 6, 3, 3)),
}


def matrices_of(layer: nn.Module) -> Tensor:
    """(groups, rows, cols) by im2col."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        return weight.T[None]
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.reshape(1, weight.shape[0], -1)
    return weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1).transpose(1, 2)


def by_tiles(layer: nn.Module, x: Tensor, ranges: dict[str, Any], name: str, rows: int, cols: int) -> Tensor:
    """The layer with each tile's result converted, by unfolded patches and matrix products."""
    matrices = matrices_of(layer)
    groups, depth, width = matrices.shape
    if isinstance(layer, nn.Conv2d):
        patches = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2)[:, None]
    elif isinstance(layer, nn.Conv1d):
        patches = x.unfold(2, 3, 1).permute(0, 2, 1, 3).reshape(len(x), -1, groups, depth).transpose(1, 2)
    elif isinstance(layer, nn.ConvTranspose2d):
        patches = x.flatten(2).transpose(1, 2)[:, None]
    else:
        patches = x[:, None, None]
    total = torch.zeros(len(x), groups, patches.shape[2], width, dtype=x.dtype)
    for group in range(groups):
        for down in range(-(-depth // rows)):
            for across in range(-(-width // cols)):
                place = slice(rows * down, rows * (down + 1)), slice(cols * across, cols * (across + 1))
                part = patches[:, group, :, place[0]] @ matrices[group][place]
                limits = ranges[f"free adc of {name}, tile {group} {down} {across}"]
                total[:, group, :, place[1]] = total[:, group, :, place[1]] + Straight.apply(part, 8, limits)
    if isinstance(layer, nn.Linear):
        return total[:, 0, 0] + layer.bias
    if isinstance(layer, nn.ConvTranspose2d):
        columns = total[:, 0].transpose(1, 2)
        return torch.nn.functional.fold(columns, (6, 6), 2, stride=2) + layer.bias[:, None, None]
    flat = total.transpose(2, 3).reshape(len(x), groups * width, -1)
    shape = (-1, *x.shape[2:]) if isinstance(layer, nn.Conv2d) else (-1, flat.shape[2])
    return (flat + layer.bias[:, None]).unflatten(2, shape[1:]) if len(shape) > 2 else flat + layer.bias[:, None]


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_alone_by_hand_values_and_gradients(kind: str, clipped: bool) -> None:
    """On tiles of 4 rows and 4 columns of weights; also where later values are beyond the ranges."""
    make, shape = LAYERS[kind]
    layer, x = seeded(make).double(), data(*shape)
    hardware = Hardware(tile_rows=4, tile_cols=8, row_sums="digital")
    hybrid = ffebm.convert(layer, x, hardware=hardware, devices=Devices(adc_bits=8))
    hybrid.calibrate_converters(x)
    read = (1.5 * x if clipped else x).requires_grad_()
    output = hybrid.train()(read)
    output.square().sum().backward()
    module = hybrid.energy_blocks["block_1"]
    ranges = module.arrays.converters.ranges  # type: ignore[union-attr]
    assert not any(name.startswith("adc ") for name in ranges)  # its outputs are digital already
    (name,) = (op for op in hybrid.plan.block("block_1").operations if hybrid.plan.graph[op].rows)
    twin = copy.deepcopy(layer)
    twin.zero_grad()
    own = read.detach().clone().requires_grad_()
    expected = by_tiles(twin, own, ranges, name, 4, 4)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    expected.square().sum().backward()
    for (_, mine), (_, other) in zip(hybrid.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-9)
    assert read.grad is not None
    assert own.grad is not None
    step = max(high for key, (_, high) in ranges.items() if key.startswith("error")) / 127
    size = float(2 * expected.detach().abs().max()) * 1.01
    tiles = -(-matrices_of(layer).shape[2] // 4) * -(-matrices_of(layer).shape[1] // 4)
    assert float((read.grad - own.grad).abs().max()) <= tiles * step * size / 2  # the error leaves through ADCs
    assert float((read.grad - own.grad).norm() / own.grad.norm()) < 0.02


def _counted(hybrid: ffebm.HybridModel, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Name of a converter -> values per sample that it converts at once, in one forward."""
    found: dict[str, int] = {}
    plain, tiles = Converters._converted, Converters.of_tiles

    def one(self: Converters, name: str, value: Tensor, bits: int | None) -> Tensor:
        if bits is not None and name not in self.spared:
            found[name] = value.numel() // len(x)
        return plain(self, name, value, bits)

    def several(self: Converters, names: Sequence[str], value: Tensor, *rest: Any) -> Any:
        found[names[0]] = value.numel() // len(x)
        return tiles(self, names, value, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Converters, "_converted", one)
        patch.setattr(Converters, "of_tiles", several)
        hybrid(x)
    return found


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(torch.tanh(self.b(h) + h))


def chain(sizes: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for rows, cols in pairwise(sizes):
        layers += [nn.Linear(rows, cols), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1))


@settings(max_examples=12, deadline=None)
@given(
    make=st.one_of(
        st.lists(st.integers(2, 9), min_size=3, max_size=4).map(lambda sizes: (lambda: chain(sizes), (2, sizes[0]))),
        st.sampled_from([(Residual, (2, 9)), (convolutions, (2, 2, 4, 4))]),
    ),
    rows=st.integers(2, 9),
    weights=st.integers(2, 9),
)
def test_conversions_are_those_that_the_plan_counts(make: Any, rows: int, weights: int) -> None:
    model, x = seeded(make[0]), data(*make[1])
    hardware = Hardware(tile_rows=rows, tile_cols=2 * weights, row_sums="digital")
    hybrid = ffebm.convert(model.double(), x, feedback=0.3, hardware=hardware, devices=EIGHT).eval()
    with pytest.MonkeyPatch.context() as patch:
        found = _counted(hybrid, x, patch)
    expected = {"dac": 0, "adc": 0, "free dac": 0, "free adc": 0}
    plan = hybrid.plan
    for block in plan.blocks:
        sums = partial_sums(plan.graph, plan.hardware, plan.graph.users(), block.operations)
        expected["dac"] += block.dac - sums.spared_dac
        expected["adc"] += block.adc - sums.spared_adc
        expected["free adc"] += sums.once + sums.forward_adc + sums.feedback_adc
        expected["free dac"] += sums.forward_dac + sums.feedback_dac
    total = dict.fromkeys(expected, 0)
    for name, count in found.items():
        total[next(kind for kind in ("free dac", "free adc", "dac", "adc") if name.startswith(kind))] += count
    if len(plan.blocks) == 1:  # names are those of one block
        assert total == expected


def test_what_is_digital_stays_between_files_copies_and_state_dicts(tmp_path: Path) -> None:
    x = data(4, 10)
    hybrid = ffebm.convert(network(), x, feedback=0.3, hardware=TILES, devices=replace(EIGHT, programming=0.05))
    hybrid.train()(x).square().sum().backward()
    hybrid.eval()
    expected = hybrid(x)
    hybrid.save(tmp_path / "saved")
    loaded = ffebm.load(tmp_path / "saved", network())
    fresh = ffebm.convert(network(), x, feedback=0.3, hardware=TILES)
    fresh.load_state_dict(hybrid.state_dict())
    for other in (loaded, copy.deepcopy(hybrid), fresh.eval()):
        assert torch.equal(other(x), expected)
        ranges = other.energy_blocks["block_1"].arrays.converters.ranges  # type: ignore[union-attr]
        assert ranges == hybrid.energy_blocks["block_1"].arrays.converters.ranges  # type: ignore[union-attr]
        assert any(name.startswith("nudged") for name in ranges)


@pytest.mark.parametrize(
    "devices", [replace(EIGHT, read_noise=1e-3), Devices(dac_bits=8), replace(EIGHT, mismatch=0.01)]
)
@pytest.mark.parametrize("gradient", ["ep", "implicit", "unrolled"])
def test_every_gradient_runs_through_tiles(devices: Devices, gradient: str) -> None:
    x = data(4, 10)
    exact = ffebm.convert(network(), x, feedback=0.3, hardware=TILES, gradient="implicit")
    hybrid = ffebm.convert(network(), x, feedback=0.3, hardware=replace(TILES, bias_row=True), devices=devices)
    hybrid.set_gradient(gradient)
    found = []
    for each in (hybrid, exact):
        read = x.clone().requires_grad_()
        each(read).square().sum().backward()
        assert read.grad is not None
        found.append([*(p.grad.clone() for p in each.parameters() if p.grad is not None), read.grad])
        each.zero_grad()
    for mine, other in zip(*found, strict=True):
        assert float((mine * other).sum() / (mine.norm() * other.norm())) > 0.95


def test_more_bits_approach_exact_sums() -> None:
    x = data(4, 10)
    exact = ffebm.convert(network(), x, feedback=0.3, hardware=TILES).eval()(x).detach()
    errors = []
    for bits in (6, 10, 16):
        hybrid = ffebm.convert(
            network(), x, feedback=0.3, hardware=TILES, devices=Devices(adc_bits=bits, dac_bits=bits)
        )
        errors.append(float((hybrid.eval()(x).detach() - exact).norm() / exact.norm()))
    assert errors[0] > 8 * errors[1] > 64 * errors[2]
