"""Keyword order: find out whether a forward reads the order of the keywords that fall into its `**kwargs`.

`torch.cat(list(features.values()), 1)` does, and a forward that hands them on, `self.model(**batch)`, does not. A call
with the keywords in another order than at capture is the captured one in the second case alone.

Promise: where the answer is no, the source gives the same values for the reverse order. The source is as before.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ffebm_compiler.passes.check_model import has_no_memory
from ffebm_compiler.passes.containers import leaves_of
from ffebm_compiler.passes.held import held_tensors
from ffebm_compiler.passes.unchanged import attributes_unchanged, generators_unchanged, tensors_unchanged

__all__ = ["gathered_keywords", "reads_keyword_order"]


def gathered_keywords(signature: inspect.Signature, kwargs: dict[str, Any]) -> list[str]:
    """Those of the keywords of a call that fall into `**kwargs`, in their order."""
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {name for name, parameter in signature.parameters.items() if parameter.kind in named}
    return [name for name in kwargs if name not in known]


def reads_keyword_order(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a forward gives other values if the keywords in its `**kwargs` come in reverse order."""
    try:
        gathered = gathered_keywords(inspect.signature(source.forward), kwargs)
    except (TypeError, ValueError):  # it has no signature, so that nothing puts its arguments in order
        return True
    if len(gathered) < 2:
        return False
    if has_no_memory(source):
        return True
    generator = torch.Generator().manual_seed(0)
    given = {name: _drawn(value, generator) for name, value in kwargs.items()}
    try:
        one, other = (_values(source, args, dict(items)) for items in (given.items(), reversed(given.items())))
    except Exception:  # it does not take other values or another order
        return True
    return len(one) != len(other) or not all(_same(*pair) for pair in zip(one, other, strict=True))


def _drawn(value: Any, generator: torch.Generator) -> Any:
    """A tensor of other values, since examples of a saved hybrid are zeros, which have no order."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator, device="cpu").to(value)


def _values(source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    with (
        torch.no_grad(),
        generators_unchanged(),
        tensors_unchanged(held_tensors(source)),
        attributes_unchanged(source),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        args, kwargs = copy.deepcopy((args, kwargs))
        return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves_of(source(*args, **kwargs))]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)
    return type(one) is type(other) and bool(one == other)
