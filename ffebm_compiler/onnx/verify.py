"""Verify an export: run it in onnxruntime, and compare it with the hybrid in torch."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ffebm_compiler.errors import ExportError, InputError
from ffebm_compiler.files.paths import path_of
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.onnx.execute import load, session_of
from ffebm_compiler.onnx.steps import Steps, Value
from ffebm_compiler.passes.containers import leaves_of
from ffebm_compiler.reports.deviation import largest_deviation
from ffebm_compiler.reports.same_draws import DrawsNoted
from ffebm_compiler.runtime.feedforward.casts import without_autocast

__all__ = ["TOLERANCE", "Deviations", "verify"]

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

    The deviation of an output is ‖onnxruntime − torch‖ / ‖torch‖. Of integers and booleans it is the share of values
    that differ. Infinite values that are equal, and NaN of both, are no deviation.

    Args:
        hybrid: the hybrid that was exported, on the CPU. It is not changed.
        path: the file, or the folder of the digital parts.
        args: the hybrid's positional inputs, or one tensor.
        kwargs: its inputs by name.
        tolerance: the largest deviation that is accepted.
        progress: called with the name of each step.

    Raises:
        ExportError: the deviation is larger or not finite, the export is of another model or cannot be run, or the
            network draws random numbers, so that there is nothing to compare.
    """
    target = path_of(path, "the export")
    given_args = (args,) if isinstance(args, Tensor) else tuple(args)
    steps = Steps.of(hybrid)
    run = _runner(target, steps)
    found: Deviations = {}
    for size, (some_args, some_kwargs) in _batches(hybrid, steps, given_args, dict(kwargs or {})).items():
        progress(f"verifying batch {size}")
        given = [leaf for leaf in hybrid._call_form.leaves(some_args, some_kwargs) if isinstance(leaf, Tensor)]
        expected = _expected(hybrid, target, some_args, some_kwargs)
        results = run(given)
        if [result.shape for result in results] != [each.shape for each in expected]:
            raise _of_another_model(target, "returns", map(_shown, results), map(_shown, expected))
        found[size] = largest_deviation(results, expected)
    size, worst = max(found.items(), key=lambda item: item[1])
    if not math.isfinite(worst):
        raise ExportError(
            f"{target} was written, but gives other values than numbers in onnxruntime at batch {size} where the "
            "hybrid gives numbers, or the reverse: if the weights and inputs are ordinary numbers, report the model"
        )
    if not worst <= tolerance:
        raise ExportError(
            f"{target} was written, but deviates from the hybrid by {worst:.1e} in onnxruntime at batch {size} "
            f"(relative, with a tolerance of {tolerance:.1e}): raise the tolerance if that is small enough, export "
            "again if the hybrid has changed since, else report the model"
        )
    return found


def _expected(hybrid: HybridCore, target: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The hybrid's outputs in eval mode.

    Raises:
        ExportError: the network draws random numbers.
    """
    with torch.no_grad(), hybrid._evaluating(), DrawsNoted() if hybrid._call_form.random else nullcontext() as draws:
        expected = [tensor.detach().cpu() for tensor in _tensors(hybrid(*args, **kwargs))]
    if draws is not None and draws.names:
        raise ExportError(
            f"{target} was written, and cannot be verified: the network draws random numbers in eval mode "
            f"({', '.join(sorted(draws.names))}), of which onnxruntime draws others than torch. Leave the verification "
            "out (ffebm export --no-verify), or let the network draw in train mode alone"
        )
    return expected


def _of_another_model(target: Path, verb: str, found: Iterable[str], wanted: Iterable[str]) -> ExportError:
    return ExportError(
        f"{target} is no export of this hybrid: it {verb} {', '.join(found) or 'nothing'}, and the hybrid {verb} "
        f"{', '.join(wanted) or 'nothing'}. Verify it with the hybrid that it was exported from, or export this one"
    )


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def _runner(path: Path, steps: Steps) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What runs an export on the hybrid's inputs.

    Raises:
        ExportError: it cannot be loaded, or takes other inputs.
    """
    if os.path.isdir(path):
        exported = load(path)
        values = exported.manifest["values"]
        _check_inputs(path, [(name, values[name]["shape"]) for name in exported.manifest["inputs"]], steps)
        return exported.run
    session = session_of(path)
    _check_inputs(path, [(item.name, item.shape) for item in session.get_inputs()], steps)
    names = [value.name for value in steps.inputs]

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.contiguous().numpy() for name, tensor in zip(names, given, strict=True)}
        try:
            return [torch.as_tensor(np.asarray(result), device="cpu") for result in session.run(None, feed)]
        except Exception as error:  # onnxruntime raises several kinds
            raise ExportError(f"onnxruntime cannot run {path} ({error}): please report the model") from error

    return run


def _check_inputs(path: Path, found: Sequence[tuple[str, Sequence[int | str]]], steps: Steps) -> None:
    """Refuse an export with inputs of other names or sizes. A free size fits any."""
    wanted = [(value.name, value.shape) for value in steps.inputs]
    sizes = [
        pair
        for (_, mine), (_, theirs) in zip(found, wanted, strict=False)
        for pair in zip_longest(mine, theirs)
        if None in pair or all(isinstance(size, int) for size in pair)
    ]
    if [name for name, _ in found] != [name for name, _ in wanted] or any(one != other for one, other in sizes):
        told = [[f"{name} ({', '.join(map(str, shape))})" for name, shape in each] for each in (found, wanted)]
        raise _of_another_model(path, "takes", *told)


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
            tensor = tensor.index_select(dim, torch.arange(size, device="cpu") % tensor.shape[dim])
    if tensor.is_floating_point():
        generator = torch.Generator().manual_seed(size)
        tensor = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.dtype)
    return tensor
