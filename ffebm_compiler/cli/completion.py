"""What the shell offers after TAB: `ffebm --install-completion` switches it on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from ffebm_compiler.hardware.presets import hardware_presets

__all__ = ["hardware", "models", "words"]

_LIBRARIES = ("timm", "torchvision", "transformers")


def words(*known: str) -> Callable[[str], list[str]]:
    """Completes an option that takes one of these words."""
    return lambda incomplete: _starting(known, incomplete)


def hardware(incomplete: str) -> list[str]:
    """Completes the presets of hardware."""
    return _starting(sorted(hardware_presets()), incomplete)


def models(incomplete: str) -> list[str]:
    """Completes the names of models: the libraries, then those of timm or torchvision."""
    library, colon, name = incomplete.partition(":")
    if not colon:
        return _starting([f"{each}:" for each in _LIBRARIES], incomplete)
    try:
        package = importlib.import_module(library) if library in _LIBRARIES[:2] else None
    except Exception:  # a library that is missing or broken completes nothing
        return []
    if package is None:
        return []
    listed = package.list_models() if library == "timm" else package.models.list_models()
    return [f"{library}:{each}" for each in _starting(listed, name)]


def _starting(known: Sequence[str], incomplete: str) -> list[str]:
    return [each for each in known if each.startswith(incomplete)]
