"""How far outputs are from the source's: what tells layers apart where an accuracy does not move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.accuracy.evaluation import Measure, Setting, check_repeats
from ffebm_compiler.accuracy.journal import Journal
from ffebm_compiler.accuracy.mappings import Mappings
from ffebm_compiler.accuracy.outputs import deviation, recorded
from ffebm_compiler.accuracy.parts import parts_of


class Several(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"logits": x, "more": [2 * x, x.argmax(-1)], "nothing": None}


def test_the_equation_over_all_outputs_of_all_calls() -> None:
    model, generator = Several(), torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(4, 5, generator=generator) for _ in range(4))
    with recorded(model) as source:
        model(a)
        model(b)
    with recorded(model) as outputs:
        model(c)
        model(d)
    assert len(model._forward_hooks) == 0
    error = sum((s * (x - y)).square().sum() for x, y in ((c, a), (d, b)) for s in (1, 2))
    varied = sum((s * x - (s * x).mean()).square().sum() for x in (a, b) for s in (1, 2))
    assert deviation(outputs, source) == pytest.approx(float(error / varied), rel=1e-5)
    assert deviation(source, source) == 0


def test_outputs_that_do_not_compare() -> None:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    assert deviation([x], []) is None
    assert deviation([x], [x, x]) is None
    assert deviation([x[:2]], [x]) is None
    assert deviation([x], [torch.ones(3, 2)]) is None  # the source's do not vary


def test_large_outputs_are_thinned() -> None:
    model = nn.Identity()
    with recorded(model) as outputs:
        for _ in range(300):
            model(torch.zeros(1 << 10, 100))
    assert len(outputs) == 256
    assert max(each.numel() for each in outputs) <= 1 << 16


def test_deviations_of_layers_add_up_where_the_accuracy_does_not_move() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(16, 4)).eval()
    x = torch.randn(64, 16)
    with torch.no_grad():
        expected = model(x).argmax(-1)

    def right(net: Any) -> float:
        return float((net(x) == net(x).amax(-1, keepdim=True)).gather(1, expected[:, None]).double().mean())

    hybrid = ffebm.convert(model, x[:2])
    measure = Measure(hybrid, right, ffebm.Devices(programming=0.002))
    source = check_repeats(measure, Setting("source", "the source", settling=()))
    mappings = Mappings(measure, parts_of(hybrid.plan), source, Journal(None, "x", {}), draws=8)
    everything = frozenset(range(len(mappings.parts)))
    assert mappings.drop(everything) < 0.03
    losses = mappings.losses()
    assert all(loss > 0 for loss in losses)
    assert sum(losses) == pytest.approx(mappings.deviations[everything], rel=0.3)
    # An evaluate that does not call the network itself has drops alone.
    silent = Measure(hybrid, lambda net: right(net.forward), ffebm.Devices(programming=0.002))
    check_repeats(silent, Setting("source", "the source", settling=()))
    plain = Mappings(silent, mappings.parts, source, Journal(None, "x", {}), draws=1)
    drops = plain.losses()
    assert all(loss == max(plain.seen[frozenset({index})], 0) for index, loss in enumerate(drops))
