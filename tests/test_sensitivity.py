"""`ffebm.sensitivity`: what each weight's and each block's devices cost."""

from __future__ import annotations

import copy
import json
import re
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from by_name import interrupted_at, mean_of_outputs, minus_distance
from torch import Tensor, nn

import ffebm_compiler as ffebm

DEVICES = ffebm.Devices(programming=0.2, seed=5)


@cache
def task() -> tuple[Tensor, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
    ).eval()
    return torch.randn(64, 6), model


def score(net: Callable[[Tensor], Tensor]) -> float:
    return minus_distance(net, *task())


@cache
def plain() -> ffebm.HybridModel:
    x, model = task()
    return ffebm.convert(model, x[:2])


def hybrid_of(**options: Any) -> ffebm.HybridModel:
    x, model = task()
    return ffebm.convert(model, x[:2], **options) if options else copy.deepcopy(plain())


def test_each_part_is_measured_alone() -> None:
    hybrid = hybrid_of()
    before = copy.deepcopy(hybrid.state_dict())
    found = ffebm.sensitivity(hybrid, score, DEVICES)
    assert list(found.weights) == ["0.weight", "3.weight", "5.weight"]
    assert list(found.blocks) == ["block_1", "block_2"]
    assert list(found.feedback) == ["block_2"]
    assert found.source == 0
    assert found.ideal == score(hybrid.eval())
    joint = hybrid_of().eval()
    every = []
    for draw in range(3):
        joint.set_devices(ffebm.Devices(programming=0.2, seed=5 + draw))
        every.append(found.ideal - score(joint))
    assert found.everything.values == pytest.approx(every, rel=1e-5)
    loss = found.everything
    assert loss.mean == pytest.approx(statistics.fmean(every), rel=1e-5)
    assert loss.error == pytest.approx(statistics.stdev(every) / 3**0.5, rel=1e-4)
    assert found.weights["3.weight"].values != found.blocks["block_2"].values
    x, model = task()
    joint.set_devices(None)
    with torch.no_grad():  # the feedback alone: one draw, exact devices
        error, expected = joint(x) - model(x), model(x)
    varied = (expected - expected.mean()).square().sum()
    assert found.feedback["block_2"].deviation == pytest.approx(float(error.square().sum() / varied), rel=1e-4)
    assert all(loss.deviation for loss in found.losses)
    assert found.feedback["block_2"].values == (0 - found.ideal,)
    assert hybrid.devices is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in hybrid.state_dict().items())


def test_a_layer_alone_is_a_hybrid_with_one_block() -> None:
    fabric = ffebm.Hardware(layers_per_block=1)
    found = ffebm.sensitivity(hybrid_of(hardware=fabric), score, DEVICES, draws=2)
    assert found.ideal == pytest.approx(0, abs=1e-12)
    assert found.feedback == {}
    alone = hybrid_of(hardware=fabric, force_digital=["3", "5"]).eval()
    losses = []
    for draw in range(2):
        alone.set_devices(ffebm.Devices(programming=0.2, seed=5 + draw))
        losses.append(-score(alone))
    assert found.weights["0.weight"].values == pytest.approx(losses, rel=1e-4)
    assert found.blocks["block_1"].values == found.weights["0.weight"].values


def test_losses_of_a_metric_that_should_be_small() -> None:
    hybrid = hybrid_of()
    large = ffebm.sensitivity(hybrid, score, DEVICES, draws=1)
    small = ffebm.sensitivity(hybrid, lambda net: -score(net), DEVICES, draws=1, higher_is_better=False)
    assert [loss.values for loss in small.losses] == [loss.values for loss in large.losses]
    assert large.everything.error is None


def test_devices_of_the_hybrid_noise_and_converters() -> None:
    hybrid = hybrid_of(devices=ffebm.Devices(read_noise=0.02, adc_bits=5, dac_bits=5))
    state = torch.get_rng_state()
    first, second = (ffebm.sensitivity(hybrid, score, draws=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second
    assert first.everything.values[0] != first.everything.values[1]
    assert first.devices == hybrid.devices
    aged = ffebm.sensitivity(hybrid, score, ffebm.Devices(drift=0.05), age=3600.0, draws=1)
    assert aged.everything.mean > 0
    assert "3600 s old" in str(aged)


def test_layers_that_share_a_weight_are_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))

    hybrid = ffebm.convert(Tied(), torch.randn(2, 6))
    x = torch.randn(16, 6)
    found = ffebm.sensitivity(hybrid, lambda net: net(x).sum(), DEVICES, draws=1)
    assert list(found.weights) == ["a.weight", "c.weight"]
    assert found.weights["a.weight"].macs == 72


