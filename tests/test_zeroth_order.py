"""Zeroth-order gradients of digital parts, against their equation and against backpropagation."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import relative
from finite_differences import squared_error
from networks import TwoBlocks, converted, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.feedforward.blocks import FeedforwardBlock
from ffebm_compiler.runtime.feedforward.zeroth_order import directions


class Digital(nn.Module):
    """Batch norm, dropout and a product that stay digital."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.4)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(self.norm(self.first(x)).relu()))


def digital() -> tuple[ffebm.HybridModel, nn.Module, Tensor]:
    model, x = seeded(Digital).double(), noise(7, 5).double()
    return ffebm.convert(model, x, force_digital="*").train(), model.train(), x


def part_of(hybrid: ffebm.HybridModel) -> FeedforwardBlock:
    (part,) = hybrid.feedforward_blocks.values()
    assert isinstance(part, FeedforwardBlock)
    return part


def run(hybrid: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    hybrid.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)  # the dropout masks
    squared_error(hybrid(x)).backward()
    assert x.grad is not None
    return {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}, x.grad


def test_it_is_its_equation_with_the_same_masks_and_frozen_statistics() -> None:
    settings = ffebm.ZerothOrder(samples=3, sigma=1e-3, seed=5)
    hybrid, model, x = digital()
    state = copy.deepcopy(model.state_dict())
    hybrid.set_gradient("ep", feedforward=settings)
    found, found_x = run(hybrid, x)
    # The operands of the part in its order: which tensor each of them is.
    names = {id(p): name for name, p in hybrid.named_parameters()}
    seen: list[Tensor] = []
    handle = part_of(hybrid).register_forward_pre_hook(lambda _, operands: seen.extend(operands))
    with torch.no_grad():
        hybrid.eval()(x)
    handle.remove()
    moved = [value for value in seen if id(value) in names or value is x or value.shape == x.shape]
    order = [names.get(id(value), "x") for value in moved]
    assert sorted(order) == sorted([*names.values(), "x"])

    def output(shifts: dict[str, Tensor]) -> Tensor:
        model.load_state_dict(state)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(shifts.get(name, torch.zeros(())))
            torch.manual_seed(3)
            return model(x + shifts.get("x", torch.zeros(())))

    centre = output({}).requires_grad_()
    (delta,) = torch.autograd.grad(squared_error(centre), centre)
    expected = {name: torch.zeros_like(value) for name, value in zip(order, moved, strict=True)}
    for signs in directions(settings, 0, 0, moved):
        assert all(bool((sign.abs() == 1).all()) for sign in signs)
        shifts = {name: 1e-3 * sign for name, sign in zip(order, signs, strict=True)}
        up, down = output(shifts), output({name: -shift for name, shift in shifts.items()})
        change = float(((up - down) * delta).sum()) / 2e-3
        for name, sign in zip(order, signs, strict=True):
            expected[name] += change * sign / 3
    for name, gradient in {**found, "x": found_x}.items():
        assert relative(gradient, expected[name]) <= 1e-6, name
    # One update of the statistics, as one forward makes.
    model.load_state_dict(state)
    torch.manual_seed(3)
    model(x)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(hybrid.get_buffer(name), buffer)


def test_the_mean_over_all_signs_is_the_gradient() -> None:
    x = noise(1, 2).double()
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 2, bias=False), nn.Softmax(1))).double()
    hybrid = ffebm.convert(model, x, force_digital="*")
    exact, exact_x = run(hybrid, x)
    hybrid.set_gradient("ep", feedforward=ffebm.ZerothOrder(samples=2000, sigma=1e-4))
    found, found_x = run(hybrid, x)
    assert relative(found["0.weight"], exact["0.weight"]) < 0.1
    assert relative(found_x, exact_x) < 0.1
    # Every pattern of signs, from the definition.
    weight, output = model[0].weight.detach(), model(x).detach().requires_grad_()
    (delta,) = torch.autograd.grad(squared_error(output), output)
    total, step = torch.zeros(2, 2, dtype=torch.float64), 1e-5
    for pattern in product((-1.0, 1.0), repeat=6):
        signs = torch.tensor(pattern, dtype=torch.float64)
        z, z_x = signs[:4].reshape(2, 2), signs[4:]
        ends = [(((x + s * z_x) @ (weight + s * z).T).softmax(1) * delta).sum() for s in (step, -step)]
        total += z * (ends[0] - ends[1]) / (2 * step) / 64
    torch.testing.assert_close(total, exact["0.weight"], rtol=1e-6, atol=1e-9)


class OneWay(torch.autograd.Function):
    """A function whose backward must not be called."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("backpropagated")


class Between(TwoBlocks):
    """Two blocks with a digital part between them that has no backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y = OneWay.apply(self.norm(self.b(self.a(x).tanh())))
        return self.d(self.c(y).tanh())


