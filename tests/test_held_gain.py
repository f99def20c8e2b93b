"""The loop gain is a measurement, γ a setting: held while weights move, left alone by evaluation."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.energies.edge_norms import MARGIN
from ffebm_compiler.runtime.energies.tracked_norms import TrackedNorms

KAPPA = 0.3


class Small(nn.Module):
    """Convolutions with a stride and a residual add, then linear layers: blocks with chains and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(8 * 9, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        h = torch.relu(self.conv1(h) + h)
        h = torch.relu(self.conv2(h))
        return self.fc2(torch.tanh(self.fc1(h.flatten(1))))


def small() -> tuple[Small, Tensor, Tensor]:
    return seeded(Small), noise(8, 1, 6, 6), torch.arange(8) % 5


def mlp(width: int = 64, depth: int = 3) -> nn.Module:
    layers = [nn.Linear(width, width)]
    for _ in range(depth - 1):
        layers += [nn.Tanh(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


def true_gain(hybrid: ffebm.HybridModel, index: int, x: Tensor) -> float:
    """κ from the singular values of the layers' dense Jacobians in float64, by autograd through the source's layers."""
    block = hybrid.blocks[index]
    program, scales = block.module.program, block.module.scales
    matrix = np.zeros((len(scales), len(scales)))
    digital = hybrid.to_digital().double().eval()
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, layer in digital.named_modules()
        if name in block.state_names
    ]
    with torch.no_grad():
        digital(x[:1].double())
    for hook in hooks:
        hook.remove()
    for later, above in enumerate(program.upstream):
        name = program.layers[later].name
        layer = digital.get_submodule(name)

        def drive(s: Tensor, layer: nn.Module = layer, shape: torch.Size = inputs[name].shape) -> Tensor:
            return layer(s.reshape(shape))

        jacobian = torch.autograd.functional.jacobian(drive, inputs[name])
        dense = jacobian.reshape(-1, inputs[name].numel()).numpy()
        if name == "conv1":  # its drive is conv1(h) + h
            dense = dense + np.eye(len(dense))
        for earlier in above:
            lips = [program.layers[i].activation.lipschitz for i in (earlier, later)]
            norm = float(np.linalg.norm(dense, 2))
            matrix[earlier, later] = math.sqrt(scales[later] / scales[earlier] * lips[0] * lips[1]) * norm
            matrix[later, earlier] = matrix[earlier, later]
    return float(np.abs(np.linalg.eigvalsh(matrix)).max()) ** 2


def step(hybrid: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(hybrid(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


class PlainSGD(torch.optim.Optimizer):
    """An optimizer that writes `.data`, as many do: no counter of the tensor tells."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(group["lr"] * parameter.grad.sign())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "sign of .data": lambda p: PlainSGD(p, 1e-2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_told_and_true_loop_gain_agree_after_any_step(name: str) -> None:
    model, x, y = small()
    hybrid = ffebm.convert(model, x, feedback=KAPPA).train()
    optimizer = OPTIMIZERS[name](hybrid.parameters())
    worst = 0.0
    for index in range(500):
        step(hybrid, optimizer, x, y)
        if index < 20 or index % 20 == 0:
            for place, block in enumerate(hybrid.blocks):
                if block.certificate is not None:  # of the weights after the step, at the γ of the step before
                    worst = max(worst, abs(block.loop_gain / true_gain(hybrid, place, x) - 1))
            hybrid(x)  # sets γ for these weights
            for place, block in enumerate(hybrid.blocks):
                if block.certificate is not None:
                    true = true_gain(hybrid, place, x)
                    assert true == pytest.approx(KAPPA, rel=0.05), (index, block.name)
                    worst = max(worst, abs(block.module.loop_gain / true - 1))
    assert 0 < worst < 0.05


@pytest.mark.parametrize("width", [64, 384])
@pytest.mark.parametrize("growth", [0.03, 0.1])
@pytest.mark.parametrize("between", ["own", "random"])
def test_a_direction_that_overtakes_is_seen(width: int, growth: float, between: str) -> None:
    """A weight grows along one of its singular vectors that was far from the largest."""
    model = seeded(lambda: mlp(width, 2))
    with torch.no_grad():
        model[2].weight.normal_(0, 0.5 / math.sqrt(width), generator=torch.Generator().manual_seed(1))
    x = noise(4, width)
    hybrid = ffebm.convert(model, x, feedback=KAPPA).train()
    weight = hybrid.get_parameter("2.weight")
    left, _, right = torch.linalg.svd(weight.detach())
    p, q = (left[:, 40], right[40]) if between == "own" else (noise(width, seed=3), noise(width, seed=4))
    direction = torch.outer(p / p.norm(), q / q.norm())
    for _ in range(60):
        with torch.no_grad():
            weight.add_(direction, alpha=growth)
        hybrid(x)
        (block,) = hybrid.blocks
        scales = block.module.scales
        exact = float(torch.linalg.matrix_norm(weight.detach().double(), 2)) ** 2 * scales[1] / scales[0]
        assert block.module.loop_gain == pytest.approx(exact, rel=0.05)
        assert exact == pytest.approx(KAPPA, rel=0.05)


@pytest.mark.parametrize(("seed", "growth"), [(0, 0.3), (1, 1.0)])
def test_changes_of_many_directions_are_seen(seed: int, growth: float) -> None:
    """One entry of a kernel changes at all positions. The norm hardly moves at first, nor does any direction of it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh())
    model.append(nn.Conv2d(6, 4, 3, padding=1))
    x = noise(2, 2, 6, 6).double()
    hybrid = ffebm.convert(model.double(), x, feedback=0.9, hardware="ideal").train()
    for index in range(16):
        hybrid(x)
        assert true_gain(hybrid, 0, x) <= 1.05 * hybrid.blocks[0].module.loop_gain
        with torch.no_grad():
            for parameter in hybrid.parameters():
                parameter.view(-1)[(index + 1) * 7919 % parameter.numel()] += growth


def test_a_jump_is_measured_to_convergence() -> None:
    model, x, _ = small()
    hybrid = ffebm.convert(model, x, feedback=KAPPA).train()
    other = seeded(Small, 7)
    with torch.no_grad():
        for mine, theirs in zip(hybrid.parameters(), other.parameters(), strict=True):
            mine.copy_(3 * theirs)
    hybrid(x)
    for index, block in enumerate(hybrid.blocks):
        if block.certificate is not None:
            assert block.module.loop_gain == pytest.approx(KAPPA, rel=1e-6)
            assert true_gain(hybrid, index, x) == pytest.approx(KAPPA / MARGIN**2, rel=5e-3)


@pytest.mark.parametrize("name", ["image", "vectors"])
def test_kept_vectors_of_another_size_are_measured_anew(name: str) -> None:
    """Files of earlier versions have images of another kind."""
    model, x, _ = small()
    hybrid = ffebm.convert(model, x, feedback=KAPPA).train()
    for change in (1.0, 1.05):
        with torch.no_grad():
            for parameter in hybrid.parameters():
                parameter.mul_(change)
        for block in hybrid.blocks:
            kept = block.module.gain.gauge.state()
            for edge in kept.values():
                edge[name] = torch.ones(len(edge[name]), 3)
            block.module.gain.gauge.restore(kept)
        hybrid(x)
    for index, block in enumerate(hybrid.blocks):
        if block.certificate is not None:
            assert block.module.gain.gauge.state()
            assert true_gain(hybrid, index, x) == pytest.approx(KAPPA, rel=0.02)


def test_amplifiers_at_symmetric_feedback_are_set_anew_too(caplog: pytest.LogCaptureFixture) -> None:
    model = seeded(lambda: nn.Sequential(*[module for _ in range(3) for module in (nn.Linear(16, 16), nn.ReLU())]))
    x, few = noise(4, 16), ffebm.GaussSeidel(max_sweeps=8)
    hybrid = ffebm.convert(model, x, energy="resistive", feedback="symmetric", solver=few).eval()
    with torch.no_grad():
        hybrid.get_parameter("2.weight").mul_(40)
    with caplog.at_level("WARNING", logger="ffebm_compiler"):
        assert bool(hybrid(x).isfinite().all())
    (record,) = (record for record in caplog.records if record.name.startswith("ffebm_compiler"))
    assert "block_1 did not settle in evaluation" in record.getMessage()


def test_a_phase_that_does_not_settle_measures_and_settles_once_more(caplog: pytest.LogCaptureFixture) -> None:
    """Weights that changed unseen: the free phase diverges, and γ is set for them."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    x = noise(4, 16)
    hybrid = ffebm.convert(model, x, feedback=0.9).train()
    weight = hybrid.get_parameter("2.weight")
    weight.data *= 40
    before = hybrid.blocks[0].module.scales
    hybrid.blocks[0].module.gain.fitted(hybrid._made_of("block_1"))
    assert torch.isfinite(hybrid(x)).all()
    assert hybrid.blocks[0].module.scales != before
    assert hybrid.blocks[0].module.last.converged
    # In evaluation γ is left alone: what these weights need is of this relaxation only, and the log says so.
    with torch.no_grad():
        weight.mul_(40)
    hybrid.eval()
    scales = hybrid.blocks[0].module.scales
    with caplog.at_level("WARNING", logger="ffebm_compiler"):
        output = hybrid(x)
    assert "block_1 did not settle in evaluation" in caplog.text
    assert "Call hybrid.recertify() to keep that" in caplog.text
    assert hybrid.blocks[0].module.scales == scales
    output.sum().backward()  # at the γ of that relaxation
    found = [parameter.grad.clone() for parameter in hybrid.parameters()]
    hybrid.zero_grad()
    hybrid.recertify()
    assert hybrid.blocks[0].module.scales != scales
    again = hybrid(x)
    torch.testing.assert_close(again, output)
    again.sum().backward()
    for ours, theirs in zip(hybrid.parameters(), found, strict=True):
        torch.testing.assert_close(ours.grad, theirs)
    # Where γ is held it stays, and the error says what to do.
    with torch.no_grad():
        weight.mul_(40)
    with (
        hybrid.held_feedback(),
        pytest.raises(ffebm.ConvergenceError, match=r"call hybrid\.recertify\(\) if the weights"),
    ):
        hybrid(x)


def gains(hybrid: ffebm.HybridModel) -> list[Any]:
    return [copy.deepcopy(block.module.gain.state()) for block in hybrid.blocks]


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@pytest.mark.parametrize("feedback", [KAPPA, "symmetric"])
def test_evaluation_changes_nothing(feedback: float | str) -> None:
    model, x, y = small()
    with torch.no_grad():
        model.conv2.weight.mul_(0.5), model.conv1.weight.mul_(0.1)
    hybrid = ffebm.convert(model, x, feedback=feedback, force_digital="stem").train()
    optimizer = torch.optim.Adam(hybrid.parameters(), 1e-3)
    for _ in range(3):
        step(hybrid, optimizer, x, y)
    before, weights = gains(hybrid), copy.deepcopy(hybrid.state_dict())
    hybrid.eval()
    with torch.no_grad():
        want = hybrid(x)
    hybrid(x).sum().backward()
    hybrid.compare(x)
    hybrid.diagnose(x)
    ffebm.check_gradients(hybrid, x, lambda out: F.cross_entropy(out, y))
    hybrid.summary(), hybrid.cost_report(), hybrid._repr_html_(), copy.deepcopy(hybrid), hybrid.state_dict()
    told = [block.loop_gain for block in hybrid.blocks]
    assert equal(gains(hybrid), before)
    with torch.no_grad():
        assert torch.equal(hybrid(x), want)
    # What is read is of the present weights, although they were not set for it.
    for index, block in enumerate(hybrid.blocks):
        if block.certificate is not None:
            assert told[index] == pytest.approx(true_gain(hybrid, index, x), rel=0.02)
    assert all(torch.equal(value, weights[key]) for key, value in hybrid.state_dict().items())


def test_reading_the_loop_gain_measures_changed_weights_and_sets_nothing() -> None:
    model = seeded(lambda: mlp(16, 2))
    hybrid = ffebm.convert(model, noise(4, 16), feedback=0.1)
    with torch.no_grad():
        hybrid.get_parameter("2.weight").mul_(3)
    (block,) = hybrid.blocks
    scales = block.module.scales
    assert block.loop_gain == pytest.approx(0.9, rel=1e-3)
    assert block.module.scales == scales
    assert "0.9" in repr(block)
    hybrid.train()(noise(4, 16))
    assert block.loop_gain == pytest.approx(0.1, rel=0.01)


def test_gradient_checks_hold_the_feedback() -> None:
    """In train mode, at weights that moved since: reference and estimators see the γ of the present setting."""
    model = seeded(lambda: mlp(12, 2)).double()
    x = noise(5, 12).double()
    hybrid = ffebm.convert(model, x, feedback=0.6).train()
    with torch.no_grad():
        hybrid.get_parameter("2.weight").mul_(1.2)
    before = gains(hybrid)
    report = ffebm.check_gradients(hybrid, x, lambda out: out.square().mean())
    assert report.worst("implicit")[1].relative_error < 1e-8
    assert equal(gains(hybrid), before)
    # Finite differences in train mode: γ is a constant, as an amplifier's is.
    weight = hybrid.get_parameter("2.weight")
    with hybrid.held_feedback():
        hybrid.set_gradient("implicit")
        hybrid(x).square().mean().backward()
        values = []
        for shift in (1e-5, -2e-5):
            with torch.no_grad():
                weight[3, 4] += shift
                values.append(float(hybrid(x).square().mean()))
    difference = (values[0] - values[1]) / 2e-5
    assert float(weight.grad[3, 4]) == pytest.approx(difference, rel=1e-6)
    assert equal(gains(hybrid), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_accumulation_and_two_forwards_see_one_feedback(reentrant: bool) -> None:
    model, x, y = small()
    hybrid = ffebm.convert(model, x, feedback=KAPPA).train()
    hybrid.recertify_every = 1
    optimizer = torch.optim.Adam(hybrid.parameters(), 1e-2)
    step(hybrid, optimizer, x, y)
    plain = copy.deepcopy(hybrid)
    F.cross_entropy(plain(x), y).backward()
    optimizer.zero_grad()
    given = x.clone().requires_grad_()  # the reentrant form gives gradients only where an input has one
    F.cross_entropy(checkpoint(hybrid, given, use_reentrant=reentrant), y).backward()
    after = gains(hybrid)
    assert equal(after, gains(plain))
    for ours, theirs in zip(hybrid.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    for _ in range(2):
        F.cross_entropy(hybrid(x), y).backward()
    assert equal(gains(hybrid), after)
    assert hybrid.blocks[0].module.gain.changes == 1


def test_functional_call_and_frozen_weights() -> None:
    model, x, _ = small()
    hybrid = ffebm.convert(model, x, feedback=KAPPA).train()
    larger = {name: 2 * value.detach() for name, value in hybrid.named_parameters()}
    torch.func.functional_call(hybrid, larger, (x,))
    index = next(i for i, block in enumerate(hybrid.blocks) if block.certificate is not None)
    first = hybrid.blocks[index].module.scales
    hybrid(x)  # back at its own weights
    assert hybrid.blocks[index].module.scales != first
    assert true_gain(hybrid, index, x) == pytest.approx(KAPPA, rel=0.02)
    changes = hybrid.blocks[index].module.gain.changes
    for _ in range(3):
        hybrid(x)
    assert hybrid.blocks[index].module.gain.changes == changes


@pytest.mark.parametrize("energy", ["hopfield", "resistive"])
@pytest.mark.parametrize("trained", [False, True])
def test_evaluation_at_other_weights_says_so_once(energy: str, trained: bool) -> None:
    """As of averaged weights: their feedback is that of the weights at which the copy was made."""
    model, x = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())), noise(6, 8)
    hybrid = ffebm.convert(model, x, energy=energy, feedback=KAPPA).train()
    if trained:
        optimizer = torch.optim.Adam(hybrid.parameters(), 1e-2)
        for _ in range(3):
            step(hybrid, optimizer, x, torch.arange(6))
    hybrid.eval()(x)  # a step further than the weights that were measured: no warning, which would be an error here
    averaged = torch.optim.swa_utils.AveragedModel(hybrid).eval()
    for parameter in averaged.parameters():
        parameter.data *= 3
    before, certificate = gains(averaged.module), averaged.module.blocks[0].module.certificate
    with pytest.warns(ffebm.FFEBMWarning, match=r"block_1: its feedback was set for other weights.*times what.*=0\.3"):
        output = averaged(x)
    assert torch.equal(averaged(x), output)
    assert equal(gains(averaged.module), before)
    assert averaged.module.blocks[0].module.certificate is certificate
    averaged.module.recertify()
    assert not torch.equal(averaged(x), output)
    with hybrid.feedforward_mode():
        torch.func.functional_call(hybrid, dict(averaged.module.named_parameters()), (x,))
    hybrid(x)
    with pytest.warns(ffebm.FFEBMWarning, match="block_1: its feedback was set for other weights"):
        torch.func.functional_call(hybrid, dict(averaged.module.named_parameters()), (x,))


def test_evaluation_compares_only_what_is_held() -> None:
    """Symmetric feedback, feedback that is held on purpose, and devices whose amplifiers stay as they are."""
    x = noise(4, 16)
    for settings in ({"feedback": "symmetric"}, {"feedback": 0.5, "energy": "unamplified"}, {}):
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        hybrid = ffebm.convert(model, x, **settings).eval()
        with torch.no_grad():
            hybrid.get_parameter("2.weight").mul_(0.1)
        with hybrid.held_feedback() if not settings else contextlib.nullcontext():
            hybrid(x)
    hybrid.set_devices("pcm")
    hybrid.age(1e9)
    hybrid(x)


def test_weights_folded_from_batch_norm_are_held_too() -> None:
    """The weight that settles is computed from several parameters; its tensor is new at every forward."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    )
    x = noise(4, 1, 5, 5)
    hybrid = ffebm.convert(model.eval(), x, feedback=0.2, fold_batchnorm=True).train()
    (block,) = [block for block in hybrid.blocks if block.certificate is not None]
    hybrid(x)
    assert block.module.gain.changes == 0
    with torch.no_grad():
        hybrid.get_parameter("4.weight").mul_(3)
    assert block.loop_gain == pytest.approx(1.8, rel=0.02)
    hybrid(x)
    assert block.loop_gain == pytest.approx(0.2, rel=0.02)


def test_symmetric_feedback_reports_the_true_gain_and_warns_once() -> None:
    model = seeded(lambda: mlp(16, 2))
    x = noise(4, 16)
    hybrid = ffebm.convert(model, x, feedback="symmetric").train()
    weight = hybrid.get_parameter("2.weight")
    for _ in range(3):
        with torch.no_grad():
            weight.div_(torch.linalg.matrix_norm(weight, 2)).mul_(0.9)
        hybrid(x)  # below 1: no warning, which would be an error here
    with torch.no_grad():
        weight.mul_(1.2)
    with pytest.warns(ffebm.FFEBMWarning, match=r"block_1: its loop gain at symmetric feedback has grown to 1\.1"):
        hybrid(x)
    with torch.no_grad():
        weight.mul_(1.01)
    hybrid(x)
    (block,) = hybrid.blocks
    assert block.module.scales == (1.0, 1.0)
    assert block.loop_gain == pytest.approx(float(torch.linalg.matrix_norm(weight.detach(), 2)) ** 2, rel=0.02)


@pytest.mark.parametrize("gradient", ["ep", "implicit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-42, 1e-39, 1e-30, 1e-12])
def test_an_error_that_vanishes_is_no_divergence(gradient: str, dtype: torch.dtype, size: float) -> None:
    """Where the loss is fitted δ is denormal: the gradient is the scaled one, or zero, and never an error."""
    model = seeded(lambda: mlp(8, 3)).to(dtype)
    x, direction = noise(4, 8).to(dtype), noise(4, 8, seed=8).to(dtype)
    hybrid = ffebm.convert(model, x, gradient=gradient)
    (hybrid(x) * direction).sum().backward()
    want = [parameter.grad.clone() for parameter in hybrid.parameters()]
    hybrid.zero_grad()
    hybrid(x).backward(direction * size)
    for ours, theirs in zip(hybrid.parameters(), want, strict=True):
        if size > 10 * torch.finfo(dtype).tiny:
            assert float((ours.grad / size - theirs).norm()) < 1e-4 * float(theirs.norm())
        else:
            assert float(ours.grad.abs().max()) < 100 * size
    hybrid.zero_grad()
    mixed = torch.stack([direction[0], direction[1] * 1e-42, direction[2] * 0, direction[3] * 1e-30])
    hybrid(x).backward(mixed)
    assert all(torch.isfinite(parameter.grad).all() for parameter in hybrid.parameters())


def test_a_certain_class_has_no_gradient_and_no_error() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    with torch.no_grad():
        model[2].bias += torch.tensor([95.0, 0.0])
    for gradient in ("ep", "implicit", ffebm.EquilibriumPropagation(beta=0.1, variant="centered")):
        hybrid = ffebm.convert(model, noise(3, 4), gradient=gradient)
        F.cross_entropy(hybrid(noise(3, 4).abs()), torch.zeros(3, dtype=torch.long)).backward()
        assert all(float(parameter.grad.abs().max()) < 1e-30 for parameter in hybrid.parameters())


def test_every_so_many_changes_are_measured_to_convergence() -> None:
    model, x, _ = small()
    hybrid = ffebm.convert(model, x, feedback=KAPPA).train()
    hybrid.recertify_every = 2
    index = next(i for i, block in enumerate(hybrid.blocks) if block.certificate is not None)
    for count in range(1, 5):
        with torch.no_grad():
            for parameter in hybrid.parameters():
                parameter.mul_(1.001)
        hybrid(x)
        hybrid(x)
        assert hybrid.blocks[index].module.gain.changes == count


def test_nan_weights_are_named() -> None:
    model, x, _ = small()
    hybrid = ffebm.convert(model, x).train()
    with torch.no_grad():
        hybrid.get_parameter("conv2.weight")[0, 0, 0, 0] = torch.nan
    with pytest.raises(ffebm.InputError, match=r"weight \d of block_\d+, of shape .* holds NaN"):
        hybrid(x)


@pytest.mark.parametrize("kappa", [0.1, 0.9])
def test_layers_that_start_at_zero(kappa: float) -> None:
    """Zero-initialised layers, as residual branches have them: no loop gain at first, then any γ that κ needs."""
    model, x = seeded(lambda: mlp(16, 3)), noise(12, 16)
    with torch.no_grad():
        model[2].weight.zero_(), model[4].weight.zero_()
    hybrid = ffebm.convert(model, x, feedback=kappa).train()
    assert hybrid.blocks[0].loop_gain == 0
    optimizer = torch.optim.Adam(hybrid.parameters(), 1e-2)
    for _ in range(6):
        step(hybrid, optimizer, x, torch.arange(12))
    hybrid(x)
    assert hybrid.blocks[0].module.loop_gain == pytest.approx(kappa, rel=0.01)


def test_a_closure_that_is_called_several_times_a_step() -> None:
    model, x, y = small()
    hybrid = ffebm.convert(model, x, feedback=0.5).train()
    optimizer = torch.optim.LBFGS(hybrid.parameters(), 0.5, max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(hybrid(x), y)
        loss.backward()
        return loss

    before = float(closure().detach())
    for _ in range(3):
        optimizer.step(closure)
    assert float(closure().detach()) < before
    for index, block in enumerate(hybrid.blocks):
        if block.certificate is not None:
            assert true_gain(hybrid, index, x) == pytest.approx(0.5, rel=0.05)


class Wired(nn.Module):
    """A state that reaches the last layer through weights and by a wire."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return torch.tanh(h + self.last(torch.tanh(self.second(h))))


def test_an_edge_without_weights_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid = ffebm.convert(seeded(Wired), noise(4, 6)).train()
    (block,) = hybrid.blocks
    assert [edge[:2] for edge in block.certificate.norms] == [(0, 1), (0, 2), (1, 2)]
    measured: list[tuple[int, int]] = []
    original = TrackedNorms.launch

    def noting(self: TrackedNorms, frame: Any) -> Any:
        launched = original(self, frame)
        measured.extend(launched._begun)
        return launched

    monkeypatch.setattr(TrackedNorms, "launch", noting)
    optimizer = torch.optim.SGD(hybrid.parameters(), 0.5)
    for step in range(3):
        measured.clear()
        hybrid(noise(4, 6)).square().mean().backward()
        optimizer.step()
        assert measured == ([] if step == 0 else [(0, 1), (0, 2), (1, 2)] if step == 1 else [(0, 1), (1, 2)])
    hybrid(noise(4, 6))
    for start, end, norm in block.module.certificate.norms:
        weight = {(0, 1): hybrid.second.weight, (1, 2): hybrid.last.weight}.get((start, end), torch.eye(6))
        assert norm == pytest.approx(MARGIN * float(torch.linalg.matrix_norm(weight.detach(), 2)), rel=2e-3)


def opened(hybrid: ffebm.HybridModel) -> ffebm.HybridModel:
    file = io.BytesIO()
    torch.save(hybrid, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, opened])
def test_a_copy_is_outside_of_the_contexts_that_it_is_made_in(
    copied: Callable[[ffebm.HybridModel], ffebm.HybridModel],
) -> None:
    model, x = seeded(lambda: mlp(16, 2)), noise(4, 16)
    hybrid = ffebm.convert(model, x, feedback=KAPPA).train()
    with hybrid.held_feedback(), hybrid.feedforward_mode():
        twin = copied(hybrid)
    assert torch.equal(twin(x), hybrid(x))
    for network in (twin, hybrid):
        with torch.no_grad():
            network.get_parameter("2.weight").mul_(3)
        network(x)
        assert network.blocks[0].loop_gain == pytest.approx(KAPPA, rel=0.02)


def test_measuring_draws_no_dropout_masks() -> None:
    """A seeded run has the source's masks whatever is measured, and what is measured depends on no generator."""
    layers = [nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)]
    model, x = nn.Sequential(*layers).train(), noise(4, 8)
    hybrid = ffebm.convert(copy.deepcopy(model), x, feedback=KAPPA).train()
    hybrid.recertify_every = 1
    state = {name: 2 * value for name, value in model.state_dict().items()}
    measuring: list[Callable[[], object]] = [
        lambda: hybrid.blocks[0].loop_gain,
        hybrid.summary,
        hybrid.recertify,
        lambda: hybrid.set_feedback(0.2),
        hybrid.block_state,
        lambda: hybrid.load_state_dict(state),
    ]
    for seed, measure in enumerate(measuring):
        with torch.no_grad():
            hybrid.get_parameter("0.weight").mul_(1.5)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        measure()
        assert torch.equal(torch.get_rng_state(), before)
    for size in (1.001, 1.5):
        with torch.no_grad():
            hybrid.get_parameter("0.weight").mul_(size)
        torch.manual_seed(5)
        hybrid(x)
        drawn = torch.rand(3)
        torch.manual_seed(5)
        model(x)
        assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("gradient", ["ep", "implicit", "recurrent"])
def test_a_gradient_is_of_its_forward_whatever_is_set_before_it(gradient: str) -> None:
    model, x, y = seeded(lambda: mlp(16, 3)), noise(6, 16), torch.arange(6)
    hybrid = ffebm.convert(model, x, feedback=0.9, gradient=gradient).train()
    weight = hybrid.get_parameter("0.weight")
    F.cross_entropy(hybrid(x), y).backward()
    expected = weight.grad
    changes: list[Callable[[], object]] = [
        lambda: hybrid.set_feedback(0.001),
        lambda: hybrid.set_feedback("symmetric"),
        lambda: hybrid.set_solver(ffebm.GaussSeidel(rtol=0.5, max_sweeps=1)),
        lambda: hybrid.set_gradient("unrolled"),
        lambda: hybrid.set_devices("pcm"),
        hybrid.eval,
    ]
    for change in changes:
        fresh = copy.deepcopy(hybrid)
        loss = F.cross_entropy(hybrid(x), y)
        change()
        hybrid.zero_grad()
        loss.backward()
        assert torch.equal(weight.grad, expected)
        state = fresh.block_state()
        hybrid.set_devices(None)
        hybrid.load_block_state(state)
        hybrid.train()


class Gated(nn.Module):
    """A plain tensor among its attributes is a factor between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.gate = torch.ones(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)) * self.gate)))  # type: ignore[no-any-return]


def copied(hybrid: ffebm.HybridModel) -> ffebm.HybridModel:
    return copy.deepcopy(hybrid)


@pytest.mark.parametrize("made", [lambda hybrid: hybrid, copied])
def test_a_plain_tensor_that_changes_in_place_is_measured(made: Callable[[Any], Any]) -> None:
    hybrid, x = made(ffebm.convert(seeded(Gated), noise(6, 8), feedback=KAPPA).train()), noise(6, 8)
    hybrid(x)
    hybrid.gate.mul_(3)
    hybrid.eval()
    assert hybrid.blocks[0].loop_gain > 2 * KAPPA  # evaluation leaves γ
    hybrid.train()(x)
    hybrid._energy["block_1"].gain.forget()
    assert hybrid.blocks[0].loop_gain == pytest.approx(KAPPA, rel=0.011)
    source = Gated()
    source.load_state_dict(hybrid.state_dict())
    source.gate.mul_(3)
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), source(x))


def test_a_conductance_of_a_plain_factor_that_turns_negative_is_refused() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.rand(8, 6) / 6), nn.Parameter(torch.rand(3, 4) / 8)
            self.mask = torch.ones(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            value = F.hardtanh(F.linear(x, self.first[:4]), 0, 1)
            return F.linear(value, self.second * self.mask)

    hybrid, x = ffebm.convert(seeded(Masked), noise(5, 6), energy="drn", feedback="symmetric"), noise(5, 6)
    hybrid(x)
    hybrid.mask.neg_()
    with pytest.raises(ffebm.InputError, match="'second', multiplied by a factor, holds negative values"):
        hybrid(x)
