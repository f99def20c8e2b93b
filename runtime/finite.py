"""Refusals of values that are NaN or infinite, where a block or a hybrid meets them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ffebm_compiler.errors import InputError

__all__ = ["check_inputs", "check_weights", "in_a_pipeline"]


def check_inputs(name: str, inputs: Sequence[Tensor]) -> None:
    """Refuse inputs with NaN or infinite values."""
    for index, value in enumerate(inputs):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(
                f"input {index} of {name}, of shape {tuple(value.shape)}, holds NaN or infinite values: "
                f"check the data and the digital part before it{in_a_pipeline()}"
            )


def check_weights(name: str, weights: Sequence[Tensor | None]) -> None:
    """Refuse weights with NaN or infinite values."""
    for index, weight in enumerate(weights):
        if weight is not None and not bool(torch.isfinite(weight).all()):
            raise InputError(
                f"weight {index} of {name}, of shape {tuple(weight.shape)}, holds NaN or infinite values. Training may "
                "have diverged; lower the learning rate or reload a checkpoint"
            )


def in_a_pipeline() -> str:
    """What else may have made such an input where several processes run, as the end of a sentence."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    return (
        ". torch.distributed.pipelining first runs a stage on memory that nothing has written, to learn its shapes, "
        "unless PipelineStage has input_args and output_args: give both"
    )
