"""Export: `torch.export` traces a module into one graph, with a free batch size where that is possible.

Promise: an `ExportedProgram` of the module in the mode it is in, or an error that names the module and the line.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind

from ffebm_compiler.errors import CaptureError, UnsupportedError
from ffebm_compiler.passes.check_model import has_no_memory
from ffebm_compiler.passes.containers import Recipe
from ffebm_compiler.passes.custom_functions import KeptFunctions, keep_custom_functions
from ffebm_compiler.passes.explain_capture import NotTraceable, explained
from ffebm_compiler.passes.exported_program import batch_of
from ffebm_compiler.passes.forward_gradients import no_forward_gradients
from ffebm_compiler.passes.held import held_tensors, plain_tensors
from ffebm_compiler.passes.hidden_compiler import hidden_compiler
from ffebm_compiler.passes.own_generators import own_generators_unchanged
from ffebm_compiler.passes.plain_call import plain_call
from ffebm_compiler.passes.process import process_unchanged, reachable
from ffebm_compiler.passes.size_decisions import SizeDecision, SizeDecisions
from ffebm_compiler.passes.tracing import tracing
from ffebm_compiler.passes.unchanged import attributes_unchanged, generators_unchanged, tensors_unchanged

__all__ = ["Exported", "export_graph"]


@dataclass(frozen=True)
class Exported:
    """The result of tracing a module."""

    program: ExportedProgram
    functions: KeptFunctions
    """The source's own autograd functions and hooks, which the traced graph calls by name."""
    inputs: Recipe
    """How to build the containers of the inputs from plain ones."""
    outputs: Recipe
    settings: tuple[str, ...] = ()
    """One sentence for each branch decided by a buffer's value, and for each check of the data that was left out."""
    note: str = ""
    """A note for the plan about the batch size, or an empty text."""
    outside: tuple[torch.Tensor, ...] = ()
    """Tensors with `requires_grad` that the forward reads and no module registers."""
    decisions: tuple[SizeDecision, ...] = ()
    """What the forward decided by sizes that are free."""


def export_graph(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, remade: Container[str] = ()
) -> Exported:
    """Export with a free batch size if that is asked for and possible.

    Args:
        source: the module.
        args: its positional inputs.
        kwargs: its keyword inputs.
        dynamic_shapes: as for `capture`.
        remade: the names of the buffers that every call makes in another shape.
    """
    trace = partial(_try_export, source, remade)
    with plain_call(source, args, kwargs) as call:
        exported = _export_graph(trace, source, call.args, call.kwargs, dynamic_shapes)
        if call.opaque:
            raise UnsupportedError(
                f"the forward returns a tensor {call.opaque}, which a hybrid cannot build again: return it by itself, "
                "or in a tuple, a list, a dictionary, a dataclass or an object with attributes"
            )
        if call.changed:
            raise UnsupportedError(
                f"the forward changes {call.changed}, which a hybrid does not: return the value, or write it in place "
                "into a tensor among the inputs"
            )
        return replace(exported, inputs=call.inputs, outputs=call.outputs)


