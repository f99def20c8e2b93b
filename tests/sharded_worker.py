"""What every process of tests/test_sharded.py runs: a hybrid under FSDP2 against the same hybrid in one process."""

from __future__ import annotations

import copy
import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import ffebm_compiler as ffebm

STEPS = 3


class Residual(nn.Module):
    """Two layers and a residual add, behind a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.down(torch.tanh(self.up(self.norm(x)))))


class Network(nn.Module):
    """Convolutions, residual blocks, and products with weights of (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh())
        self.layers = nn.ModuleList(Residual(16) for _ in range(3))
        self.mix = nn.Parameter(torch.randn(16, 12) / 4)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(1)
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.tanh(x @ self.mix))


def made(gradient: str) -> ffebm.HybridModel:
    torch.manual_seed(0)
    solver = ffebm.GaussSeidel(rtol=1e-10)
    own = ffebm.FeedbackWeights(start="random") if gradient == "implicit" else "tied"
    x = torch.randn(2, 1, 6, 6).double()
    return ffebm.convert(Network().double(), x, feedback=0.3, gradient=gradient, solver=solver, feedback_weights=own)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8 * count, 1, 6, 6, generator=generator).double() for _ in range(STEPS + 2)]


def step(hybrid: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = hybrid(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def sharded(hybrid: ffebm.HybridModel, root: bool) -> None:
    for layer in hybrid.get_submodule("layers").children():
        fully_shard(layer)
    fully_shard(hybrid.get_submodule("first"))
    if root:
        fully_shard(hybrid)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def agree(hybrid: ffebm.HybridModel, alone: ffebm.HybridModel, what: str) -> None:
    wanted = dict(alone.named_parameters())
    for name, parameter in hybrid.named_parameters():
        error = (whole(parameter) - wanted[name]).norm() / wanted[name].norm()
        assert error < 1e-6, f"{what}: {name} deviates by {error:.1e}"


def watched(hybrid: ffebm.HybridModel) -> list[int]:
    """How many units hold whole tensors while each block runs."""
    units = [module for module in hybrid.get_submodule("layers").children() if isinstance(module, FSDPModule)]
    assert units
    counts: list[int] = []

    def count(*_: object) -> None:
        counts.append(sum(not any(isinstance(p, DTensor) for p in unit.parameters()) for unit in units))

    for block in hybrid.blocks:
        block.module.register_forward_pre_hook(count)
    return counts


def units_alone() -> None:
    """Modules are sharded and the hybrid itself is not: the gradients of what is left are each process's own."""
    rank, count = dist.get_rank(), dist.get_world_size()
    alone = made("ep").train()
    hybrid = copy.deepcopy(alone)
    sharded(hybrid, root=False)
    (x, *_) = batches(count)
    hybrid(x.chunk(count)[rank]).square().mean().backward()
    alone(x).square().mean().backward()
    for name, parameter in hybrid.named_parameters():
        wanted, found = alone.get_parameter(name).grad, parameter.grad
        assert wanted is not None
        assert found is not None, name
        if isinstance(found, DTensor):
            found = found.full_tensor()
        else:
            dist.all_reduce(found)
            found /= count
        assert (found - wanted).norm() / wanted.norm() < 1e-6, name


def training(gradient: str) -> None:
    rank, count = dist.get_rank(), dist.get_world_size()
    alone = made(gradient).train()
    hybrid = copy.deepcopy(alone)
    sharded(hybrid, root=True)
    for model in (hybrid, alone):  # both measure from here on at the same steps
        model.recertify()
    counts = watched(hybrid)
    mine, theirs = (torch.optim.SGD(model.parameters(), 0.3, momentum=0.9) for model in (hybrid, alone))
    for x in batches(count)[:STEPS]:
        step(hybrid, mine, x.chunk(count)[rank])
        step(alone, theirs, x)
    agree(hybrid, alone, f"{gradient} after {STEPS} steps")
    assert max(counts) <= 1, f"{max(counts)} units are whole at once"
    gains = [block.module.gain for block in hybrid.blocks if block.module.program.coupled]
    expected = [block.module.gain for block in alone.blocks if block.module.program.coupled]
    assert gains
    assert all(gain.changes == STEPS - 1 for gain in gains), [gain.changes for gain in gains]
    for gain, other in zip(gains, expected, strict=True):
        assert max(abs(a / b - 1) for a, b in zip(gain.scales, other.scales, strict=True)) < 1e-5
    hybrid.recertify()
    alone.recertify()
    x = batches(count)[-1]
    with torch.no_grad():
        found, wanted = hybrid.eval()(x), alone.eval()(x)
    assert (found - wanted).norm() / wanted.norm() < 1e-6
    for block, other in zip(hybrid.blocks, alone.blocks, strict=True):
        assert abs(block.loop_gain - other.loop_gain) < 1e-5
    assert all(isinstance(p, DTensor) for p in hybrid.get_submodule("layers").parameters())


def checkpoints(folder: str) -> None:
    """Save after two steps, go on; load into a fresh hybrid and go on: the same."""
    rank, count = dist.get_rank(), dist.get_world_size()
    xs = [x.chunk(count)[rank] for x in batches(count)]

    def fresh() -> tuple[ffebm.HybridModel, torch.optim.Optimizer]:
        hybrid = made("ep").train()
        sharded(hybrid, root=True)
        return hybrid, torch.optim.AdamW(hybrid.parameters(), 1e-2)

    hybrid, optimizer = fresh()
    for x in xs[:2]:
        step(hybrid, optimizer, x)
    model, optim = get_state_dict(hybrid, optimizer)
    checkpoint.save({"model": model, "optim": optim, "blocks": hybrid.block_state()}, checkpoint_id=folder)
    losses = [step(hybrid, optimizer, x) for x in xs[2:]]

    again, other = fresh()
    model, optim = get_state_dict(again, other)
    state = {"model": model, "optim": optim, "blocks": again.block_state()}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(again, other, model_state_dict=state["model"], optim_state_dict=state["optim"])
    again.load_block_state(state["blocks"])
    resumed = [step(again, other, x) for x in xs[2:]]
    assert all(torch.equal(a, b) for a, b in zip(losses, resumed, strict=True)), (losses, resumed)
    for (name, a), (_, b) in zip(hybrid.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(whole(a), whole(b)), name


def conductances() -> None:
    """Optimizers leave none below 0, be it a parameter or the product of one with a folded batch norm."""
    torch.manual_seed(0)
    parts = (
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
    for layer in (parts[0], parts[3], parts[6]):
        layer.weight.data.abs_()
    rank, count = dist.get_rank(), dist.get_world_size()
    (x, *_) = batches(count)
    alone = ffebm.convert(nn.Sequential(*parts).double(), x[:2], energy="drn", fold_batchnorm=True).train()
    hybrid = copy.deepcopy(alone)
    fully_shard(hybrid.get_submodule("0"))
    fully_shard(hybrid.get_submodule("3"))
    fully_shard(hybrid)
    mine, theirs = (torch.optim.SGD(model.parameters(), 20.0) for model in (hybrid, alone))
    for _ in range(2):
        step(hybrid, mine, x.chunk(count)[rank])
        step(alone, theirs, x)
    agree(hybrid, alone, "conductances")
    first = alone.get_parameter("0.weight")
    assert 0 < int((first == 0).sum()) < first.numel()
    for weight in (w for model in (hybrid, alone) for w in model.operands_of("block_1")[1] if w is not None):
        assert weight.dim() == 1 or float(weight.detach().min()) >= 0


def main() -> None:
    warnings.simplefilter("error", ffebm.FFEBMWarning)
    dist.init_process_group("gloo")
    training("ep")
    training("implicit")
    units_alone()
    conductances()
    checkpoints(sys.argv[1])
    dist.destroy_process_group()
    sys.stdout.flush()
    # torch 2.13 with gloo aborts at the interpreter's exit in one run of five, also for a plain FSDP2 network.
    os._exit(0)


if __name__ == "__main__":
    main()