@pytest.mark.parametrize(
    "devices",
    [ffebm.Devices(mismatch=0.1), ffebm.Devices(programming=0.1, mismatch=0.1)],
    ids=["mismatch", "both"],
)
@pytest.mark.parametrize("feedback_weights", ["tied", "free"])
def test_a_part_of_a_block_with_feedback_of_its_own(devices: ffebm.Devices, feedback_weights: str) -> None:
    hybrid = hybrid_of(feedback_weights=feedback_weights)
    found = ffebm.sensitivity(hybrid, score, devices, draws=1)
    assert all(loss.mean > 0 for loss in (*found.weights.values(), *found.blocks.values()))


def test_table_and_picture(tmp_path: Path) -> None:
    hybrid = hybrid_of()
    found = ffebm.sensitivity(hybrid, score, DEVICES, draws=2)
    text = str(found)
    assert all(len(line) <= 80 for line in text.splitlines()), text
    assert "modelled" in text
    worst = max(found.of("weight"), key=lambda loss: loss.mean).name
    others = [loss.name for loss in found.of("weight") if loss.name != worst]
    assert all(0 < text.index("share of MACs") < text.index(worst) < text.index(name) for name in others), text
    found.save_svg(tmp_path / "losses.svg")
    drawn = ET.fromstring((tmp_path / "losses.svg").read_text(encoding="utf-8"))
    words = "".join(drawn.itertext())
    assert "3.weight" in words
    assert "block_2" in words
    found.to_json(tmp_path / "losses.json")
    data = json.loads((tmp_path / "losses.json").read_text())
    assert data["losses"][0]["mean"] == found.everything.mean


def test_an_evaluate_that_is_not_deterministic() -> None:
    x, _ = task()
    with pytest.raises(ffebm.InputError, match=r"not deterministic: called twice with the source's own comp"):
        ffebm.sensitivity(hybrid_of(), lambda net: net(x[torch.randperm(64)[:8]]).sum(), DEVICES)


def test_an_evaluate_that_fails() -> None:
    hybrid = hybrid_of()
    calls = []

    def failing(net: Any) -> float:
        calls.append(net)
        if len(calls) > 7:
            raise ZeroDivisionError("no sample")
        return 1.0

    with pytest.raises(ffebm.InputError, match="raised an error with layer '0' on devices: ZeroDivisionError: no"):
        ffebm.sensitivity(hybrid, failing, DEVICES)

    def unsettled(net: Any) -> float:
        raise ffebm.ConvergenceError("block_1 does not settle")

    with pytest.raises(ffebm.ConvergenceError, match=r"the source's own computation: block_1 does not settle"):
        ffebm.sensitivity(hybrid, unsettled, DEVICES)
    for wrong, said in (
        (lambda net: "0.9", "of type str"),
        (lambda net: float("nan"), "returned nan"),
        (lambda net: True, "bool"),
        (lambda net: -1e308, r"returned -1e\+308 with .*of at most 1e\+100 in size"),
        (lambda net: 10**400, "returned inf"),
    ):
        with pytest.raises(ffebm.InputError, match=said):
            ffebm.sensitivity(hybrid, wrong, DEVICES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"devices": None}, "this hybrid computes exactly: pass devices='pcm'"),
        ({"evaluate": 3}, "evaluate is a int; expected a function"),
        ({"draws": 0}, "draws is 0; expected a whole number of at least 1"),
        ({"age": -1.0}, "age is -1"),
        ({"executor": 4}, "executor is a int; expected an executor"),
        ({"hybrid": nn.Linear(2, 2)}, "hybrid is a Linear; expected a HybridModel"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"evaluate": score, "devices": DEVICES, **arguments}
    if "hybrid" not in given:
        given["hybrid"] = hybrid_of()
    with pytest.raises(ffebm.InputError, match=said):
        ffebm.sensitivity(**given)


def test_a_plan_without_blocks() -> None:
    with pytest.raises(ffebm.InputError, match="the plan has no analog block"):
        ffebm.sensitivity(hybrid_of(force_digital=["0", "3", "5"]), score, DEVICES)


