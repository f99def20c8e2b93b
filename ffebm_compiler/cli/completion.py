"""What the shell offers after TAB: `ffebm --install-completion` switches it on."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, MutableMapping, Sequence
from itertools import pairwise
from typing import Any

from ffebm_compiler.hardware.presets import hardware_presets

__all__ = ["hardware", "models", "whole_words", "words"]

_LISTS: dict[str, Callable[[Any], Sequence[str]]] = {
    "timm": lambda timm: timm.list_models(),
    "torchvision": lambda torchvision: torchvision.models.list_models(),
    "transformers": lambda transformers: list(transformers.CONFIG_MAPPING),
}
"""How each library lists the names of its models."""
_BASH = "_FFEBM_BASH_BEFORE"
"""Names the variable with what stands before the last colon of the word to complete, which bash keeps itself."""


def whole_words(environment: MutableMapping[str, str]) -> None:
    """Join what bash divides: `timm:res` arrives from it as three words, `--hardware=cross` too.

    Of the word to complete, bash replaces what stands behind the colon alone, so that typer gets this part.
    `models` finds the rest in the environment.
    """
    if environment.get("_FFEBM_COMPLETE") != "complete_bash":
        return
    current = int(environment.get("COMP_CWORD", "0"))
    given = environment.get("COMP_WORDS", "").split("\n")[: current + 1]
    whole: list[str] = []
    for before, word in pairwise(["", *given]):
        if word == "=" and whole and whole[-1].startswith("-"):
            whole.append("")  # the value of an option
        elif whole and not {":", "="}.isdisjoint((before, word)):
            whole[-1] += word
        else:
            whole.append(word)
    if ":" in given[-2:]:
        library, _, whole[-1] = whole[-1].rpartition(":")
        environment[_BASH] = f"{library}:"
    environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join(whole), str(len(whole) - 1)


def words(*known: str) -> Callable[[str], list[str]]:
    """Completes an option that takes one of these words."""
    return lambda incomplete: _starting(known, incomplete)


def hardware(incomplete: str) -> list[str]:
    """Completes the presets of hardware."""
    return _starting(sorted(hardware_presets()), incomplete)


def models(incomplete: str) -> list[str]:
    """Completes the names of models: the libraries, then those of one of them."""
    before = os.environ.get(_BASH, "")
    library, colon, name = f"{before}{incomplete}".partition(":")
    if not colon:
        libraries = _starting([f"{each}:" for each in _LISTS], incomplete)
        # A shell ends the word behind the only offer, and the word goes on behind the colon.
        return libraries if len(libraries) != 1 else models(libraries[0]) or libraries
    if library not in _LISTS:
        return []
    try:
        listed = _LISTS[library](importlib.import_module(library))
    except Exception:  # a library that is missing or broken completes nothing
        return []
    return [f"{library}:{each}".removeprefix(before) for each in _starting(listed, name)]


def _starting(known: Sequence[str], incomplete: str) -> list[str]:
    return [each for each in known if each.startswith(incomplete)]
