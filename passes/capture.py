"""Capture: an `nn.Module` and example inputs become a `Program`.

`torch.export` traces a private copy of the model in eval mode; the source is never touched. Its graph is in one
ATen dialect, with shapes and module paths on every node. Parameters, buffers and constants are
placeholders. So a tied weight is one placeholder that is read twice, and the hybrid can own its tensors under
the source's names. Where the model's code reads a `training` flag or its `train` sets attributes, the copy is traced a
second time in train mode, and `merge_modes` makes one graph of both.

Promise: the graph is a `Program` (see `ir`). Its batch size is free with `dynamic_shapes="batch"`, where
the model allows it. Every failure names the module and the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import ExportedProgram

from ffebm_compiler.errors import CaptureError, InputError, UnsupportedError
from ffebm_compiler.ir import Program
from ffebm_compiler.passes.check_model import check_finite, check_model, has_no_memory
from ffebm_compiler.passes.copied_closures import parameters_outside
from ffebm_compiler.passes.explain_capture import rejected, rejection_of
from ffebm_compiler.passes.export_graph import Exported, export_graph
from ffebm_compiler.passes.exported_program import module_of, program_of
from ffebm_compiler.passes.keyword_order import reads_keyword_order
from ffebm_compiler.passes.private_copy import private_copy
from ffebm_compiler.passes.set_up import same_in_evaluation, set_up
from ffebm_compiler.passes.training_reads import TrainingReads, is_rebound, set_by_mode, training_reads
from ffebm_compiler.passes.without_cache import without_cache

__all__ = ["capture"]


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

    Where a parameter or buffer is on the meta device, all of them and the inputs are captured there: shapes alone.

    Raises:
        InputError: `model` is no model, or the model rejects the inputs.
        CaptureError: the forward cannot be traced; names the module and the line.
    """
    if isinstance(model, ExportedProgram):
        source = module_of(model)
        return program_of(model, source, "", copied=True)
    check_model(model)
    check_finite(model, args, kwargs)
    source = private_copy(model)
    if has_no_memory(model):
        source = source.to("meta")
        args, kwargs = pytree.tree_map(_without_memory, (args, dict(kwargs)))
    cache = without_cache(source, args, kwargs)
    flags = {module: module.training for module in source.modules()}
    try:
        program = _in_both_modes(source, args, dict(kwargs), dynamic_shapes, model)
    finally:
        for module, flag in flags.items():
            module.training = flag
    if cache:
        program.note(cache)
    return program


def _without_memory(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf


def _in_both_modes(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, model: nn.Module
) -> Program:
    """The capture in eval mode, with a second one in train mode if the model's code reads a training flag."""
    source.eval()
    evaluation = set_up(source, args, kwargs)
    kept = [evaluation.note]
    changing = set_by_mode(source)  # also since a model may drop values that it keeps between calls in eval mode
    with training_reads() as reads:
        exported = export_graph(source, args, kwargs, dynamic_shapes, evaluation.remade)
    if evaluation.outputs is None and not has_no_memory(source):  # the exporter compares no dtypes
        rejection = rejection_of(source, args, kwargs)
        if rejection is not None:
            raise rejected(source, args, kwargs, rejection)
    keywords_in_order = reads_keyword_order(source, args, kwargs)
    _refuse_outside(exported, model)
    names = {module: name for name, module in source.named_modules()}
    asks = {module for module in reads.asks | changing if module in names}
    others = reads.others()
    training: Program | None = None
    refused = ""
    if asks:
        source.train()
        try:
            training_set_up = set_up(source, args, kwargs, evaluation)
            kept.append(training_set_up.note)
            trained, more = _in_train_mode(source, args, kwargs, dynamic_shapes, training_set_up.remade, asks)
            if trained.note and not exported.note:
                source.eval()
                fixed = export_graph(source, args, kwargs, None, evaluation.remade)
                exported = replace(fixed, note=trained.note.replace("the model", "in train mode the model"))
            elif exported.note and not trained.note:
                trained = export_graph(source, args, kwargs, None, training_set_up.remade)
            asks |= {module for module in more.asks if module in names}
            for reader, read in more.others().items():
                others.setdefault(reader, set()).update(read)
            _refuse_outside(trained, model)
            training = _wrapped(replace(trained, note=""), source)
        except (CaptureError, InputError) as error:
            refused = str(error)
        except UnsupportedError as error:
            source.train()
            if not same_in_evaluation(source, args, kwargs, evaluation):
                raise  # the calls in train mode have left something that cannot be undone
            refused = str(error)
    program = _wrapped(exported, source)
    program.training, program.refused_in_training = training, refused
    program.keywords_in_order = keywords_in_order
    program.decisions_in_training = (training or program).decisions
    program.asks = frozenset(names[module] for module in asks)
    for reader, read in others.items():
        paths = sorted(names[module] for module in read if module in names)
        if len(paths) == 1 and reader in names:
            program.flags[names[reader]] = paths[0]
        elif len(paths) > 1:
            program.in_one_mode += (tuple(paths),)
    for sentence in filter(None, kept):
        program.note(sentence)
    for decision in dict.fromkeys((*program.decisions, *program.decisions_in_training)):
        if decision.varies:
            program.note(
                f"the forward decides by a size: {decision.described(program.inputs)}. Calls with sizes that decide "
                "otherwise are refused, and ONNX files do not check it"
            )
    if refused:
        program.note(f"the model has no capture in train mode, and the hybrid none: {refused}")
    return program


def _in_train_mode(
    source: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    remade: frozenset[str],
    asks: set[nn.Module],
) -> tuple[Exported, TrainingReads]:
    """The capture in train mode, and the flags that were read.

    Dropout and norms whose flags no other code reads stay in eval mode, since `rebind` makes them follow their flags.
    """
    while True:
        source.train()
        for module in source.modules():
            if is_rebound(module) and module not in asks:
                module.training = False
        with training_reads() as reads:
            exported = export_graph(source, args, kwargs, dynamic_shapes, remade)
        if not any(is_rebound(module) for module in reads.asks - asks):
            return exported, reads
        asks = asks | reads.asks


def _refuse_outside(exported: Exported, model: nn.Module) -> None:
    found = parameters_outside(exported.program.constants, model)
    if found:
        raise CaptureError(
            f"the forward reads {', '.join(map(repr, found[:4]))} of the original model, not of the copy that is "
            "converted, so that the hybrid could not train them. The code reaches the model or its parameters through "
            "a global variable or a class; reach them through self"
        )


def _wrapped(exported: Exported, source: nn.Module) -> Program:
    program = program_of(exported.program, source, exported.note, exported.inputs, exported.outputs, exported.outside)
    program.functions, program.decisions = exported.functions, exported.decisions
    for sentence in exported.settings:
        program.note(sentence)
    return program
