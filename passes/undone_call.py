"""Undone call: call a module and undo what the call did.

Promise: random generators, the contents of tensors, and the module's tables of parameters and buffers are as before,
except for buffers that the call made. Changed attributes stay.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ffebm_compiler.passes.assigned_state import is_remade
from ffebm_compiler.passes.changing_line import changing_line
from ffebm_compiler.passes.containers import leaves_of
from ffebm_compiler.passes.held import held_tensors
from ffebm_compiler.passes.own_generators import own_generators_unchanged
from ffebm_compiler.passes.process import reachable
from ffebm_compiler.passes.tracing import ordinary_paths
from ffebm_compiler.passes.unchanged import (
    draws_of_this_thread,
    generator_states,
    generators_unchanged,
    tensors_unchanged,
)

__all__ = ["DrawsElsewhere", "call_undone"]


class DrawsElsewhere(Exception):
    """A forward drew from a generator that is not torch's."""


def call_undone(
    source: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    drawn: set[str] | None = None,
    place: list[str] | None = None,
    keep_remade: bool = False,
    written: list[Tensor] | None = None,
    reached: list[Any] | None = None,
) -> list[Any]:
    """The outputs of a call, of which nothing but changed attributes remains.

    Args:
        source: the module.
        args: its positional inputs.
        kwargs: its keyword inputs.
        drawn: receives the names of generators other than torch's. The call raises `DrawsElsewhere` if it uses one.
        place: receives the line that draws first.
        keep_remade: let buffers stay that are `is_remade`.
        written: receives the tensors whose contents the call changed.
        reached: what `reachable` finds for the module, if that is known.
    """
    tables: list[dict[str, Any]] = [table for m in source.modules() for table in (m._parameters, m._buffers)]
    registered = [(table, dict(table)) for table in tables]
    reached = reachable(source) if reached is None else reached
    state = held_tensors(source, reached)
    with (
        ordinary_paths(),
        own_generators_unchanged(source, reached) as own,
        generators_unchanged(),
        tensors_unchanged(state) as changed_tensors,
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
    if written is not None:
        written.extend(changed_tensors)
    for now, before in registered:  # undoes the assignment of a buffer; a new buffer stays
        now.update({n: old for n, old in before.items() if not keep_remade or not is_remade(old, now.get(n))})
    if drawn:
        raise DrawsElsewhere
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
