"""Verify an export: run it in onnxruntime, and compare it with the hybrid in torch."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ffebm_compiler.errors import ExportError, InputError
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.onnx.execute import load, session_of
from ffebm_compiler.onnx.steps import Steps, Value
from ffebm_compiler.passes.containers import leaves_of
from ffebm_compiler.runtime.feedforward.casts import without_autocast

__all__ = ["TOLERANCE", "Deviations", "deviation", "verify"]

TOLERANCE = 1e-4
"""Relative deviation up to which an export counts as equal, the accuracy of a certified block in float32."""

Deviations = dict[int, float]
"""Size of the batch -> largest relative deviation of an output."""


@without_autocast()
def verify(
    hybrid: HybridCore,
    path: str | Path,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    tolerance: float = TOLERANCE,
    progress: Callable[[str], None] = lambda _: None,
) -> Deviations:
    """Compare an export with its hybrid in eval mode, on the given inputs and on random ones of another batch size.

    The deviation of an output is ‖onnxruntime − torch‖ / ‖torch‖.

    Args:
        hybrid: the hybrid that was exported, on the CPU. It is not changed.
        path: the file, or the folder of the digital parts.
        args: the hybrid's positional inputs.
        kwargs: its inputs by name.
        tolerance: the largest deviation that is accepted.
        progress: called with the name of each step.

    Raises:
        ExportError: the deviation is larger or not finite, or the export cannot be run.
    """
    target = Path(path)
    steps = Steps.of(hybrid)
    run = load(target).run if os.path.isdir(target) else _file_runner(target, steps)
    found: Deviations = {}
    for size, (some_args, some_kwargs) in _batches(hybrid, steps, tuple(args), dict(kwargs or {})).items():
        progress(f"verifying batch {size}")
        given = [leaf for leaf in hybrid._call_form.leaves(some_args, some_kwargs) if isinstance(leaf, Tensor)]
        with torch.no_grad(), hybrid._evaluating():
            expected = _tensors(hybrid(*some_args, **some_kwargs))
        found[size] = deviation(run(given), expected)
    size, worst = max(found.items(), key=lambda item: item[1])
    if not worst <= tolerance:
        what = f"deviates from the hybrid by {worst:.1e}" if math.isfinite(worst) else "gives other values than numbers"
        raise ExportError(
            f"{target} was written, but {what} in onnxruntime at batch {size} (relative, with a tolerance of "
            f"{tolerance:.1e}): raise the tolerance if that is small enough, else report the model"
        )
    return found


def deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ‖found − expected‖ / ‖expected‖ of the floating-point tensors (of all if there are none)."""
    floating = [index for index, tensor in enumerate(expected) if tensor.is_floating_point()]
    worst = 0.0
    for index in floating or range(len(expected)):
        have, want = found[index].double(), expected[index].detach().cpu().double()
        relative = float((have - want).norm() / want.norm().clamp_min(torch.finfo(torch.float32).tiny))
        worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def _file_runner(path: Path, steps: Steps) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    session = session_of(path)
    names = [value.name for value in steps.inputs]

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.contiguous().numpy() for name, tensor in zip(names, given, strict=True)}
        try:
            return [torch.from_numpy(result) for result in session.run(None, feed)]
        except Exception as error:  # onnxruntime raises several kinds
            raise ExportError(f"onnxruntime cannot run {path} ({error}): please report the model") from error

    return run


def _batches(
    hybrid: HybridCore, steps: Steps, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[int, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Batch size -> inputs: the given ones, and others with a larger batch if its size is free."""
    leaves = [leaf for leaf in hybrid._call_form.leaves(args, kwargs) if isinstance(leaf, Tensor)]
    pairs = list(zip(steps.inputs, leaves, strict=True))
    sizes = [leaf.shape[dim] for value, leaf in pairs for dim, name in enumerate(value.shape) if name == "batch"]
    if not sizes or not all(_has_plain_sizes(value) for value, _ in pairs):
        return {(sizes or [leaf.shape[0] if leaf.dim() else 1 for leaf in leaves] or [1])[0]: (args, kwargs)}
    for other in (sizes[0] + 3, 2 * sizes[0], sizes[0] + 2, sizes[0] + 1):
        resized = {id(leaf): _resized(value, leaf, other) for value, leaf in pairs}
        others = pytree.tree_map(lambda leaf, found=resized: found.get(id(leaf), leaf), (args, kwargs))
        with contextlib.suppress(InputError):  # the source would do something else at this size
            hybrid._call_form.leaves(*others)
            return {sizes[0]: (args, kwargs), other: others}
    return {sizes[0]: (args, kwargs)}


def _has_plain_sizes(value: Value) -> bool:
    """Whether each of its sizes is a number or a name."""
    return all(isinstance(size, int) or size.isidentifier() for size in value.shape)


def _resized(value: Value, tensor: Tensor, size: int) -> Tensor:
    """A tensor with `size` entries along the batch: random normal floats, or repeated integers, which stay valid."""
    for dim, name in enumerate(value.shape):
        if name == "batch":
            tensor = tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])
    if tensor.is_floating_point():
        generator = torch.Generator().manual_seed(size)
        tensor = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    return tensor
