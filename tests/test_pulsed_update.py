"""Updates by pulses: the device's law and its statistics, any optimizer as pulses, and Tiki-Taka against asymmetry."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from torch import nn
from torch.optim import Optimizer

import ffebm_compiler as ffebm
from ffebm_compiler import Devices, PulsedUpdate, PulseResponse, TikiTaka
from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.devices.pulses import PulsedWeights

SIDE = 1000


def _pickled(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def _many(response: PulseResponse) -> PulsedWeights:
    """A million devices whose bound is 1."""
    return PulsedWeights(response, torch.zeros(SIDE, SIDE, dtype=torch.float64), 0, 0, bound=1.0)


@pytest.mark.parametrize("softness", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("direction", [1, -1])
def test_pulses_are_the_recursion_of_single_pulses(softness: float, direction: int) -> None:
    response = PulseResponse(step=0.01, asymmetry=0.2, softness=softness)
    weights = PulsedWeights(response, torch.zeros(1, 9, dtype=torch.float64), 0, 0, bound=2.0)
    start = torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[None]
    expected = start.clone()
    for _ in range(40):
        size = 0.02 * (1 + direction * 0.2) * (1 - direction * softness * expected / 2.0)
        expected = (expected + direction * size).clamp(-2, 2)
    found = weights.pulsed(start, torch.full_like(start, 40.0 * direction))
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.equal(weights.pulsed(start, torch.zeros_like(start)), start)


def test_numbers_of_pulses_have_the_mean_of_the_change() -> None:
    weights = _many(PulseResponse(step=0.01))
    change = torch.full((SIDE, SIDE), 0.0237, dtype=torch.float64)
    torch.manual_seed(0)
    found = weights.pulses_for(change)
    assert set(found.unique().tolist()) == {2.0, 3.0}
    assert float(found.mean()) == pytest.approx(2.37, rel=0.02)
    assert float(weights.pulses_for(-change).mean()) == pytest.approx(-2.37, rel=0.02)


def test_noise_from_cycle_to_cycle_grows_with_the_root_of_the_pulses() -> None:
    weights = _many(PulseResponse(step=0.001, cycle=0.5, softness=1.0))
    start = torch.full((SIDE, SIDE), 0.2, dtype=torch.float64)
    torch.manual_seed(0)
    for pulses in (1, 9):
        moved = weights.pulsed(start, torch.full_like(start, float(pulses))) - start
        assert float(moved.std()) == pytest.approx(0.5 * 0.001 * 0.8 * math.sqrt(pulses), rel=0.02)
        assert float(moved.mean()) == pytest.approx((0.8 - 0.8 * 0.999**pulses), rel=0.02)


def test_spread_over_the_devices() -> None:
    weights = _many(PulseResponse(step=0.01, asymmetry=0.1, step_spread=0.2, asymmetry_spread=0.05, bound_spread=0.1))
    assert float(weights.steps.mean()) == pytest.approx(0.01, rel=0.02)
    assert float(weights.steps.std()) == pytest.approx(0.002, rel=0.02)
    assert float(weights.asymmetry.mean()) == pytest.approx(0.1, rel=0.02)
    assert float(weights.asymmetry.std()) == pytest.approx(0.05, rel=0.02)
    assert float(weights.bounds.std()) == pytest.approx(0.1, rel=0.02)


def test_equal_pulses_up_and_down_end_at_the_symmetry_point() -> None:
    response = PulseResponse(step=0.01, asymmetry=0.3)
    weights = PulsedWeights(response, torch.zeros(1, 5, dtype=torch.float64), 0, 0, bound=1.0)
    value = torch.linspace(-0.9, 0.9, 5, dtype=torch.float64)[None]
    one = torch.ones_like(value)
    for _ in range(2000):
        value = weights.pulsed(weights.pulsed(value, one), -one)
    assert torch.allclose(value, weights.symmetry_points, atol=0.01)
    assert torch.allclose(weights.symmetry_points, torch.full_like(value, 0.3))
    hard = PulsedWeights(PulseResponse(softness=0.0, asymmetry=0.3), value, 0, 0)
    assert not hard.symmetry_points.any()


def _regression(wrap: Callable[[Optimizer], Optimizer], steps: int = 400, rate: float = 0.05) -> float:
    """Mean squared error of a linear layer against a target of the same form, from noisy batches."""
    target = noise(8, 12, seed=1) * 0.3
    layer = seeded(lambda: nn.Linear(12, 8, bias=False))
    optimizer = wrap(torch.optim.SGD(layer.parameters(), rate))
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, 12, generator=generator)
        y = x @ target.T + torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(layer(x), y, reduction="sum").div(16).backward()
        optimizer.step()
    return float((layer.weight.detach() - target).square().mean() / target.square().mean())


def test_fine_symmetric_pulses_are_the_optimizer() -> None:
    fine = Devices(update=PulseResponse(step=1e-5, softness=0.0, bound=40.0))
    assert _regression(lambda inner: PulsedUpdate(inner, fine)) == pytest.approx(
        _regression(lambda inner: inner), rel=0.05
    )


def test_tiki_taka_repairs_asymmetry() -> None:
    """Noisy gradients pull asymmetric devices to their symmetry point, which is not where the loss is least."""
    devices = Devices(update=PulseResponse(step=0.002, asymmetry=0.5, bound=3.0))
    plain = _regression(lambda inner: PulsedUpdate(inner, devices), 1500, 0.03)
    repaired = _regression(lambda inner: TikiTaka(inner, devices), 1500, 0.03)
    assert repaired < 0.2 * plain
    assert repaired < _regression(lambda inner: inner, 1500, 0.03)  # its buffer averages the gradient's noise


@pytest.mark.parametrize("kind", [PulsedUpdate, TikiTaka])
@pytest.mark.parametrize(
    "inner", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, 1e-2)]
)
def test_any_optimizer_is_wrapped_and_resumed(kind: Any, inner: Any) -> None:
    devices = Devices(update=PulseResponse(step=0.003, cycle=0.3, step_spread=0.1), seed=5)

    def step(model: nn.Module, optimizer: Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(noise(6, 5)).square().sum().backward()
            optimizer.step()

    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))
    optimizer = kind(inner(model.parameters()), devices)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(model, optimizer, 3)
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    other = copy.deepcopy(model)
    resumed = kind(inner(other.parameters()), devices)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (other, resumed)):
        torch.manual_seed(3)
        step(each, its, 4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    loss = resumed.step(lambda: torch.tensor(1.5))
    assert float(loss) == 1.5


KINDS: list[Any] = [PulsedUpdate, TikiTaka]


@pytest.mark.parametrize("kind", [PulsedUpdate, partial(TikiTaka, rate=5.0)])
def test_a_group_that_is_added_later_trains_and_resumes(kind: Any) -> None:
    """Gradual unfreezing: the layer that joins is stepped by pulses, its bias exactly; a state holds its devices."""
    coarse = Devices(update=PulseResponse(step=0.003, cycle=0.3, step_spread=0.1, asymmetry_spread=0.1), seed=5)

    def made() -> tuple[nn.Sequential, Any]:
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
        optimizer = kind(torch.optim.Adam(model[2].parameters(), 1e-2), coarse)
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.02})
        return model, optimizer

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        model(noise(6, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = made()
    before = [p.detach().clone() for p in model[0].parameters()]
    for _ in range(3):
        step(model, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, model[0].parameters(), strict=True))
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert len(optimizer.param_groups) == 2
    arrays = [*optimizer.weights, *getattr(optimizer, "fast", ())]
    assert len({float(each.steps.sum()) for each in arrays}) == len(arrays)  # each has draws of its own
    resumed = kind(torch.optim.Adam(model.parameters(), 1e-2), coarse)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        resumed.load_state_dict(optimizer.state_dict())
    copied, resumed = made()
    copied.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's optimizers share what they load
    for each, its in ((model, optimizer), (copied, resumed)):
        torch.manual_seed(3)
        step(each, its)
        step(each, its)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_a_group_that_is_added_beside_chosen_parameters_is_digital() -> None:
    model, exact = (seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) for _ in range(2))
    optimizer: Optimizer = PulsedUpdate(torch.optim.SGD(model[1].parameters(), 0.1), "reram", [model[1].weight])
    for network in (model, exact):
        network(noise(6, 4)).square().sum().backward()
    optimizer.add_param_group({"params": model[0].weight})
    optimizer.step()
    torch.optim.SGD([exact[0].weight], 0.1).step()
    assert torch.equal(model[0].weight, exact[0].weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_or_pickled_update_goes_on_alike(kind: Any, copied: Callable[[Any], Any]) -> None:
    model = seeded(lambda: nn.Linear(5, 4))
    optimizer = kind(torch.optim.Adam(model.parameters(), 1e-2, foreach=True), "reram")
    torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # puts a wrapper around step

    def step(network: nn.Module, its: Optimizer) -> Any:
        def closure() -> torch.Tensor:
            its.zero_grad()
            loss: torch.Tensor = network(noise(6, 5)).square().sum()
            loss.backward()
            return loss

        return its.step(closure)

    step(model, optimizer)
    other, its = copied((model, optimizer))
    losses = []
    for network, each in ((model, optimizer), (other, its)):
        torch.manual_seed(3)
        step(network, each)
        losses.append(step(network, each).item())
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert its.param_groups is its.optimizer.param_groups
    assert its.state is its.optimizer.state


def test_hooks_of_a_step_are_called_once() -> None:
    """Also where both classes have been made, since torch puts its hooks around each class's `step`."""
    calls: list[str] = []
    for kind in (*KINDS, *KINDS):
        optimizer = kind(_sgd(), "reram")
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
        optimizer.step()
    assert calls == ["before", "after"] * 4


