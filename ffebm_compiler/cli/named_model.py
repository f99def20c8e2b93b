"""A model that was named on the command line, and the inputs to use where none are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffebm_compiler.errors import InputError

__all__ = ["NamedModel", "built", "first_line"]


@dataclass(frozen=True)
class NamedModel:
    """A model, and descriptions of the inputs to use if the command line gives none."""

    module: nn.Module
    inputs: tuple[str, ...] = ()


def built(name: str, build: Any) -> nn.Module:
    """The module, or what the callable returns.

    Raises:
        InputError: it is no callable, it fails, or it returns no module.
    """
    if isinstance(build, nn.Module):
        return build
    if not callable(build):
        raise InputError(
            f"{name} is of type {type(build).__name__}; expected a callable that returns a torch.nn.Module"
        )
    try:
        model = build()
    except ImportError as error:  # such as transformers' models beside a torchvision that was built for another torch
        raise InputError(
            f"{name} needs a package that cannot be imported ({first_line(error)}): `ffebm doctor` shows which are "
            f"missing, and which broken because they were built for another torch than {torch.__version__}"
        ) from error
    except Exception as error:  # it runs the user's code
        raise InputError(f"{name} failed when it was called without arguments ({first_line(error)})") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned an object of type {type(model).__name__}; expected a torch.nn.Module")
    return model


def first_line(error: BaseException) -> str:
    """The first line of an error's first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
