"""Without cache: a transformers model returns its key-value cache only where the caller asks for it.

`config.use_cache` is on by default, for generation, so that each call returns the keys and values of
every layer. A hybrid is called on whole inputs, and the default of the private copy is off. If
`use_cache` or `past_key_values` is among the example inputs, the hybrid returns what the source returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["without_cache"]

_ASKS = ("use_cache", "past_key_values")


def without_cache(source: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Turn `use_cache` off in the configurations of a private copy; returns a note for the plan, or an empty text."""
    names = list(inspect.signature(source.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if any(given.get(name) is not None for name in _ASKS):
        return ""
    changed = False
    for module in source.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
            changed = True
    if not changed:
        return ""
    return "the model is captured without its key-value cache: pass use_cache=True among the example inputs to have it"
