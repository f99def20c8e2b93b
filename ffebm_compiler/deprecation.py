"""What is deprecated: it still works, warns, and says what to use instead. docs/stability.md has the rules."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ffebm_compiler.errors import FFEBMDeprecationWarning

__all__ = ["Deprecated", "deprecated_attribute"]


@dataclass(frozen=True)
class Deprecated:
    """A public name on its way out."""

    value: Any
    """What the name still is."""
    since: str
    """The first version that warns."""
    until: str
    """The version that will no longer have it."""
    instead: str
    """A sentence: what to use from now on."""


def deprecated_attribute(module: str, name: str, names: Mapping[str, Deprecated]) -> Any:
    """The `__getattr__` of a module with deprecated names: warn, and return what the name still is.

    Raises:
        AttributeError: the name is none of them.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    found = names[name]
    warnings.warn(
        f"{module}.{name} is deprecated since version {found.since} and will be gone in {found.until}: {found.instead}",
        FFEBMDeprecationWarning,
        stacklevel=3,
    )
    return found.value
