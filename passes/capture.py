"""Capture: an `nn.Module` and example inputs become a `Program`.

The graph comes from `torch.export` (one ATen dialect with shapes and module paths on every
node) of a private copy of the model in eval mode; the source is never touched. Parameters,
buffers and constants are placeholders, so that tied weights are one placeholder used twice and
the hybrid can own its tensors under the source's names.

Promise: the graph is a `Program` (see `ir`), its batch size is free where the model allows it
and `dynamic_shapes="batch"`, and every failure names the module and the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from ffebm_compiler.ir import Program
from ffebm_compiler.passes.check_model import check_finite, check_model
from ffebm_compiler.passes.export_graph import export_graph
from ffebm_compiler.passes.exported_program import module_of, program_of
from ffebm_compiler.passes.private_copy import private_copy
from ffebm_compiler.passes.without_cache import without_cache

__all__ = ["capture"]

_RANDOM_DEPTH = ("DropPath", "StochasticDepth", "DropBlock")


def capture(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any = "batch",
) -> Program:
    """Export a private copy of `model` in eval mode and wrap it as a `Program`.

    Args:
        model: a module, an `fx.GraphModule` or an `ExportedProgram`.
        args: example positional inputs.
        kwargs: example keyword inputs.
        dynamic_shapes: `"batch"` frees the leading dimension of the inputs, `None` fixes every
            shape, anything else is handed to `torch.export.export` as it is.

    Raises:
        InputError: for something that is no model, or inputs that the model rejects.
        CaptureError: where the forward cannot be traced; names the module and the line.
    """
    if isinstance(model, ExportedProgram):
        source = module_of(model)
        return program_of(model, source, "")
    check_model(model)
    check_finite(model, args, kwargs)
    source = private_copy(model)
    cache = without_cache(source, args, kwargs)
    flags = {module: module.training for module in source.modules()}
    source.eval()
    try:
        exported = export_graph(source, args, dict(kwargs), dynamic_shapes)
    finally:
        for module, flag in flags.items():
            module.training = flag
    program = program_of(exported.program, source, exported.note, exported.inputs, exported.outputs)
    program.functions = exported.functions
    for sentence in (*exported.settings, *([cache] if cache else [])):
        program.note(sentence)
    dropped = sorted(
        name for name, module in source.named_modules() if type(module).__name__ in _RANDOM_DEPTH and _drop_rate(module)
    )
    if dropped:
        program.note(
            f"{len(dropped)} stochastic-depth modules (first: {dropped[0]!r}) drop at random only in train "
            "mode; the capture is of eval mode and never drops them"
        )
    return program


def _drop_rate(module: nn.Module) -> float:
    for name in ("drop_prob", "p"):
        value = getattr(module, name, None)
        if isinstance(value, float | int):
            return float(value)
    return 0.0