def _export_graph(
    trace: Callable[..., Exported], source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any
) -> Exported:
    if shapes != "batch":
        return trace(args, kwargs, shapes)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors:
        return trace(args, kwargs, None)
    size = tensors[0].shape[0]
    try:
        wide_args, wide_kwargs = _at_least_two(args, kwargs, size)
        free = ShapesCollection()
        for leaf in pytree.tree_leaves((wide_args, wide_kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == max(size, 2):
                free[leaf] = {0: Dim.AUTO}
        try:
            spec = free.dynamic_shapes(source, wide_args, wide_kwargs)
        except Exception as error:  # the forward does not take these arguments
            raise explained(source, args, kwargs, error) from error
        exported = _with_one_sample_tried(trace(wide_args, wide_kwargs, spec), source, (args, kwargs))
        if _batch_is_free(exported.program) and _decides_as(exported, size):
            return exported
    except CaptureError:
        pass
    exported = trace(args, kwargs, None)
    return replace(exported, note=f"the batch size is fixed at {size}: the model does not trace with a free one")


def _batch_is_free(exported: ExportedProgram) -> bool:
    """Whether the leading size of the first input stayed a symbol. `len(x)` makes it a constant without a warning."""
    inputs = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    symbol, _ = batch_of(exported.graph_module, inputs)
    return symbol is not None


def _with_one_sample_tried(exported: Exported, source: nn.Module, given: Any) -> Exported:
    """The same, where decisions that one sample makes otherwise are accepted for it if they make no difference.

    `if batch != ids.shape[0]: ids = ids.expand(batch, -1)` is such a decision. The exporter takes no batch of one.
    """
    otherwise = [decision for decision in exported.decisions if not decision.is_kept_at((1,) * len(decision.sizes))]
    if not otherwise or not _computes_one_sample(exported, source, given):
        return exported
    accepted = (replace(each, tried=each.tried | {(1,) * len(each.sizes)}) for each in otherwise)
    kept = tuple(decision for decision in exported.decisions if decision not in otherwise)
    return replace(exported, decisions=(*kept, *accepted))


def _computes_one_sample(exported: Exported, source: nn.Module, given: Any) -> bool:
    """Whether the graph gives the forward's values for the first sample alone."""
    if has_no_memory(source):
        return True  # nothing will be computed
    leaves = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    size = leaves[0].shape[0]

    def first(leaf: Any) -> Any:
        batched = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size
        return leaf[:1].clone() if batched else leaf

    args, kwargs = pytree.tree_map(first, given)
    found = []
    made: tuple[Callable[[], nn.Module], ...] = (lambda: source, lambda: exported.program.module(check_guards=False))
    for make in made:
        with _as_before(source), tensors_unchanged(held_tensors(source)), _silent(), torch.no_grad():
            torch.manual_seed(0)
            try:
                found.append(pytree.tree_leaves(make()(*args, **kwargs)))
            except Exception:  # what the source refuses, the hybrid refuses
                return False
    return len(found[0]) == len(found[1]) and all(map(_same, *found))


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return bool(one == other)
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def _decides_as(exported: Exported, size: int) -> bool:
    """Whether the example's own batch size decides what the size did with which it was traced."""
    return all(decision.is_kept_at((size,) * len(decision.sizes)) for decision in exported.decisions)


def _at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Double a batch of one: `torch.export` would otherwise take the 1 for a constant."""

    def widen(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == size:
            return torch.cat([leaf, leaf]) if size == 1 else leaf.clone()
        return leaf

    wide: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(widen, (args, kwargs))
    return wide


def _try_export(
    source: nn.Module, remade: Container[str], args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Exported:
    try:
        return _traced(source, remade, args, kwargs, dynamic_shapes)
    except CaptureError as error:
        if isinstance(error.__cause__, NotTraceable):
            raise
        with hidden_compiler() as asked:
            try:
                return _traced(source, remade, args, kwargs, dynamic_shapes)
            except CaptureError as other:
                # An error of another kind comes from the branch for compilers, which the source itself does not take.
                raise other if asked and type(error.__cause__).__module__ == "builtins" else error from None


def _traced(
    source: nn.Module, remade: Container[str], args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Exported:
    quiet = logging.root.manager.disable
    logging.disable(logging.ERROR)  # the exporter logs graphs and tracebacks before it raises what we explain below
    try:
        decided = SizeDecisions()
        with _as_before(source), tracing(source, remade) as calls, decided.noted(), _silent():
            with keep_custom_functions() as functions, no_forward_gradients():
                program = torch.export.export(source, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            calls.known.check()
        found, outside = calls.notes(), tuple(calls.outside)
        return Exported(
            program, functions, Recipe(), Recipe(), settings=found, outside=outside, decisions=decided.of(program)
        )
    except Exception as error:
        with _as_before(source), tensors_unchanged(held_tensors(source)):
            raise explained(source, args, kwargs, error) from error
    finally:
        logging.disable(quiet)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _as_before(source: nn.Module) -> Iterator[None]:
    reached = reachable(source)
    with (
        attributes_unchanged(source),
        process_unchanged(source, reached),
        own_generators_unchanged(source, reached),
        tensors_unchanged(plain_tensors(source, reached)),  # tracing also computes with the values of small constants
        generators_unchanged(),
    ):
        yield
