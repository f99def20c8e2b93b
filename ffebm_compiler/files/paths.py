"""Paths: what a function takes as the name of a file or a folder."""

from __future__ import annotations

import os
from pathlib import Path

from ffebm_compiler.errors import InputError

__all__ = ["path_of"]


def path_of(given: object, expected: str, name: str = "path") -> Path:
    """The path that was given, as text or as an object that stands for a path.

    Args:
        given: the argument.
        expected: what it should name, such as "the file to write".
        name: the argument's name.

    Raises:
        InputError: it is something else.
    """
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not isinstance(text, str):
        raise InputError(f"{name} is {given!r}; expected the name of {expected}, as text or a Path")
    return Path(text)
