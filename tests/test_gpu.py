"""On a CUDA device: what the CPU tests check, at the device's own precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # torch's own; the second at the first product in a thread of autograd's.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]


ESTIMATORS: dict[str, Any] = {
    "ep": "ep",
    "ep centered": ffebm.EquilibriumPropagation(beta=1e-2, variant="centered"),
    "nudged by a cost": ffebm.CostNudge(1e-2),
    "implicit": "implicit",
    "implicit, cg": ffebm.ImplicitDifferentiation(method="cg"),
    "unrolled": "unrolled",
}


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Float32 products without TF32, which cuDNN's convolutions use by default."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def _relative(found: Tensor, expected: Tensor) -> float:
    assert expected.device.type == "cpu"
    return float((found.cpu() - expected).norm() / expected.norm())


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 32),
        nn.GELU(),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize("moved", ["before", "after"])
def test_convert_and_gradients(moved: str) -> None:
    x = torch.randn(8, 3, 8, 8)
    labels = torch.randint(0, 10, (8,), device="cuda")
    if moved == "before":
        hybrid = ffebm.convert(_network().cuda(), x.cuda())
    else:
        hybrid = ffebm.convert(_network(), x).cuda()
    report = ffebm.check_gradients(hybrid, x.cuda(), lambda output: F.cross_entropy(output, labels))
    for estimator in ("ep", "implicit", "unrolled"):
        assert report.worst(estimator)[1].cosine > 0.999, report
    hybrid.recertify()
    assert hybrid.compare(x.cuda()).output < 1


def test_autocast_trains() -> None:
    x, labels = torch.randn(32, 3, 8, 8, device="cuda"), torch.randint(0, 10, (32,), device="cuda")
    hybrid = ffebm.convert(_network().cuda(), x).train()
    optimizer = torch.optim.AdamW(hybrid.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(hybrid(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def _smooth() -> nn.Module:
    """Monotone activations without kinks, so that a rounding error stays one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 64, 32),
        nn.Softplus(),
        nn.Linear(32, 10),
    )


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-7), (torch.float32, 1e-2)])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_training_step_is_that_of_the_cpu(name: str, dtype: torch.dtype, error: float) -> None:
    x, labels = torch.randn(8, 3, 8, 8, dtype=dtype), torch.randint(0, 10, (8,))
    here = ffebm.convert(_smooth().to(dtype), x, gradient=ESTIMATORS[name]).train()
    there = copy.deepcopy(here).cuda()
    gradients, losses = [], []
    for hybrid, device in ((here, "cpu"), (there, "cuda")):
        optimizer = torch.optim.SGD(hybrid.parameters(), 0.1)
        loss = F.cross_entropy(hybrid(x.to(device)), labels.to(device))
        loss.backward()
        gradients.append({key: p.grad.clone() for key, p in hybrid.named_parameters() if p.grad is not None})
        optimizer.step()
        losses.append(loss.detach())
    assert _relative(losses[1], losses[0]) < error
    assert list(gradients[0]) == list(gradients[1]) == [key for key, _ in here.named_parameters()]
    for key, expected in gradients[0].items():
        assert _relative(gradients[1][key], expected) < error, key
    state = here.state_dict()
    for key, value in there.state_dict().items():
        assert value.device.type == "cuda"
        if value.is_floating_point():
            assert _relative(value, state[key]) < error, key


@pytest.mark.usefixtures("full_precision")
def test_converted_there_as_here() -> None:
    x = torch.randn(8, 3, 8, 8)
    here, there = ffebm.convert(_smooth(), x), ffebm.convert(_smooth().cuda(), x.cuda())
    assert there.plan.to_dict() == here.plan.to_dict()
    for mine, other in zip(here.blocks, there.blocks, strict=True):
        assert other.loop_gain == pytest.approx(mine.loop_gain, rel=1e-3)
    assert _relative(there(x.cuda()).detach(), here(x).detach()) < 1e-3


