"""A model that was named on the command line, and the inputs to use where none are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ffebm_compiler.errors import InputError
from ffebm_compiler.files.checked_json import short

__all__ = ["NamedModel", "built", "evaluating", "first_line", "left_the_program"]


@dataclass(frozen=True)
class NamedModel:
    """A model, and the inputs to use if the command line gives none: their descriptions, or the inputs themselves."""

    module: nn.Module
    inputs: tuple[str, ...] = ()
    example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """Inputs that come with the model, which are used as they are: (args, kwargs)."""


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
    except SystemExit as error:
        raise InputError(left_the_program(name, "when it was called", error)) from error
    except ImportError as error:  # such as transformers' models beside a torchvision that was built for another torch
        raise InputError(
            f"{name} needs a package that cannot be imported ({first_line(error)}): `ffebm doctor` shows which are "
            f"missing, and which broken because they were built for another torch than {torch.__version__}"
        ) from error
    except Exception as error:  # it runs the user's code
        how = "when its model was built" if name.endswith(")") else "when it was called without arguments"
        raise InputError(f"{name} failed {how} ({first_line(error)})") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} returned an object of type {type(model).__name__}; expected a torch.nn.Module")
    return model


def evaluating(name: str, model: NamedModel) -> NamedModel:
    """The model in eval mode.

    Raises:
        InputError: the model's own code for it fails.
    """
    try:
        model.module.eval()
    except (Exception, SystemExit) as error:  # it runs the user's code
        raise InputError(f"{name} failed in eval(), in which models are converted ({first_line(error)})") from error
    return model


def left_the_program(name: str, when: str, error: SystemExit) -> str:
    """The text of an error: user's code called `sys.exit`, as `parse_args` of argparse does."""
    given = "" if error.code is None else f" with {short(error.code)}"
    return (
        f"{name} left the program {when} (sys.exit{given}): put what reads the command line or leaves the program "
        'under if __name__ == "__main__":, so that the model can be built without it'
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
