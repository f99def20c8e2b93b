"""What every process of tests/test_sharded.py runs: a hybrid as a stage of a pipeline, against the whole."""

from __future__ import annotations

import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from sharded_worker import Residual
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import ffebm_compiler as ffebm


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def main() -> None:
    warnings.simplefilter("error", ffebm.FFEBMWarning)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    source = nn.Sequential(*(Residual(12) for _ in range(count))).double()
    x, target = torch.randn(8, 12).double(), torch.randn(8, 12).double()
    settings = {"feedback": 0.3, "solver": ffebm.GaussSeidel(rtol=1e-12)}
    alone = ffebm.convert(source, x, **settings).train()
    output = alone(x)
    loss_fn(output, target).backward()

    hybrid = ffebm.convert(source[rank], x, **settings).train()
    for value in (float("nan"), float("inf")):
        with pytest.raises(ffebm.InputError, match="unless PipelineStage has input_args and output_args"):
            hybrid(torch.full((2, 12), value).double())
    # Without these PipelineStage runs the hybrid on memory that nothing has written, which may hold NaN or 1e300.
    received, sent = torch.zeros(2, 12).double().requires_grad_(rank > 0), torch.zeros(2, 12).double().requires_grad_()
    stage = PipelineStage(hybrid, rank, count, torch.device("cpu"), input_args=received, output_args=sent)
    schedule = ScheduleGPipe(stage, n_microbatches=4, loss_fn=loss_fn)
    losses: list[Tensor] = []
    if rank == 0:
        found = schedule.step(x, losses=losses, target=target) if count == 1 else schedule.step(x)
    elif rank == count - 1:
        found = schedule.step(target=target, losses=losses)
    else:
        found = schedule.step()
    if rank == count - 1:
        assert (found - output).norm() / output.norm() < 1e-6
    for name, parameter in hybrid.named_parameters():
        wanted = alone.get_parameter(f"{rank}.{name}").grad
        assert (parameter.grad - wanted).norm() / wanted.norm() < 1e-6, name
    dist.destroy_process_group()
    sys.stdout.flush()
    # torch 2.13 with gloo aborts at the interpreter's exit in one run of five, also for a plain FSDP2 network.
    os._exit(0)


if __name__ == "__main__":
    main()
