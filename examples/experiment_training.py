"""How the experiments train a classifier: a run that stops where it fails, and goes on where it was stopped.

`training` yields a row for each epoch and writes a checkpoint after it. It runs where the data are, on a CPU or a GPU
(`Data.to`). The order of the samples is drawn on the CPU, so that it is the same on both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from experiment_data import Data
from torch import Tensor, nn

import ffebm_compiler as ffebm

__all__ = [
    "Checkpoint",
    "Diverged",
    "Recipe",
    "Row",
    "accuracy",
    "differentiated",
    "seconds",
    "training",
    "training_and_accuracy",
]

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor], Tensor]


class Diverged(ffebm.FFEBMError):
    """A run whose loss or states are not finite any more, or in which a layer has died out."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam with a cosine schedule, an incomplete last batch left out."""

    epochs: int
    rate: float
    batch: int = 32
    loss: Loss = F.cross_entropy
    weight_decay: float = 0.0
    autocast: torch.dtype | None = None
    """The dtype of products; None for that of the weights."""


def accuracy(model: nn.Module, data: Data, part: tuple[Tensor, Tensor], batch: int = 500) -> float:
    """Percent of a part of the data that the model classifies rightly, in evaluation mode."""
    was = model.training
    model.eval()
    with torch.no_grad():
        found = [
            model(data.scaled(x)).argmax(-1) == y
            for x, y in zip(part[0].split(batch), part[1].split(batch), strict=True)
        ]
    model.train(was)
    return 100 * float(torch.cat(found).double().mean())


def training(model: nn.Module, data: Data, recipe: Recipe, seed: int, checkpoint: Path) -> Iterator[Row]:
    """Train a classifier. Yields the epoch, its mean loss, its seconds, and what its blocks did in it.

    Seconds are those of the process on a CPU, and of the clock on a GPU.

    Raises:
        InputError: the loss is no scalar, or a batch is larger than the data.
        Diverged: the loss is not finite, a block does not settle, its weights are too large, or a layer's gradient was
            zero in a whole epoch; names the block.
    """
    optimizer = torch.optim.Adam(model.parameters(), recipe.rate, weight_decay=recipe.weight_decay)
    x, y = data.training
    count = len(x) // recipe.batch
    if not count:
        raise ffebm.InputError(
            f"{data.name} has {len(x)} training inputs, fewer than a batch of {recipe.batch}: take smaller batches"
        )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, recipe.epochs * count))
    generator = torch.Generator().manual_seed(seed)
    kept = Checkpoint(checkpoint, model, {"optimizer": optimizer, "schedule": schedule}, generator)
    for epoch in range(kept.resume(), recipe.epochs + 1):
        model.train()
        losses, sweeps, silent, started = [], [], _weights(model), seconds(data.device)
        for rows in torch.randperm(len(x), generator=generator)[: count * recipe.batch].split(recipe.batch):
            optimizer.zero_grad()
            at = rows.to(data.device)
            losses.append(_step(model, data.scaled(x[at]), y[at], recipe, f"epoch {epoch}"))
            silent = [name for name in silent if not _has_gradient(model, name)]
            optimizer.step()
            schedule.step()
            sweeps += [one.sweeps for one in _settled(model)]
        row = {"epoch": epoch, "loss": statistics.mean(losses), "seconds": seconds(data.device) - started}
        if isinstance(model, ffebm.HybridModel):
            gains = [block.loop_gain for block in model.blocks if block.certificate is not None]
            row |= {"sweeps": statistics.mean(sweeps) if sweeps else 0, "loop_gain": max(gains, default=0.0)}
        yield row
        if silent:
            raise Diverged(f"stopped in epoch {epoch}: {_silent(model, silent)}")
        kept.save(epoch)  # now that its row is in the file


def training_and_accuracy(
    model: nn.Module, data: Data, recipe: Recipe, seed: int, checkpoint: Path, batch: int = 500
) -> Iterator[Row]:
    """`training`, with the test accuracy after each epoch, in batches of `batch`."""
    for row in training(model, data, recipe, seed, checkpoint):
        yield {**row, "test": accuracy(model, data, data.test, batch)}


def _step(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, when: str) -> float:
    def loss() -> Tensor:
        with torch.autocast(x.device.type, recipe.autocast, enabled=recipe.autocast is not None):
            scores = model(x)
        return recipe.loss(scores, y)

    return differentiated(model, loss, when)