def test_an_interrupted_call_goes_on(tmp_path: Path) -> None:
    hybrid, file = hybrid_of(), tmp_path / "sensitivity.json"
    expected = ffebm.sensitivity(hybrid, score, DEVICES, draws=2)
    calls: list[int] = []
    interrupted = interrupted_at(9, score, calls)
    with pytest.raises(KeyboardInterrupt):
        ffebm.sensitivity(hybrid, interrupted, DEVICES, draws=2, file=file)
    kept = json.loads(file.read_text())["results"]
    assert len(kept) == 5
    calls[:] = [1] * 100
    assert ffebm.sensitivity(hybrid, interrupted, DEVICES, draws=2, file=file) == expected
    # A feedback has one draw, and block_1 is measured as its only layer.
    assert len(calls) - 100 == 3 + len(expected.losses) * 2 - 1 - 2 - 5
    # Further draws go on from the same file.
    assert ffebm.sensitivity(hybrid, score, DEVICES, draws=1, file=file).weights["3.weight"].values == (
        expected.weights["3.weight"].values[0],
    )
    with pytest.raises(ffebm.InputError, match="of another sensitivity: its devices is"):
        ffebm.sensitivity(hybrid, score, "pcm", file=file)
    with pytest.raises(ffebm.InputError, match=r"another sensitivity: its value of the source is '-0\.0'"):
        ffebm.sensitivity(hybrid, lambda net: 1 + score(net), DEVICES, file=file)
    damaged = json.loads(file.read_text())
    next(value for key, value in damaged["results"].items() if key.startswith("weight"))["value"] = -1e308
    file.write_text(json.dumps(damaged))
    with pytest.raises(ffebm.InputError, match=r"value of 'weight .*' is -1e\+308; expected a number of at most 1e"):
        ffebm.sensitivity(hybrid, score, DEVICES, file=file)
    file.write_text('{"schema": 1}')
    with pytest.raises(ffebm.InputError, match=r"sensitivity.json is no sensitivity \(it has no 'kind'\)"):
        ffebm.sensitivity(hybrid, score, DEVICES, file=file)
    file.write_text('{"schema": 1, "kind": "exploration", "of": {}, "results": {}}')
    with pytest.raises(ffebm.InputError, match="holds 'exploration' of version 1; expected 'sensitivity'"):
        ffebm.sensitivity(hybrid, score, DEVICES, file=file)


class Odd(Executor):
    """An executor whose workers get lost, or that takes no work after the first."""

    def __init__(self, refuses: bool) -> None:
        self.refuses, self.count = refuses, 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.count += 1
        if self.refuses and self.count > 1:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[Any] = Future()
        if self.count == 1:
            future.set_exception(ConnectionError("worker died"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_executors_give_the_same_result(caplog: pytest.LogCaptureFixture) -> None:
    hybrid = hybrid_of()
    devices = ffebm.Devices(programming=0.2, read_noise=0.01)
    expected = ffebm.sensitivity(hybrid, score, devices, draws=2)
    with ThreadPoolExecutor(3) as threads:
        assert ffebm.sensitivity(hybrid, score, devices, draws=2, executor=threads) == expected
    assert ffebm.sensitivity(hybrid, score, devices, draws=2, executor=Odd(refuses=False)) == expected
    assert "a worker of the executor is lost (ConnectionError: worker died)" in caplog.text
    assert ffebm.sensitivity(hybrid, score, devices, draws=2, executor=Odd(refuses=True)) == expected
    assert "the executor takes no work (RuntimeError: cannot schedule" in caplog.text


@pytest.mark.slow
def test_a_process_pool_gives_the_same_result() -> None:
    hybrid = hybrid_of()
    expected = ffebm.sensitivity(hybrid, mean_of_outputs, DEVICES, draws=2)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert ffebm.sensitivity(hybrid, mean_of_outputs, DEVICES, draws=2, executor=pool) == expected
        with pytest.raises(ffebm.InputError, match="cannot send the work of sensitivity to its workers"):
            ffebm.sensitivity(hybrid, lambda net: mean_of_outputs(net), DEVICES, executor=pool)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_how_far_it_is(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    ffebm.sensitivity(hybrid_of(), score, DEVICES, draws=1)
    shown = capsys.readouterr().err
    assert ("sensitivity" in shown) == terminal, shown
    found = re.findall(r"(\d+)/(\d+)", shown)
    assert bool(found) == terminal
    assert not terminal or found[-1][0] == found[-1][1]
