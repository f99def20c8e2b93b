"""Set-up: call the private copy before it is traced, and find out whether it keeps state between calls.

The first call of a forward may make buffers, tables and caches, which would hold the tracer's
tensors if that call were traced. So eager calls come first. A kept value that was computed from parameters (a table)
is forgotten again, so that the trace computes it.

The hybrid does not have state between calls that no parameter or buffer holds. If the
output depends on such state, the model is refused. If every call sets an attribute without an effect, a note says so.

Promise: the module is unchanged, except for what its first call sets up once and for all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ffebm_compiler.errors import CaptureError, UnsupportedError
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.changing_line import changing_line
from ffebm_compiler.passes.containers import leaves_of
from ffebm_compiler.passes.held import held_tensors
from ffebm_compiler.passes.own_generators import own_generators_unchanged
from ffebm_compiler.passes.process import reachable
from ffebm_compiler.passes.repeated_calls import differ, differing_module
from ffebm_compiler.passes.tracing import ordinary_paths
from ffebm_compiler.passes.unchanged import (
    Attributes,
    draws_of_this_thread,
    generator_states,
    generators_unchanged,
    tensors_unchanged,
)

__all__ = ["SetUp", "same_in_evaluation", "set_up"]


@dataclass(frozen=True)
class SetUp:
    """What the calls of a module have shown."""

    note: str = ""
    """A note for the plan about attributes that every call sets, or an empty text."""
    outputs: tuple[Any, ...] | None = None
    """The outputs of a call; None if it fails."""


def set_up(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], evaluation: SetUp | None = None) -> SetUp:
    """Call a module in its present mode until it is set up. Results, draws and written state are undone.

    A call that fails leaves the module as it was. Either the exporter fails too, and that failure is explained, or it
    overlooks the cause, and `capture` says that the model rejects the inputs.

    Args:
        source: the module.
        args: its positional inputs.
        kwargs: its keyword inputs.
        evaluation: for a module in train mode, the result of its calls in eval mode.

    Raises:
        UnsupportedError: an earlier call changes the output of a later one, for example through an attribute.
        CaptureError: forward draws from the generators of Python or numpy.
    """
    before = Attributes(source)
    drawn: set[str] = set()
    try:
        first = _call_undone(source, args, kwargs, drawn)
        before.forget(_of_parameters)
        again = Attributes(source)
        second = _call_undone(source, args, kwargs, drawn)
        again.forget(_of_parameters)
        kept = [name for name in again.changed() if not _is_remade(source, name)]
        other = differ(first, second)
        if other and not kept:  # the calls may differ because the first one set something up
            other = differ(second, _call_undone(source, args, kwargs, drawn))
        where = (
            differing_module(source, lambda: _call_undone(source, args, kwargs, drawn)) if other and not kept else ""
        )
        left = evaluation is not None and not same_in_evaluation(source, args, kwargs, evaluation)
    except _DrawsElsewhere:
        place: list[str] = []
        with suppress(Exception):
            _call_undone(source, args, kwargs, None, place)
        before.restore()
        raise CaptureError(
            f"forward draws random numbers from {' and '.join(sorted(drawn))}{''.join(place)}, which a captured graph "
            "would repeat for ever: draw them with torch (torch.rand(())), or outside of forward and hand them in as "
            "an input"
        ) from None
    except Exception:
        before.restore()
        return SetUp()
    again.restore()
    named = ", ".join(repr(name) for name in kept[:4]) + (", ..." if len(kept) > 4 else "")
    if other or left:
        before.restore()
        place_of_state = f" in the attribute {named}" if kept else ""
        if not kept:
            place_of_state = f" in module {where!r}" if where else ""
            place_of_state += " outside of parameters and buffers (an object, a global variable, a closure, a tensor)"
        what = "output" if other else "output in eval mode"
        raise UnsupportedError(
            f"the model's {what} depends on what an earlier call left{place_of_state}: keep it in a buffer "
            "(register_buffer) that forward writes in place, or hand it in as an input"
        )
    if not kept:
        return SetUp("", tuple(second))
    note = f"forward sets attributes ({named}) at every call, which the hybrid does not: its output is the same"
    return SetUp(note, tuple(second))


def same_in_evaluation(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], evaluation: SetUp) -> bool:
    """Whether a module in train mode still has the outputs in eval mode that it had before."""
    if evaluation.outputs is None:
        return True
    source.eval()
    try:
        return not differ(evaluation.outputs, _call_undone(source, args, kwargs, None))
    finally:
        source.train()


class _DrawsElsewhere(Exception):
    """A forward drew from a generator that is not torch's."""


def _call_undone(
    source: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    drawn: set[str] | None,
    place: list[str] | None = None,
) -> list[Any]:
    """The outputs of a call, of which nothing but changed attributes remains.

    Args:
        source: the module.
        args: its positional inputs.
        kwargs: its keyword inputs.
        drawn: receives the names of generators other than torch's. The call raises `_DrawsElsewhere` if it uses one.
        place: receives the line that draws first.
    """
    tables: list[dict[str, Any]] = [table for m in source.modules() for table in (m._parameters, m._buffers)]
    registered = [(table, dict(table)) for table in tables]
    reached = reachable(source)
    state = held_tensors(source, reached)
    with (
        ordinary_paths(),
        own_generators_unchanged(source, reached) as own,
        generators_unchanged(),
        tensors_unchanged(state),
        _no_warnings(),
        torch.enable_grad(),
    ):
        states = generator_states()
        with ExitStack() as stack:
            drew = stack.enter_context(draws_of_this_thread())
            if place is not None:
                watch = changing_line(lambda: (generator_states(), [*own.drawn()]))
                stack.callback(place.extend, stack.enter_context(watch))
            outputs = [
                leaf.detach() if isinstance(leaf, Tensor) else leaf
                for leaf in leaves_of(source(*_copy_inputs(args), **_copy_inputs(kwargs)))
            ]
        if drawn is not None:
            changed = {name for name, value in generator_states().items() if value != states.get(name, value)}
            drawn.update(changed & drew)
            drawn.update(own.drawn())
    for now, before in registered:  # undoes the assignment of a buffer; a new buffer stays
        now.update(before)
    if drawn:
        raise _DrawsElsewhere
    return outputs


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _copy_inputs(inputs: Any) -> Any:
    """A copy of the inputs, which the forward may write to."""
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf,
        inputs,
    )


def _of_parameters(value: Any) -> bool:
    """Whether a value holds a tensor that was computed from parameters."""
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in pytree.tree_leaves(value))


def _is_remade(source: nn.Module, name: str) -> bool:
    """Whether a parametrisation by hooks computes an attribute from parameters at every call (`weight_norm`)."""
    path, _, leaf = name.rpartition(".")
    parameters = module_at(source, path)._parameters
    return any(f"{leaf}_{kind}" in parameters for kind in ("orig", "v"))