class _DropPath(nn.Module):
    """A layer whose result is left out for some samples, as EfficientNet's `drop_connect` does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        if not self.training:
            return x + result
        kept = torch.floor(0.8 + torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device))
        return x + result / 0.8 * kept


@pytest.mark.parametrize("moved", ["before", "after"])
def test_masks_of_whole_samples_are_drawn_there(moved: str) -> None:
    x = torch.randn(8, 3, 8, 8)
    if moved == "before":
        hybrid = ffebm.convert(_DropPath().cuda(), x.cuda())
    else:
        hybrid = ffebm.convert(_DropPath(), x).cuda()
    hybrid.train()
    left_out = [(hybrid(x.cuda()) == x.cuda()).flatten(1).all(1).sum() for _ in range(20)]
    assert 0 < int(sum(left_out)) < 160


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize(("saved", "loaded"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_save_and_load_across_devices(saved: str, loaded: str, tmp_path: Path) -> None:
    x = torch.randn(8, 3, 8, 8)
    hybrid = ffebm.convert(_smooth(), x, feedback=0.2, gradient="implicit").to(saved).train()
    F.cross_entropy(hybrid(x.to(saved)), torch.randint(0, 10, (8,), device=saved)).backward()
    torch.optim.SGD(hybrid.parameters(), 0.1).step()
    hybrid.recertify()
    hybrid.eval().save(tmp_path / "saved")
    again = ffebm.load(tmp_path / "saved", _smooth().to(loaded))
    assert {value.device.type for value in again.state_dict().values()} == {loaded}
    assert not again.training
    for key, value in hybrid.state_dict().items():
        assert torch.equal(again.state_dict()[key].cpu(), value.cpu()), key
    assert _relative(again(x.to(loaded)).detach(), hybrid.cpu()(x).detach()) < 1e-3
    again.train()
    F.cross_entropy(again(x.to(loaded)), torch.randint(0, 10, (8,), device=loaded)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in again.parameters())


def test_there_and_back() -> None:
    x = torch.randn(8, 3, 8, 8)
    hybrid = ffebm.convert(_smooth(), x).eval()
    before = hybrid(x).detach()
    hybrid.cuda()(x.cuda()).sum().backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in hybrid.parameters())
    hybrid.cpu()
    assert torch.equal(hybrid(x).detach(), before)


# -- no waiting, graphs --------------------------------------------------------------------------


def _batches(count: int, dtype: torch.dtype = torch.float32, rows: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(rows, 3, 8, 8, generator=generator, dtype=dtype).cuda(),
            torch.randint(0, 10, (rows,), generator=generator).cuda(),
        )
        for _ in range(count)
    ]


def _gradients(hybrid: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["ep", "ep centered", "implicit"])
def test_the_host_never_waits_in_a_step(name: str, autocast: bool) -> None:
    hybrid = ffebm.convert(_smooth().cuda(), _batches(1)[0][0], gradient=ESTIMATORS[name]).train()
    with hybrid.held_feedback():  # a measurement of the loop gain is read once a block
        for index, (x, labels) in enumerate(_batches(6)):
            hybrid.zero_grad()
            torch.cuda.set_sync_debug_mode("error" if index > 2 else "default")
            try:
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(hybrid(x), labels)
                loss.backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["ep", "ep centered", "implicit"])
def test_a_graphed_step_is_the_step(name: str) -> None:
    batches = _batches(12, torch.float64)
    plain = ffebm.convert(_smooth().double().cuda(), batches[0][0], feedback=0.3, gradient=ESTIMATORS[name]).train()
    graphed = copy.deepcopy(plain)
    step = ffebm.GraphedStep(graphed, F.cross_entropy)
    for index, (x, labels) in enumerate(batches):
        plain.zero_grad()
        expected = F.cross_entropy(plain(x), labels)
        expected.backward()
        loss = step(x, labels)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
        for key, gradient in _gradients(plain).items():
            assert float((_gradients(graphed)[key] - gradient).norm() / gradient.norm()) < 1e-7, (index, key)
    assert step.captures <= 3  # another one where a phase needed a sweep more
    for key, value in plain.state_dict().items():  # the statistics of batch norm
        torch.testing.assert_close(graphed.state_dict()[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_graphed_training_holds_the_gain(autocast: bool) -> None:
    batches = _batches(4)
    hybrid = ffebm.convert(_network().cuda(), batches[0][0], feedback=0.3).train()
    optimizer = torch.optim.Adam(hybrid.parameters(), 5e-3)
    step = ffebm.GraphedStep(hybrid, F.cross_entropy)
    losses = []
    for index in range(60):
        x, labels = batches[index % 4]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            losses.append(float(step(x, labels)))
        for block in hybrid.energy_blocks.values():
            if block.program.coupled:
                assert block.loop_gain == pytest.approx(0.3, rel=0.101)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]
    assert 1 <= step.captures < 40
    assert step._gains._graph is not None
    told = {block.name: block.module.loop_gain for block in hybrid.blocks if block.module.program.coupled}
    step(*batches[0])
    with hybrid.held_feedback():
        for name in told:
            module = hybrid.energy_blocks[name]
            assert module.loop_gain == pytest.approx(hybrid.certificate_of(name).loop_gain, rel=0.05)


def test_another_batch_runs_without_a_graph() -> None:
    hybrid = ffebm.convert(_smooth().cuda(), _batches(1)[0][0]).train()
    step = ffebm.GraphedStep(hybrid, F.cross_entropy)
    for x, labels in _batches(4):
        step(x, labels)
    assert step.captures == 1
    plain = copy.deepcopy(hybrid)
    (x, labels), *_ = _batches(1, rows=5)
    loss = step(x, labels)
    assert step.captures == 1
    torch.testing.assert_close(loss, F.cross_entropy(plain(x), labels).detach(), rtol=1e-4, atol=0)


def test_a_loss_that_waits_is_refused() -> None:
    hybrid = ffebm.convert(_smooth().cuda(), _batches(1)[0][0]).train()

    def waiting(output: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(output, labels)
        return loss * (1.0 if loss.item() > 0 else 2.0)

    step = ffebm.GraphedStep(hybrid, waiting)
    (x, labels), *_ = _batches(1)
    step(x, labels)
    step(x, labels)
    stream = torch.cuda.current_stream()
    with pytest.raises(ffebm.UnsupportedError, match="could not be captured as a CUDA graph"):
        step(x, labels)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(100, device="cuda").std() > 0.1  # draws still work, and so does another capture
    hybrid.zero_grad()  # no tensor of the refused step is left, or its stream would be warned about
    other = ffebm.GraphedStep(hybrid, F.cross_entropy)
    for _ in range(4):
        loss = other(x, labels)
    assert other.captures == 1
    torch.testing.assert_close(loss, F.cross_entropy(hybrid(x), labels).detach(), rtol=1e-4, atol=0)


def test_symmetric_feedback_is_refused_by_a_graph() -> None:
    hybrid = ffebm.convert(_smooth().cuda(), _batches(1)[0][0], feedback="symmetric").train()
    with pytest.raises(ffebm.UnsupportedError, match="waits for its residual in every step, because nothing certifies"):
        ffebm.GraphedStep(hybrid, F.cross_entropy)


def test_devices_are_the_same_on_a_gpu() -> None:
    """The draws come from a CPU generator, so that a seed gives the same devices on both."""
    from dataclasses import replace

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    x = torch.randn(8, 20)
    devices = replace(ffebm.device_presets()["pcm"], weight_bits=5, mismatch=0.02, wire_resistance=1e-4, seed=3)
    held = []
    for device in ("cpu", "cuda"):
        hybrid = ffebm.convert(copy.deepcopy(model).to(device), x.to(device), devices=devices, feedback=0.3)
        hybrid.age(86400)
        held.append([value.detach().cpu() for value in hybrid.blocks[0].weights if value is not None])
        F.cross_entropy(hybrid(x.to(device)), torch.zeros(8, dtype=torch.long, device=device)).backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in hybrid.parameters() if p.grad is not None)
    for first, second in zip(*held, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    graphed = ffebm.convert(copy.deepcopy(model).cuda(), x.cuda(), devices=devices, feedback=0.3).train()
    with pytest.raises(ffebm.UnsupportedError, match="what devices hold is computed by the host"):
        ffebm.GraphedStep(graphed, F.cross_entropy)


def test_converters_of_tiles_are_the_same_on_a_gpu() -> None:
    """Partial sums converted tile by tile, forward, back and in a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 10)).double()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    hardware = ffebm.Hardware(tile_rows=16, tile_cols=8, row_sums="digital")
    found = []
    for device in ("cpu", "cuda"):
        hybrid = ffebm.convert(copy.deepcopy(model).to(device), x.to(device), hardware=hardware, feedback=0.3)
        hybrid.set_devices(ffebm.Devices(adc_bits=10, dac_bits=10))
        output = hybrid(x.to(device))
        output.square().sum().backward()
        assert any("tile" in name for name in hybrid.energy_blocks["block_1"].arrays.converters.ranges)
        found.append([output.detach().cpu(), *(p.grad.cpu() for p in hybrid.parameters() if p.grad is not None)])
    for first, second in zip(*found, strict=True):
        assert float((first - second).norm() / first.norm()) < 0.02  # but for ties


def test_digital_bits_on_a_gpu(full_precision: None) -> None:
    """The same integers as on a CPU, but for ties, and gradients of 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 5))
    x = torch.randn(64, 20)
    found = []
    for device in ("cpu", "cuda"):
        hybrid = ffebm.convert(copy.deepcopy(model).to(device), x.to(device), force_digital="0")
        hybrid.set_devices(ffebm.Devices(digital_bits=8))
        hybrid.calibrate_digital([x.to(device)])
        hybrid.set_gradient("ep", feedforward="quantised")
        output = hybrid(x.to(device))
        output.square().sum().backward()
        found.append([output.detach().cpu(), *(p.grad.cpu() for p in hybrid.parameters() if p.grad is not None)])
    for first, second in zip(*found, strict=True):
        assert float((first - second).norm() / first.norm()) < 0.02