def test_only_matrices_are_pulsed_and_others_are_exact() -> None:
    model, exact = (seeded(lambda: nn.Linear(5, 4)) for _ in range(2))
    coarse = Devices(update=PulseResponse(step=0.05, softness=0.0, bound=1.0))
    optimizers = (
        PulsedUpdate(torch.optim.SGD(model.parameters(), 0.01), coarse),
        torch.optim.SGD(exact.parameters(), 0.01),
    )
    start = model.weight.detach().clone()
    for each, optimizer in zip((model, exact), optimizers, strict=True):
        each(noise(6, 5)).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.bias, exact.bias)
    steps = (model.weight.detach() - start) / (0.05 * start.abs().max())
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert not torch.equal(model.weight, exact.weight)


def test_a_hybrid_on_devices_trains_by_pulses() -> None:
    """Static errors, EP and pulses together: the loss falls, and the loop gain is held."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)))
    x, y = noise(32, 6), torch.arange(32) % 4
    devices = Devices(programming=0.05, update=PulseResponse(step=0.002, bound=4.0, cycle=0.3))
    hybrid = ffebm.convert(model, x, devices=devices, feedback=0.3).train()
    analog = [hybrid.get_parameter(name) for name, place in hybrid.plan.weights.items() if place.block]
    optimizer = PulsedUpdate(torch.optim.Adam(hybrid.parameters(), 0.01), devices, analog)
    losses = []
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(hybrid(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    hybrid(x)
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.3, rel=0.06)


def _sgd() -> Optimizer:
    return torch.optim.SGD(nn.Linear(3, 2).parameters(), 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PulseResponse(step=0.0), "step is 0.0; expected a finite number above 0"),
        (lambda: PulseResponse(step=2.0), r"step is 2.0; .* at most 1"),
        (lambda: PulseResponse(asymmetry=1.0), "asymmetry is 1.0"),
        (lambda: PulseResponse(softness=1.5), "softness is 1.5"),
        (lambda: PulseResponse(cycle=-1), "cycle is -1"),
        (lambda: PulseResponse(bound=0), "bound is 0"),
        (lambda: Devices(update=0.1), "update is 0.1; expected a PulseResponse or None"),
        (lambda: PulsedUpdate("SGD", "reram"), "optimizer is a str; expected one of torch's"),  # type: ignore[arg-type]
        (lambda: PulsedUpdate(_sgd(), "pcm"), "devices are 'pcm', which do not say how a pulse changes them"),
        (
            lambda: PulsedUpdate(_sgd(), "reram", [torch.zeros(2, 2)]),
            "`parameters` holds a tensor that the optimizer does not step",
        ),
        (lambda: PulsedUpdate(_sgd(), "reram", []), "`parameters` is empty: pass those of its parameters"),
        (lambda: TikiTaka(_sgd(), "reram", every=0), "every is 0; expected a number of steps"),
        (lambda: TikiTaka(_sgd(), "reram", rate=0.0), "rate is 0.0"),
        (lambda: PulsedUpdate(_sgd(), "reram").load_state_dict({}), "this one has none: load what its own"),
        (
            lambda: TikiTaka(_sgd(), "reram").load_state_dict(PulsedUpdate(_sgd(), "reram").state_dict()),
            "the state of a TikiTaka is expected",
        ),
    ],
)
def test_bad_input_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_state_of_other_devices_is_refused_by_count() -> None:
    state: dict[str, Any] = PulsedUpdate(_sgd(), "reram").state_dict()
    state["bounds"] = [1.0, 2.0]
    with pytest.raises(InputError, match="for 1 parameters is expected, and this one has 2"):
        PulsedUpdate(_sgd(), "reram").load_state_dict(state)
