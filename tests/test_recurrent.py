"""Recurrent cells and layers are their linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm

CELLS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNNCell(8, 4),
    "rnn, relu": lambda: nn.RNNCell(8, 4, nonlinearity="relu"),
    "gru": lambda: nn.GRUCell(8, 4),
    "gru, no bias": lambda: nn.GRUCell(8, 4, bias=False),
    "lstm": lambda: nn.LSTMCell(8, 4),
    "lstm, no bias": lambda: nn.LSTMCell(8, 4, bias=False),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "rnn": lambda: nn.RNN(8, 4),
    "rnn, relu": lambda: nn.RNN(8, 4, nonlinearity="relu", batch_first=True),
    "gru": lambda: nn.GRU(8, 4, batch_first=True),
    "gru, two levels, both ways": lambda: nn.GRU(8, 4, 2, bidirectional=True),
    "lstm": lambda: nn.LSTM(8, 4),
    "lstm, two levels, both ways": lambda: nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True, bias=False),
    "lstm, projected": lambda: nn.LSTM(8, 6, 2, proj_size=3, batch_first=True),
    "gru, dropout": lambda: nn.GRU(8, 4, 3, dropout=0.4, batch_first=True),
}


class Around(nn.Module):
    """A recurrent module whose outputs are joined into one tensor."""

    def __init__(self, inner: nn.Module, twice: bool) -> None:
        super().__init__()
        self.inner, self.twice = inner, twice

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        if self.twice:  # a cell, called again from its own state
            found = self.inner(x.flip(1), found)
        leaves: list[Tensor] = torch.utils._pytree.tree_leaves(found)
        return torch.cat([leaf.flatten() for leaf in leaves])


def same(model: nn.Module, x: Tensor, train: bool = False) -> ffebm.HybridModel:
    source = copy.deepcopy(model).train(train)
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1)).train(train)
    torch.manual_seed(3)
    got = hybrid(x)
    torch.manual_seed(3)
    want = source(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(want)
    (got * direction).sum().backward()
    (want * direction).sum().backward()
    ours = dict(hybrid.named_parameters())
    for name, parameter in source.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)
        assert parameter.dim() < 2 or hybrid.plan.weights[name].block, name
    return hybrid


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_its_linear_layers(cell: str) -> None:
    torch.manual_seed(0)
    same(Around(CELLS[cell](), True), torch.randn(5, 8))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_unrolled(layer: str) -> None:
    torch.manual_seed(0)
    same(Around(LAYERS[layer](), False), torch.randn(2, 3, 8))


def test_dropout_between_levels_follows_the_training_flag() -> None:
    torch.manual_seed(0)
    same(Around(LAYERS["gru, dropout"](), False), torch.randn(2, 3, 8), train=True)


def test_layers_settle_together_and_train() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rnn, self.out = nn.Linear(6, 8), nn.RNN(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x, torch.tanh(self.first(x[:, 0]))[None])[0][:, -1])

    torch.manual_seed(0)
    hybrid = ffebm.convert(Tagger(), torch.randn(4, 3, 6), feedback=0.3, block_ops=("add", "reshape", "concat"))
    assert any(block.module.program.coupled for block in hybrid.blocks)
    report = ffebm.check_gradients(hybrid, torch.randn(4, 3, 6), lambda y: y.square().sum())
    assert min(row["ep"].cosine for row in report.agreements.values()) > 0.999


def test_a_layer_that_is_not_unrolled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffebm_compiler.passes.recurrent._MOST_STEPS", 2)

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    plan = ffebm.plan(Long(), torch.randn(2, 3, 4))
    reason = plan.weights["rnn.weight_hh_l0"].reason
    assert reason == "a recurrent layer of packed sequences, or of more than 64 steps, is not unrolled into its layers"
    assert plan.weights["out.weight"].block
