"""Capture: an `nn.Module` and example inputs become a `Program`.

The graph comes from `torch.export` (one ATen dialect with shapes and module paths on every
node) of a private copy of the model in eval mode; the source is never touched. Parameters,
buffers and constants are placeholders, so that tied weights are one placeholder used twice and
the hybrid can own its tensors under the source's names.

Promise: the graph is a `Program` (see `ir`), its batch size is free where the model allows it
and `dynamic_shapes="batch"`, and every failure names the module and the line.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind

from ffebm_compiler.errors import CaptureError, InputError
from ffebm_compiler.ir import Program

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
        source = _module_of(model)
        return _program(model, source, "")
    check_model(model)
    check_finite(model, args, kwargs)
    source = _private_copy(model)
    flags = {module: module.training for module in source.modules()}
    source.eval()
    note = ""
    try:
        exported, note = _export(source, args, dict(kwargs), dynamic_shapes)
    finally:
        for module, flag in flags.items():
            module.training = flag
    program = _program(exported, source, note)
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


def check_model(model: object) -> None:
    """Refuse what is no ordinary eager module, with a sentence that helps."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"convert needs a torch.nn.Module, got {type(model).__name__}: pass the model object itself, "
            "not its class, its weights or a function"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the model is a TorchScript module, which hides its Python forward: pass the eager nn.Module")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError(f"the model is wrapped in {type(model).__name__}: convert model.module, then wrap the hybrid")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise InputError(
                f"parameter {name!r} is not initialised yet (a lazy module): run the model once on an input first"
            )
        if tensor.is_meta:
            raise InputError(f"parameter {name!r} is on the meta device: load the weights before converting")
        if tensor.is_complex():
            raise InputError(
                f"parameter {name!r} is complex ({tensor.dtype}): energy blocks are real; split it into two"
            )
        if tensor.is_quantized:
            raise InputError(f"parameter {name!r} is quantised: pass the float model; `Hardware` has the bits")
    for name, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise InputError(f"module {name!r} is quantised: pass the float model; `Hardware` has the bits")


def check_finite(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse NaN or infinite weights, and NaN in the example inputs."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"parameter {name!r} has {bad} values that are NaN or infinite: check the checkpoint")
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    for index, leaf in enumerate(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)):
        if leaf.is_floating_point() and bool(torch.isnan(leaf).any()):
            raise InputError(f"example input {index} of shape {tuple(leaf.shape)} holds NaN: check the data")


