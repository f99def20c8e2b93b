"""Train a hybrid on scikit-learn's digits with several processes: an ordinary DistributedDataParallel model.

    torchrun --nproc-per-node 2 examples/train_distributed.py [--epochs 3] [--check]

Each process settles its own part of the batch; gradients are averaged as for any module. `--check`
first compares them with those of one process on the whole batch. NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ffebm_compiler as ffebm

log = logging.getLogger("train_distributed")


def network() -> nn.Module:
    """A CNN without batch norm (its statistics would be each process's own)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 64),
        nn.Tanh(),
        nn.Linear(64, 10),
    )


def check(wrapped: DistributedDataParallel, hybrid: nn.Module, images: Tensor, labels: Tensor, part: slice) -> float:
    """Largest relative difference between the averaged gradients and those of the whole batch."""
    alone = copy.deepcopy(hybrid)
    F.cross_entropy(wrapped(images[part]), labels[part]).backward()
    F.cross_entropy(alone(images), labels).backward()
    pairs = zip(hybrid.parameters(), alone.parameters(), strict=True)
    worst = max(float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs if a.grad is not None)
    wrapped.zero_grad()
    return worst


def main() -> None:
    """Run the command line, in each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)  # the same weights and order of samples in every process
    data = load_digits()
    images = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1).to(device)
    labels = torch.tensor(data.target).to(device)
    train, test = slice(0, 1440), slice(1440, None)
    hybrid = ffebm.convert(network().to(device), images[:2])
    wrapped = DistributedDataParallel(hybrid)
    share = options.batch // world
    part = slice(rank * share, (rank + 1) * share)
    if options.check:
        log.info(
            "gradients: %.1e from one process's",
            check(wrapped, hybrid, images[: share * world], labels[: share * world], part),
        )
    optimizer = torch.optim.AdamW(wrapped.parameters(), 2e-3)
    for epoch in range(options.epochs):
        for batch in torch.randperm(train.stop).split(share * world):
            mine = batch[part]
            optimizer.zero_grad()
            F.cross_entropy(wrapped(images[mine]), labels[mine]).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = float((hybrid(images[test]).argmax(1) == labels[test]).float().mean())
        log.info("epoch %d: test accuracy %.2f %%", epoch + 1, 100 * accuracy)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