def test_no_backpropagation_is_left_between_blocks() -> None:
    x = noise(5, 6)
    hybrid = ffebm.convert(seeded(Between), x).train()
    with pytest.raises(RuntimeError, match="backpropagated"):
        run(hybrid, x)
    hybrid.set_gradient("ep", feedforward="zeroth-order")
    found, _ = run(hybrid, x)
    assert set(found) == {name for name, _ in hybrid.named_parameters()}
    assert all(bool(gradient.abs().sum() > 0) for gradient in found.values())
    assert "digital parts without backpropagation: ZerothOrder(samples=1" in hybrid.summary()
    hybrid.set_gradient("ep", blocks=[hybrid.blocks[0].name])
    run(hybrid, x)  # as it was
    hybrid.set_gradient("ep")
    with pytest.raises(RuntimeError, match="backpropagated"):
        run(hybrid, x)


def test_many_samples_come_near_the_gradient_of_every_kind_of_part() -> None:
    hybrid, x = converted("transformer", nn.GELU)  # layer norms, attention, residual sums
    hybrid = copy.deepcopy(hybrid).double()
    exact, _ = run(hybrid, x.double())
    hybrid.set_gradient("ep", feedforward=ffebm.ZerothOrder(samples=400))
    found, _ = run(hybrid, x.double())
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (found, exact)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.5


def test_training_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    x = noise(5, 6)
    hybrid = ffebm.convert(seeded(Between), x).train()
    hybrid.set_gradient("ep", feedforward=ffebm.ZerothOrder(samples=2, seed=4))
    first, _ = run(hybrid, x)
    hybrid.save(tmp_path / "saved")
    torch.save(hybrid.state_dict(), tmp_path / "state.pt")
    copies = {
        "copy": copy.deepcopy(hybrid),
        "files": ffebm.load(tmp_path / "saved", seeded(Between)).train(),
        "state": ffebm.convert(seeded(Between), x).train(),
    }
    copies["state"].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    expected, _ = run(hybrid, x)
    assert not torch.equal(expected["a.weight"], first["a.weight"])  # other directions at every call
    for kind, other in copies.items():
        found, _ = run(other, x)
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (kind, name)
    parts = [part for part in hybrid.feedforward_blocks.values() if isinstance(part, FeedforwardBlock)]
    again = pickle.loads(pickle.dumps(parts[0]))
    assert (again.zeroth_order, again.calls) == (parts[0].zeroth_order, parts[0].calls)


def test_a_graph_that_is_kept_gives_the_same_gradient_again() -> None:
    hybrid, _, x = digital()
    hybrid.set_gradient("ep", feedforward="zeroth-order")
    loss = squared_error(hybrid(x))
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}
    loss.backward()
    for name, parameter in hybrid.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * first[name])


class Moving(nn.Module):
    """A moving average that a forward writes and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 6)
        self.register_buffer("average", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).relu()
        self.average.mul_(0.9).add_(0.1 * y.detach().mean(0))
        return y - self.average


def test_a_part_that_writes_its_state_is_refused_by_name() -> None:
    hybrid = ffebm.convert(Moving(), noise(4, 5))
    with pytest.raises(ffebm.UnsupportedError, match=r"\w+ cannot have a zeroth-order gradient: it writes 'average'"):
        hybrid.set_gradient("implicit", feedforward="zeroth-order")
    assert {block.module.estimator.name for block in hybrid.blocks} == {"ep"}
    hybrid.set_gradient("implicit", feedforward="backprop")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_hybrid_perturbs_too() -> None:
    x = noise(5, 6)
    hybrid = ffebm.convert(seeded(Between), x).train()
    hybrid.set_gradient("ep", feedforward="zeroth-order")
    twin = copy.deepcopy(hybrid)
    expected, _ = run(hybrid, x)
    found, _ = run(torch.compile(twin, backend="eager"), x)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient)


def test_the_check_names_it() -> None:
    hybrid, _, x = digital()
    hybrid.set_gradient("ep", feedforward=ffebm.ZerothOrder(samples=200))
    report = ffebm.check_gradients(hybrid, x, squared_error)
    assert report.own == "ep, zeroth-order"
    assert report.worst("ep")[1].cosine > 0.999999
    assert 0.2 < report["second.bias"]["ep, zeroth-order"].cosine < 0.999999


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ffebm.ZerothOrder(samples=0), "samples is 0; expected a positive integer"),
        (lambda: ffebm.ZerothOrder(sigma=0.0), r"sigma is 0.0; expected a positive number"),
        (lambda: ffebm.ZerothOrder(seed=-1), "seed is -1; expected an integer"),
        (
            lambda: converted("mlp", nn.Tanh)[0].set_gradient("ep", feedforward="second"),
            "feedforward is 'second'; expected 'backprop', 'zeroth-order'",
        ),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ffebm.InputError, match=message):
        make()


@pytest.mark.parametrize("feedforward", ["zeroth-order", "quantised"])
def test_a_choice_for_digital_parts_is_refused_where_there_are_none(feedforward: str) -> None:
    hybrid = copy.deepcopy(converted("mlp", nn.Tanh)[0])
    match = f"feedforward is {feedforward!r}, and the plan has no digital part.* leave `feedforward` out"
    with pytest.raises(ffebm.InputError, match=match):
        hybrid.set_gradient("implicit", feedforward=feedforward)
    assert {block.module.estimator.name for block in hybrid.blocks} == {"ep"}  # nothing was set
    hybrid.set_gradient("implicit", feedforward="backprop")