def _private_copy(model: nn.Module) -> nn.Module:
    """A deep copy; results of earlier calls that a module caches as attributes are copied without their history."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for leaf in pytree.tree_leaves([value for key, value in vars(module).items() if key not in _REGISTERED]):
            if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model {type(model).__name__} cannot be copied ({type(error).__name__}: {error}); the converter "
            "works on a copy so that the source stays as it is: make it deep-copyable (no open files, no locks)"
        ) from error


_REGISTERED = ("_parameters", "_modules")


def _export(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[ExportedProgram, str]:
    """Export with a free batch where asked and possible; returns the note to report."""
    if dynamic_shapes is None:
        return _try_export(source, args, kwargs, None), ""
    if dynamic_shapes != "batch":
        return _try_export(source, args, kwargs, dynamic_shapes), ""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors:
        return _try_export(source, args, kwargs, None), ""
    size = tensors[0].shape[0]
    try:
        wide_args, wide_kwargs = _at_least_two(args, kwargs, size)
        shapes = ShapesCollection()
        for leaf in pytree.tree_leaves((wide_args, wide_kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == max(size, 2):
                shapes[leaf] = {0: Dim.AUTO}
        try:
            spec = shapes.dynamic_shapes(source, wide_args, wide_kwargs)
        except Exception as error:  # arguments that the forward does not take
            raise _explained(source, args, kwargs, error) from error
        exported = _try_export(source, wide_args, wide_kwargs, spec)
        if _batch_is_free(exported):
            return exported, ""
    except CaptureError:
        pass
    exported = _try_export(source, args, kwargs, None)
    return exported, f"the batch size is fixed at {size}: the model does not trace with a free one"


def _batch_is_free(exported: ExportedProgram) -> bool:
    """Whether the leading size of the first input stayed a symbol: `len(x)` makes it a constant without a word."""
    inputs = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    symbol, _ = _batch(exported.graph_module, inputs)
    return symbol is not None


def _at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Double a batch of one: `torch.export` would otherwise take the 1 for a constant."""

    def widen(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size:
            return torch.cat([leaf, leaf]) if size == 1 else leaf.clone()
        return leaf

    wide: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(widen, (args, kwargs))
    return wide


def _try_export(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporter logs whole graphs before it raises what we explain below
    try:
        with torch.enable_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                return torch.export.export(source, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise _explained(source, args, kwargs, error) from error
    finally:
        logging.disable(quiet)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _explained(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> CaptureError | InputError:
    """Say whether the model rejects the inputs or only cannot be traced, and where."""
    where = _where(source, error)
    try:
        with torch.no_grad():
            source(*args, **kwargs)
    except Exception as rejection:
        shapes = [
            tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else repr(leaf)
            for leaf in pytree.tree_leaves((args, kwargs))
        ]
        return InputError(
            f"the model itself rejects the example inputs {shapes}{_where(source, rejection)}: "
            f"{type(rejection).__name__}: {_first_line(rejection)}; pass inputs for which model(*inputs) runs"
        )
    return CaptureError(
        f"the forward cannot be traced{where}: {_first_line(error)}; control flow or sizes that depend on data "
        "cannot be compiled: make the branch depend on shapes or settings, or convert the submodules around it"
    )


def _where(source: nn.Module, error: BaseException) -> str:
    """Path of the innermost module, and the innermost line of the model's own code (not of torch)."""
    names = {id(module): name for name, module in source.named_modules()}
    path, place, own = "", "", False
    for frame, line in traceback.walk_tb(error.__traceback__):
        names_of_locals = frame.f_code.co_varnames
        owner = frame.f_locals.get(names_of_locals[0]) if names_of_locals else None
        if isinstance(owner, nn.Module) and id(owner) in names and frame.f_code.co_name != "_call_impl":
            if frame.f_code.co_filename.endswith("torch/nn/modules/module.py"):
                continue
            path = names[id(owner)] or type(source).__name__
            foreign = type(owner).__module__.startswith("torch.")
            if not (foreign and own):
                place, own = f"{frame.f_code.co_filename}, line {line}", not foreign
    return f" in module {path!r} ({place})" if path else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _program(exported: ExportedProgram, source: nn.Module, note: str) -> Program:
    graph_module = exported.graph_module
    first = {id(tensor): name for name, tensor in [*source.named_parameters(), *source.named_buffers()]}
    tensors = dict(source.named_parameters(remove_duplicate=False))
    lifted: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    inputs: list[str] = []
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            target = str(spec.target)  # a tied weight goes by its first name
            lifted[name] = first.get(id(tensors[target]), target) if target in tensors else target
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            constants[name] = exported.constants[str(spec.target)].detach().clone()
        elif spec.kind == InputKind.USER_INPUT:
            inputs.append(name)
        else:
            raise CaptureError(f"the captured graph needs {spec.kind.name.lower()} {name!r}, which is not supported")
    symbol, hint = _batch(graph_module, inputs)
    program = Program(
        graph_module=fx.GraphModule(graph_module, graph_module.graph),
        source=source,
        lifted=lifted,
        constants=constants,
        inputs=tuple(inputs),
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        batch_symbol=symbol,
        batch_hint=hint,
    )
    if note:
        program.note(note)
    return program


def _batch(graph_module: fx.GraphModule, inputs: list[str]) -> tuple[str | None, int]:
    """The symbol and the example's size of the batch: the first input's leading dimension."""
    for node in graph_module.graph.nodes:
        if node.op != "placeholder" or node.name not in inputs:
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value.dim():
            continue
        size = value.shape[0]
        if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
            return str(size.node.expr), int(size.node.hint)
        return None, int(size)
    return None, 1


def _module_of(exported: ExportedProgram) -> nn.Module:
    """A plain module tree that holds an exported program's parameters and buffers by name."""
    root = nn.Module()
    for name, tensor in exported.state_dict.items():
        *parents, leaf = name.split(".")
        module = root
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        copied = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(leaf, nn.Parameter(copied, requires_grad=tensor.requires_grad))
        else:
            module.register_buffer(leaf, copied)
    return root
