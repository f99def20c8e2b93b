"""Earlier call: what a call computes after one with other inputs, in a module that was not called before.

A forward may keep what it needs once (a table of positions), what it has seen (a mean over the inputs so far, the
first batch) or what it has drawn. All are there after two calls with the same inputs and the same random numbers, and
give the same output. A first call with other ones tells them apart.

Promise: the source and what its code names stay as they are. The calls are made in a copy, which shares the source's
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ffebm_compiler.passes.assigned_state import is_remade
from ffebm_compiler.passes.named_values import NamedValues
from ffebm_compiler.passes.private_copy import private_copy
from ffebm_compiler.passes.process import reachable
from ffebm_compiler.passes.unchanged import Attributes, generators_unchanged
from ffebm_compiler.passes.undone_call import call_undone

__all__ = ["EarlierCall", "earlier_call"]


@dataclass(frozen=True)
class EarlierCall:
    """What two calls of a module have shown."""

    outputs: list[Any]
    """The outputs of the second call."""
    kept: tuple[str, ...]
    """Names of the attributes that the calls changed."""
    remade: tuple[str, ...]
    """Names of the buffers that the calls made again (`is_remade`)."""
    growing: tuple[tuple[str, Tensor, Tensor], ...]
    """(name, old tensor, new tensor) of the buffers among them that the second call made in yet another shape."""


def earlier_call(
    source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
) -> EarlierCall | None:
    """Call a copy with other inputs and random numbers, and then with these; None if the forward fails.

    A forward may not take the other inputs (sorted lengths, say). Then it is given inputs of which the truth values
    and the whole numbers that are all equal stay, and in the end both calls are made with these.

    Args:
        source: the module.
        args: its positional inputs.
        kwargs: its keyword inputs.
        tensors: what `held_tensors` finds for the module.
    """
    inputs = (args, kwargs)
    attempts = [pytree.tree_map(_other, inputs), inputs]
    if any(_is_uniform(leaf) for leaf in pytree.tree_leaves(inputs)):
        attempts.insert(0, pytree.tree_map(_another, inputs))
    for first_args, first_kwargs in attempts:
        copied = private_copy(source, shared=tensors)
        attributes = Attributes(copied)
        reached = reachable(copied)
        named = NamedValues(reached)
        start = _buffers(copied)
        try:
            with generators_unchanged():
                _seed_otherwise()  # numbers that the first call draws and keeps are state
                call_undone(copied, first_args, first_kwargs, keep_remade=True, reached=reached)
            between = _buffers(copied)
            outputs = call_undone(copied, args, kwargs, keep_remade=True, reached=reached)
            end = _buffers(copied)
            remade = tuple(name for name in start if is_remade(start[name], end[name]))
            growing = tuple(
                (name, between[name], end[name])
                for name in remade
                if isinstance(start[name], Tensor) and is_remade(between[name], end[name])
            )
            return EarlierCall(outputs, tuple(attributes.changed()), remade, growing)
        except Exception:  # these inputs are not the forward's, or it fails anyway
            continue
        finally:
            named.restore()
    return None


def _seed_otherwise() -> None:
    """Give torch's generators other states. Those of a GPU that is not in use yet stay as the user has seeded them."""
    seed = torch.initial_seed() ^ 1
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _buffers(module: nn.Module) -> dict[str, Any]:
    return {f"{path}.{name}".lstrip("."): b for path, m in module.named_modules() for name, b in m._buffers.items()}


def _has_values(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and not leaf.is_meta and leaf.layout is torch.strided and leaf.numel() > 0


def _is_uniform(leaf: Any) -> bool:
    """Whether `_other` leaves a tensor as it is. A GPU is not given numbers that may be no index: that would end it."""
    if not _has_values(leaf) or leaf.is_floating_point() or leaf.is_complex():
        return False
    return leaf.dtype == torch.bool or (leaf.device.type == "cpu" and bool((leaf == leaf.flatten()[0]).all()))


def _another(leaf: Any) -> Any:
    """What `_other` gives, and the opposite truth values, and the next number for numbers that are all equal."""
    if not _is_uniform(leaf):
        return _other(leaf)
    return ~leaf if leaf.dtype == torch.bool else leaf + 1


def _other(leaf: Any) -> Any:
    """Another value that a forward is likely to take. Numbers stay between the least and the greatest or near them."""
    if not _has_values(leaf):
        return leaf
    if leaf.is_floating_point() or leaf.is_complex():
        return (0.5 * leaf.detach() + 0.25).requires_grad_(leaf.requires_grad)
    if leaf.dtype == torch.bool:
        return leaf
    least, greatest = torch.aminmax(leaf.long())
    return (least + greatest - leaf.long()).to(leaf.dtype)
