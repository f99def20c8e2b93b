"""`ffebm.plan_for_accuracy`: as much analog as a budget allows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from by_name import minus_distance
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.accuracy.evaluation import Measure, Setting
from ffebm_compiler.accuracy.journal import Journal
from ffebm_compiler.accuracy.mappings import Mappings, search
from ffebm_compiler.accuracy.parts import Part, parts_of

DEVICES = ffebm.Devices(programming=0.1)


@cache
def task() -> tuple[Tensor, nn.Module]:
    """A network whose first and last layers are sensitive, with layers of very different sizes."""
    torch.manual_seed(0)
    sizes = (6, 20, 8, 24, 4, 3)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.Tanh()]
    model = nn.Sequential(*layers[:-2]).eval()
    return torch.randn(64, 6), model


def score(net: Callable[[Tensor], Tensor]) -> float:
    return minus_distance(net, *task())


def planned(max_drop: float, **options: Any) -> ffebm.AccuracyPlan:
    x, model = task()
    return ffebm.plan_for_accuracy(model, x[:2], score, devices=DEVICES, max_drop=max_drop, **options)


def test_the_plan_keeps_the_budget(tmp_path: Path) -> None:
    x, model = task()
    file = tmp_path / "planning.json"
    found = planned(0.01, draws=2, file=file)
    report = found.measurement
    assert 0 < found.analog_macs < found.weight_macs
    assert report.drop <= 0.01 < report.full_drop
    assert report.value == -report.drop
    assert {layer.paths[0] for layer in report.digital} == set(found.rejected)
    # The plan's own hybrid, built and measured by hand with the same devices.
    hybrid = ffebm.convert(model, x[:2], plan=found).eval()
    values = []
    for draw in range(2):
        hybrid.set_devices(ffebm.Devices(programming=0.1, seed=1_000_003 + draw))
        values.append(score(hybrid))
    assert report.value == pytest.approx(sum(values) / 2, rel=1e-5)
    text = " ".join(str(found).split())
    assert "digital for the sake of accuracy" in text
    assert "at most 0.01 was asked for" in text
    # A stored plan is a plan.
    found.to_json(tmp_path / "plan.json")
    stored = ffebm.Plan.from_json(tmp_path / "plan.json")
    assert stored.blocks == found.blocks
    with pytest.raises(ffebm.PlanError, match="this plan was not measured"):
        _ = ffebm.AccuracyPlan.from_json(tmp_path / "plan.json").measurement
    # What was measured is kept, and nothing is measured again.
    kept = json.loads(file.read_text())["results"]
    with ThreadPoolExecutor(2) as threads:
        again = planned(0.01, draws=2, file=file, executor=threads)
    assert again == found
    assert json.loads(file.read_text())["results"] == kept


def test_everything_is_analog_within_a_wide_budget() -> None:
    found = planned(10.0, draws=1)
    assert found.rejected == {}
    assert found.measurement.mappings == 1
    assert found.measurement.error is None


def test_layers_of_force_analog_stay_and_what_is_unreachable_is_told() -> None:
    found = planned(0.01, draws=1, force_analog=["12"])
    assert "12" not in found.rejected
    with pytest.raises(
        ffebm.PlanError,
        match=r"max_drop=1e-07 is not reachable with an analog layer on custom: the smallest drop of \d+ measured",
    ):
        planned(1e-7, draws=1)
    with pytest.raises(ffebm.PlanError, match=r"analog \('12' that force_analog keeps analog\)"):
        planned(1e-7, draws=1, force_analog="12")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"devices": None}, "plan_for_accuracy needs devices"),
        ({"max_drop": -0.1}, "max_drop is -0.1"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"evaluate": "accuracy"}, "evaluate is a str"),
        ({"draws": 0}, "draws is 0"),
        ({"trials": -1}, "trials is -1"),
        ({"executor": "pool"}, "executor is a str"),
        ({"tiles": 4}, "there is no argument 'tiles'; those of ffebm.plan are hardware"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str) -> None:
    x, model = task()
    given: dict[str, Any] = {"evaluate": score, "devices": DEVICES, **arguments}
    with pytest.raises(ffebm.InputError, match=said):
        ffebm.plan_for_accuracy(model, x[:2], **given)


def test_a_network_without_analog_layers() -> None:
    x, model = task()
    with pytest.raises(ffebm.PlanError, match="no layer can be analog on this hardware"):
        ffebm.plan_for_accuracy(model, x[:2], score, devices=DEVICES, force_digital=["*"])


def test_functional_layers_of_the_root() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(8, 6) / 2), nn.Parameter(torch.randn(8, 8) / 4)
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.nn.functional.layer_norm(torch.tanh(torch.nn.functional.linear(x, self.first)), (8,))
            x = torch.nn.functional.layer_norm(torch.tanh(torch.nn.functional.linear(x, self.second)), (8,))
            return self.last(x)

    torch.manual_seed(1)
    model, x = Functional().eval(), torch.randn(32, 6)
    with torch.no_grad():
        expected = model(x)

    def near(net: Any) -> float:
        return -float((net(x) - expected).square().mean())

    everything = ffebm.plan_for_accuracy(model, x[:2], near, devices=DEVICES, max_drop=9.0, draws=1)
    half = everything.measurement.full_drop / 3
    found = ffebm.plan_for_accuracy(model, x[:2], near, devices=DEVICES, max_drop=half, draws=1)
    assert found.measurement.drop <= half
    assert found.measurement.digital


class Added(Mappings):
    """Mappings whose drops are the sums of given losses."""

    def __init__(self, macs: list[int], losses: list[float]) -> None:
        self.parts = [Part(str(i), (str(i),), (str(i),), ("b",), size) for i, size in enumerate(macs)]
        self.given, self.seen, self.deviations = losses, {}, {}

    def drops(self, mappings: Any, title: str) -> list[float]:
        wanted = list(mappings)
        for mapping in wanted:
            self.seen[mapping] = sum(self.given[index] for index in mapping)
        return [self.seen[mapping] for mapping in wanted]


def exact(macs: list[int], losses: list[float], most: float, refused: int) -> int:
    """The multiply-accumulates of the best mapping of all but so many that are better."""
    numbers = range(len(macs))
    within = [
        sum(macs[i] for i in some)
        for size in range(len(macs) + 1)
        for some in itertools.combinations(numbers, size)
        if sum(losses[i] for i in some) <= most
    ]
    return sorted(within, reverse=True)[refused]


@pytest.mark.parametrize(("refused", "least"), [(0, 0.95), (3, 0.85)])
def test_the_search_against_the_exact_optimum_of_added_losses(refused: int, least: float) -> None:
    """The best mapping, and the best one left when three were refused."""
    generator = torch.Generator().manual_seed(3)
    shares, equal = [], 0
    for _ in range(40):
        macs = [int(value) for value in torch.randint(1, 100, (9,), generator=generator)]
        losses = [float(value) for value in torch.rand(9, generator=generator) ** 3]
        most = 0.4 * sum(losses)
        mappings = Added(macs, losses)
        found = list(itertools.islice(search(mappings, most), refused + 1))
        assert all(mappings.seen[each] <= most for each in found)
        assert len(set(found)) == refused + 1
        best = exact(macs, losses, most, refused)
        shares.append(mappings.macs(found[-1]) / best)
        equal += mappings.macs(found[-1]) == best
    assert min(shares) >= least
    assert equal >= 30


def test_fixed_parts_and_a_budget_for_nothing() -> None:
    mappings = Added([5, 50, 10], [0.3, 0.2, 0.1])
    assert list(search(mappings, 0.45, fixed=frozenset({0}))) == [frozenset({0, 2}), frozenset({0})]
    assert list(search(Added([5, 50], [0.3, 0.2]), 0.1)) == []
    assert list(search(Added([5, 50], [0.3, 0.2]), 0.1, fixed=frozenset({0}))) == []
    assert list(search(Added([5, 50], [0.3, 0.2]), 0.0, trials=0)) == []
    everything = search(Added([5, 50], [0.3, 0.2]), 1.0, trials=0)
    assert [next(everything), next(everything)] == [frozenset({0, 1}), frozenset({1})]


def test_a_refused_mapping_counts_as_above_the_budget() -> None:
    mappings = Added([100, 10, 1], [0.1, 0.1, 0.05])
    assert next(search(mappings, 0.2)) == frozenset({0, 1})
    assert next(search(mappings, 0.2, refused=[frozenset({0, 1})])) == frozenset({0, 2})


def test_a_mapping_is_measured_as_the_plan_without_the_other_layers() -> None:
    x, model = task()
    hybrid = ffebm.convert(model, x[:2])
    parts = parts_of(hybrid.plan)
    measure = Measure(hybrid, score, ffebm.Devices())
    source = measure(Setting("source", "the source", settling=()))["value"]
    assert source == 0
    mappings = Mappings(measure, parts, source, Journal(None, "x", {}), draws=1)
    # Exact devices: what is left is the feedback of the blocks that hold the layers.
    everything = mappings.drop(frozenset(range(len(parts))))
    assert everything == pytest.approx(-score(hybrid.eval()), rel=1e-6)
    alone = ffebm.convert(model, x[:2], force_digital=["3", "6", "9", "12"]).eval()
    assert mappings.drop(frozenset({0})) == pytest.approx(-score(alone), abs=1e-12)
