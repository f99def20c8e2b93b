"""Refusals of values that are NaN, infinite or beyond a dtype, where a block or a hybrid meets them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ffebm_compiler.errors import InputError

__all__ = ["check_feedback", "check_inputs", "check_range", "check_weights", "in_a_pipeline"]


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


def check_range(name: str, states: Sequence[Tensor], diagonals: Sequence[Tensor | None], layers: Sequence[str]) -> None:
    """Refuse inputs and weights with which the squares of a block's states overflow already without feedback.

    Args:
        name: the block.
        states: its states without feedback and without loads.
        diagonals: D^l, by which they are divided; None for 1.
        layers: the names of its layers.
    """
    for index, (state, diagonal) in enumerate(zip(states, diagonals, strict=True)):
        if not _has_norm(state):
            raise InputError(
                f"state {index} of {name} reaches {float(state.abs().amax()):.2g} without any feedback, so that its "
                f"norm overflows {state.dtype}: scale the weights or the inputs, put a norm before the block, or use "
                "hybrid.double()"
            )
        potential = state if diagonal is None else state / diagonal
        if diagonal is not None and not _has_norm(potential):
            raise InputError(
                f"{name}: the conductances at a unit of {layers[index]} sum to {float(diagonal.min()):.2g}, and its "
                f"potential is a current divided by that sum. It reaches {float(potential.abs().amax()):.2g}, so that "
                f"its norm overflows {state.dtype}: give this unit larger weights, or set them and its bias to 0"
            )


def _has_norm(values: Tensor) -> bool:
    return bool(torch.isfinite(torch.linalg.vector_norm(values)))


def check_feedback(name: str, scales: Sequence[float], dtype: torch.dtype) -> None:
    """Refuse a feedback gain γ = c_m/c_l that the dtype of the states cannot hold."""
    largest, end = max(scales) / min(scales), torch.finfo(dtype).max
    if largest <= end:
        return
    wider = "use a dtype with a larger range (bfloat16 or float32, beyond them float64)"
    if max(scales) > 1:  # that of the last layer is 1
        raise InputError(
            f"the feedback of {name} to its first layer is {largest:.2g} times smaller than to its last, and {dtype} "
            f"ends at {end:.2g}: {wider}, a larger feedback, or fewer layers in a block "
            "(hardware=Hardware(layers_per_block=...))"
        )
    raise InputError(
        f"the feedback gain γ of {name} is {largest:.2g}, since the weights between its states are small, and "
        f"{dtype} ends at {end:.2g}: {wider}, or a smaller feedback"
    )


def in_a_pipeline() -> str:
    """What else may have made such an input where several processes run, as the end of a sentence."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    return (
        ". torch.distributed.pipelining first runs a stage on memory that nothing has written, to learn its shapes, "
        "unless PipelineStage has input_args and output_args: give both"
    )
