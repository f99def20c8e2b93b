"""Set-up: call the private copy before it is traced, and find out whether it keeps state between calls.

The first call of a forward may make buffers, tables and caches, which would hold the tracer's
tensors if that call were traced. So eager calls come first. A kept value that was computed from parameters (a table)
is forgotten again, so that the trace computes it.

The hybrid does not have state between calls that no parameter or buffer holds. If the
output depends on such state, the model is refused. If every call sets an attribute without an effect, a note says so.
Two calls with the same inputs do not show all of it. So another copy is called with other inputs first
(`earlier_call`). It also shows the buffers that the forward makes again in another shape. Numbers that every call
changes are tried as they would be many calls later (`counters`).

Promise: the module is unchanged, except for what its first call sets up once and for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from ffebm_compiler.errors import CaptureError, FFEBMError, UnsupportedError
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.counters import CALLS, advance
from ffebm_compiler.passes.earlier_call import EarlierCall, earlier_call
from ffebm_compiler.passes.held import held_tensors
from ffebm_compiler.passes.named_values import NamedValues
from ffebm_compiler.passes.process import reachable
from ffebm_compiler.passes.repeated_calls import differ, differing_module
from ffebm_compiler.passes.unchanged import Attributes
from ffebm_compiler.passes.undone_call import DrawsElsewhere, call_undone

__all__ = ["SetUp", "same_in_evaluation", "set_up"]


@dataclass(frozen=True)
class SetUp:
    """What the calls of a module have shown."""

    note: str = ""
    """A note for the plan about attributes and buffers that calls set, or an empty text."""
    remade: frozenset[str] = frozenset()
    """Buffers in whose place a call puts a tensor of another shape, dtype or device: a table for the present sizes.
    Later calls compute the same with it as without it."""
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
        UnsupportedError: an earlier call changes the output of a later one, for example through an attribute, or the
            first call alone writes parameters or buffers.
        CaptureError: forward draws from the generators of Python or numpy, or a buffer's shape changes in every call.
    """
    reached = reachable(source)
    earlier = earlier_call(source, args, kwargs, held_tensors(source, reached))
    before, named = Attributes(source), NamedValues(reached)

    def undo() -> None:
        before.restore()
        named.restore()

    drawn: set[str] = set()
    written: tuple[list[Tensor], list[Tensor]] = ([], [])
    try:
        first = call_undone(source, args, kwargs, drawn, written=written[0], reached=reached)
        before.forget(_of_parameters)
        reached = reachable(source) if before.changed() else reached
        again, named_again = Attributes(source), NamedValues(reached)
        second = call_undone(source, args, kwargs, drawn, written=written[1], reached=reached)
        again.forget(_of_parameters)
        kept = [name for name in again.changed() if not _is_parametrised(source, name)]
        other = differ(first, second)
        if other and not kept:  # the calls may differ because the first one set something up
            other = differ(second, call_undone(source, args, kwargs, drawn, reached=reached))
        where = differing_module(source, lambda: call_undone(source, args, kwargs, drawn)) if other and not kept else ""
        left = evaluation is not None and not same_in_evaluation(source, args, kwargs, evaluation)
    except DrawsElsewhere:
        place: list[str] = []
        with suppress(Exception):
            call_undone(source, args, kwargs, None, place)
        undo()
        raise CaptureError(
            f"forward draws random numbers from {' and '.join(sorted(drawn))}{''.join(place)}, which a captured graph "
            "would repeat for ever: draw them with torch (torch.rand(())), or outside of forward and hand them in as "
            "an input"
        ) from None
    except Exception:
        undo()
        return SetUp()
    counting = None if other else advance(again, named_again)
    later = None
    if counting is not None:
        with suppress(Exception):  # a list that ends, say
            later = call_undone(source, args, kwargs, reached=reached)
        named_again.restore()
    again.restore()
    try:
        if other or left:
            raise _depends("output" if other else "output in eval mode", _LEFT + _place(kept, where))
        if later is not None and differ(second, later):
            number = f"a number that every call changes{_place(counting or (), '')} ({CALLS} calls later it differs)"
            raise _depends("output", number)
        _refuse_first_writes(source, *written)
        if earlier is not None:
            _refuse_what_it_has_seen(source, earlier, second)
    except FFEBMError:
        undo()
        raise
    remade = earlier.remade if earlier is not None else ()
    notes = []
    if kept:
        notes.append(f"forward sets attributes ({_listed(kept)}) at every call")
    if remade:
        notes.append(f"forward puts tensors of another shape or dtype in the place of buffers ({_listed(remade)})")
    note = f"{' and '.join(notes)}, which the hybrid does not: its output is the same" if notes else ""
    return SetUp(note, frozenset(remade), tuple(second))


def _place(attributes: Sequence[str], module: str) -> str:
    """Where state is kept that is no parameter and no buffer."""
    if attributes:
        return f" in the attribute {_listed(attributes)}"
    inside = f" in module {module!r}" if module else ""
    return f"{inside} outside of parameters and buffers (an object, a global variable, a closure, a tensor)"


_LEFT = "what an earlier call left"


def _depends(what: str, state: str) -> UnsupportedError:
    return UnsupportedError(
        f"the model's {what} depends on {state}: keep it in a buffer (register_buffer) of its final shape that forward "
        "writes in place, or hand it in as an input"
    )


def _refuse_first_writes(source: nn.Module, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Refuse tensors that the first call alone has written, as flows initialise their scales by the first batch."""
    later = {id(tensor) for tensor in second}
    once = {id(tensor) for tensor in first if id(tensor) not in later}
    names = [name for name, tensor in (*source.named_parameters(), *source.named_buffers()) if id(tensor) in once]
    if names:
        raise UnsupportedError(
            f"the model's first call writes {_listed(names)}, and later calls do not, so that its output depends on "
            "what the first call was given: call the model once before it is converted, in train mode if it does so "
            "there"
        )


def _refuse_what_it_has_seen(source: nn.Module, earlier: EarlierCall, outputs: Sequence[Any]) -> None:
    """Refuse a module that has other `outputs` after a call with other inputs, or buffers that grow in every call."""
    if differ(earlier.outputs, outputs):
        attributes = [name for name in earlier.kept if not _is_parametrised(source, name)]
        buffers = f" in the buffer {_listed(earlier.remade)}, of which it changed the shape or dtype"
        raise _depends("output", _LEFT + (buffers if earlier.remade else _place(attributes, "")))
    for name, old, new in earlier.growing:
        raise CaptureError(
            f"the forward assigns {new.dtype} of shape {tuple(new.shape)} to {name!r}, which is {old.dtype} of shape "
            f"{tuple(old.shape)}, and another one in the next call; a graph keeps the shapes of the state, so assign a "
            "tensor of one shape and dtype"
        )


def same_in_evaluation(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], evaluation: SetUp) -> bool:
    """Whether a module in train mode still has the outputs in eval mode that it had before."""
    if evaluation.outputs is None:
        return True
    source.eval()
    try:
        return not differ(evaluation.outputs, call_undone(source, args, kwargs, None))
    finally:
        source.train()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (", ..." if len(names) > 4 else "")


def _of_parameters(value: Any) -> bool:
    """Whether a value holds a tensor that was computed from parameters."""
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in pytree.tree_leaves(value))


def _is_parametrised(source: nn.Module, name: str) -> bool:
    """Whether a parametrisation by hooks computes an attribute from parameters at every call (`weight_norm`)."""
    path, _, leaf = name.rpartition(".")
    parameters = module_at(source, path)._parameters
    return any(f"{leaf}_{kind}" in parameters for kind in ("orig", "v"))