def differentiated(model: nn.Module, loss_of: Callable[[], Tensor], when: str) -> float:
    """The loss, whose gradients are added to those of the model.

    Raises:
        InputError: the loss is no scalar.
        Diverged: `when` the loss is not finite, a block does not settle, or its weights are too large.
    """
    with _named_divergence(model, when):
        loss = loss_of()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ffebm.InputError(f"the loss is no scalar tensor (got {shape}): reduce it by mean() or sum()")
    found = float(loss.detach())
    if not math.isfinite(found):
        raise Diverged(f"stopped in {when}: the loss is {found}{_not_finite(model)}")
    with _named_divergence(model, when):
        loss.backward()  # type: ignore[no-untyped-call]
    return found


def seconds(device: torch.device) -> float:
    """Of this process; on a GPU, of the clock, once all that was asked of it is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _named_divergence(model: nn.Module, when: str) -> Iterator[None]:
    """Make `Diverged` of a block that does not settle, and of one that refuses weights that have become too large."""
    try:
        yield
    except ffebm.FFEBMError as error:
        size = sum(float(p.detach().square().sum()) for p in model.parameters())
        if not isinstance(error, ffebm.ConvergenceError) and math.isfinite(size):
            raise
        raise Diverged(f"stopped in {when}: {str(error).split(';')[0]}") from error


def _not_finite(model: nn.Module) -> str:
    """Which block has states that are not finite, or else which parameter is not."""
    for block in model.blocks if isinstance(model, ffebm.HybridModel) else ():
        if any(not bool(torch.isfinite(state).all()) for state in block.states or ()):
            return f", and states of {block.name} ({', '.join(block.layers)}) are not finite"
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    return f", and {bad[0]} is not finite" if bad else ""


def _weights(model: nn.Module) -> list[str]:
    """The weights that learn from the loss: of a hybrid, those of the source."""
    own = model.feedback_names if isinstance(model, ffebm.HybridModel) else ()
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and p.dim() > 1 and name not in own]


def _has_gradient(model: nn.Module, name: str) -> bool:
    """Not one that is zero. A weight that the loss does not depend on has none, and is not looked at again."""
    gradient = model.get_parameter(name).grad
    return gradient is None or bool(gradient.any())


def _silent(model: nn.Module, names: Sequence[str]) -> str:
    """What is told of weights without a gradient, with the block of the first one."""
    blocks = model.blocks if isinstance(model, ffebm.HybridModel) else ()
    home = [f" of {block.name}" for block in blocks if any(names[0].startswith(layer) for layer in block.layers)]
    return (
        f"the gradient of {', '.join(names)}{home[0] if home else ''} was zero in every step, since no unit after it "
        "answers any more. A smaller rate or a smaller nudge may keep them"
    )


def _settled(model: nn.Module) -> list[Any]:
    blocks = model.energy_blocks.values() if isinstance(model, ffebm.HybridModel) else ()
    return [block.last for block in blocks if block.program.coupled and block.last is not None]


@dataclass
class Checkpoint:
    """What a run needs to go on as if it had not been stopped: weights, optimizer and schedule, all random states."""

    path: Path
    model: nn.Module
    others: Mapping[str, Any]
    """Name -> what has a `state_dict`."""
    generator: torch.Generator
    """Of the order of the samples."""

    def save(self, epoch: int) -> None:
        """Write all of it after an epoch, whole or not at all."""
        part = self.path.with_suffix(".part")
        torch.save(
            {
                **{name: one.state_dict() for name, one in self.others.items()},
                "epoch": epoch,
                "model": self.model.state_dict(),
                "order": self.generator.get_state(),
                "draws": torch.get_rng_state(),
                "draws on GPUs": torch.cuda.get_rng_state_all(),
            },
            part,
        )
        part.replace(self.path)

    def resume(self) -> int:
        """Read it, if there is one. Returns the epoch to go on with."""
        if not self.path.exists():
            return 1
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])  # onto its own device
        for name, one in self.others.items():
            one.load_state_dict(state[name])
        self.generator.set_state(state["order"])
        torch.set_rng_state(state["draws"])
        for device, draws in enumerate(state["draws on GPUs"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(draws, device)
        return int(state["epoch"]) + 1
