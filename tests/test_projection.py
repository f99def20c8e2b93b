"""`hybrid.project`: weights scaled down until every symmetric block is certified."""

from __future__ import annotations

import pytest
import torch
from networks import noise, seeded, warmed
from torch import nn

import ffebm_compiler as ffebm


def _layers(*norms: float) -> nn.Sequential:
    """Linear layers of given spectral norms with tanh between them."""
    parts: list[nn.Module] = []
    for norm in norms:
        layer = nn.Linear(8, 8)
        with torch.no_grad():
            layer.weight.mul_(norm / torch.linalg.matrix_norm(layer.weight, 2))
        parts += [layer, nn.Tanh()]
    return nn.Sequential(*parts).double()


def test_only_the_large_norms_are_capped() -> None:
    model = seeded(lambda: _layers(9.0, 0.3, 2.5, 0.2))
    x = noise(4, 8).double()
    hybrid = ffebm.convert(model, x, feedback="symmetric")
    before = hybrid.blocks[0].loop_gain
    assert before > 5
    assert hybrid.project(0.8) == {"block_1": before}
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.8, rel=2e-2)
    for index, scaled in ((0, False), (2, False), (4, True), (6, False)):
        same = torch.equal(hybrid.get_parameter(f"{index}.weight"), model[index].weight)
        assert same is not scaled, index  # the first layer couples no two states
    for index in (0, 2, 4, 6):
        assert torch.equal(hybrid.get_parameter(f"{index}.bias"), model[index].bias)
    assert hybrid.project(0.85) == {}
    exact = torch.linalg.matrix_norm(hybrid.get_parameter("4.weight").detach(), 2)
    assert float(exact) == pytest.approx(hybrid.blocks[0].certificate.norms[1][2], rel=1e-2)
    hybrid(x).sum().backward()  # it settles


def test_the_cap_is_the_projection_onto_a_chain() -> None:
    """For two coupled layers κ = ‖W‖², so that the cap is √limit exactly."""
    hybrid = ffebm.convert(seeded(lambda: _layers(1.0, 3.0)), noise(4, 8).double(), feedback="symmetric")
    hybrid.project(0.49)
    norm = float(torch.linalg.matrix_norm(hybrid.get_parameter("2.weight").detach(), 2))
    assert norm == pytest.approx(0.7, rel=1e-2)


@pytest.mark.parametrize("fold", [False, True])
def test_convolutions_and_folded_batch_norm(fold: bool) -> None:
    x = noise(4, 3, 8, 8)
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()
        )
    )
    model = warmed(model, x)
    hybrid = ffebm.convert(model, x, feedback="symmetric", fold_batchnorm=fold)
    gains = {block.name: block.loop_gain for block in hybrid.blocks}
    changed = hybrid.project(0.7)
    assert changed == {name: gain for name, gain in gains.items() if gain > 0.7}
    assert bool(changed) is fold  # with batch norm digital every convolution is a block of its own
    assert all(block.loop_gain <= 0.7 * 1.02 for block in hybrid.blocks)
    hybrid.recertify()
    assert all(block.loop_gain <= 0.7 * 1.02 for block in hybrid.blocks)


def test_training_stays_inside_the_certificate() -> None:
    model, x = seeded(lambda: _layers(0.5, 0.5, 0.5)), noise(16, 8).double()
    hybrid = ffebm.convert(model, x, feedback="symmetric").train()
    hybrid.recertify_every, hybrid.project_to = 2, 0.6
    optimizer = torch.optim.SGD(hybrid.parameters(), 1.0)
    gains = []
    for _ in range(12):
        optimizer.zero_grad()
        (-(hybrid(x) * torch.sign(x)).sum(1).mean()).backward()
        gains.append(hybrid.blocks[0].loop_gain)
        optimizer.step()
    assert max(gains) <= 0.6 * 1.02
    hybrid.project_to = None

    def train() -> None:
        for _ in range(12):
            optimizer.zero_grad()
            (-(hybrid(x) * torch.sign(x)).sum(1).mean()).backward()
            optimizer.step()

    with pytest.warns(ffebm.FFEBMWarning, match="loop gain at symmetric feedback has grown to"):
        train()
    hybrid.recertify()
    assert hybrid.blocks[0].loop_gain > 0.6


def test_a_loop_gain_given_as_a_number_needs_none() -> None:
    model = seeded(lambda: _layers(9.0, 9.0))
    hybrid = ffebm.convert(model, noise(4, 8).double(), feedback=0.95)
    assert hybrid.project(0.5) == {}
    assert torch.equal(hybrid.get_parameter("2.weight"), model[2].weight)


class Skipping(nn.Module):
    """A coupling by the identity alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        return torch.tanh(2 * h + self.b(x))


def test_guards() -> None:
    hybrid = ffebm.convert(seeded(Skipping), noise(4, 6), feedback="symmetric", block_ops=("add", "reshape", "scale"))
    assert hybrid.blocks[0].loop_gain > 1
    with pytest.raises(ffebm.InputError, match=r"a feeds b with norm 2.* without a weight .* be brought to 0\.9"):
        hybrid.project(0.9)
    for limit in (0, 1, 1.5, True, "0.9"):
        with pytest.raises(ffebm.InputError, match=r"limit is .*; expected a loop gain strictly between 0 and 1"):
            hybrid.project(limit)


def test_a_weight_that_is_no_multiple_of_a_parameter_is_not_scaled() -> None:
    class Squashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.weight = nn.Parameter(torch.eye(8) * 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(torch.tanh(self.first(x)), torch.sinh(self.weight))

    hybrid = ffebm.convert(seeded(Squashed), noise(4, 6), feedback="symmetric")
    with pytest.raises(ffebm.UnsupportedError, match="no parameter, nor a view or a multiple of one"):
        hybrid.project(0.9)
    assert torch.equal(hybrid.get_parameter("weight"), torch.eye(8) * 3)
