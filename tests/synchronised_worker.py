"""What every process of tests/test_sharded.py runs: synchronised batch norm against one process."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn

import ffebm_compiler as ffebm


def network() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, momentum=None)
    layers = nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh(), norm, nn.Conv2d(6, 3, 2)
    return nn.Sequential(*layers, nn.BatchNorm2d(3, affine=False, track_running_stats=False)).double()


def main() -> None:
    warnings.simplefilter("error", ffebm.FFEBMWarning)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    x = torch.randn(7, 2, 6, 6).double() * torch.arange(1.0, 8.0).view(-1, 1, 1, 1)
    mine = x[:3] if rank == 0 else x[3:]
    weights = torch.randn(7, 3, 1, 1).double()
    settings = {"feedback": 0.3, "gradient": "implicit", "solver": ffebm.GaussSeidel(rtol=1e-12)}
    alone = ffebm.convert(network(), x, **settings).train()
    (alone(x) * weights).sum().backward()
    hybrid = ffebm.convert(nn.SyncBatchNorm.convert_sync_batchnorm(network()), mine, **settings).train()
    output = hybrid(mine)
    (output * (weights[:3] if rank == 0 else weights[3:])).sum().backward()
    for parameter, wanted in zip(hybrid.parameters(), alone.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        assert (parameter.grad - wanted.grad).norm() <= 1e-8 * wanted.grad.norm() + 1e-10
    for buffer, wanted in zip(hybrid.buffers(), alone.buffers(), strict=True):
        assert torch.allclose(buffer, wanted, rtol=1e-10), (buffer, wanted)
    assert torch.allclose(output, alone(x)[:3] if rank == 0 else alone(x)[3:], rtol=1e-7, atol=1e-9)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(hybrid.eval())
    assert converted is hybrid
    assert torch.equal(hybrid(mine), hybrid(mine))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as in pipelined_worker.py


if __name__ == "__main__":
    main()
